"""The rows of a run as a JSON file, with machine, versions, date and commit; reading one imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.environment import record
from fastpref.folders import check_file

SCHEMA = 2
MARK = '"schema": '  # stands at the beginning of every results file
PACKAGES = (
    "fastpref",
    "torch",
    "triton",
    "numpy",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
)

Row = dict[str, Any]
File = dict[str, Any]


def environment(device: str, device_class: str, copy_gb_per_s: float) -> File:
    """The head of a file; `complete` becomes true when the run ends by itself."""
    found = record(PACKAGES, folder=Path(__file__).parent)
    on_gpu = device.startswith("cuda")
    return {
        "schema": SCHEMA,
        **found,
        "device": found["gpus"][0] if on_gpu else found["cpu"],
        "device_class": device_class,
        "copy_gb_per_s": copy_gb_per_s,
        "complete": False,
    }


def check_json(path: Path | None) -> None:
    """Raise FolderError where `--json` cannot be written, or names a file of others."""
    if path is not None:
        check_file(path, mark=MARK, option="--json")


class Store:
    """The rows of a run, kept in `path`, if one is given, one by one: what interrupts a run costs the row under way."""

    def __init__(self, path: Path | None, head: File) -> None:
        if path is not None and path.exists():
            check_json(path)
        self.path, self.head = path, head
        self.rows: list[Row] = []
        self.skipped: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save()

    def skip(self, suite: str, case: str, mode: str, provider: str, reason: str) -> None:
        self.skipped.append({"suite": suite, "case": case, "mode": mode, "provider": provider, "reason": reason})
        self.save()

    def save(self, *, complete: bool = False) -> None:
        if self.path is not None:
            write(self.path, {**self.head, "complete": complete}, self.rows, self.skipped)


def write(path: Path, head: File, rows: Sequence[Row], skipped: Sequence[Row] = ()) -> None:
    """A row a line. The file is replaced as a whole, so that a run that is killed leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opening = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    body, left_out = (",\n".join(json.dumps(row, allow_nan=False) for row in part) for part in (rows, skipped))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(
            f'{opening},\n "rows": [\n{body}\n],\n "skipped": [\n{left_out}\n]\n}}\n', encoding="utf-8"
        )
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> File:
    """A results file; ValueError where it is none or of another schema."""
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no results file: {error}") from error
    if not isinstance(file, dict) or "schema" not in file:
        raise ValueError(f"{path} is no results file: it names no schema; fastpref bench writes such files")
    if file["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {file['schema']!r}, this version of fastpref reads schema {SCHEMA}: measure again with "
            "fastpref bench, or read it with the version that wrote it"
        )
    missing = [name for name in ("device", "device_class", "date", "versions", "rows", "skipped") if name not in file]
    if missing:
        raise ValueError(f"{path} is no whole results file: it lacks {', '.join(missing)}")
    return file
