"""`fastpref train` from the command line: files, overrides, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpref.cli import main
from fastpref.training.arguments import parse_arguments

MODEL = '{"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}'


@pytest.fixture
def options(tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """The options of a run that works."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        f"--dataset={data}", f"--tokenizer={tmp_path / 'tokenizer'}", f"--model_config={MODEL}", "--max_length=64",
        "--max_steps=2", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def test_a_run_from_the_command_line(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *options, "--loss", "dpop", "--loss-options", '{"lam": 2}', "--learning_rate", "1e-3"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert "dpop/penalty" in records[-1]
    captured = capsys.readouterr()
    assert "trained 2 steps" in captured.out
    assert "step 2/2  loss" in captured.err


def test_a_yaml_or_json_file_gives_options_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "loss: dpop\nlearning_rate: 1e-4\nbeta: 0.3\nloss_options: {lam: 2.5}\ndisable_dropout: false\nresume: true\n"
        "max_steps: 7\neval_dataset: null\nmodel_config: {model_type: gpt2}\n"
    )
    config = parse_arguments([str(path), "--beta", "0.2", "--no_progress"])
    assert (config.loss, config.learning_rate, config.beta, config.max_steps) == ("dpop", 1e-4, 0.2, 7)
    assert (config.disable_dropout, config.resume, config.progress) == (False, "latest", False)
    assert (config.loss_options, config.model_config) == ({"lam": 2.5}, {"model_type": "gpt2"})
    (tmp_path / "run.json").write_text('{"loss": "ipo", "resume": "some/checkpoint", "precision": "bf16"}')
    config = parse_arguments([str(tmp_path / "run.json")])
    assert (config.loss, config.resume, config.precision) == ("ipo", "some/checkpoint", "bf16")


def test_a_bare_resume_means_the_newest_checkpoint() -> None:
    assert parse_arguments(["--resume"]).resume == "latest"
    assert parse_arguments(["--resume", "a/b"]).resume == "a/b"
    assert parse_arguments([]).resume is None


BAD = {
    "unknown option": (["--lerning_rate=1"], "--lerning_rate=1; did you mean '--learning_rate'?"),
    "abbreviated option": (["--max_len=3"], "--max_len=3; it is --max_length here"),
    "not a number": (["--beta=strong"], "argument --beta: invalid float value: 'strong'"),
    "out of range": (["--beta=-1"], "beta must be a finite number in (0, inf), got -1.0"),
    "unknown loss": (["--loss=dop"], "dop"),
    "unknown loss option": (["--loss=dpop", '--loss_options={"lambda": 2}'], "lambda"),
    "loss options no JSON": (["--loss_options={lam: 2}"], "loss_options is not valid JSON"),
    "unknown precision": (["--precision=fp16"], "precision must be one of bf16, fp32; got 'fp16'"),
    "missing dataset": (["--dataset=none.jsonl"], "dataset: there is no file 'none.jsonl'"),
    "missing config": (["none.yaml"], "there is no config file 'none.yaml'"),
    "not a config": (["run.txt"], "run.txt: the config file must end in .yaml, .yml, .json"),
    "missing reference": (["--reference_model=/none/such"], "reference_model: there is no folder '/none/such'"),
    "reference cache a file": ([f"--reference_cache={__file__}"], "reference_cache must be a folder, or the name of a"),
    "output a file": ([f"--output_dir={__file__}"], f"output_dir {__file__!r} is a file: give a folder"),
    "model without positions": (["--max_length=65"], "max_length=65 is beyond the model's 64 positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_exit_code_2(
    case: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, message = BAD[case]
    first = bad if not bad[0].startswith("-") else []
    assert main(["train", *first, *options, *([] if first else bad)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("fastpref train: error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    assert message in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_reference_model_that_cannot_be_loaded_gives_one_line_and_exit_code_2(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for dry_run in ("true", "false"):
        assert main(["train", *options, f"--reference_model={empty}", f"--dry_run={dry_run}"]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"fastpref train: error: reference_model='{empty}': ")


def test_a_file_that_does_not_fit_is_named_with_the_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rat: 1\n")
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert "unknown option 'learning_rat'; did you mean 'learning_rate'?" in error
    path.write_text("xyzzy: blue\n")
    assert main(["train", str(path)]) == 2
    assert "unknown option 'xyzzy'; the options are model, model_config, tokenizer" in capsys.readouterr().err
    path.write_text("max_grad_norm:\n")
    assert main(["train", str(path)]) == 2
    assert "max_grad_norm is empty; leave it out for its default, 1.0" in capsys.readouterr().err
    path.write_text("a: [1\n")
    assert main(["train", str(path)]) == 2
    assert "run.yaml: cannot be read: while parsing a flow sequence" in capsys.readouterr().err
    path.write_text("- 1\n")
    assert main(["train", str(path)]) == 2
    assert "run.yaml: the file must hold options by name, got [1]" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_gives_one_line_and_exit_code_1(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["train", *options, "--learning_rate=1e30", "--schedule=constant", "--max_steps=6", "--no_progress"]) == 1
    )
    assert "fastpref train: error: step " in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_commands_are_listed_and_an_unknown_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "demo" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "unknown command 'trian'; the commands are train, demo, study, bench, plan, doctor" in said


def test_import_fastpref_loads_nothing_of_the_train_extra() -> None:
    code = (
        "import sys, fastpref; heavy = {'transformers', 'accelerate', 'datasets', 'matplotlib', 'rich'}; "
        "sys.exit(heavy & set(sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_modules_of_the_package_are_its_attributes() -> None:
    names = ("linear", "logps", "losses", "models", "ops", "parallel", "reference", "training")
    code = f"import fastpref; assert all(getattr(fastpref, name).__name__ == 'fastpref.' + name for name in {names})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_extra_the_error_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; sys.modules['accelerate'] = None; from fastpref.cli import main; sys.exit(main(['train']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith('which is not installed: pip install "fastpref[train]"')
    assert done.stderr.count("\n") == 1
