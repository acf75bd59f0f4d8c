"""Reference log-probs on disk, under what they depend on: no stale value and no damaged line is ever used.

A file `reference-<16 hex of the key>.<process>.jsonl` begins with a header: format version and the parts of the key.
Every line after it is a pair's log-probs with a checksum, or the header of a later run that appends to the file. Any
number of processes may read what others write, and write at the same time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.training.adapters import active_adapters, plain_names
from fastpref.training.checkpoints.durable import writing
from fastpref.training.data.tokens import Pair

FORMAT = 1
CHOSEN, REJECTED = "ref_chosen_logps", "ref_rejected_logps"  # as in a dataset's columns
VALUE_PARTS = ("weights", "precision", "logps", "reduction")
CHUNK = 1 << 26  # bytes of a weight that are on the CPU at a time
BAR_FROM = 1 << 31  # bytes of weights that take a second or more to hash
# Entries of a config that leave log-probs as they are: how a model or adapter was saved, loaded, trained, sampled from.
_WITHOUT_EFFECT = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "attn_implementation",
    "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
)  # fmt: skip
_NOR_HAVE = re.compile(r"^_|_token_id$|drop")

Logps = tuple[float, float]  # of the chosen and of the rejected response
OpenBar = Callable[[str, int], AbstractContextManager[Any]]  # Console.bar


@dataclass(frozen=True)
class ReferenceKey:
    """Under what a run's reference log-probs are kept.

    `digest` covers what changes the log-probs of the same token ids. Tokenizer, chat template and truncation act
    through the ids, which each pair is found by: that is stricter than their names, and lets a pair be used again that
    they leave as it is. They are here to explain why a pair is not found.
    """

    weights: str  # model_digest of the reference
    precision: str
    logps: str
    reduction: str
    tokenizer: str  # tokenizer_digest
    template: str  # SHA-256 of the chat template
    max_length: int

    @property
    def digest(self) -> str:
        return _sha256({name: getattr(self, name) for name in VALUE_PARTS})

    def differences(self, parts: dict[str, Any]) -> list[str]:
        """What is different in another key's parts, in words."""
        words = {
            "weights": "other weights or another model config",
            "tokenizer": "another tokenizer",
            "template": "another chat template",
        }
        return [
            words.get(name) or f"{name}={parts.get(name)} (not {value})"
            for name, value in asdict(self).items()
            if parts.get(name) != value
        ]


def text_digest(text: str | dict[str, str] | None) -> str:
    """SHA-256 of a text, or of a tokenizer's several templates by their names."""
    return hashlib.sha256(str(text or "").encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary and the special tokens."""
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _sha256({"vocabulary": tokenizer.get_vocab(), "special": special})


def pair_digest(pair: Pair) -> str:
    """A hash of all that a pair's log-probs depend on besides the model: token ids and where the responses begin."""
    digest = hashlib.blake2b(digest_size=16)
    for ids, start in (pair.chosen, pair.rejected):
        digest.update(f"{len(ids)} {start} ".encode())
        digest.update(ids.tobytes())
    return digest.hexdigest()


def model_digest(model: Any, weights: Iterable[tuple[str, Tensor]], *, bar: OpenBar | None = None) -> str:
    """SHA-256 of the model's weights and buffers, each by name, dtype, shape and bytes, and of its config.

    Active adapters (PEFT) count with their weights and configs, unless they change nothing: with LoRA that is fresh
    (one factor is zero) a model has the digest of its base.

    Args:
        model: not wrapped.
        weights: its weights and buffers by name, whole ones where the model is sharded.
        bar: shows how far it is, where that takes seconds.
    """
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    active, plain = active_adapters(model), plain_names(model)
    digests: dict[str, str] = {}
    adapters: dict[str, str] = {}
    fresh: set[str] = set()
    with (
        bar("hash of the reference's weights (MiB)", size >> 20) if bar and size >= BAR_FROM else nullcontext() as shown
    ):
        done = 0
        for name, tensor in weights:
            base = plain(name)
            if base is None and not set(active) & set(name.split(".")):
                continue
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            for chunk in _chunks(tensor):
                digest.update(chunk.numpy().data)
                before, done = done, done + chunk.numel()
                if shown is not None:
                    shown.advance((done >> 20) - (before >> 20))
            if base is not None:
                digests[base] = digest.hexdigest()
                continue
            adapters[name] = digest.hexdigest()
            if "lora_" in name and not tensor.any():
                fresh.add(_both_factors(name))
    trained = {name: digest for name, digest in adapters.items() if _both_factors(name) not in fresh}
    parts: dict[str, Any] = {"config": _config(model), "weights": digests}
    if trained:
        configs = {name: model.peft_config[name].to_dict() for name in active}
        # What is adapted stands in the weights' names; in the config it is a set, in any order.
        parts |= {"adapters": trained, "adapter_configs": _with_effect(configs)}
    return _sha256(parts)


def _both_factors(name: str) -> str:
    """One name for the two factors of a LoRA layer."""
    return re.sub(r"\blora_(embedding_)?[AB]\b", "lora", name)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:  # each (n,) uint8 on the CPU
    """The bytes of a tensor, a part at a time; nothing of one on the CPU is copied."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's: several tensors that stand for one
        for name in tensor.__tensor_flatten__()[0]:
            yield from _chunks(getattr(tensor, name))
        return
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), CHUNK):
        yield flat[begin : begin + CHUNK].cpu()


def _config(model: Any) -> dict[str, Any]:
    """The entries of the model's config that bear on its log-probs (rotary scaling, softcaps, ...)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _with_effect(base.config.to_diff_dict())


def _with_effect(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        str(name): _with_effect(entry)
        for name, entry in value.items()
        if not (name in _WITHOUT_EFFECT or _NOR_HAVE.search(str(name)) or isinstance(entry, set))
    }


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Record(NamedTuple):
    """One line: the log-probs of the pair with this digest, first seen in this row of its dataset."""

    pair: str
    row: int
    logps: Logps


@dataclass
class Found:
    """What a folder holds: the log-probs under a key, and the headers of the runs that wrote there."""

    logps: dict[str, Logps] = field(default_factory=dict)
    others: int = 0  # pairs under the key that were not asked for
    same_key: list[dict[str, Any]] = field(default_factory=list)
    other_keys: list[dict[str, Any]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)  # a line for the user on each file with damaged lines

    def differences(self, key: ReferenceKey) -> list[str]:
        """In words, why pairs that were asked for are not there, if the headers tell."""
        nearest = min((key.differences(header) for header in self.same_key or self.other_keys), key=len, default=[])
        return ["other data"] if not nearest and self.others and not self.logps else nearest


def cache_file(folder: Path, key: ReferenceKey, process: int) -> Path:
    return folder / f"reference-{key.digest[:16]}.{process}.jsonl"


def read_cache(folder: Path, key: ReferenceKey, wanted: Iterable[str], *, say: Callable[[str], None]) -> Found:
    """The log-probs of the wanted pairs that the folder has under this key, and what in it is damaged.

    A file whose first line is damaged is renamed, and a line says so.
    """
    found, pairs = Found(), set(wanted)
    for path in filter(Path.is_file, sorted(folder.glob("reference-*.jsonl"))):
        first = next(_lines(path), b"")
        header = _header(_decode(first)) if first.endswith(b"\n") else None
        if header is not None and header["key"] == key.digest:
            _read_lines(path, key, pairs, found)
        elif header is not None:
            found.other_keys.append(header)
        elif path.name.startswith(f"reference-{key.digest[:16]}.") and path.stat().st_size:  # empty: only just made
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)
            say(f"reference log-probs: the first line of {path} is damaged; the file is not used, and now {aside.name}")
    return found


