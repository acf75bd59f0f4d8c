"""The benchmarks run on tiny cases and leave complete rows. A process of its own: no test imports a benchmark."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks/ is not beside tests/")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What `pytest benchmarks --device-class tiny` printed, and the file it wrote."""
    folder = tmp_path_factory.mktemp("benchmarks")
    results = folder / "results.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTPREF_BACKEND")}
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-q", "-p", "no:cacheprovider"]
    options = ["--device-class", "tiny", "--results", str(results), f"--benchmark-storage={folder}"]
    done = subprocess.run(
        [*command, *options],
        cwd=folder,
        env=environment,
        text=True,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads(results.read_text())


def test_the_file_names_machine_versions_and_date(run: tuple[str, dict[str, Any]]) -> None:
    _, file = run
    assert file["schema"] == 1
    assert file["date"].startswith("20")
    assert file["device"]
    assert "commit" in file
    assert file["device_class"] == "tiny"
    assert file["copy_gb_per_s"] > 0
    assert file["versions"]["torch"]


def test_every_provider_has_a_row_for_every_tiny_case(run: tuple[str, dict[str, Any]]) -> None:
    got = {(r["case"], r["provider"], r["mode"]) for r in run[1]["rows"]}
    wanted = {
        (case, provider, mode)
        for case in ("tiny-odd", "tiny-bf16")
        for provider, modes in {
            "fastpref": ("train", "forward"),
            "inplace": ("train",),
            "plain": ("train", "forward"),
            "cross_entropy": ("train", "forward"),
            "cross_entropy_nocopy": ("train",),
        }.items()
        for mode in modes
    }
    wanted |= {(case, name, "train") for case in ("dpo-7", "dpop-7") for name in ("fastpref", "plain")}
    assert got == wanted
    assert len(run[1]["rows"]) == len(wanted)


def test_every_row_has_time_memory_error_and_bandwidth(run: tuple[str, dict[str, Any]]) -> None:
    for row in run[1]["rows"]:
        assert 0 < row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"], row
        assert len(row["times_ms"]) == row["rounds"] >= 2
        assert math.isclose(row["gb_per_s"], row["bytes_that_must_move"] / row["median_ms"] / 1e6)
        assert math.isclose(row["ratio_to_copy"], row["gb_per_s"] / row["copy_gb_per_s"])
        assert isinstance(row["peak_bytes"], int)
        assert row["peak_beyond_gradient_bytes"] <= row["peak_bytes"]


def test_the_errors_are_those_of_the_dtype(run: tuple[str, dict[str, Any]]) -> None:
    """A provider that computed something else would show here: its time would be worth nothing."""
    for row in run[1]["rows"]:
        bf16 = row.get("dtype") == "bf16"
        coarse = bf16 and row["provider"].startswith("cross_entropy")  # alone in keeping bfloat16 values
        # Half a step of bfloat16 near 16 a token; a few steps of float32 near 64.
        assert row["value_error_per_token"] < (2**-5 if coarse else 1e-5), row
        if row["mode"] == "train":
            # Relative to the norm: half a step of bfloat16 (twice that where p is rounded too), a few of float32.
            assert row["gradient_error_relative"] < (2**-8 if bf16 else 1e-6), row
        else:
            assert row["gradient_error_relative"] is None


def test_bytes_count_scored_rows_twice_read_once_written_and_zeros(run: tuple[str, dict[str, Any]]) -> None:
    """(2, 9, 507) float32 with 4 of 8 positions scored a sequence: 8 rows read twice, 18 rows written."""
    by_mode = {r["mode"]: r for r in run[1]["rows"] if r["case"] == "tiny-odd"}
    assert by_mode["train"]["scored_rows"] == 8
    assert by_mode["train"]["bytes_that_must_move"] == 507 * 4 * (2 * 8 + 18)
    assert by_mode["forward"]["bytes_that_must_move"] == 507 * 4 * 8


def test_the_table_is_printed_without_a_headline(run: tuple[str, dict[str, Any]]) -> None:
    printed, file = run
    assert "peak MiB" in printed
    assert f"{len(file['rows'])} rows in " in printed
    assert "headline" not in printed


def _results_module() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_results", BENCHMARKS / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_headline_says_which_promise_is_missed() -> None:
    row = {"case": "headline", "mode": "train", "peak_beyond_gradient_bytes": 17 * 2**20}
    times = {"fastpref": 100.0, "plain": 500.0, "cross_entropy": 360.0, "cross_entropy_nocopy": 340.0}
    rows = [{**row, "provider": name, "median_ms": ms} for name, ms in times.items()]
    assert _results_module().headline(rows) == [
        "headline: 5.00 times faster than plain (at least 5): met",
        "headline: 3.60 times faster than cross_entropy (at least 3.5): met",
        "headline: 3.40 times faster than cross_entropy_nocopy (at least 3.5): MISSED",
        "headline: 17.00 MiB beyond the gradient (at most 16): MISSED",
    ]
    assert _results_module().headline(rows[:2]) == []
