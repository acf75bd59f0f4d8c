"""Where rows come from: JSONL, datasets folders, objects; and what happens where they are not to be had."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fastpref.training.data.sources import check_rows, load_rows, read_jsonl


def test_jsonl_is_read_line_by_line_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "天"}\n\n{"prompt": "b"}\n', encoding="utf-8")
    assert load_rows(str(path), "dataset") == [{"prompt": "天"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "pairs.jsonl, line 3: not valid JSON"),
        ("[1, 2]", "pairs.jsonl, line 3: a JSON object is needed, got [1, 2]"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read_jsonl(path)
    assert message in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset: there is no file '.*none.jsonl'"):
        load_rows(str(tmp_path / "none.jsonl"), "dataset")


def test_jsonl_needs_no_datasets_package_and_the_rest_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it raises ImportError
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a"}\n', encoding="utf-8")
    assert len(load_rows(str(path), "dataset")) == 1
    with pytest.raises(ImportError, match=r'needs the package `datasets`: pip install "fastpref\[train\]"'):
        load_rows(str(tmp_path), "dataset")


def test_a_datasets_folder_is_read_and_a_missing_train_split_is_an_error(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "split"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "odd"))
    for name in ("plain", "split"):
        loaded = check_rows(load_rows(str(tmp_path / name), "dataset"), "dataset")
        assert [loaded[i] for i in range(len(loaded))] == [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    with pytest.raises(ValueError, match="has the splits test; a 'train' split is needed"):
        load_rows(str(tmp_path / "odd"), "dataset")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "train_dataset is empty: it needs at least one pair"),
        ("a.jsonl", TypeError, "train_dataset must be a list of dicts, .*got 'a.jsonl'"),
        ({"prompt": "a"}, TypeError, "train_dataset must be a list of dicts"),
        (iter([]), TypeError, "train_dataset must be a list of dicts"),
    ],
)
def test_what_is_no_dataset_is_refused(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_rows(rows, "train_dataset")
