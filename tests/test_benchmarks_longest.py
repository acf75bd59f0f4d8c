"""The search for the longest pair that trains: its steps, a worker that dies, hangs or errs, bad input, and one run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.benchmarks import process, results
from fastpref.benchmarks.foretell import Found, foretell
from fastpref.benchmarks.longest import STEP, main
from fastpref.benchmarks.process import TimeUp
from fastpref.benchmarks.report.words import longest_tokens

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="on a CPU the limit is Linux's")


@settings(max_examples=150, deadline=None)
@given(
    base=st.integers(0, 900),
    slope=st.floats(0.001, 5.0),
    bend=st.floats(0.0, 1e-4),
    stricter=st.floats(0.9, 1.0),
    start=st.sampled_from([32, 256]),
)
def test_what_is_foretold_fits_and_what_fails_is_at_most_3_percent_longer(
    base: int, slope: float, bend: float, stricter: float, start: int
) -> None:
    """Also where peaks bend, and where memory is refused a little before the limit."""
    limit, tried = 10_000, []

    def peak_of(length: int) -> int | None:
        tried.append(length)
        peak = round(base + slope * length + bend * length**2)
        return peak if peak <= stricter * limit else None

    found = foretell(peak_of, limit, start=start, most=100_000)
    assert len(set(tried)) == len(tried) <= 16
    assert found.longest in (*tried, 0)
    if found.stopped_by == "length":
        assert found.longest == 100_000
    else:
        assert found.next_failed is not None
        assert found.next_failed in tried
        assert found.next_failed - found.longest <= max(0.03 * found.longest, 16)


def test_a_straight_line_is_confirmed_within_six_runs() -> None:
    tried: list[int] = []

    def peak_of(length: int) -> int | None:
        tried.append(length)
        return 700 + 3 * length if 700 + 3 * length <= 6000 else None

    found = foretell(peak_of, 6000, start=256, most=10**6)
    assert (found.stopped_by, found.longest <= 1766 < found.next_failed) == ("memory", True)  # type: ignore[operator]
    assert len(tried) <= 6


def test_time_leaves_a_lower_bound() -> None:
    def peak_of(length: int) -> int | None:
        if length > 64:
            raise TimeUp
        return length

    found = foretell(peak_of, 10**6, start=32, most=10**6)
    assert (found.longest, found.stopped_by) == (64, "time")
    assert longest_tokens({"longest": 64, "stopped_by": "time"}) == "≥ 64"


def test_a_search_that_nothing_stops_ends_at_the_last_length() -> None:
    assert foretell(lambda length: length, 10**6, start=100, most=507) == Found(507, None, "length")


# A worker without torch. A length beyond `limit` is refused; one at `death` kills it, one at `hang` gets no answer.
STUB = """
import json, os, signal, sys, time
for line in sys.stdin:
    question = json.loads(line)
    if question["what"] == "set_up":
        assert question["within"] and question["case"]["checkpointing"]
        print(json.dumps({{}}), flush=True)
        continue
    length = question["length"] if question["what"] == "step" else question["case"]["length"]
    if question["what"] == "train":
        assert os.path.isfile(os.path.join(question["folder"], "steps.json"))
    if length >= {death}:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV) if {by_signal} else sys.exit(3)
    if length >= {hang}:
        time.sleep(60)
    answer = {{"peak_bytes": 1000 * length}} if length <= {limit} else {{"refused": "full"}}
    print(json.dumps({{"error": "broken"}} if length >= {error} else answer), flush=True)
