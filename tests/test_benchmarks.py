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
from torch.nn import functional

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


def _rows(run: tuple[str, dict[str, Any]], *suites: str) -> list[dict[str, Any]]:
    return [row for row in run[1]["rows"] if row["suite"] in suites]


def test_every_provider_has_a_row_for_every_tiny_case(run: tuple[str, dict[str, Any]]) -> None:
    rows = _rows(run, "logps", "losses")
    got = {(r["case"], r["provider"], r["mode"]) for r in rows}
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
    assert len(rows) == len(wanted)


def test_every_linear_provider_that_is_installed_has_a_row(run: tuple[str, dict[str, Any]]) -> None:
    train = {"products", "fastpref", "fastpref_logps", "logits", "plain", "plain_fp32"}
    for modules, names in {
        "trl": ("trl_selective", "trl_chunked"),
        "liger_kernel": ("liger",),
    }.items():
        train.update(names if importlib.util.find_spec(modules) else ())
    if hasattr(functional, "linear_cross_entropy"):
        train.update(("linear_cross_entropy", "linear_cross_entropy_tuned"))
    cases = ("linear-tiny", "linear-tiny-bf16", "linear-tiny-frozen")
    wanted = {(case, name, "train") for case in cases for name in train}
    wanted |= {(case, name, "forward") for case in cases for name in ("products", "fastpref_logps", "plain")}
    rows = _rows(run, "linear")
    assert {(r["case"], r["provider"], r["mode"]) for r in rows} == wanted
    assert len(rows) == len(wanted)


def test_every_linear_row_has_time_memory_and_its_ratio_to_the_products(run: tuple[str, dict[str, Any]]) -> None:
    rows = _rows(run, "linear")
    floors = {(r["case"], r["mode"]): r["median_ms"] for r in rows if r["provider"] == "products"}
    for row in rows:
        assert 0 < row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"], row
        assert math.isclose(row["ratio_to_products"], row["median_ms"] / floors[row["case"], row["mode"]])
        count = 1 if row["mode"] == "forward" else 2 if row["frozen"] else 3
        assert row["products"] == count
        assert math.isclose(row["tflop_per_s"], count * row["unit_operations"] / row["median_ms"] / 1e9)
        if row["provider"] == "products":
            assert row["products_dtype"] in ("float32", "bfloat16")
        else:
            assert row["peak_beyond_gradient_bytes"] <= row["peak_bytes"]


def test_products_count_scored_rows_alone(run: tuple[str, dict[str, Any]]) -> None:
    """(4, 9) positions with 4 of 8 scored a sequence: 16 rows of 24 by a head of 507."""
    (row,) = [r for r in _rows(run, "linear") if (r["case"], r["provider"]) == ("linear-tiny-frozen", "fastpref")]
    assert row["scored_rows"] == 16
    assert row["unit_operations"] == 2 * 16 * 24 * 507
    assert row["gradient_bytes"] == 4 * 9 * 24 * 4  # of the hidden states alone: the head is frozen


def test_every_way_to_the_linear_loss_computes_the_same_loss_and_gradients(run: tuple[str, dict[str, Any]]) -> None:
    for row in _rows(run, "linear"):
        if row["provider"] == "products":
            continue
        bf16 = row["dtype"] == "bf16"
        # Ours and plain_fp32 round gradients alone to bfloat16; others round logits or their sum too.
        exact = row["provider"] in ("fastpref", "fastpref_logps", "plain_fp32")
        assert row["loss_error"] < (2**-8 if bf16 and not exact else 1e-6), row
        bound = 1e-6 if not bf16 else 2**-8 if exact else 2**-6
        wanted = [name for name, there in _GRADIENTS.items() if row["mode"] == "train" and there(row)]
        for name in _GRADIENTS:
            if name in wanted:
                assert row[name] < bound, row
            else:
                assert row[name] is None


_GRADIENTS = {
    "hidden_error_relative": lambda row: True,
    "weight_error_relative": lambda row: not row["frozen"],
}


