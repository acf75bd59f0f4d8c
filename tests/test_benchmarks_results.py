"""Pictures, comparison and report of results files whose rows are made by hand; and the committed report is current."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastpref.benchmarks.promises import judge
from fastpref.benchmarks.report import __main__ as report
from fastpref.benchmarks.report import noise, words
from fastpref.benchmarks.report.compare import Comparison, compare
from fastpref.benchmarks.report.page import NOT_MEASURED
from fastpref.benchmarks.report.plots import pictures, plot_all

MIB = 2**20
VERSIONS = {"torch": "2.13.0", "triton": "3.9.0", "trl": "1.16.0", "liger-kernel": None}


def a_row(provider: str, times: Sequence[float], **fields: Any) -> dict[str, Any]:
    """A row of the linear suite; `fields` replace its own."""
    ordered = sorted(times)
    row: dict[str, Any] = {
        "suite": "linear", "case": "linear-half", "mode": "train", "provider": provider,
        "family": "fastpref" if provider.startswith("fastpref") else "plain", "rival": False, "how": "as published",
        "batch": 2, "length": 507, "hidden": 24, "vocab": 1021, "share": 0.5, "dtype": "bf16", "scored_rows": 506,
        "frozen": False, "budget": None, "products": 3, "series": None,
        "median_ms": ordered[len(ordered) // 2], "q1_ms": ordered[len(ordered) // 4],
        "q3_ms": ordered[3 * len(ordered) // 4], "min_ms": ordered[0], "rounds": len(times), "times_ms": list(times),
        "first_ms": None, "work": 10**9, "work_unit": "FLOP", "rate": 1.0, "rate_unit": "TFLOP/s",
        "limit": "the same matrix products", "limit_ms": 90.0, "ratio_to_limit": 90.0 / ordered[len(ordered) // 2],
        "peak_bytes": 100 * MIB, "gradient_bytes": 50 * MIB, "peak_beyond_gradient_bytes": 50 * MIB,
        "value_error": 1e-3, "value_error_per_token": None, "gradient_error": 1e-3, "gradient_errors": {"hidden": 1e-3},
    }  # fmt: skip
    return row | fields


def a_file(rows: Sequence[dict[str, Any]], **head: Any) -> dict[str, Any]:
    return {
        "schema": 2,
        "date": "2026-11-21T03:28:28+00:00",
        "commit": "7f1c310caef5a46c2c4d45e96734ed4d6c20f1e3",
        "device": "Intel(R) Xeon(R) Processor @ 2.50GHz, 2 cores",
        "device_class": "cpu",
        "threads": 2,
        "python": "3.11.7",
        "system": "Linux",
        "versions": VERSIONS,
        "copy_gb_per_s": 20.0,
        "complete": True,
        "rows": list(rows),
        "skipped": [],
    } | head


def measured(
    rng: random.Random, factor: float, rounds: int, noise_of: Sequence[float], **fields: Any
) -> dict[str, Any]:
    """A file of ten rows of ours, the first `factor` times slower, and ten of others: 100 ms with lognormal noise."""
    rows = []
    for place in range(20):
        scale, deviation = (factor if place == 0 else 1.0), rng.choice(noise_of)
        times = [100 * scale * math.exp(rng.gauss(0, deviation)) for _ in range(rounds)]
        rows.append(a_row("fastpref" if place < 10 else "plain", times, case=f"case-{place}", **fields))
    return a_file(rows)


@pytest.mark.parametrize(
    ("rounds", "noise_of"), [(5, [0.03]), (2, [0.03]), (2, [0.005, 0.03, 0.1]), (3, [0.002, 0.05])]
)
def test_at_no_change_fewer_than_one_row_in_a_hundred_is_called(rounds: int, noise_of: list[float]) -> None:
    rng = random.Random(f"no change {rounds} {noise_of}")
    called = compared = 0
    for _ in range(100):
        comparison = compare(measured(rng, 1.0, rounds, noise_of), measured(rng, 1.0, rounds, noise_of))
        called += len(comparison.changes)
        compared += comparison.compared
    assert compared == 2000
    assert called < 0.01 * compared


def test_15_percent_at_five_rounds_of_3_percent_noise_is_found() -> None:
    rng = random.Random(15)
    comparisons = [compare(measured(rng, 1.0, 5, [0.03]), measured(rng, 1.15, 5, [0.03])) for _ in range(100)]
    found = [any(change.key[1] == "case-0" for change in comparison.regressions) for comparison in comparisons]
    assert sum(found) >= 95


def slowed(factor: float, **head: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two files of quiet rows: ours `factor` times slower in the second, four of others as they were."""
    quiet = [100.0, 100.5, 99.5]
    old = [a_row("fastpref", quiet), *(a_row(f"plain-{n}", quiet) for n in range(4))]
    new = [a_row("fastpref", [factor * t for t in quiet]), *(dict(row) for row in old[1:])]
    return a_file(old), a_file(new, **head)


