"""What the user sees while a command works: lines and progress bars, from the main process only, on stderr.

A terminal gets bars, by rich; a log file gets a line instead, some seconds after the last one. Both tell the same: how
far, how long still, how fast. The clock of the lines is a thread, so that a long step shows up too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # between lines where there is no terminal; the first one comes
FIRST_LINE_SECONDS = 2.0  # this long after the outermost bar was opened
RATE_SECONDS = 3600.0  # that the time left is reckoned from: a slow first step is forgotten in time

TITLE = TextColumn("{task.description}", markup=False)
COUNT = TextColumn(
    "{task.completed:,}/{task.total:,}{task.fields[unit]} ({task.percentage:.0f}%)", style="", markup=False
)
ETA = TimeRemainingColumn()
NOTE = TextColumn("{task.fields[note]}", style="", markup=False)


class Bar:
    """How far a part of the work is, counted on from `done` where it resumes."""

    def __init__(self, display: Progress, title: str, total: int, *, done: int, unit: str) -> None:
        self._display = display
        fields: dict[str, Any] = {"unit": f" {unit}s" if unit else "", "note": "", "tokens": 0}
        self.id = display.add_task(title, total=total, completed=done, **fields)
        self._task = display.tasks[-1]
        display.advance(self.id, 0)  # the first advance is timed from here

    def advance(self, amount: int = 1, *, tokens: int = 0, note: str | None = None) -> None:
        """`tokens`: how many this took, for the bar's own rate; `note`: what is shown in place of that."""
        tokens += self._task.fields["tokens"]
        if note is None:
            seconds = self._task.elapsed
            note = f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else self._task.fields["note"]
        self._display.update(self.id, advance=amount, tokens=tokens, note=note)

    @property
    def eta(self) -> str:
        """As "eta 1:02:03"; empty before anything was done, and when all is."""
        return f"eta {ETA.render(self._task)}" if self._task.time_remaining else ""

    def __str__(self) -> str:
        """As "train: 12/100 steps (12%)  eta 1:02:03  1,234 tokens/s"."""
        task = self._task
        parts = (f"{TITLE.render(task)}: {COUNT.render(task)}", self.eta, str(NOTE.render(task)))
        return "  ".join(filter(None, parts))


class Console:
    """`say` prints a line; `bar` opens a progress bar, inside of another one too.

    Args:
        main: whether this is the process that speaks; of a run of several it is one.
        progress: False leaves out bars and the lines of `say_progress`.
        out: where to, stderr by default.
    """

    def __init__(self, *, main: bool = True, progress: bool = True, out: Any = None) -> None:
        self.main = main
        self.said: list[str] = []  # the lines of `say`
        self.progress = main and progress
        self._rich = RichConsole(file=out or sys.stderr, soft_wrap=True, highlight=False)
        self._display = Progress(
            *(TITLE, BarColumn(bar_width=None), COUNT, TextColumn("eta"), ETA, NOTE),
            console=self._rich,
            transient=True,
            disable=not (self.progress and self._rich.is_interactive),
            get_time=lambda: time.monotonic(),
            speed_estimate_period=RATE_SECONDS,
        )
        self._bars: list[Bar] = []
        self._said = time.monotonic()

    def say(self, line: str) -> None:
        self.said.append(line)
        self._print(line)

    def _print(self, line: str) -> None:
        self._said = time.monotonic()
        if self.main:
            self._display.refresh()  # the bars are drawn again below the line: as they are now
            self._rich.print(line, markup=False)

    def say_progress(self, line: str) -> None:
        """A line that `progress=False` silences."""
        if self.progress:
            self._print(line)

    @property
    def eta(self) -> str:
        """The time left of the outermost bar, to end a line with."""
        return f"  {self._bars[0].eta}" if self._bars and self._bars[0].eta else ""

    @contextmanager
    def bar(self, title: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[Bar]:
        """A bar in a terminal, or a line now and then without one; nothing where `progress` is off."""
        bar = Bar(self._display, title, total, done=done, unit=unit)
        outermost = not self._bars
        self._bars.append(bar)
        try:
            with self._shown() if outermost else nullcontext():
                yield bar
        finally:
            self._bars.remove(bar)
            self._display.remove_task(bar.id)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """The display of the outermost bar; those inside are further lines of it."""
        if not self.progress or self._rich.is_interactive:
            with self._display:  # which does nothing where it is disabled
                yield
            return
        over = threading.Event()
        self._said = time.monotonic()
        ticker = threading.Thread(target=self._tick, args=(over,), name="fastpref-progress", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            over.set()
            ticker.join()

    def _tick(self, over: threading.Event) -> None:
        wait = quiet = FIRST_LINE_SECONDS
        while not over.wait(wait):
            wait = quiet - (time.monotonic() - self._said)  # whatever was said last shows that the run lives
            if wait <= 0:
                self._print(str(self._bars[-1]))  # of nested bars the inner one tells more
                wait = quiet = LINE_SECONDS
