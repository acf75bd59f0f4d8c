"""`pytest benchmarks`: options, the machine, and the rows of the run. Plain `pytest` takes tests/ only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The suites import their neighbours by name, and so does memory_worker.py.
sys.path.insert(0, os.path.dirname(__file__))

import results
import results_linear
from cases import DEVICE_CLASSES
from session import RUN, Run


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastpref")
    group.addoption("--device-class", choices=["auto", *DEVICE_CLASSES], default="auto", help="which set of cases")
    group.addoption("--results", type=Path, help="write the rows to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--collect-only"):
        return
    try:
        config.stash[RUN] = Run(config.getoption("--device-class"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Iterator[Run]:
    yield pytestconfig.stash[RUN]
    pytestconfig.stash[RUN].worker.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if RUN not in config.stash or not config.stash[RUN].rows:
        return
    run = config.stash[RUN]
    head = results.environment(run.device, run.device_class, run.copy_gb_per_s)
    terminalreporter.section("fastpref")
    terminalreporter.write_line(f"{head['device']}; copy {run.copy_gb_per_s:.1f} GB/s; {head['date']}")
    linear = [row for row in run.rows if row["suite"] == "linear"]
    others = [row for row in run.rows if row["suite"] != "linear"]
    lines = []
    if others:
        lines += [*results.table(others).splitlines(), *results.headline(others)]
    if linear:
        lines += [*results_linear.table(linear).splitlines(), *results_linear.promises(linear, run.device_class)]
    for line in lines:
        terminalreporter.write_line(line)
    if (path := config.getoption("--results")) is not None:
        results.write(path, head, run.rows)
        terminalreporter.write_line(f"{len(run.rows)} rows in {path}")