def test_every_row_has_time_memory_error_and_bandwidth(run: tuple[str, dict[str, Any]]) -> None:
    for row in _rows(run, "logps", "losses"):
        assert 0 < row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"], row
        assert len(row["times_ms"]) == row["rounds"] >= 2
        assert math.isclose(row["gb_per_s"], row["bytes_that_must_move"] / row["median_ms"] / 1e6)
        assert math.isclose(row["ratio_to_copy"], row["gb_per_s"] / row["copy_gb_per_s"])
        assert isinstance(row["peak_bytes"], int)
        assert row["peak_beyond_gradient_bytes"] <= row["peak_bytes"]


def test_the_errors_are_those_of_the_dtype(run: tuple[str, dict[str, Any]]) -> None:
    """A provider that computed something else would show here: its time would be worth nothing."""
    for row in _rows(run, "logps", "losses"):
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
    assert "of products" in printed
    assert "MISSED" not in printed  # tiny cases promise nothing


def _results_module(name: str = "results") -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
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


def _linear_row(case: str, provider: str, ms: float, **others: Any) -> dict[str, Any]:
    row = {"case": case, "provider": provider, "mode": "train", "median_ms": ms, "rival": False, "scored_rows": 510}
    return {**row, "ratio_to_products": None, "peak_beyond_gradient_bytes": None, **others}


def test_the_linear_promises_name_the_fastest_rival_and_say_which_is_missed() -> None:
    rows = [
        _linear_row("linear-half", "fastpref", 100.0, ratio_to_products=1.5),
        _linear_row("linear-half", "plain", 760.0),
        _linear_row("linear-half", "liger", 900.0, rival=True),
        _linear_row("linear-half", "trl_selective", 390.0, rival=True),
        _linear_row("linear-frozen", "fastpref", 60.0),
        _linear_row("linear-half-64MiB", "fastpref", 160.0, peak_beyond_gradient_bytes=70 * 2**20),
        _linear_row(
            "linear-growth-4k-64MiB", "fastpref", 700.0, peak_beyond_gradient_bytes=81 * 2**20, scored_rows=2040
        ),
    ]
    module = _results_module("results_linear")
    assert module.promises(rows, "cpu") == [
        "linear-half: 7.60 times faster than plain (at least 7.5): met",
        "linear-half: 3.90 times faster than trl_selective, the fastest of 2 rivals (at least 4): MISSED",
        "linear-half: 1.50 times the products alone (at most 1.4): MISSED",
        "linear-half-64MiB: 4.75 times faster than plain (at least 5): MISSED",
        "linear-frozen: 0.60 of the trainable time (at most 0.65): met",
        "linear-half-64MiB: 70.00 MiB beyond the gradients (at most 80): met",
        "linear-growth-4k-64MiB: 81.00 MiB beyond the gradients (at most 80): MISSED",
        "linear-growth-4k-64MiB: 1.09 times the time a row of linear-half-64MiB (at most 1.15): met",
    ]
    assert module.promises(rows[:1], "tiny") == []


def test_the_linear_promises_on_a_gpu_are_ratios_to_the_products_and_peaks() -> None:
    peak = {"peak_beyond_gradient_bytes": 2**30}
    forward = {"mode": "forward", "ratio_to_products": 1.2, "products": 1}
    rows = [
        _linear_row("linear-half", "fastpref", 37.0, ratio_to_products=1.1, products=3, **peak),
        _linear_row("linear-half", "fastpref_logps", 13.0, **forward),
    ]
    assert _results_module("results_linear").promises(rows, "gpu") == [
        "linear-half: 1.20 times the products alone, 1 of them, fastpref_logps forward (at most 1.15): MISSED",
        "linear-half: 1.10 times the products alone, 3 of them, fastpref train (at most 1.12): met",
        "linear-half: 1024.00 MiB beyond the gradients (at most 1126.4): met",
    ]
