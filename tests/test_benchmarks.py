"""The benchmarks run on tiny cases and leave complete rows, by `pytest benchmarks` and by `fastpref bench`."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the bench extra is not installed")

from fastpref.benchmarks import results
from fastpref.benchmarks.measure import Timer, cpu_times, peak_on_gpu, stolen_share
from fastpref.benchmarks.promises import judge
from fastpref.benchmarks.runner import MEMORY, Entry, Run, measure, select
from fastpref.benchmarks.suites import SUITES
from fastpref.cli import main
from fastpref.folders import MARKER

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FAMILIES = {"fastpref", "plain", "torch"}  # of the ways that need nothing installed
ALWAYS = {
    "logps": ("fastpref", "inplace", "plain", "cross_entropy", "cross_entropy_nocopy"),
    "linear": ("products", "fastpref", "fastpref_logps", "logits", "plain", "plain_fp32"),
    "losses": ("fastpref", "plain"),
}


@pytest.fixture(scope="module")
def run() -> Run:
    """The tiny rows of what needs nothing but this project and torch; memory of our own way alone is measured."""
    return _measured(*ALWAYS, weighed=("fastpref",))


def _measured(*suites: str, weighed: tuple[str, ...] | None = None) -> Run:
    """Of `weighed` providers the memory is measured too, which takes another process longer than the time."""
    run = Run("tiny")
    for entry in _wanted(run, *suites):
        with pytest.MonkeyPatch.context() as patch:
            if weighed is not None and entry.provider not in weighed:
                patch.setattr(Run, "weigh", lambda *_, **__: dict.fromkeys(MEMORY))
            measure(run, entry)
    run.close()
    return run


def _wanted(run: Run, *suites: str) -> list[Entry]:
    found = [entry for entry in run.entries() if entry.suite.name in suites]
    return [entry for entry in found if entry.suite.providers[entry.provider].family in {*FAMILIES, "limit"}]


def _rows(run: Run, *suites: str) -> list[dict[str, Any]]:
    return [row for row in run.rows if row["suite"] in suites]


def test_every_way_that_is_installed_has_a_row_for_every_tiny_case(run: Run) -> None:
    wanted = {
        (entry.suite.name, entry.case.name, entry.provider, entry.mode)
        for entry in _wanted(run, *ALWAYS)
        if entry.suite.providers[entry.provider].why_not(entry.case, "cpu") is None
    }
    got = [(row["suite"], row["case"], row["provider"], row["mode"]) for row in run.rows]
    assert set(got) == wanted
    assert len(got) == len(wanted)
    for suite, names in ALWAYS.items():
        assert set(names) <= {name for of_suite, _, name, _ in wanted if of_suite == suite}


def test_every_row_has_time_memory_its_rate_and_its_ratio_to_the_limit(run: Run) -> None:
    for row in run.rows:
        assert 0 < row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"], row
        assert len(row["times_ms"]) == row["rounds"] >= 1
        assert row["first_ms"] > 0
        assert row["stolen_share"] is None or 0 <= row["stolen_share"] <= 1
        scale = {"GB/s": 1e6, "TFLOP/s": 1e9}[row["rate_unit"]]
        assert math.isclose(row["rate"], row["work"] / row["median_ms"] / scale)
        assert math.isclose(row["ratio_to_limit"], row["limit_ms"] / row["median_ms"])
        if row["family"] == "limit":
            assert row["ratio_to_limit"] == 1
        if row["peak_bytes"] is not None:
            assert row["peak_beyond_gradient_bytes"] <= row["peak_bytes"]


def test_the_limit_of_a_copy_follows_from_bytes_and_the_bandwidth_of_the_same_run(run: Run) -> None:
    for row in _rows(run, "logps", "losses"):
        assert math.isclose(row["limit_ms"], row["work"] / run.head["copy_gb_per_s"] / 1e6)


def test_the_limit_of_the_linear_path_is_the_time_of_its_products(run: Run) -> None:
    rows = _rows(run, "linear")
    floors = {(r["case"], r["mode"]): r["median_ms"] for r in rows if r["provider"] == "products"}
    for row in rows:
        assert row["limit_ms"] == floors[row["case"], row["mode"]]
        assert row["products"] == (1 if row["mode"] == "forward" else 2 if row["frozen"] else 3)


def test_the_errors_are_those_of_the_dtype(run: Run) -> None:
    """A provider that computed something else would show here: its time would be worth nothing."""
    for row in _rows(run, "logps", "losses"):
        bf16 = row.get("dtype") == "bf16"
        coarse = bf16 and row["provider"].startswith("cross_entropy")  # alone in keeping bfloat16 values
        # Half a step of bfloat16 near 16 a token; a few steps of float32 near 64.
        error = row["value_error_per_token"] if row["suite"] == "logps" else row["value_error"]
        assert error < (2**-5 if coarse else 1e-5), row
        if row["mode"] == "train":
            # Relative to the norm: half a step of bfloat16 (twice that where p is rounded too), a few of float32.
            assert row["gradient_error"] < (2**-8 if bf16 else 1e-6), row
        else:
            assert row["gradient_error"] is None


def test_every_way_to_the_linear_loss_computes_the_same_loss_and_gradients(run: Run) -> None:
    for row in _rows(run, "linear"):
        if row["provider"] == "products":
            assert row["value_error"] is None
            continue
        bf16 = row["dtype"] == "bf16"
        # Ours and plain_fp32 round gradients alone to bfloat16; others round logits or their sum too.
        exact = row["provider"] in ("fastpref", "fastpref_logps", "plain_fp32")
        assert row["value_error"] < (2**-8 if bf16 and not exact else 1e-6), row
        if row["mode"] == "forward":
            assert row["gradient_errors"] is None
            continue
        assert list(row["gradient_errors"]) == (["hidden"] if row["frozen"] else ["hidden", "weight"])
        assert row["gradient_error"] == max(row["gradient_errors"].values())
        assert row["gradient_error"] < (1e-6 if not bf16 else 2**-8 if exact else 2**-6), row


@pytest.mark.slow
def test_the_memory_of_every_way_is_measured() -> None:
    for row in _measured(*ALWAYS).rows:
        if row["provider"] != "products" and sys.platform == "linux":
            assert row["peak_beyond_gradient_bytes"] <= row["peak_bytes"], row


@pytest.mark.slow
def test_every_way_takes_the_same_training_step() -> None:
    pytest.importorskip("transformers", reason="the train extra is not installed")
    rows = [row for row in _measured("step").rows if row["case"] == "step-tiny"]
    (limit,) = [row for row in rows if row["family"] == "limit"]
    assert {"fastpref", "fastpref_hidden", "fastpref_logits", "plain"} <= {row["provider"] for row in rows}
    for row in rows:
        assert math.isclose(row["tokens_per_second"], 4 * 23 / row["median_ms"] * 1e3)
        if row is limit:
            continue
        assert row["value_error"] < 2e-6, row
        assert row["gradient_error"] < 2e-6, row
        assert set(row["gradient_errors"]) == {"q_proj", "norm", "head"}
        assert math.isclose(row["head_share"], 1 - limit["median_ms"] / row["median_ms"])


def test_bytes_count_scored_rows_twice_read_once_written_and_zeros(run: Run) -> None:
    """(2, 9, 507) float32 with 4 of 8 positions scored a sequence: 8 rows read twice, 18 rows written."""
    by_mode = {row["mode"]: row for row in run.rows if row["case"] == "tiny-odd"}
    assert by_mode["train"]["scored_rows"] == 8
    assert by_mode["train"]["work"] == 507 * 4 * (2 * 8 + 18)
    assert by_mode["forward"]["work"] == 507 * 4 * 8


def test_operations_count_scored_rows_alone(run: Run) -> None:
    """(4, 9) positions with 4 of 8 scored a sequence: 16 rows of 24 by a head of 507, twice for a frozen head."""
    (row,) = [r for r in _rows(run, "linear") if (r["case"], r["provider"]) == ("linear-tiny-frozen", "fastpref")]
    assert row["scored_rows"] == 16
    assert row["work"] == 2 * (2 * 16 * 24 * 507)
    assert row["gradient_bytes"] == 4 * 9 * 24 * 4  # of the hidden states alone: the head is frozen


def test_a_named_provider_brings_the_limit_of_its_case_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "weigh", lambda *_, **__: dict.fromkeys(MEMORY))
    run = Run("tiny")
    (entry,) = select(run.entries(), cases=("linear-tiny-frozen",), providers=("plain_fp32",))
    row = measure(run, entry)
    run.close()
    assert row is not None
    assert [r["provider"] for r in run.rows] == ["products", "plain_fp32"]
    assert row["limit_ms"] == run.rows[0]["median_ms"]


def test_a_rival_that_breaks_leaves_a_line_and_ours_does_not_pass_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = SUITES["losses"]
    run = Run("tiny")
    (case,) = [case for case in suite.cases("tiny", memory=0) if case.loss == "dpo"]

    def broken(suite_: Any, case_: Any, provider: str, mode: str, inputs: Any) -> Any:
        raise RuntimeError(f"no {provider} today")

    monkeypatch.setattr(type(suite), "call", broken)
    assert measure(run, Entry(suite, case, "plain", "train")) is None
    (line,) = run.skipped
    assert (line["provider"], line["reason"]) == ("plain", "RuntimeError: no plain today")
    with pytest.raises(RuntimeError, match="no fastpref today"):
        measure(run, Entry(suite, case, "fastpref", "train"))
    run.close()


def test_a_value_that_is_not_finite_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = SUITES["losses"]
    run = Run("tiny")
    case = suite.cases("tiny", memory=0)[0]
    monkeypatch.setattr(type(suite), "errors", lambda *_: {"value_error": math.nan})
    assert measure(run, Entry(suite, case, "plain", "train")) is None
    assert run.skipped[0]["reason"] == "ArithmeticError: what it computes is not finite"
    run.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "logits"], ["unknown suite 'logits'", "logps, linear, losses, step"]),
        (["--case", "gpt2", "tiny-od"], ["unknown case 'gpt2', 'tiny-od'", "tiny-odd", "linear-tiny"]),
        (["--provider", "flash"], ["unknown provider 'flash'", "fastpref", "plain_fp32", "trl"]),
        (["--suite", "losses", "--provider", "inplace"], ["no row", "suite losses", "provider inplace"]),
        (["--device_class", "tpu"], ["unknown device class 'tpu'", "cpu, gpu, quick, tiny"]),
        (["--quick"], ["--quick is the set quick, and --device_class says tiny"]),
        (["--name", "a/b"], ["--name must be letters", "'a/b'"]),
        (["--compare", "old.json"], ["--compare"]),
    ],
)
def test_bad_input_is_one_line_that_lists_what_is_known(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "--device_class" in arguments
    given = ["bench", *([] if own else ["--device_class", "tiny"]), "--output_dir", str(tmp_path / "out"), *arguments]
    assert main(given) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("fastpref bench: error: ")
    assert all(word in printed for word in words), printed
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_refused_and_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"results.json": "{}", "linear-half.png": "a picture"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    given = ["bench", "--device_class", "tiny", "--overwrite", "--output_dir"]
    refused = [(tmp_path, "linear-half.png"), (tmp_path / "results.json", "file"), (tmp_path / "a" / "b", "mkdir -p")]
    for folder, says in refused:
        assert main([*given, str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("package", "options"), [("rich", ["--no_plots"]), ("psutil", ["--no_plots"]), ("matplotlib", [])]
)
def test_without_its_extra_bench_says_which_one_to_install(
    package: str,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    for name in ("fastpref.benchmarks.cli", "fastpref.console", "fastpref.memory"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["bench", "--device_class", "tiny", "--output_dir", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert package in line
    assert 'pip install "fastpref[bench]"' in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 1, "rows": []}', "has schema 1, this version of fastpref reads schema 2"),
        ("[]", "names no schema"),
        ("{", "is no results file"),
        ('{"schema": 2, "rows": []}', "lacks device"),
    ],
)
def test_a_file_of_another_schema_is_refused(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old.json", "new.json"):
        (tmp_path / name).write_text(text)
    assert main(["bench", "--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 2
    assert words in capsys.readouterr().err
    assert main(["bench", "--compare", str(tmp_path / "gone.json"), str(tmp_path / "new.json")]) == 2
    assert "gone.json" in capsys.readouterr().err


def test_bench_writes_a_whole_file_and_shows_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Run, "weigh", lambda *_, **__: dict.fromkeys(MEMORY))
    names = ["fastpref", "plain"]
    given = ["bench", "--device_class=tiny", "--suite=losses", f"--output_dir={tmp_path}", "--provider", *names]
    assert main([*given, "--name", "tiny", "--no_plots"]) == 0
    file = results.read(tmp_path / "tiny.json")
    assert file["complete"] is True
    assert file["device_class"] == "tiny"
    assert file["versions"]["torch"]
    assert file["copy_gb_per_s"] > 0
    assert [row["provider"] for row in file["rows"]] == names * 2
    printed = capsys.readouterr()
    assert "losses dpop-7 plain train: " in printed.err
    assert "4 rows in" in printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, "tiny.json"]
    before = (tmp_path / "tiny.json").read_bytes()
    assert main([*given, "--name", "tiny", "--no_plots"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "tiny.json").read_bytes() == before


def test_the_list_names_every_way_and_why_some_are_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device_class", "tiny", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "suite linear (limit: the matrix products alone)" in printed
    assert "cut_cross_entropy: linear_cross_entropy" in printed
    assert "[skipped: " in printed


def test_an_interrupted_run_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a signal that comes in the third row."""

    def interrupting(run: Run, entry: Entry) -> Any:
        if len(run.rows) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(run, entry)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's tests start without one
    monkeypatch.setattr("fastpref.benchmarks.runner.measure", interrupting)
    monkeypatch.setattr(Run, "weigh", lambda *_, **__: dict.fromkeys(MEMORY))
    given = ["bench", "--device_class", "tiny", "--suite", "losses", "--provider", "fastpref", "plain"]
    try:
        assert main([*given, "--output_dir", str(tmp_path), "--no_plots"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    file = results.read(tmp_path / "results.json")
    assert (len(file["rows"]), file["complete"]) == (2, False)
    assert "2 rows are kept in" in capsys.readouterr().out


@pytest.mark.slow
def test_pytest_runs_the_same_rows(tmp_path: Path) -> None:
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks/ is not beside tests/")
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-q", "-p", "no:cacheprovider", "-k", "losses"]
    options = ["--device-class", "tiny", "--results", str(path), f"--benchmark-storage={tmp_path}"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, text=True, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    file = results.read(path)
    assert {(row["case"], row["provider"]) for row in file["rows"]} == {
        (case, name) for case in ("dpo-7", "dpop-7") for name in ("fastpref", "plain")
    }
    assert file["complete"] is True
    assert "4 rows in" in done.stdout


def _promise_row(case: str, provider: str, ms: float, **others: Any) -> dict[str, Any]:
    row = {"suite": "linear", "case": case, "provider": provider, "mode": "train", "median_ms": ms, "rival": False}
    row |= {
        "scored_rows": 510,
        "ratio_to_limit": None,
        "peak_beyond_gradient_bytes": None,
        "products": 3,
        "series": None,
    }
    return {**row, **others}


def test_the_headline_says_which_promise_is_missed() -> None:
    times = {"fastpref": 100.0, "plain": 500.0, "cross_entropy": 360.0, "cross_entropy_nocopy": 340.0}
    peak = 17 * 2**20
    rows = [_promise_row("headline", name, ms, peak_beyond_gradient_bytes=peak) for name, ms in times.items()]
    assert sorted(map(str, judge(rows, "cpu"))) == [
        "headline: 17.00 MiB beyond the gradients (at most 16): MISSED",
        "headline: 3.40 times faster than cross_entropy_nocopy (at least 3.5): MISSED",
        "headline: 3.60 times faster than cross_entropy (at least 3.5): met",
        "headline: 5.00 times faster than plain (at least 5): met",
    ]
    assert judge(rows, "tiny") == []


def test_the_linear_promises_name_the_fastest_rival_and_say_which_is_missed() -> None:
    rows = [
        _promise_row("linear-half", "fastpref", 100.0, ratio_to_limit=1 / 1.5),
        _promise_row("linear-half", "plain", 760.0),
        _promise_row("linear-half", "liger", 900.0, rival=True),
        _promise_row("linear-half", "trl_selective", 390.0, rival=True),
        _promise_row("linear-frozen", "fastpref", 60.0),
        _promise_row("linear-half-64MiB", "fastpref", 160.0, peak_beyond_gradient_bytes=70 * 2**20),
        _promise_row(
            "linear-growth-4k-64MiB", "fastpref", 700.0, peak_beyond_gradient_bytes=81 * 2**20, scored_rows=2040
        ),
    ]
    assert sorted(map(str, judge(rows, "cpu"))) == [
        "linear-frozen: 0.60 of the trainable time (at most 0.65): met",
        "linear-growth-4k-64MiB: 1.09 times the time a row of linear-half-64MiB (at most 1.15): met",
        "linear-growth-4k-64MiB: 81.00 MiB beyond the gradients (at most 80): MISSED",
        "linear-half-64MiB: 4.75 times faster than plain (at least 5): MISSED",
        "linear-half-64MiB: 70.00 MiB beyond the gradients (at most 80): met",
        "linear-half: 1.50 times the products alone, 3 of them, fastpref train (at most 1.4): MISSED",
        "linear-half: 3.90 times faster than trl_selective, the fastest of 2 rivals (at least 4): MISSED",
        "linear-half: 7.60 times faster than plain (at least 7.5): met",
    ]


def test_the_promises_on_a_gpu_are_ratios_to_limits_and_peaks() -> None:
    peak = {"peak_beyond_gradient_bytes": 2**30}
    logits = {"suite": "logps", "work": 2**33, "ratio_to_limit": 0.89}
    rows = [
        _promise_row("qwen3", "fastpref", 5.0, **logits),
        _promise_row("headline", "fastpref", 0.1, **{**logits, "work": 2**29}),  # too small to fill a GPU
        _promise_row("linear-half", "fastpref", 37.0, ratio_to_limit=1 / 1.1, **peak),
        _promise_row("linear-half", "fastpref_logps", 13.0, mode="forward", ratio_to_limit=1 / 1.2, products=1),
    ]
    assert sorted(map(str, judge(rows, "gpu"))) == [
        "linear-half: 1.10 times the products alone, 3 of them, fastpref train (at most 1.12): met",
        "linear-half: 1.20 times the products alone, 1 of them, fastpref_logps forward (at most 1.15): MISSED",
        "linear-half: 1024.00 MiB beyond the gradients (at most 1126.4): met",
        "qwen3 train: 0.89 of a copy's bandwidth (at least 0.9): MISSED",
    ]


def test_time_that_a_hypervisor_took_is_told(tmp_path: Path) -> None:
    """user nice system idle iowait irq softirq steal guest: guest is part of user and does not count twice."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 20 60 0 5 3 2 50 0\ncpu0 1 1 1\n")
    assert cpu_times(stat) == (200, 2)
    assert cpu_times(tmp_path / "none") is None
    assert stolen_share(None) is None
    before = cpu_times()
    share = stolen_share(before)
    assert (share is None) == (before is None)
    assert share is None or 0 <= share <= 1


class _FakeCuda:
    """torch.cuda with a clock that a call advances by 2 ms, and an allocator whose peak it raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.clock = 0.0
        clock = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.clock

            def synchronize(self) -> None:
                clock.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        for name, value in {
            "Event": Event,
            "synchronize": lambda: self.log.append("synchronize"),
            "_sleep": lambda cycles: self.log.append("sleep"),
            "reset_peak_memory_stats": lambda: self.log.append("reset"),
            "memory_allocated": lambda: 1000,
            "max_memory_allocated": lambda: 5000,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self) -> None:
        self.log.append("call")
        self.clock += 2.0


def test_time_on_a_gpu_is_between_events_behind_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _FakeCuda(monkeypatch)
    timer = Timer("cuda")
    for _ in range(3):
        timer.before()
        timer.run(cuda.call)
    assert timer.seconds() == [0.002] * 3
    assert cuda.log == ["synchronize", "sleep", "call", "wait"] * 3


def test_memory_on_a_gpu_is_the_allocators_peak_beyond_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _FakeCuda(monkeypatch)
    over_input, fresh = torch.zeros(10), torch.zeros(7)
    measured = peak_on_gpu(lambda: [cuda.call(), over_input, fresh][1:], [over_input, "not a tensor"])
    assert measured == {"peak_bytes": 4000, "gradient_bytes": 28, "peak_beyond_gradient_bytes": 3972}
    assert cuda.log == ["synchronize", "reset", "call", "synchronize"]


def test_on_a_gpu_others_code_runs_after_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault there takes the process along; rows of ours are on disk by then."""
    run = Run("tiny")
    monkeypatch.setattr(run, "device", "cuda")
    for suite in SUITES.values():
        late = [
            (entry.suite.providers[entry.provider].family not in {*FAMILIES, "limit"})
            or entry.suite.providers[entry.provider].compiles
            for entry in run.entries()
            if entry.suite is suite
        ]
        assert late == sorted(late)
    run.close()


@pytest.mark.parametrize("device_class", ["cpu", "gpu", "quick", "tiny"])
def test_every_case_names_providers_that_exist_and_can_be_sized_without_a_device(device_class: str) -> None:
    for suite in SUITES.values():
        cases = suite.cases(device_class, memory=80 * 2**30)
        assert len({case.name for case in cases}) == len(cases) > 0
        for case in cases:
            for provider, mode in suite.entries(case, device_class):
                assert provider in suite.providers
                assert suite.work(case, mode) > 0
            assert all(hasattr(case, field) for field in suite.shape)