class CacheWriter:
    """Appends to this process's file of a key; what `append` has returned from survives the end of the process."""

    def __init__(self, folder: Path, key: ReferenceKey, *, process: int) -> None:
        self._path, self._key, self._started = cache_file(folder, key, process), key, False

    def append(self, records: Iterable[Record]) -> None:
        """Write the records, but for those that are not finite: these are never kept."""
        lines = [_line(self._key, record) for record in records if all(map(math.isfinite, record.logps))]
        if not lines:
            return
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not (self._started and self._path.exists()):  # another run may have set it aside
                header = json.dumps(_sealed({"format": FORMAT, "key": self._key.digest, **asdict(self._key)}))
                # What is there may end in half a line; what follows must not become part of it.
                lines = [header, *lines] if _ends_a_line(self._path) else ["", header, *lines]
                self._started = True
            # In one call: where several processes append to a file, their lines stay whole.
            with self._path.open("ab") as file:
                file.write("".join(line + "\n" for line in lines).encode())


def _line(key: ReferenceKey, record: Record) -> str:
    values = {"pair": record.pair, "row": record.row, CHOSEN: record.logps[0], REJECTED: record.logps[1]}
    return json.dumps({**values, "crc": _checksum(key, record)})


def _checksum(key: ReferenceKey, record: Record) -> str:
    """Covers the key too, so that a line under another key's header is not taken for one of its own."""
    return _crc(json.dumps([key.digest, *record]))


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _sealed(header: dict[str, Any]) -> dict[str, Any]:
    return {**header, "crc": _crc(json.dumps(header, sort_keys=True))}


def _header(value: Any) -> dict[str, Any] | None:
    if not (isinstance(value, dict) and value.get("format") == FORMAT and isinstance(value.get("key"), str)):
        return None
    return value if value == _sealed({name: part for name, part in value.items() if name != "crc"}) else None


def _decode(line: bytes) -> Any:
    """What a line holds, None where that is not JSON."""
    try:
        return json.loads(line.decode("utf-8"))
    except ValueError:
        return None


def _read_lines(path: Path, key: ReferenceKey, wanted: set[str], found: Found) -> None:
    damaged: Counter[str] = Counter()
    for line in _lines(path):
        value = _decode(line)
        header = _header(value)
        if header is not None:
            found.same_key.append(header)
        elif line.strip():
            record = _record(value, key)
            if isinstance(record, str):
                damaged[record if line.endswith(b"\n") else "cut short"] += 1
            elif record.pair in wanted:
                found.logps.setdefault(record.pair, record.logps)
            else:
                found.others += 1
    if damaged:
        count = sum(damaged.values())
        why = ", ".join(f"{number} {reason}" for reason, number in sorted(damaged.items()))
        lines = "line" if count == 1 else "lines"
        found.damage.append(f"reference log-probs: {count} damaged {lines} of {path} not used ({why})")


def _record(value: Any, key: ReferenceKey) -> Record | str:
    """The record that a line holds, or what is wrong with it."""
    if not isinstance(value, dict):
        return "not JSON"
    logps: Any = (value.get(CHOSEN), value.get(REJECTED))
    record = Record(value.get("pair", ""), value.get("row", -1), logps)
    if value.get("crc") != _checksum(key, record):
        return "with a wrong checksum"
    finite = all(isinstance(logp, float) and math.isfinite(logp) for logp in logps)
    return record if finite else "not a finite number"


def _ends_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