def test_a_slower_row_is_named_with_both_times_and_sets_the_exit_code() -> None:
    comparison = compare(*slowed(1.25))
    assert comparison.exit_code == 1
    text = comparison.format()
    assert "linear linear-half train fastpref: 25% slower (100 ms -> 125 ms, 3 and 3 rounds; noise up to 5%)" in text
    assert text.endswith("5 rows compared: 1 worse, 0 better, the rest within the noise")


def test_a_faster_row_is_said_and_leaves_the_exit_code_zero() -> None:
    comparison = compare(*slowed(0.8))
    assert comparison.exit_code == 0
    assert "better:\n  linear linear-half train fastpref: 20% less time" in comparison.format()


def test_less_than_five_percent_is_never_called_however_quiet_the_rows() -> None:
    assert compare(*slowed(1.04)).changes == []


def test_a_slower_machine_is_taken_out_and_said() -> None:
    old, new = slowed(1.25)
    for row in new["rows"]:
        row["times_ms"] = [1.3 * time for time in row["times_ms"]]
    comparison = compare(old, new)
    assert [(change.key[3], round(change.ratio, 3)) for change in comparison.changes] == [("fastpref", 1.25)]
    assert "linear: the machine took +30.0% time (4 rows that are not fastpref's); taken out" in comparison.format()


def test_without_other_rows_the_measured_limits_tell_the_machines_drift() -> None:
    old, new = (a_file([a_row("fastpref", [t, t + 1, t + 2], limit_ms=limit)]) for t, limit in ((100, 90), (200, 180)))
    comparison = compare(old, new)
    assert comparison.changes == []
    assert "linear: the machine took +100.0% time (the measured limits); taken out" in comparison.format()


def test_rows_whose_package_changed_are_no_measure_of_the_machine() -> None:
    """All rivals got slower with a new trl: that is not the machine's drift, and ours is not called faster for it."""
    quiet = [100.0, 100.5, 99.5]
    trl = [a_row(f"trl-{n}", quiet, family="trl") for n in range(4)]
    slower = [{**row, "times_ms": [2 * t for t in quiet]} for row in trl]
    old = a_file([a_row("fastpref", quiet), *trl])
    new = a_file([a_row("fastpref", quiet), *slower], versions=VERSIONS | {"trl": "1.17.0"})
    comparison = compare(old, new)
    assert {change.key[3] for change in comparison.regressions} == {"trl-0", "trl-1", "trl-2", "trl-3"}
    assert "trl differs: 1.16.0 -> 1.17.0" in comparison.format()


def test_between_two_devices_nothing_is_taken_out_and_that_is_said() -> None:
    text = compare(*slowed(1.0, device="another")).format()
    assert "device differs: Intel(R) Xeon(R) Processor @ 2.50GHz, 2 cores -> another" in text
    assert "linear: no device in common; times are compared as they are" in text


def test_a_time_of_a_single_round_is_shown_and_not_judged() -> None:
    old, new = (a_file([a_row("fastpref", [ms])]) for ms in (100.0, 300.0))
    comparison = compare(old, new)
    assert comparison.changes == []
    assert "linear linear-half train fastpref: time of a single round, 100 ms -> 300 ms" in comparison.format()


def test_two_rounds_find_a_time_that_doubled() -> None:
    old, new = slowed(2.0)
    for file in (old, new):
        for row in file["rows"]:
            row["times_ms"], row["rounds"] = row["times_ms"][:2], 2
    assert compare(old, new).exit_code == 1


def one_change(field: str, was: Any, now: Any) -> Comparison:
    quiet = [100.0, 100.5, 99.5]
    return compare(*(a_file([a_row("fastpref", quiet, **{field: value})]) for value in (was, now)))


