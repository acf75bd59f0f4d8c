"""What people give by mistake, at every public edge of training: refused before a model is built, with what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref import cli
from fastpref.options import Parser, UsageError
from fastpref.training import TrainConfig, train
from fastpref.training.arguments import OTHER_NAMES, parse_arguments
from fastpref.training.data.sources import check_rows

Make = Callable[..., Any]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that is refused."""
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


# The command line and its files


@pytest.mark.parametrize("arguments", [("--help",), *((name, "--help") for name in cli.COMMANDS)])
def test_a_help_text_waits_for_neither_torch_nor_transformers(arguments: tuple[str, ...]) -> None:
    if arguments[0] == "bench":
        pytest.importorskip("rich", reason='needs pip install "fastpref[bench]"')
    code = (
        "import contextlib, sys\n"
        "from fastpref.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({list(arguments)!r})\n"
        "sys.exit({'torch', 'transformers', 'numpy'} & set(sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: fastpref" in done.stdout


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("--lr 1e-5", "--learning_rate"),
        ("--per_device_train_batch_size 2", "--batch_size"),
        ("--per-device-train-batch-size=2", "--batch_size"),
        ("--num_train_epochs 3", "--epochs"),
        ("--log_with wandb", "--report_to"),
        ("--lam 5", "loss_options"),
        ("--bf16", "precision"),
        ("--bta 0.2", "'--beta'"),
        ("--no_progres", "'--no_progress'"),
    ],
)
def test_another_trainers_name_or_a_slip_is_told_ours(
    given: str, ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, "train", *given.split())
    assert given.split("=")[0].split()[0] in error
    assert ours in error


def test_of_two_unknown_options_each_is_told_ours(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "train", "--lr", "1", "--num_epochs", "2")
    assert "--lr: it is --learning_rate here; --num_epochs: it is --epochs here" in error


def test_the_other_names_are_none_of_ours_and_each_leads_to_an_option_of_ours() -> None:
    ours = set(TrainConfig.__dataclass_fields__)
    assert not ours & set(OTHER_NAMES)
    assert not [told for told in OTHER_NAMES.values() if " " not in told and told not in ours]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("beta: 0.1\nloss: dpo\nbeta: 0.2\n", "'beta' is given twice, in lines 1 and 3"),
        ("loss: dpop\nloss_options:\n  lam: 1\n  lam: 2\n", "'lam' is given twice, in lines 3 and 4"),
        ("lr: 1.0e-5\n", "'lr'; it is learning_rate here"),
        ("batchsize: 2\n", "'batchsize'; did you mean 'batch_size'?"),
        ("batch_size: true\n", "batch_size is no switch, got true"),
        ("batch_size: [1, 2]\n", "batch_size must be one value, got [1, 2]"),
        ("batch_size: 2.5\n", "invalid int value: '2.5'"),
        ("lora_target_modules: [q, v]\n", "names are separated by commas"),
        ("beta: {a: 1}\n", "beta must be one value, got {'a': 1}"),
        ("progress: perhaps\n", "must be true or false, got 'perhaps'"),
        ("loss_options: lam\n", "loss_options must be a JSON object or the path of a JSON file, got 'lam'"),
        ("precision: fp16\n", "precision must be one of bf16, fp32; got 'fp16'"),
        ("? [a, b]\n: 1\n", "unhashable key"),
        ("\xff: 1\n", "not UTF-8 text"),
    ],
)
def test_a_yaml_file_is_refused_with_its_fault(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert named in error_of(capsys, "train", str(path))


def test_a_key_twice_in_json_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"beta": 1, "beta": 2}')
    assert "'beta' is given 2 times" in error_of(capsys, "train", str(tmp_path / "run.json"))
    with pytest.raises(ValueError, match="'lam' is given 2 times"):
        TrainConfig(loss_options='{"lam": 1, "lam": 2}')


