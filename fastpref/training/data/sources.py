"""Where rows come from: files, folders and hub names, or objects given in Python.

`datasets` reads Parquet and Arrow files, folders and hub datasets. JSON is read by the standard library: Arrow would
take texts that look like dates for times, give every message the keys of all others, and refuse a whole file for half
an emoji. Likewise CSV by pandas, told to leave texts as they stand.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import json
import lzma
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastpref.checks import describe
from fastpref.training.config import TrainConfig
from fastpref.training.data.formats import in_order, rename

Rows = Sequence[Any]  # of dicts; checked row by row where they are rendered
COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
FORMATS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}  # other files hold JSON
FILE_SUFFIXES = (*FORMATS, *COMPRESSED, ".json", ".jsonl", ".ndjson")
NUMBERS = ("ref_chosen_logps", "ref_rejected_logps")


class FileRows(list[Any]):
    """The rows of files, one after the other."""

    def __init__(self, files: Mapping[str, Rows]) -> None:
        super().__init__(row for rows in files.values() for row in rows)
        self.lengths = {name: len(rows) for name, rows in files.items()}

    def where(self, index: int) -> str:
        """The file of a row, and the row's index there where there are several files."""
        for name, length in self.lengths.items():
            if index < length:
                return name if len(self.lengths) == 1 else f"{name} (its row {index})"
            index -= length
        raise IndexError(f"there is no row {index} beyond the last")


def read_rows(config: TrainConfig, given: Any, name: str, argument: str) -> Rows | None:
    """The rows of the option `name`, or of the object `given` as `argument`, with `config.columns` under our names.

    None where there is neither.
    """
    source = getattr(config, name)
    if source is not None and given is not None:
        raise ValueError(f"config.{name} and the argument {argument} were both given: give one of them")
    split = getattr(config, f"{name}_split")
    if source is not None:
        given = load_rows(source, name, split=split, subset=config.dataset_config)
    elif split is not None:
        raise ValueError(f"{name}_split={split!r} goes with {name}, which is not set")
    if given is None:
        return None
    columns: Any = config.columns  # a dict, which __post_init__ made of it
    return rename(check_rows(given, name if source is not None else argument), columns)


def load_rows(source: str, name: str, *, split: str | None = None, subset: str | None = None) -> Rows:
    """The rows of files, folders and glob patterns, separated by commas, or of a hub dataset.

    Args:
        source: what to read. A folder is one that `datasets.save_to_disk` has written, or holds files whose names tell
            their splits.
        name: of the option, for errors.
        split: of folders and hub datasets; "train" by default.
        subset: the configuration of hub datasets that have several.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or it cannot be read; the file is named, and of JSON the line.
        ImportError: `datasets` is needed, and not installed.
    """
    parts = [source] if Path(source).exists() else [part.strip() for part in source.split(",")]
    found = {part: _load(part, name, split, subset) for part in parts}
    return FileRows(found) if len(found) > 1 else found[parts[0]]


def _load(source: str, name: str, split: str | None, subset: str | None) -> Rows:
    path = Path(source)
    paths = [path]
    if not path.exists() and any(char in source for char in "*?["):
        paths = [file for file in map(Path, sorted(glob.glob(source, recursive=True))) if file.is_file()]
        if not paths:
            raise FileNotFoundError(f"{name}: no file matches {source!r}")
    elif not path.exists() and (path.suffix in FILE_SUFFIXES or path.is_absolute() or source.startswith(".")):
        raise FileNotFoundError(f"{name}: there is no file {source!r}")
    elif not path.is_file():
        return _load_split(source, name, split or "train", subset)
    if split not in (None, "train"):
        raise ValueError(f"{name}_split={split!r}: {source!r} is no folder or hub dataset, and so has no splits")
    return FileRows({str(file): _read_file(file) for file in paths})


def _load_split(source: str, name: str, split: str, subset: str | None) -> Rows:
    """A split of a folder or of a hub dataset."""
    path = Path(source)
    told = f"{name}={source!r} ({name}_split={split!r}{'' if path.exists() else '; no file or folder here'})"
    with _datasets(told, quiet=path.exists()) as (datasets, cache):
        if not path.exists():
            return datasets.load_dataset(source, subset, split=split)
        if (path / "state.json").is_file():
            return datasets.load_from_disk(source)
        saved = (path / "dataset_dict.json").is_file()
        if saved:
            splits = datasets.load_from_disk(source)
        else:  # which files are in which split, by their names or by the folder's README.md
            builder = datasets.load_dataset_builder(str(path.resolve()), subset, cache_dir=cache)
            splits = builder.config.data_files or {}
        if split not in splits:
            raise ValueError(f"there is no split {split!r}; there are {', '.join(map(str, splits))}")
        if saved:
            return splits[split]
        files = [path / Path(file).relative_to(path.resolve()) for file in splits[split]]
    return FileRows({str(file): _read_file(file) for file in files})


def _read_file(path: Path) -> Rows:
    """The rows of one file, compressed or not."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        return _read_json(path)
    if kind == "csv":
        _check_encoding(path)
        with _datasets(str(path)):
            import pandas  # which `datasets` brings and uses, but then 007 is a number, and NA is nothing

            kinds = defaultdict(lambda: "str", dict.fromkeys(NUMBERS, "float"))
            sep = "\t" if suffixes[-1] == ".tsv" else ","
            return pandas.read_csv(path, sep=sep, dtype=kinds, keep_default_na=False).to_dict("records")
    with _datasets(str(path)) as (datasets, cache):
        files: Any = {"data_files": [str(path)], "split": "train", "cache_dir": cache, "keep_in_memory": True}
        return list(in_order(datasets.load_dataset(kind, **files)))


def _read_json(path: Path) -> list[Any]:
    """Of a file with an object a line, where empty lines are passed over, or with one array of objects."""
    _check_encoding(path)
    rows: list[Any] = []
    number = 0
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            array = not rows and line.lstrip().startswith(b"[")
            try:
                values = json.loads(line + lines.read() if array else line)
            except UnicodeDecodeError as error:
                here = number + error.object.count(b"\n", 0, error.start)
                raise ValueError(f"{path}, line {here}: not UTF-8 text: {error.reason}") from error
            except json.JSONDecodeError as error:
                here = number + (error.lineno - 1 if array else 0)
                raise ValueError(f"{path}, line {here}: not valid JSON: {error}") from error
            for row in values if array else [values]:
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: a JSON object is needed, got {describe(row)}")
                rows.append(row)
    return rows


def _open(path: Path) -> Any:
    return COMPRESSED.get(path.suffix, open)(path, "rb")


def _check_encoding(path: Path) -> None:
    """Raise ValueError for text that is not UTF-8 by its first bytes, or a file that is not compressed as it says."""
    try:
        with _open(path) as file:
            start = file.read(4)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:1] == b"\0" or start[1:2] == b"\0":
        raise ValueError(f"{path} is UTF-16 text: save it as UTF-8")


@contextmanager
def _datasets(source: str, *, quiet: bool = True) -> Iterator[tuple[Any, str]]:
    """The package `datasets`, and a folder for what it writes of local files; its errors are told in a line.

    `quiet`: without its progress bars and log.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source} is not a JSON file, and reading anything else needs the package `datasets`: "
            'pip install "fastpref[train]"'
        ) from error
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    if quiet:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            yield datasets, cache
    except Exception as error:  # its own kinds, pyarrow's, pandas's, the hub's
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        told = " ".join(str(cause).split())
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{source} cannot be read: {told}") from error
    finally:
        if quiet:
            datasets.logging.set_verbosity(level)
            if not bars:
                datasets.enable_progress_bars()


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
