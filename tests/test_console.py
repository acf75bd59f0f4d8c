"""Lines and progress bars, in a terminal and in a log."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest

pytest.importorskip("rich", reason="fastpref.console needs fastpref[train]")

from fastpref import console
from fastpref.console import Console


def test_the_time_left_of_a_resumed_run_counts_what_it_does_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 900 of 1000 in hand, two seconds a step: not a thousandth of that."""
    now = [50.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Console(progress=False).bar("train", 1000, done=900, unit="step") as bar:
        assert str(bar) == "train: 900/1,000 steps (90%)"
        for _ in range(4):
            now[0] += 2.0
            bar.advance(tokens=100)
        assert str(bar) == "train: 904/1,000 steps (90%)  eta 0:03:12  50 tokens/s"
        bar.advance(note="slow")
        assert str(bar).endswith("  slow")
        now[0] += 2 * console.RATE_SECONDS  # a slow one is forgotten in time
        for _ in range(2):
            bar.advance()
            now[0] += 2.0
        assert bar.eta == "eta 0:03:06"  # 93 steps


def lines_of(monkeypatch: pytest.MonkeyPatch, *, progress: bool = True, every: float = 0.05) -> tuple[Console, Any]:
    monkeypatch.setattr(console, "FIRST_LINE_SECONDS", every)
    monkeypatch.setattr(console, "LINE_SECONDS", every)
    out = io.StringIO()
    return Console(main=True, progress=progress, out=out), out


def wait_for(out: io.StringIO, text: str) -> None:
    end = time.perf_counter() + 60
    while text not in out.getvalue():
        assert time.perf_counter() < end, out.getvalue()
        time.sleep(0.01)


def test_without_a_terminal_a_line_shows_that_a_long_step_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, out = lines_of(monkeypatch)
    with shown.bar("train", 10, unit="step") as bar:
        wait_for(out, "train: 0/10 steps (0%)\n")  # nothing has advanced yet
        bar.advance(3, note="loss 0.5")
        wait_for(out, "train: 3/10 steps (30%)  eta ")
        with shown.bar("evaluation", 4) as inner:
            inner.advance()
            wait_for(out, "evaluation: 1/4 (25%)")
            said = out.getvalue().count("train:")
            time.sleep(0.2)
            assert out.getvalue().count("train:") <= said + 1  # of two bars the inner one speaks
    said = out.getvalue()
    time.sleep(0.15)
    assert out.getvalue() == said
    assert "loss 0.5" in said


def test_a_line_that_was_said_puts_off_the_next_and_progress_off_silences_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    shown, out = lines_of(monkeypatch)
    with shown.bar("train", 10):
        shown.say("a record")
        time.sleep(0.3)  # several times as long as it waits; by its clock no time has passed since the line
        assert "train:" not in out.getvalue()
        now[0] += 1.0
        wait_for(out, "train:")
    shown, out = lines_of(monkeypatch, progress=False)
    with shown.bar("train", 10) as bar:
        bar.advance()
        time.sleep(0.2)
    assert out.getvalue() == ""


def test_in_a_terminal_bars_may_be_nested_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = io.StringIO()
    shown = Console(main=True, progress=True, out=out)
    for _ in range(2):
        with shown.bar("train", 4, done=1, unit="step") as bar:
            bar.advance(note="1,234 tokens/s")
            with shown.bar("evaluation", 2, unit="pair") as inner:
                inner.advance()
                shown.say("a line")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert text.count("a line") == 2
    assert re.search(r"train +\S+ 2/4 steps \(50%\) +eta \S+ +1,234 tokens/s", text)
    assert re.search(r"evaluation +\S+ 1/2 pairs \(50%\)", text)
