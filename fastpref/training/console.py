"""What the user sees while a run goes on: lines and progress bars, from the main process only, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


class Bar:
    """One progress bar; without a display it takes the same calls and shows nothing."""

    def __init__(self, progress: Any = None, task: Any = None) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: int = 1, *, note: str | None = None) -> None:
        if self._progress is not None:
            fields = {} if note is None else {"note": note}
            self._progress.update(self._task, advance=amount, **fields)


class Console:
    """`say` prints a line; `bar` opens a progress bar with the time left and a note (tokens a second)."""

    def __init__(self, *, main: bool, progress: bool) -> None:
        self.main = main
        self.progress = main and progress
        self._rich: Any = None
        if main and find_spec("rich") is not None:
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=sys.stderr, soft_wrap=True, highlight=False)
        elif self.progress:
            self.say('rich is not installed, so there is no progress bar: pip install "fastpref[train]"')

    def say(self, line: str) -> None:
        if self._rich is not None:
            self._rich.print(line, markup=False)
        elif self.main:
            print(line, file=sys.stderr, flush=True)

    def say_progress(self, line: str) -> None:
        """A line that `progress=False` silences."""
        if self.progress:
            self.say(line)

    @contextmanager
    def bar(self, title: str, total: int, *, done: int = 0) -> Iterator[Bar]:
        if not (self.progress and self._rich is not None and self._rich.is_terminal):
            yield Bar()
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._rich, transient=True) as progress:
            yield Bar(progress, progress.add_task(title, total=total, completed=done, note=""))