@pytest.mark.parametrize(
    ("field", "was", "now", "text"),
    [
        ("value_error", 1e-3, 2.1e-3, "value_error 1.0e-03 -> 2.1e-03"),
        ("value_error", 0.0, 1e-3, "value_error 0 -> 1.0e-03"),
        ("gradient_error", 1e-3, 3e-3, "gradient_error 1.0e-03 -> 3.0e-03"),
        ("gradient_error", 1e-3, math.nan, "gradient_error 1.0e-03 -> nan"),
        ("peak_beyond_gradient_bytes", 50 * MIB, 52 * MIB, "peak_beyond_gradient_bytes 50.0 MiB -> 52.0 MiB"),
    ],
)
def test_an_error_or_a_peak_that_grew_is_a_regression(field: str, was: Any, now: Any, text: str) -> None:
    comparison = one_change(field, was, now)
    assert [change.text for change in comparison.regressions] == [text]
    assert comparison.exit_code == 1


@pytest.mark.parametrize(
    ("field", "was", "now"),
    [
        ("value_error", 1e-3, 1.9e-3),  # not twice
        ("value_error", 1e-13, 9e-5),  # chance, below the rounding of float32 sums
        ("gradient_error", 1e-8, 9e-7),
        ("gradient_error", 1e-3, None),
        ("peak_beyond_gradient_bytes", 50 * MIB, 50.9 * MIB),  # not 2%
        ("peak_beyond_gradient_bytes", 1000, 500_000),  # not a MiB
    ],
)
def test_growth_within_rounding_or_allocation_is_none(field: str, was: Any, now: Any) -> None:
    assert one_change(field, was, now).changes == []


def test_rows_of_one_file_and_rows_of_another_shape_are_listed() -> None:
    quiet = [100.0, 101.0]
    old = a_file([a_row("fastpref", quiet), a_row("gone", quiet), a_row("other", quiet)])
    new = a_file([a_row("fastpref", quiet), a_row("fresh", quiet), a_row("other", [500.0, 501.0], vocab=2042)])
    comparison = compare(old, new)
    assert comparison.exit_code == 0
    text = comparison.format()
    assert "only in the old file:\n  linear linear-half train gone" in text
    assert "only in the new file:\n  linear linear-half train fresh" in text
    assert "linear linear-half train other: another shape, vocab 1021 -> 2042" in text


def test_a_sweep_is_said_not_to_be_compared() -> None:
    sweep = a_file([{"suite": "tiles", "tile": [256, 1024], "median_ms": 1.0}])
    assert compare(sweep, sweep).not_compared == ["1 rows of tiles: a sweep, without cases and providers"]


