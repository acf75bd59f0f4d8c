"""`pytest benchmarks`: options, the machine, and the rows of the run. Plain `pytest` takes tests/ only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastpref.benchmarks.cases import DEVICE_CLASSES
from fastpref.benchmarks.cli import print_rows
from fastpref.benchmarks.promises import judge
from fastpref.benchmarks.runner import Run

RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastpref")
    group.addoption("--device-class", choices=["auto", *DEVICE_CLASSES], default="auto", help="which set of cases")
    group.addoption("--results", type=Path, help="write the rows to this JSON file, one by one")


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[RUN] = Run(config.getoption("--device-class"), config.getoption("--results"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    entries = metafunc.config.stash[RUN].entries()
    names = [f"{entry.suite.name}-{entry.case.name}-{entry.provider}-{entry.mode}" for entry in entries]
    metafunc.parametrize("entry", entries, ids=names)


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Iterator[Run]:
    run = pytestconfig.stash[RUN]
    yield run
    run.close()
    run.save(complete=True)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash.get(RUN, None)
    if run is None or not run.rows:
        return
    terminalreporter.section("fastpref")
    copy = run.head["copy_gb_per_s"]
    terminalreporter.write_line(f"{run.head['device']}; copy {copy:.1f} GB/s; {run.head['date']}")
    print_rows(run.rows)
    for promise in judge(run.rows, run.device_class):
        terminalreporter.write_line(str(promise))
    if run.path is not None:
        terminalreporter.write_line(f"{len(run.rows)} rows in {run.path}")
