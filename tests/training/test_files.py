"""Where rows come from: files of each kind, folders, objects; and what happens where they are not to be had."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref.training import TrainConfig, train, with_reference
from fastpref.training.arguments import parse_arguments
from fastpref.training.data.sources import check_rows, load_rows, read_rows
from fastpref.training.data.tokens import data_digest, tokenize_rows

Row = dict[str, Any]
ROWS = [
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "null"},
    {"prompt": "天\n", "chosen": "NA", "rejected": "007"},
]


def write(path: Path, rows: list[Row] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def csv_text(rows: list[Row], sep: str) -> str:
    cells = [list(rows[0]), *([f'"{value}"' for value in row.values()] for row in rows)]
    return "".join(sep.join(line) + "\n" for line in cells)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And nothing is written to the user's caches."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")


KINDS: dict[str, Callable[[str], bytes]] = {
    "jsonl": lambda lines: lines.replace("\n", "\n\n").encode(),
    "json": lambda lines: f"\n [{','.join(lines.splitlines())}]".encode(),
    "txt": str.encode,
    "bom.jsonl": lambda lines: lines.encode("utf-8-sig"),
    "jsonl.gz": lambda lines: gzip.compress(lines.encode()),
    "json.bz2": lambda lines: bz2.compress(lines.encode()),
    "jsonl.xz": lambda lines: lzma.compress(lines.encode()),
    "csv": lambda lines: csv_text(ROWS, ",").encode("utf-8-sig"),
    "tsv": lambda lines: csv_text(ROWS, "\t").encode(),
    "csv.gz": lambda lines: gzip.compress(csv_text(ROWS, ",").encode()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_kind_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs.{kind}"
    path.write_bytes(KINDS[kind]("".join(json.dumps(row) + "\n" for row in ROWS)))
    rows = load_rows(str(path), "dataset")
    assert [rows[i] for i in range(len(rows))] == ROWS
    assert not (tmp_path / "cache").exists()


def test_parquet_and_a_saved_dataset_give_the_same_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "pairs.parquet")
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "split")
    for name in ("pairs.parquet", "plain", "split"):
        assert list(load_rows(str(tmp_path / name), "dataset")) == ROWS
    assert list(load_rows(str(tmp_path / "split"), "dataset", split="test")) == ROWS[1:]
    with pytest.raises(ValueError, match="there is no split 'dev'; there are train, test"):
        load_rows(str(tmp_path / "split"), "dataset", split="dev")


def test_what_arrow_adds_to_messages_and_tools_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}{{ '' if add_generation_prompt }}"
    )
    rows = []
    for key in ("sky", "sea"):
        call = {"type": "function", "function": {"name": "look", "arguments": {key: "blue?"}}}
        calls = [{"role": "user", "content": key}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        tool = {"name": "look", "parameters": {"properties": {key: {"type": "string"}}}}
        answer = [{"role": "assistant", "content": "blue"}]
        rows.append({"prompt": calls, "chosen": answer, "rejected": [*answer, calls[0]], "tools": [tool]})
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "pairs.parquet")
    wanted = data_digest(tokenize_rows(rows, tokenizer, max_length=999).pairs)
    for given in (data, load_rows(str(tmp_path / "pairs.parquet"), "dataset")):
        assert data_digest(tokenize_rows(given, tokenizer, max_length=999).pairs) == wanted
    assert not (tmp_path / "cache").exists()


def test_reference_log_probs_in_csv_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,ref_chosen_logps,ref_rejected_logps\na,1,2,-1.5,-2\n")
    assert load_rows(str(path), "dataset")[0] == {
        "prompt": "a", "chosen": "1", "rejected": "2", "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0,
    }  # fmt: skip


def test_json_keeps_dates_missing_keys_and_half_emojis_as_they_stand(tmp_path: Path) -> None:
    rows = [
        {"chosen": "2026-11-25", "rejected": "2026-11-26 10:00:00", "prompt": [{"role": "user", "content": "a"}]},
        {"chosen": "\ud83d", "rejected": "b", "prompt": [{"role": "user", "content": "a", "name": "x"}]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(load_rows(str(path), "dataset")) == rows


def test_a_folder_of_files_has_splits(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-0.jsonl", ROWS[:1])
    write(tmp_path / "data" / "train-1.jsonl", ROWS[1:])
    write(tmp_path / "data" / "test-0.jsonl", ROWS[1:])
    assert list(load_rows(str(tmp_path / "data"), "dataset")) == ROWS
    assert list(load_rows(str(tmp_path / "data"), "dataset", split="test")) == ROWS[1:]
    with pytest.raises(
        ValueError, match=r"dataset='.*data' \(dataset_split='dev'\) cannot be read: there is no split 'dev'; there are"
    ):
        load_rows(str(tmp_path / "data"), "dataset", split="dev")
    (tmp_path / "none").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=r"dataset='.*none' .* cannot be read"):
        load_rows(str(tmp_path / "none"), "dataset")


def test_patterns_and_several_sources_follow_each_other(tmp_path: Path) -> None:
    write(tmp_path / "b,1.jsonl", ROWS[:1])
    write(tmp_path / "a.jsonl", ROWS[1:])
    assert list(load_rows(f"{tmp_path}/*.jsonl", "dataset")) == [ROWS[1], ROWS[0]]
    assert list(load_rows(f"{tmp_path}/b,1.jsonl", "dataset")) == ROWS[:1]
    assert list(load_rows(f"{tmp_path}/a.jsonl, {tmp_path}/b*.jsonl", "dataset")) == [ROWS[1], ROWS[0]]
    with pytest.raises(FileNotFoundError, match=r"dataset: no file matches '.*/c\*.jsonl'"):
        load_rows(f"{tmp_path}/c*.jsonl", "dataset")


def test_a_bad_row_is_named_with_its_file(tmp_path: Path, tokenizer: Any) -> None:
    one, other = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", [ROWS[0], {"prompt": "a"}])
    with pytest.raises(ValueError, match=r"^\S+b.jsonl: row 1 has no 'chosen'"):
        tokenize_rows(load_rows(str(other), "dataset"), tokenizer, max_length=64)
    with pytest.raises(ValueError, match=r"^\S+b.jsonl \(its row 1\): row 3 has no 'chosen'"):
        tokenize_rows(load_rows(f"{one},{other}", "dataset"), tokenizer, max_length=64)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "pairs.jsonl, line 3: not valid JSON"),
        (b"[1, 2]", "pairs.jsonl, line 3: a JSON object is needed, got [1, 2]"),
        (b'{"prompt": "\xe9"}', "pairs.jsonl, line 3: not UTF-8 text"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_rows(str(path), "dataset")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "a"},\n\n{"prompt": ]', "a.json, line 3: not valid JSON"),
        ("a.json", b'[\n\n"b"]', "a.json, line 1: a JSON object is needed, got 'b'"),
        ("a.json", b'[\n\n"\xff"]', "a.json, line 3: not UTF-8 text"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "a.jsonl is UTF-16 text: save it as UTF-8"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16-le"), "a.jsonl is UTF-16 text: save it as UTF-8"),
        ("a.csv", "prompt,chosen".encode("utf-16"), "a.csv is UTF-16 text: save it as UTF-8"),
        ("a.csv", b"prompt,chosen\n\xe9,b\n", "a.csv cannot be read: 'utf-8' codec can't decode"),
        ("a.csv", b'prompt,chosen\n"a,b\n', "a.csv cannot be read: Error tokenizing data"),
        ("a.parquet", b"nothing", "a.parquet cannot be read: "),
        ("a.jsonl.gz", b"nothing", "a.jsonl.gz cannot be read: Not a gzipped file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_rows(str(tmp_path / name), "dataset")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset: there is no file '.*none.jsonl'"):
        load_rows(str(tmp_path / "none.jsonl"), "dataset")
    with pytest.raises(
        (FileNotFoundError, ValueError), match=r"dataset='nobody/nothing' .*no file or folder here\) cannot be read: "
    ):
        load_rows("nobody/nothing", "dataset")


def test_json_needs_no_datasets_package_and_the_rest_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it raises ImportError
    assert list(load_rows(str(write(tmp_path / "pairs.jsonl")), "dataset")) == ROWS
    with pytest.raises(ImportError, match=r'needs the package `datasets`: pip install "fastpref\[train\]"'):
        load_rows(str(tmp_path), "dataset")


def test_columns_are_read_under_our_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "x", "frage": "a", "chosen": "c", "rejected": "r"}] * 2
    columns = {"prompt": "frage", "chosen": "rejected", "rejected": "chosen"}
    wanted = [{"prompt": "a", "chosen": "r", "rejected": "c"}] * 2
    path = write(tmp_path / "pairs.jsonl", rows)
    config = TrainConfig(dataset=path, eval_dataset=path, columns=json.dumps(columns))
    for name in ("dataset", "eval_dataset"):
        found: Any = read_rows(config, None, name, name)
        assert list(found) == wanted
        assert found.where(1) == str(path)
    for given in (rows, datasets.Dataset.from_list(rows)):
        assert list(read_rows(TrainConfig(columns=columns), given, "dataset", "train_dataset") or ()) == wanted
    with pytest.raises(ValueError, match="'prompt' is to be read from 'quest', but the columns are prompt, frage, ch"):
        read_rows(TrainConfig(columns={"prompt": "quest"}), rows, "dataset", "train_dataset")


def test_a_run_and_with_reference_take_columns_and_splits(
    make_config: Callable[..., TrainConfig], make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    rows = [{"prompt": str(i), "frage": f"sky {i}?", "chosen": " blue", "rejected": " green"} for i in range(6)]
    write(folder / "train.jsonl", rows[:4])
    write(folder / "test.jsonl", rows[4:])
    options = {"dataset": folder, "eval_dataset": folder, "eval_dataset_split": "test"}
    config = parse_arguments(
        [f"--{name}={value}" for name, value in options.items()] + ["--columns", '{"prompt": "frage"}']
    )
    chosen = {name: getattr(config, name) for name in (*options, "columns")}
    config = make_config(**chosen, max_steps=1)
    result = train(config, model=make_model(), tokenizer=tokenizer)
    assert "eval_loss" in result.history[-1]
    found = with_reference(config, model=make_model(), tokenizer=tokenizer)
    assert [(row["prompt"], row["ref_chosen_logps"] < 0) for row in found] == [(row["frage"], True) for row in rows[:4]]


def test_options_of_data_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match=r"dataset_split='dev': '.*pairs.jsonl' is no folder or hub dataset"):
        read_rows(TrainConfig(dataset=path, dataset_split="dev"), None, "dataset", "train_dataset")
    with pytest.raises(ValueError, match="eval_dataset_split='dev' goes with eval_dataset, which is not set"):
        read_rows(TrainConfig(eval_dataset_split="dev"), None, "eval_dataset", "eval_dataset")
    with pytest.raises(ValueError, match=r"columns must be one of .*; got 'promt'; did you mean 'prompt'"):
        TrainConfig(columns={"promt": "a"})
    with pytest.raises(TypeError, match="columns: 'prompt' must be the name of a column, got 5"):
        TrainConfig(columns={"prompt": 5})


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