def test_yaml_that_merges_mappings_is_no_repetition(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("loss: dpop\nloss_options:\n  <<: {lam: 1, margin_clip: 3}\n  lam: 2\n")
    assert parse_arguments([str(path)]).loss_options == {"lam": 2, "margin_clip": 3}


def test_of_an_option_given_twice_the_last_counts_and_a_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_arguments(["--beta", "1", "--no_progress", "--beta=2", "--progress"])
    assert (config.beta, config.progress) == (2, True)
    said = capsys.readouterr().err
    assert "--beta is given 2 times" in said
    assert "--progress is given 2 times" in said


def test_a_wrong_choice_is_told_the_nearest() -> None:
    parser = Parser(prog="fastpref some")
    parser.add_argument("--size", choices=("small", "large"))
    with pytest.raises(UsageError, match=r"invalid choice: 'smal' \(one of small, large\); did you mean 'small'\?"):
        parser.parse_args(["--size", "smal"])
    assert parser.parse_args(["--size", "large"]).size == "large"


def test_an_interrupted_command_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    for name in cli.COMMANDS:
        monkeypatch.setitem(cli.COMMANDS, name, interrupted)
        assert cli.main([name]) == 130
        assert capsys.readouterr().err == f"fastpref {name}: interrupted\n"


@pytest.mark.parametrize("name", cli.EXTRAS)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setitem(cli.COMMANDS, name, lacking)
    assert f'rich is needed, which is not installed: pip install "fastpref[{cli.EXTRAS[name]}]"' in error_of(
        capsys, name
    )


# train() in Python


class Endless:
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("data", "error", "named"),
    [
        ({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, TypeError, r"Dataset\.from_dict"),
        ((row for row in [{}]), TypeError, r"no length"),
        (Endless(), TypeError, r"no length"),
        ({1, 2}, TypeError, r"got \{1, 2\} \(set\)"),
        (5, TypeError, r"got 5 \(int\)"),
        (b"rows", TypeError, r"\(bytes\)"),
        ((), ValueError, r"is empty"),
    ],
)
@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
def test_what_is_no_dataset_is_refused_before_a_model_is_built(
    argument: str, data: Any, error: type[Exception], named: str, make_config: Make, rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(error, match=f"(?s){argument}.*{named}"):
        train(make_config(), **{"train_dataset": rows, argument: data})


def test_a_data_frame_is_a_dataset_whatever_its_index(rows: list[dict[str, Any]]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    frame.loc[3, "rejected"] = None
    found = check_rows(frame[frame.index > 1], "train_dataset")
    assert [found[i] for i in range(len(found))] == [rows[2], {**rows[3], "rejected": None}, *rows[4:]]
    with pytest.raises(ValueError, match="train_dataset is empty"):
        check_rows(frame[:0], "train_dataset")
    with pytest.raises(TypeError, match="no row 0: make a list of it"):
        check_rows(pandas.Series(rows)[2:], "train_dataset")


def test_splits_and_streams_of_datasets_are_refused(rows: list[dict[str, Any]]) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    with pytest.raises(TypeError, match="with the splits train, test: give one of them"):
        check_rows(datasets.DatasetDict({"train": data, "test": data}), "train_dataset")
    with pytest.raises(TypeError, match="train_dataset must be a list of dicts"):
        check_rows(data.to_iterable_dataset(), "train_dataset")


@pytest.mark.parametrize("kind", [str, Path])
def test_names_are_taken_where_objects_are(
    kind: type, make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    model, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    make_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": model, "tokenizer": model, "train_dataset": data, "eval_dataset": data}
    result = train(make_config(dry_run=True), **{name: kind(path) for name, path in options.items()})
    assert result.dry_run is not None
    assert result.dry_run.schedule
    with pytest.raises(ValueError, match="model was given twice"):
        train(make_config(model=str(model)), model=kind(model), train_dataset=rows)


@pytest.mark.parametrize("given", [5, object(), ["a"]])
def test_what_is_no_tokenizer_or_model_is_refused(
    given: Any, make_config: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer, got"):
        train(make_config(), tokenizer=given, train_dataset=rows)
    with pytest.raises(TypeError, match="model must be a transformers causal language model, got"):
        train(make_config(), model=given, tokenizer=tokenizer, train_dataset=rows)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_folder_is_named_by_its_option(
    file: str, make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(b'{"a')
    with pytest.raises((ValueError, OSError), match=r"model='.*model' cannot be loaded: "):
        train(make_config(model=str(tmp_path / "model")), tokenizer=tokenizer, train_dataset=rows)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"a')
    with pytest.raises((ValueError, OSError), match=r"tokenizer='.*tokenizer' cannot be loaded: "):
        train(make_config(tokenizer=tmp_path / "tokenizer"), train_dataset=rows)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_budget_below_one_tile_is_refused_before_the_run(
    dry_run: bool, make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    config = make_config(memory_budget="1", dry_run=dry_run)
    with pytest.raises(ValueError, match=r"memory_budget of 1 bytes is smaller than one tile .* give at least"):
        train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "4"), ("batch_size", True), ("max_steps", 2.0), ("beta", True), ("learning_rate", "1e-4"),
        ("dry_run", 1), ("model", ""), ("output_dir", 5), ("resume", 5), ("model_config", 5), ("loss_options", [1]),
        ("lora_target_modules", ["q"]), ("precision", 16), ("schedule", None), ("memory_budget", 1.5),
        ("best_metric", 5), ("loss", None), ("seed", "0"), ("group_by_length", "yes"),
    ],
)  # fmt: skip
def test_an_option_of_another_type_is_a_type_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be .*got"):
        TrainConfig(**{name: value})


def test_paths_are_taken_as_their_text(tmp_path: Path) -> None:
    names = ("model", "tokenizer", "dataset", "eval_dataset", "reference_cache", "output_dir", "resume")
    config = TrainConfig(**{name: tmp_path / name for name in names})
    assert {name: getattr(config, name) for name in names} == {name: str(tmp_path / name) for name in names}


def test_a_result_prints_without_its_model_and_history(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    result = train(make_config(max_steps=1), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert result.history
    text = repr(result)
    assert text == f"TrainResult(output_dir={result.output_dir!r}, step=1, stopped=None)"
