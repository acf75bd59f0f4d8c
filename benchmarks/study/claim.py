"""The study's folder: whose it is, and how long the study has run in it, over all the times that it was taken up."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastpref.benchmarks.study.cells import Study
from fastpref.training.durable import new_file

MARKER = ".fastpref-study"
LOCK = ".fastpref-study-lock"


class FolderBusyError(RuntimeError):
    """Another process's study is running in the folder."""


def claim(study: Study) -> None:
    """Make the folder the study's, or raise FileExistsError where it holds another study or what is not ours."""
    folder, own = study.folder, {"size": study.size.name, "university": study.university, "model": study.model}
    marker = folder / MARKER
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir {str(folder)!r} is a file: give a folder")
    if marker.exists():
        there = _read(marker)
        differing = [
            f"{name} {there.get(name)!r} (asked for: {value!r})"
            for name, value in own.items()
            if there.get(name) != value
        ]
        if differing:
            raise FileExistsError(
                f"output_dir {str(folder)!r} holds a study of {', '.join(differing)}: give another folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"output_dir {str(folder)!r} holds files that no study wrote: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write(marker, {**own, "seconds": 0.0})


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second study out of the folder while the block runs; what a killed one left half done is cleared away.

    Raises:
        FolderBusyError: there is one.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusyError(
                f"a study is running in {str(folder)!r}: wait for its end, or give another folder"
            ) from None
        for left in (*folder.glob(".ticks-*"), *folder.glob("run-*")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


@contextmanager
def counted(folder: Path) -> Iterator[None]:
    """Add the time that the block takes to the study's, be it cut short."""
    started = time.perf_counter()
    try:
        yield
    finally:
        marker = folder / MARKER
        there = _read(marker)
        _write(marker, there | {"seconds": there["seconds"] + time.perf_counter() - started})


def seconds_so_far(folder: Path) -> float:
    return _read(folder / MARKER)["seconds"]


def _read(marker: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(marker.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise FileExistsError(f"{marker}, which says whose study this is, is damaged: give another folder") from None


def _write(path: Path, content: dict[str, object]) -> None:
    with new_file(path) as new:
        new.write_text(json.dumps(content) + "\n", encoding="utf-8")