def a_longest(provider: str, longest: int) -> dict[str, Any]:
    return {
        "suite": "longest", "case": "small", "mode": "train", "provider": provider, "rival": provider != "fastpref",
        "family": "fastpref" if provider == "fastpref" else "trl", "within_bytes": 2**30, "longest": longest,
        "next_failed": longest + 128, "peak_bytes": 1000 * MIB, "seconds": 3.0, "dtype": "bf16", "share": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(("now", "exit_code"), [(900, 0), (880, 1)])
def test_a_longest_pair_that_shrank_by_more_than_an_eighth_is_a_regression(now: int, exit_code: int) -> None:
    assert compare(a_file([a_longest("fastpref", 1024)]), a_file([a_longest("fastpref", now)])).exit_code == exit_code


def test_the_shift_ignores_one_stray_sample() -> None:
    shift = noise.shift_of([100.0, 100.0, 100.0, 100.0, 900.0], [110.0] * 5)
    assert shift == pytest.approx(math.log(1.1), abs=1e-12)


def full_file(**head: Any) -> dict[str, Any]:
    """Every kind of row that a page and a picture know: a case with rivals, three lengths, an error, the longest."""
    rows = [
        a_row("products", [90.0, 91.0], family="limit", value_error=None, gradient_error=None, peak_bytes=None),
        a_row("fastpref", [100.0, 101.0, 102.0]),
        a_row("fastpref_logps", [95.0, 96.0, 97.0]),
        a_row("liger", [440.0, 450.0, 460.0], family="liger", rival=True),
        a_row("plain", [1000.0, 1001.0], peak_beyond_gradient_bytes=3 * 2**30),
    ]
    for length in (507, 1021, 4096):
        fields: dict[str, Any] = {"case": f"linear-length-{length}", "series": "linear-length", "length": length}
        rows.append(a_row("fastpref", [length / 5.0] * 3, **fields))
        if length < 4096:
            rows.append(a_row("plain", [length * 2.0] * 3, **fields))
    logps: dict[str, Any] = {
        "suite": "logps",
        "case": "headline",
        "limit": "copy bandwidth",
        "work_unit": "B",
        "rate_unit": "GB/s",
    }
    rows += [
        a_row(name, [ms, ms, ms], **logps) for name, ms in (("fastpref", 9.0), ("plain", 80.0), ("compiled", 30.0))
    ]
    for length in (257, 514):
        fields = {
            **logps,
            "case": f"headline-{length}",
            "series": "long",
            "length": length,
            "value_error": length / 400,
        }
        rows += [a_row(name, [length / 50.0] * 2, **fields) for name in ("fastpref", "plain")]
    step = {"suite": "step", "case": "step-gpt2", "pairs": 1, "layers": 4, "tokens_per_second": 1234.5}
    rows += [a_row(name, [ms, ms + 1], **step) for name, ms in (("fastpref", 900.0), ("plain", 3000.0))]
    rows += [a_longest("fastpref", 4096), a_longest("trl", 1024)]
    skipped = [
        {"suite": "linear", "case": c, "mode": "train", "provider": "quack", "reason": "needs a GPU"} for c in "ab"
    ]
    return a_file(rows, **({"skipped": skipped} | head))


PICTURES = {
    "linear-half",
    "linear-length-time",
    "linear-length-memory",
    "logps-headline",
    "logps-long-time",
    "logps-long-memory",
    "logps-long-error",
    "longest-small",
}


def test_there_is_a_picture_for_what_has_rows_and_for_nothing_else() -> None:
    assert set(pictures(full_file())) == PICTURES
    assert pictures(a_file([a_row("fastpref", [1.0, 2.0])])) == {}  # nobody beside it
    assert pictures(a_file([])) == {}


def test_the_pictures_are_drawn_and_the_same_rows_give_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [row for row in full_file()["rows"] if row["suite"] in ("linear", "longest")]
    first, again = (plot_all(a_file(rows), tmp_path / name, formats=("png", "svg")) for name in ("first", "again"))
    assert {path.name for path in first} == {
        f"{name}.{kind}" for name in PICTURES if not name.startswith("logps") for kind in ("png", "svg")
    }
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.read_bytes().startswith(b"\x89PNG" if one.suffix == ".png" else b"<?xml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(f"# Title\n\n{report.OPENING}\nold\n<!-- end of results -->\nafter\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text(json.dumps(full_file()))
    return tmp_path


def run(folder: Path, *options: str) -> int:
    return report.main(["--results", str(folder / "results"), "--readme", str(folder / "README.md"), *options])


def test_the_page_has_ours_against_the_rival_the_promises_and_what_nobody_measured(folder: Path) -> None:
    page = report.report(report.read_all(folder / "results"), report.planned_on_gpu())
    assert "| **101 ms** | `liger` 4.46× | 9.91× | 50.0 MiB | 50.0 MiB |" in page.split("## CPU")[0]
    assert NOT_MEASURED in page
    assert (
        "| `linear-half` | hidden (2, 8193, 4096), head (128256, 4096), bf16, 50% scored |" in page.split("## GPU")[1]
    )
    assert "| `linear-half` | times faster than plain | 9.91 | ≥ 7.5 | met |" in page
    assert "| needs a GPU | linear | `quack` | a, b |" in page
    assert "| `fastpref` | 4,096 | 4,224 | 1000 MiB |" in page
    for name in PICTURES:
        assert f"(plots/cpu/{name}.png)" in page


def test_the_block_of_a_page_has_three_tables_a_picture_and_the_gpus_line(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert run(folder) == 0
    assert {path.stem for path in (folder / "results" / "plots" / "cpu").iterdir()} == PICTURES
    readme = (folder / "README.md").read_text()
    assert readme.startswith(f"# Title\n\n{report.OPENING}\n")
    assert readme.endswith("\n<!-- end of results -->\nafter\n")
    assert "\nold\n" not in readme
    titles = [words.TITLES[suite] for suite in ("logps", "linear", "step")]
    assert [line.partition(":")[0] for line in readme.splitlines() if line.startswith(tuple(titles))] == titles
    assert "![The loss from hidden states](results/plots/cpu/linear-half.png)" in readme
    assert NOT_MEASURED in readme


def test_the_short_block_has_a_line_a_suite_and_counts_the_promises(folder: Path) -> None:
    page = folder / "README.md"
    page.write_text(f"{report.SHORT_OPENING}\nold\n<!-- end of results -->\n")
    assert run(folder) == 0
    text = page.read_text()
    assert "| The loss from hidden states, CPU<br>" in text
    assert "| **101 ms** | `liger` 4.46× | 9.91× | 50.0 MiB | 50.0 MiB |" in text
    assert NOT_MEASURED in text
    judged = judge(full_file()["rows"], "cpu")
    assert f"\n{sum(promise.met for promise in judged)} of {len(judged)} promises are met.\n" in text


def test_a_gpus_file_takes_the_place_of_not_measured(folder: Path) -> None:
    gpu = full_file(device_class="gpu", device="NVIDIA H200")
    (folder / "results" / "gpu.json").write_text(json.dumps(gpu))
    files = report.read_all(folder / "results")
    page = report.report(files, report.planned_on_gpu())
    assert page.index("## GPU") < page.index("## CPU")
    assert "| `linear-half` | hidden (2, 8193, 4096)" not in page
    assert "| `linear-frozen` | hidden (2, 8193, 4096), frozen head (128256, 4096), bf16, 50% scored |" in page
    assert NOT_MEASURED not in page + report.tables_block(files, "results")


def test_check_names_what_is_stale_and_writing_mends_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = folder / "results"
    assert run(folder, "--check") == 1
    assert f"{results / 'REPORT.md'} is missing" in capsys.readouterr().out
    assert not (results / "plots").exists()  # it wrote nothing
    assert run(folder) == 0
    capsys.readouterr()
    assert run(folder, "--check") == 0
    assert capsys.readouterr().out == "up to date\n"

    (folder / "README.md").write_text((folder / "README.md").read_text().replace("101 ms", "99 ms"))
    (results / "plots" / "cpu" / "linear-half.png").unlink()
    shutil.copy(results / "plots" / "cpu" / "longest-small.png", results / "plots" / "cpu" / "gone.png")
    assert run(folder, "--check") == 1
    assert capsys.readouterr().out.splitlines()[:-1] == [
        f"{folder / 'README.md'} is not what the results files give",
        f"{results / 'plots' / 'cpu' / 'linear-half.png'} is missing",
        f"{results / 'plots' / 'cpu' / 'gone.png'} {report.LEFTOVER}",
    ]
    assert run(folder) == 0
    assert (results / "plots" / "cpu" / "gone.png").exists()  # it may be anybody's
    assert report.LEFTOVER in capsys.readouterr().out


def test_a_page_or_pictures_that_others_made_are_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, page = folder / "results" / "plots" / "cpu" / "linear-half.png", folder / "results" / "REPORT.md"
    picture.parent.mkdir(parents=True)
    picture.write_text("theirs")
    assert run(folder) == 2
    assert "plots" in capsys.readouterr().err
    page.write_text("theirs")
    assert run(folder) == 2
    assert "REPORT.md" in capsys.readouterr().err
    assert (picture.read_text(), page.read_text()) == ("theirs", "theirs")


def test_without_readme_another_folders_report_leaves_the_repositorys_readme_alone(folder: Path) -> None:
    (folder / "results" / "cpu.json").write_text(json.dumps(a_file([a_row("fastpref", [1.0, 2.0])])))  # no picture
    before = report.README.read_bytes() if report.README.exists() else None
    assert report.main(["--results", str(folder / "results")]) == 0
    assert (report.README.read_bytes() if report.README.exists() else None) == before


@pytest.mark.parametrize(
    ("options", "file", "said"),
    [
        ([], '{"schema": 1, "rows": []}', "has schema 1, this version of fastpref reads schema 2"),
        ([], "not JSON", "is no results file"),
        (["--nonsense"], "{}", "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], file: str, said: str
) -> None:
    (folder / "results" / "bad.json").write_text(file)
    assert run(folder, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_readme_without_the_markers_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "README.md").write_text("# Title\n")
    assert run(folder) == 2
    assert "must have one line <!-- results: written by" in capsys.readouterr().err


@pytest.mark.skipif(not report.README.exists(), reason="benchmarks/ is not in its repository")
def test_the_committed_report_and_readme_are_what_the_committed_results_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report.main(["--check"]) == 0, "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (words.milliseconds(0.0123), "12.3 µs"),
        (words.milliseconds(214.78), "215 ms"),
        (words.milliseconds(20061), "20.1 s"),
        (words.times(0.854), "0.85×"),
        (words.times(12.66), "12.7×"),
        (words.memory(3.3 * MIB), "3.30 MiB"),
        (words.memory(-300), "0 KiB"),
        (words.tokens(65536), "64k"),
        (words.tokens(507), "507"),
    ],
)
def test_numbers_have_three_digits_and_the_unit_that_reads_best(said: str, wanted: str) -> None:
    assert said == wanted
