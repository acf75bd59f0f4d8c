"""Reference log-probs on disk: files that are only appended to, and of which no damaged line is ever used.

A file `reference-<16 hex of the key>.<process>.jsonl` begins with a header: format version and the parts of the key.
Every line after it is a pair's log-probs with a checksum, or the header of a later run that appends to the file. Any
number of processes may read what others write, and write at the same time.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.training.checkpoints.durable import writing
from fastpref.training.reference.key import ReferenceKey

FORMAT = 1
CHOSEN, REJECTED = "ref_chosen_logps", "ref_rejected_logps"  # as in a dataset's columns

Logps = tuple[float, float]  # of the chosen and of the rejected response


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


def cache_file(folder: Path, key: ReferenceKey, process: int) -> Path:
    return folder / f"reference-{key.digest[:16]}.{process}.jsonl"


def read_cache(folder: Path, key: ReferenceKey, wanted: Iterable[str], *, say: Callable[[str], None]) -> Found:
    """The log-probs of the wanted pairs that the folder has under this key, and what in it is damaged.

    A file whose first line is damaged is renamed, and a line says so.
    """
    found, pairs = Found(), set(wanted)
    for path in filter(Path.is_file, sorted(folder.glob("reference-*.jsonl"))):
        header = _read_header(path)
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
            self._write(lines)

    def _write(self, lines: list[str]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not (self._started and self._path.exists()):  # another run may have set it aside
            header = _sealed({"format": FORMAT, "key": self._key.digest, **asdict(self._key)})
            # What is there may end in half a line; what follows must not become part of it.
            lines = [json.dumps(header), *lines] if _ends_a_line(self._path) else ["", json.dumps(header), *lines]
            self._started = True
        # In one call: where several processes append to a file, their lines stay whole.
        with self._path.open("ab") as file:
            file.write("".join(line + "\n" for line in lines).encode())


def differences(found: Found, key: ReferenceKey) -> list[str]:
    """In words, why pairs that were asked for are not there, if the headers tell."""
    headers = found.same_key or found.other_keys
    nearest = min((key.differences(header) for header in headers), key=len, default=[])
    if not nearest and found.others and not found.logps:
        return ["other data"]
    return nearest


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


def _read_header(path: Path) -> dict[str, Any] | None:
    """The file's first line, if it is a header of this format."""
    first = next(_lines(path), b"")
    return _header(_decode(first)) if first.endswith(b"\n") else None


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
