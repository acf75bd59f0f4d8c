"""What claims a folder changes nothing in one that is refused, and never gives one folder to two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastpref.folders import MARKER, FolderError, Owner, check, check_file, claim, claim_next, claimed, next_folder

TRAIN, STUDY = Owner("fastpref train"), Owner("fastpref study", {"size": "small", "seeds": (0, 1)}, resume=True)


def snapshot(folder: Path) -> dict[str, Any]:
    """Names, bytes and times of all that is in a folder."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in (folder, *folder.rglob("*"))
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of somebody's files, with the names that runs write."""
    folder = tmp_path / "project"
    (folder / "model").mkdir(parents=True)
    for name in ("README.md", "config.json", "metrics.jsonl", "model/model.safetensors"):
        (folder / name).write_text(f"my own {name}")
    return folder


@pytest.mark.parametrize("owner", [TRAIN, STUDY])
@pytest.mark.parametrize("take", [check, claim])
def test_a_folder_of_foreign_files_is_refused_by_their_names_and_stays_byte_for_byte(
    project: Path, owner: Owner, take: Callable[[Path, Owner], Any]
) -> None:
    before = snapshot(project)
    with pytest.raises(FolderError, match=r"README\.md, config\.json, metrics\.jsonl and 1 more") as refused:
        take(project, owner)
    assert "\n" not in str(refused.value)
    assert snapshot(project) == before


@pytest.mark.parametrize("take", [check, claim])
@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("project/README.md", "is a file"),
        ("project/README.md/run", "is no folder"),
        ("project/missing/deeper/run", "mkdir -p .*deeper"),
        ("nowhere", "link to nothing"),
    ],
)
def test_what_cannot_become_a_folder_is_refused_and_nothing_is_made(
    project: Path, tmp_path: Path, place: str, text: str, take: Callable[[Path, Owner], Any]
) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    before = snapshot(tmp_path)
    with pytest.raises(FolderError, match=text):
        take(tmp_path / place, TRAIN)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("take", [check, claim])
