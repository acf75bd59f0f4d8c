"""Where rows come from: JSONL files, `datasets` folders and hub names, or objects given in Python.

JSONL and lists need nothing installed; `datasets` is imported for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpref.checks import describe

Rows = Sequence[Any]  # of dicts; checked row by row where they are rendered


def load_rows(source: str, name: str) -> Rows:
    """The rows of a JSONL file, of a `datasets.save_to_disk` folder, or of a hub dataset's train split."""
    path = Path(source)
    if path.is_file():
        return read_jsonl(path)
    if not path.exists() and (path.suffix in (".jsonl", ".json") or path.is_absolute() or source.startswith(".")):
        raise FileNotFoundError(f"{name}: there is no file {source!r}")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name}={source!r} is not a JSONL file, and reading anything else needs the package `datasets`: "
            'pip install "fastpref[train]"'
        ) from error
    loaded = datasets.load_from_disk(source) if path.is_dir() else datasets.load_dataset(source)
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise ValueError(f"{name}={source!r} has the splits {', '.join(loaded)}; a 'train' split is needed")
        loaded = loaded["train"]
    return loaded


def read_jsonl(path: Path) -> list[Any]:
    """One JSON object a line; empty lines are passed over, a malformed one is named by its number."""
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text: {error.reason}") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a JSON object is needed, got {describe(row)}")
            rows.append(row)
    return rows


def check_rows(rows: Any, name: str) -> Rows:
    """An object given as a dataset: a list of dicts, `datasets.Dataset`, pandas DataFrame, or what is indexed likewise.

    Raises:
        TypeError: it has no length, or no rows by number.
        ValueError: it is empty.
    """
    if type(rows).__name__ == "DataFrame" and type(rows).__module__.startswith("pandas"):
        from datasets import Dataset

        rows = Dataset.from_pandas(rows, preserve_index=False)
    wanted = f"{name} must be a list of dicts, a datasets.Dataset or a pandas DataFrame, got"
    if isinstance(rows, Mapping):
        kind, keys = type(rows).__name__, ", ".join(map(str, rows))
        if kind == "DatasetDict":
            raise TypeError(f"{wanted} a DatasetDict with the splits {keys}: give one of them")
        raise TypeError(f"{wanted} {describe(rows)}: of a dict of columns, datasets.Dataset.from_dict makes one")
    if not hasattr(rows, "__len__"):
        raise TypeError(f"{wanted} {describe(rows)}, which has no length: make a list of it")
    if isinstance(rows, (bytes, str)) or not hasattr(rows, "__getitem__"):
        raise TypeError(f"{wanted} {describe(rows)}")
    if len(rows) == 0:
        raise ValueError(f"{name} is empty: it needs at least one pair")
    try:
        rows[0]
    except (KeyError, TypeError, IndexError) as error:
        raise TypeError(f"{wanted} {describe(rows)}, which has no row 0: make a list of it") from error
    return rows
