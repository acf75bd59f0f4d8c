"""What the user sees while a run goes on: lines and progress bars, from the main process only, on stderr.

A terminal gets bars; a log file gets a line instead, some seconds after the last one. Both tell the same: how far, how
fast, how long still. The clock of the lines is a thread, so that a long step shows up too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

LINE_SECONDS = 10.0  # between lines where there is no terminal; the first one of a bar comes
FIRST_LINE_SECONDS = 2.0  # this long after it was opened
RECENT = 50  # advances that the time left is reckoned from: a slow first step is forgotten in time


class Bar:
    """How far a part of the run is, counted on from `done` where it resumes."""

    def __init__(self, title: str, total: int, *, done: int = 0, unit: str = "") -> None:
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self.note = ""
        self._seen = deque([(time.monotonic(), done, 0)], maxlen=RECENT + 1)  # when, how many, tokens until then

    def advance(self, amount: int = 1, *, tokens: int = 0, note: str | None = None) -> None:
        """`tokens`: how many this took, for the bar's own rate; `note`: what is shown in place of that."""
        self.done += amount
        self._seen.append((time.monotonic(), self.done, self._seen[-1][2] + tokens))
        if note is not None:
            self.note = note
        elif tokens:
            self.note = f"{self._rate(2):,.0f} tokens/s"

    @property
    def count(self) -> str:
        """As "12/100 steps (12%)"."""
        share = self.done / self.total if self.total else 1.0
        unit = f" {self.unit}s" if self.unit else ""
        return f"{self.done:,}/{self.total:,}{unit} ({share:.0%})"

    @property
    def eta(self) -> str:
        """As "eta 1:02:03"; empty before anything was done, and when all is."""
        rate = self._rate(1)
        return f"eta {clock((self.total - self.done) / rate)}" if rate and self.done < self.total else ""

    def _rate(self, column: int) -> float:
        first, last = self._seen[0], self._seen[-1]
        return (last[column] - first[column]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    def __str__(self) -> str:
        return "  ".join(part for part in (f"{self.title}: {self.count}", self.eta, self.note) if part)


def progress_note(history: Sequence[dict[str, Any]]) -> str:
    """Rate, loss and margin of the last record of training."""
    last = next((record for record in reversed(history) if "tokens_per_second" in record), None)
    if last is None:
        return ""
    return f"{last['tokens_per_second']:,.0f} tokens/s  loss {last['loss']:.4f}  margin {last['rewards/margins']:.4f}"


def clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Console:
    """`say` prints a line; `bar` opens a progress bar, inside of another one too."""

    def __init__(self, *, main: bool, progress: bool, out: Any = None) -> None:
        self.main = main
        self._out = out or sys.stderr
        self.progress = main and progress
        self._rich: Any = None
        self._live: Any = None  # rich's display, while a bar is open
        self._bars: list[Bar] = []
        self._said = time.monotonic()
        if main and find_spec("rich") is not None:
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=self._out, soft_wrap=True, highlight=False)

    def say(self, line: str) -> None:
        self._said = time.monotonic()
        if self._rich is not None:
            if self._live is not None:  # the bars are drawn again below the line: as they are now
                self._live.refresh()
            self._rich.print(line, markup=False)
        elif self.main:
            print(line, file=self._out, flush=True)

    def say_progress(self, line: str) -> None:
        """A line that `progress=False` silences."""
        if self.progress:
            self.say(line)

    @property
    def eta(self) -> str:
        """The time left of the outermost bar, to end a line with."""
        return f"  {self._bars[0].eta}" if self._bars and self._bars[0].eta else ""

    @contextmanager
    def bar(self, title: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[Bar]:
        """A bar in a terminal, or a line now and then without one; nothing where `progress` is off."""
        bar = Bar(title, total, done=done, unit=unit)
        self._bars.append(bar)
        try:
            if not self.progress:
                yield bar
            elif self._rich is not None and self._rich.is_terminal:
                with self._drawn(bar):
                    yield bar
            else:
                with self._lines(bar):
                    yield bar
        finally:
            self._bars.remove(bar)

    @contextmanager
    def _drawn(self, bar: Bar) -> Iterator[None]:
        outermost = self._live is None
        if outermost:  # a terminal has room for one display; bars inside are further lines of it
            self._live = _display(self._rich)
            self._live.start()
        task = self._live.add_task(bar.title, total=None, bar=bar)
        try:
            yield
        finally:
            self._live.remove_task(task)
            if outermost:
                self._live.stop()
                self._live = None

    @contextmanager
    def _lines(self, bar: Bar) -> Iterator[None]:
        opened, over = time.monotonic(), threading.Event()

        def tick() -> None:
            # Whatever was said last shows that the run lives.
            quiet = LINE_SECONDS if self._bars[0] is not bar else FIRST_LINE_SECONDS
            wait = quiet
            while not over.wait(wait):
                wait = quiet - (time.monotonic() - max(self._said, opened))
                if wait <= 0:
                    if self._bars[-1:] == [bar]:  # of nested bars the inner one tells more
                        self.say(str(bar))
                        quiet = LINE_SECONDS
                    wait = quiet

        ticker = threading.Thread(target=tick, name="fastpref-progress", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            over.set()
            ticker.join()


def _display(console: Any) -> Any:
    """rich's progress display, whose columns read the bar at each refresh."""
    from rich.progress import Progress, ProgressColumn
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    class Drawn(ProgressColumn):
        def render(self, task: Any) -> Any:
            bar = task.fields["bar"]
            return ProgressBar(total=max(bar.total, 1), completed=bar.done, width=min(40, max(6, console.width - 74)))

    class Said(ProgressColumn):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def render(self, task: Any) -> Any:
            return Text(getattr(task.fields["bar"], self.name), no_wrap=True, overflow="ellipsis")

    columns = (Said("title"), Drawn(), Said("count"), Said("eta"), Said("note"))
    return Progress(*columns, console=console, transient=True)