def test_a_read_only_parent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[[Path, Owner], Any]
) -> None:
    """As `os.access` sees it: root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(FolderError, match="read-only"):
        take(tmp_path / "run", TRAIN)
    assert list(tmp_path.iterdir()) == []


def test_what_only_making_the_folder_shows_is_one_line_too(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="cannot be used"):
        claim(tmp_path / ("x" * 300), TRAIN)


@pytest.mark.parametrize("take", [check, claim])
@pytest.mark.parametrize(
    ("place", "text"), [("~/run", "home folder"), ("~", "home folder"), ("my runs/a", "`mkdir -p 'my runs'`")]
)
def test_the_remedy_can_be_pasted_into_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, text: str, take: Callable[[Path, Owner], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FolderError, match=text):
        take(Path(place), TRAIN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["itself", "a link to it", "its parent"])
def test_the_folder_of_an_input_is_refused(tmp_path: Path, way: str) -> None:
    run = tmp_path / "run"
    with claim(run, TRAIN):
        (run / "model").mkdir()
        (run / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(run / "model")
    place = {"itself": run / "model", "a link to it": tmp_path / "link", "its parent": run}[way]
    before = snapshot(tmp_path)
    owner = Owner("fastpref train", resume=True, inputs={"--model": str(run / "model"), "--tokenizer": "a/hub-name"})
    for take in (check, claim):
        with pytest.raises(FolderError, match="--model"):
            take(place, owner)
    assert snapshot(tmp_path) == before


def test_an_unfinished_run_starts_again_with_its_own_identity_and_no_other(tmp_path: Path) -> None:
    owner = Owner("fastpref train", {"loss": "dpo", "epochs": 1.0})
    with claim(tmp_path / "run", owner) as first:
        (first.folder / "metrics.jsonl").write_text("1\n")
    before = snapshot(tmp_path)
    with pytest.raises(FolderError, match=r"loss 'dpo' \(asked for: 'ipo'\)"):
        claim(tmp_path / "run", Owner("fastpref train", {"loss": "ipo", "epochs": 1.0}))
    with pytest.raises(FolderError, match="is a folder of fastpref train"):
        claim(tmp_path / "run", STUDY)
    assert snapshot(tmp_path) == before
    claim(tmp_path / "run", owner).release()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "1\n"


def test_a_finished_run_is_only_gone_on_with_and_keeps_its_notes(tmp_path: Path) -> None:
    with claim(tmp_path / "run", Owner("fastpref study", STUDY.identity)) as first:
        (first.folder / "results.json").write_text("{}")
        first.note(seconds=123456.75)
        first.finish()
        first.note(seconds=1)  # a shorter text than the one before
    with pytest.raises(FolderError, match="holds an earlier run"):
        claim(tmp_path / "run", Owner("fastpref study", STUDY.identity))
    with claim(tmp_path / "run", STUDY) as again:
        assert (again.notes["seconds"], again.notes["finished"]) == (1, True)


def test_a_claim_under_which_nothing_was_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for folder in ("empty", "new", "runs/new"):
        with claim(Path(folder), TRAIN):
            assert (Path(folder) / MARKER).exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]


def test_what_may_lie_in_the_folder_already_stays(tmp_path: Path) -> None:
    (tmp_path / "reference-1.jsonl").write_text("log-probs")
    with claim(tmp_path, Owner("fastpref train", besides=("reference-*",))):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["reference-1.jsonl"]


@pytest.mark.parametrize("text", ["{", "[1]", '"text"'])
def test_a_damaged_marker_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text)
    (tmp_path / "metrics.jsonl").write_text("1\n")
    before = snapshot(tmp_path)
    with pytest.raises(FolderError, match="damaged"):
        claim(tmp_path, STUDY)
    assert snapshot(tmp_path) == before
    assert claimed(tmp_path, "fastpref study") == []


def test_a_folder_in_use_is_refused_until_its_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fastpref.folders import Owner, claim\n"
        "held = claim(Path(sys.argv[1]), Owner('fastpref train')); print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            for take in (check, claim):
                with pytest.raises(FolderError, match="in use"):
                    take(tmp_path / "run", TRAIN)
        finally:
            process.send_signal(signal.SIGKILL)
    claim(tmp_path / "run", TRAIN).release()


def test_new_folders_are_numbered_and_two_at_once_get_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = Path("runs") / "fastpref"
    assert next_folder(base) == base
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: claim_next(base, TRAIN), range(16)))
    names = ["fastpref", *(f"fastpref-{number}" for number in range(2, 17))]
    assert sorted(held.folder.name for held in claims) == sorted(names)
    (base / "metrics.jsonl").write_text("1\n")
    for held in claims:
        held.release()
    assert [path.name for path in Path("runs").iterdir()] == ["fastpref"]
    Path("runs/fastpref-2").symlink_to("nowhere")
    Path("runs/fastpref-old").mkdir()
    Path("runs/fastpref-4").mkdir()
    assert next_folder(base).name == "fastpref-3"
    with claim_next(base, STUDY) as study:
        (study.folder / "results.json").write_text("{}")
    assert claimed(base, "fastpref train") == [base]
    assert claimed(base, "fastpref study") == [Path("runs/fastpref-3")]


def test_a_single_file_is_replaced_only_by_its_own_writer(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours.json", tmp_path / "other.json"
    ours.write_text('{"schema": 2}')
    other.write_text("{}")
    before = snapshot(tmp_path)
    check_file(ours, mark='"schema"', option="--json")
    check_file(tmp_path / "new.json", mark='"schema"', option="--json")
    for path, text in ((other, "did not write"), (tmp_path, "is a folder"), (tmp_path / "a" / "b.json", "mkdir -p")):
        with pytest.raises(FolderError, match=f"^--json .*{text}"):
            check_file(path, mark='"schema"', option="--json")
    assert snapshot(tmp_path) == before
