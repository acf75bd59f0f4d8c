"""Every row of the device's set as a benchmark of pytest-benchmark's, with its storage, comparison and options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastpref.benchmarks.runner import Entry, Run, measure


def test_row(benchmark: Any, run: Run, entry: Entry) -> None:
    def clock(call: Callable[[], None], before: Callable[[], None], rounds: int) -> None:
        benchmark.pedantic(call, setup=before, rounds=rounds, iterations=1)

    row = measure(run, entry, clock)
    if row is None:
        pytest.skip(run.skipped[-1]["reason"])
    benchmark.extra_info.update(row)
