"""`fastpref train` and the folder that it is given: what it did not write itself it neither replaces nor deletes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref.cli import main
from fastpref.folders import MARKER, FolderError
from fastpref.training import train
from fastpref.training.checkpoints.durable import MANIFEST

Make = Callable[..., Any]


def snapshot(folder: Path) -> dict[str, Any]:
    """Names, bytes and times of all that is in a folder."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in (folder, *folder.rglob("*"))
    }


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody works, with a model, an adapter and a link; no model there can be loaded."""
    folder = tmp_path / "project"
    for name in ("model/config.json", "adapter/adapter_config.json", "models/base/config.json", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my own {name}")
    for name in ("config.json", "metrics.jsonl", "model/model.safetensors", "pairs.jsonl"):
        (folder / name).write_text(f"my own {name}")
    (folder / "link").symlink_to("model")
    (folder / "nowhere").symlink_to("missing")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("model", "place", "text"),
    [
        ("model", ".", "--model 'model'"),
        ("hub/name", ".", "holds --dataset 'pairs.jsonl'"),
        ("model", "model", "is the folder of --model"),
        ("model", "link", "is the folder of --model"),
        ("link", "model", "is the folder of --model"),
        ("adapter", "adapter", "is the folder of --model"),
        ("models/base", "models", "holds --model"),
        ("model", "README.md", "is a file"),
        ("model", "README.md/run", "is no folder"),
        ("model", "missing/run", "mkdir -p missing"),
        ("model", "nowhere", "a link to nothing"),
    ],
)
def test_a_folder_of_others_is_refused_before_anything_is_loaded_and_stays_byte_for_byte(
    project: Path, model: str, place: str, text: str, dry_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither data nor model could be loaded, and the message is the folder's."""
    before = snapshot(project)
    options = [f"--model={model}", "--dataset=pairs.jsonl", f"--output_dir={place}"]
    assert main(["train", *options, f"--dry_run={str(dry_run).lower()}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastpref train: error: output_dir {place!r}")
    assert text in line
    assert snapshot(project) == before


@pytest.mark.parametrize("name", ["tokenizer", "reference_model", "dataset", "eval_dataset"])
def test_the_folder_of_any_other_input_is_refused_too(
    project: Path, make_config: Make, name: str, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    before = snapshot(project)
    config = make_config(**{name: "model", "output_dir": "model"})
    with pytest.raises(FolderError, match=f"is the folder of --{name}"):
        train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert snapshot(project) == before


@pytest.fixture
def start(make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> Make:
    def run(**options: Any) -> Any:
        config = make_config(**{"output_dir": None, "max_steps": 2, **options})
        return train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)

    return run


def test_a_finished_run_stays_byte_for_byte_and_may_be_made_longer(start: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(output_dir=str(run))
    before = snapshot(tmp_path)
    for dry_run in (False, True):
        with pytest.raises(FolderError, match="holds an earlier run"):
            start(output_dir=str(run), dry_run=dry_run)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        start(output_dir=str(run), resume=True)
    assert snapshot(tmp_path) == before


def test_every_run_has_a_new_folder_by_default_and_resume_takes_the_newest(
    start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="resume: there is no checkpoint"):
        start(resume=True)
    assert list(tmp_path.iterdir()) == []
    options = {"save_every": 1, "schedule": "constant"}
    first = start(**options).output_dir
    before = snapshot(first)
    second, third = start(**options).output_dir, start().output_dir  # the third has no checkpoint
    assert [first, second, third] == [Path("runs") / name for name in ("fastpref", "fastpref-2", "fastpref-3")]
    start(dry_run=True)
    assert "nothing was written to runs/fastpref-4" in capsys.readouterr().out
    assert start(**options, max_steps=3, resume=True).output_dir == second
    assert snapshot(first) == before
    os.utime(first / "checkpoint-2" / MANIFEST, (time.time() + 60,) * 2)
    assert start(**options, max_steps=3, resume=True).output_dir == first
    assert start(**options, max_steps=4, resume=str(second / "checkpoint-3")).output_dir == second
    assert (second / "checkpoint-4").is_dir()
    assert sorted(path.name for path in Path("runs").iterdir()) == ["fastpref", "fastpref-2", "fastpref-3"]


def test_a_run_that_could_not_begin_leaves_no_folder(start: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_every"):
        start(output_dir=str(tmp_path / "run"), eval_every=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["README.md", "model", "best", "checkpoint-3"])
def test_what_somebody_has_put_where_a_run_would_write_is_refused(start: Make, tmp_path: Path, name: str) -> None:
    run = start(output_dir=str(tmp_path / "run"), save_every=1).output_dir
    if (run / name).exists():
        (run / name).rename(tmp_path / name)
    if name == "README.md":
        (run / name).write_text("# run\n")
    else:
        (run / name).mkdir()
        (run / name / "weights.bin").write_text("mine")
    before = snapshot(run)
    with pytest.raises(FolderError, match=f"holds {name}, which fastpref train did not write"):
        start(output_dir=str(run), save_every=1, max_steps=3, resume=True)
    assert snapshot(run) == before


def test_what_lies_beside_the_checkpoints_of_a_run_that_goes_on_stays(start: Make, tmp_path: Path) -> None:
    run = start(output_dir=str(tmp_path / "run"), save_every=1).output_dir
    others = [run / name for name in ("checkpoint-best", "checkpoint-3-mine", "model-old", "reference-mine.jsonl")]
    for folder in others:
        folder.mkdir()
        (folder / "weights.bin").write_text("mine")
    before = [snapshot(folder) for folder in others]
    start(output_dir=str(run), save_every=1, keep_checkpoints=1, max_steps=4, resume=True)
    assert (run / "checkpoint-4").is_dir()
    assert [snapshot(folder) for folder in others] == before


def test_a_run_that_was_killed_goes_on_or_starts_again_and_nothing_else_may_have_its_folder(
    tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = tmp_path / "run"
    model = '{"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}'
    options = [
        f"--dataset={tmp_path / 'pairs.jsonl'}", f"--tokenizer={tmp_path / 'tokenizer'}", f"--model_config={model}",
        "--max_length=64", "--max_steps=100000", "--logging_every=1", "--save_every=0", "--no_progress",
        f"--output_dir={run}",
    ]  # fmt: skip
    metrics = run / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-m", "fastpref.cli", "train", *options]) as process:
        try:
            end = time.monotonic() + 240
            while not (metrics.exists() and metrics.stat().st_size):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            (run / "notes.txt").write_text("mine")
            assert main(["train", *options]) == 2
            assert "is in use" in capsys.readouterr().err
        finally:
            process.send_signal(signal.SIGKILL)
    before = snapshot(run)
    assert main(["train", *options, "--max_steps=2"]) == 2
    assert "max_steps 100000 (asked for: 2)" in capsys.readouterr().err
    assert main(["train", *options, "--resume"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert snapshot(run) == before
    noted = json.loads((run / MARKER).read_text())
    noted["identity"]["max_steps"] = 2
    (run / MARKER).write_text(json.dumps(noted))
    assert main(["train", *options, "--max_steps=2"]) == 0
    assert len(metrics.read_text().splitlines()) == 2
    assert (run / "notes.txt").read_text() == "mine"
    assert json.loads((run / MARKER).read_text())["finished"] is True
