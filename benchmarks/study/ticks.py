"""How far jobs in other processes are: each writes a few words to a hidden file, and whoever shows them reads it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

EVERY = 1.0  # seconds between two writes


def ticker(path: Path, total: int) -> Callable[[], None]:
    """A function to call after each of `total` steps; the file holds how many were made, as "12%"."""
    done, due = 0, 0.0

    def tick() -> None:
        nonlocal done, due
        done += 1
        if time.monotonic() >= due:
            path.write_text(f"{done / total:.0%}", encoding="utf-8")
            due = time.monotonic() + EVERY

    return tick


def ticks(folder: Path) -> str:
    """What the jobs under way in the folder have written, as "draft 12%, judge 15%"."""
    found = {}
    for path in folder.glob(".ticks-*"):
        with contextlib.suppress(FileNotFoundError):  # its job has just ended, and removed it
            found[path.name.split("-", 1)[1]] = path.read_text(encoding="utf-8")
    return ", ".join(f"{name} {said}" for name, said in sorted(found.items()) if said)
