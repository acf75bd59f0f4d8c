"""Every command leaves a folder of others byte for byte as it is, and says in one line why and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')
pytest.importorskip("accelerate", reason='needs pip install "fastpref[train]"')
pytest.importorskip("rich", reason='needs pip install "fastpref[bench]"')

from fastpref.benchmarks import longest, sweep, training
from fastpref.benchmarks.report.__main__ import main as report
from fastpref.cli import main
from fastpref.folders import Owner, claim

FILES = (
    "README.md", "REPORT.md", "config.json", "metrics.jsonl", "results.json", "train.jsonl", "model/model.safetensors",
    "base/config.json", "plots/trip/beach.png", "results-plots/linear.png", "tensorboard/events", ".hidden",
    "photos/beach.png", "photos/trip/notes.txt",
)  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "--model=model", "--dataset=train.jsonl", "--output_dir"),
    "train, dry run": ("train", "--dry_run", "--model=model", "--dataset=train.jsonl", "--output_dir"),
    "train, resumed": ("train", "--resume", "--model=model", "--dataset=train.jsonl", "--output_dir"),
    "demo": ("demo", "--quick", "--output_dir"),
    "study": ("study", "--size=tiny", "--output_dir"),
    "study's report": ("study", "--report"),
    "bench": ("bench", "--device_class=tiny", "--output_dir"),
    "bench, to overwrite": ("bench", "--device_class=tiny", "--overwrite", "--output_dir"),
}
# What has a module of its own to run.
MODULES = {
    "report": (report, "--results"),
    "training": (training.main, "--case=training-tiny", "--json"),
    "longest": (longest.main, "--tiny", "--json"),
    "sweep": (sweep.main, "--tiny", "--json"),
}


def snapshot(folder: Path) -> dict[str, Any]:
    """Names, bytes and times of all that is in a folder."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in (folder, *folder.rglob("*"))
    }


@pytest.mark.parametrize("place", [".", "model", "photos", "README.md", "missing/run", "link"])
@pytest.mark.parametrize("command", [*COMMANDS, *MODULES])
def test_what_a_command_did_not_write_stays_as_it_is(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"my own {name}")
    (tmp_path / "model" / "results.json").write_text("mine too")  # what bench would write
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    run, *options = MODULES[command] if command in MODULES else (main, *COMMANDS[command])
    assert run([*options, place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: " in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_path_is_not_the_current_folder(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = COMMANDS[command]
    assert (report([*options, ""]) if name == "report" else main([name, *options, ""])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{options[-1].removeprefix('--')} must be " in line.replace("argument --", "").replace(":", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no folder that seems writable and is not")
@pytest.mark.parametrize("command", ["train", "demo", "study", "bench"])
def test_what_only_making_the_folder_shows_is_one_line_too(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*COMMANDS[command], "/proc/fastpref"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/proc/fastpref" in line


def test_a_folder_without_results_gets_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert report(["--results", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_of_another_command_is_refused_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with claim(Path("results"), Owner("fastpref study")):
        Path("results", "README.md").write_text("# The study")
    assert main(["train", "--model=model", "--dataset=train.jsonl", "--output_dir=results"]) == 2
    assert "fastpref study" in capsys.readouterr().err
