"""What reference log-probs depend on: the digests of model, tokenizer and pair under which they are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref.training.data.tokens import Pair

CHUNK = 1 << 26  # bytes of a weight that are on the CPU at a time
BAR_FROM = 1 << 31  # bytes of weights that take a second or more to hash
VALUE_PARTS = ("weights", "precision", "logps", "reduction")

# Entries of a model's config that leave its log-probs as they are: how it was saved, loaded, trained or sampled from.
_WITHOUT_EFFECT = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "attn_implementation")

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

    Adapters (PEFT) do not count: with any, the model has the digest of its base.

    Args:
        model: not wrapped.
        weights: its weights and buffers by name, whole ones where the model is sharded.
        bar: shows how far it is, where that takes seconds.
    """
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    digests: dict[str, str] = {}
    with (
        bar("hash of the reference's weights (MiB)", size >> 20) if bar and size >= BAR_FROM else nullcontext() as shown
    ):
        done = 0
        for name, tensor in base_weights(model, weights):
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            for chunk in _chunks(tensor):
                digest.update(chunk.numpy().data)
                before, done = done, done + chunk.numel()
                if shown is not None:
                    shown.advance((done >> 20) - (before >> 20))
            digests[name] = digest.hexdigest()
    return _sha256({"config": base_config(model), "weights": digests})


def _chunks(tensor: Tensor) -> Iterator[Tensor]:  # each (n,) uint8 on the CPU
    """The bytes of a tensor, a part at a time; nothing of one on the CPU is copied."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), CHUNK):
        yield flat[begin : begin + CHUNK].cpu()


def base_weights(model: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names that they have without adapters, whose own are left out."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix: list[str] = []
    inner: dict[str, str] = {}
    # PEFT's layers hold the original as `base_layer`, its wrappers of modules trained as a whole as `original_module`.
    for name, module in model.named_modules():
        if module is base:
            prefix = name.split(".") if name else []
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            inner[name] = "base_layer"
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            inner[name] = "original_module"
    for name, tensor in weights:
        parts = name.split(".")
        within = [inner.get(".".join(parts[:place])) for place in range(len(parts))]
        if parts[: len(prefix)] == prefix and all(
            wanted in (None, part) for wanted, part in zip(within, parts, strict=True)
        ):
            kept = [part for wanted, part in zip(within, parts, strict=True) if wanted is None]
            yield ".".join(kept[len(prefix) :]), tensor


def base_config(model: Any) -> dict[str, Any]:
    """The entries of the model's config that bear on its log-probs (rotary scaling, softcaps, ...)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _with_effect(base.config.to_diff_dict())


def _with_effect(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        str(name): _with_effect(entry)
        for name, entry in value.items()
        if not (str(name).startswith("_") or name in _WITHOUT_EFFECT or str(name).endswith("_token_id"))
    }


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