"""
KINDS = pytest.mark.parametrize("kind", [[], ["--training"]], ids=["step", "training"])


def run_with_stub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: list[str], *, within: str = "150kB", **does: float
) -> dict[str, Any]:
    """The file that a search with one provider writes; a tiny search starts with 32 tokens."""
    for package in ("transformers", "accelerate", "datasets"):
        pytest.importorskip(package, reason="the providers need the train extra")
    script, path = tmp_path / "stub.py", tmp_path / "rows.json"
    does = {"limit": 10**6, "death": 10**6, "hang": 10**6, "error": 10**6, "by_signal": 1, "seconds": 60, **does}
    script.write_text(STUB.format(**does))
    monkeypatch.setattr(process, "WORKER", script)
    options = ["--tiny", "--device", "cpu", "--provider", "plain", "--within", within, "--json", str(path), *kind]
    assert main([*options, "--seconds", str(does["seconds"])]) == 0
    return results.read(path)


@KINDS
def test_a_row_says_what_fits_what_does_not_and_the_peak_of_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: list[str]
) -> None:
    file = run_with_stub(tmp_path, monkeypatch, kind, limit=140)
    (row,) = file["rows"]
    assert (row["suite"], row["case"]) == ("longest", "longest-training" if kind else "longest-tiny")
    assert (row["provider"], row["stopped_by"], row["within_bytes"]) == ("plain", "memory", 150_000)
    assert row["longest"] <= 140 < row["next_failed"] <= 1.03 * row["longest"] + 1
    assert row["peak_bytes"] == 1000 * row["longest"]
    assert (row["share"], row["checkpointing"]) == (0.5, True)
    assert (file["complete"], file["skipped"]) == (True, [])


@KINDS
def test_what_kills_its_process_does_not_fit_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: list[str]
) -> None:
    (row,) = run_with_stub(tmp_path, monkeypatch, kind, death=60)["rows"]
    assert row["longest"] < 60 <= row["next_failed"] <= row["longest"] + 2
    assert row["stopped_by"] == "memory"


@pytest.mark.parametrize(
    ("does", "reason"),
    [({"death": 64, "by_signal": 0}, "its process ended with code 3: last words"), ({"error": 64}, "broken")],
)
def test_an_end_that_is_not_about_memory_is_a_line_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: dict[str, float], reason: str
) -> None:
    file = run_with_stub(tmp_path, monkeypatch, [], **does)
    assert file["rows"] == []
    assert [line["reason"] for line in file["skipped"]] == [reason]


def test_a_step_without_an_answer_is_stopped_in_time_and_the_longest_is_a_lower_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = run_with_stub(tmp_path, monkeypatch, [], hang=128, seconds=1.5)["rows"]
    assert 32 <= row["longest"] < 128
    assert (row["next_failed"], row["stopped_by"]) == (None, "time")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "gpt5", "--within", "1GiB"], "unknown model 'gpt5'; known here are tiny, "),
        (["--tiny", "--provider", "plain", "ours"], "unknown provider 'ours'; known here are fastpref, "),
        (["--training", "--tiny", "--provider", "liger"], "unknown provider 'liger'; known here are fastpref, trl"),
        (["--within", "much"], "argument --within: must be bytes or text like"),
        (["--model", "gpt2-head"], "--within says how much memory"),
        (["--within", "100000GiB"], "GiB to give"),
        (["--tiny", "--model", "quick"], "--tiny is the model tiny, and --model says quick"),
        (["--tiny", "--most", "3"], "--most must be at least 16 tokens, got 3"),
        (["--tiny", "--seconds", "0"], "--seconds must be above 0"),
        (["--tiny", "--seconds", "nan"], "--seconds must be above 0"),
        (["--tiny", "--json", "."], "longest: error: "),
    ],
)
def test_bad_input_is_one_line_with_what_is_known(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cpu", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_a_real_step_fails_where_the_kernel_refuses_memory(tmp_path: Path) -> None:
    """The tiny model's logits of 4096 tokens alone take 2·4096·507·4 bytes, a few times over."""
    pytest.importorskip("transformers", reason="the providers of steps need transformers")
    path = tmp_path / "rows.json"
    assert main(["--tiny", "--device", "cpu", "--provider", "plain", "--json", str(path)]) == 0
    (row,) = results.read(path)["rows"]
    assert STEP.start["tiny"] <= row["longest"] < row["next_failed"] <= STEP.most["tiny"]
    assert row["stopped_by"] == "memory"
    assert 0 < row["peak_bytes"] <= row["within_bytes"]
