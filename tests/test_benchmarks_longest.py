"""The search for the longest pair that trains: its steps, a worker that dies, hangs or errs, bad input, and one run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.benchmarks import longest_process, results
from fastpref.benchmarks.longest import MOST, PRECISION, SHORTEST, START, Found, main, search
from fastpref.benchmarks.longest_process import TimeUp


@settings(max_examples=200, deadline=None)
@given(limit=st.integers(0, 10**6), start=st.sampled_from([17, 256, 2048]))
def test_what_is_found_fits_and_what_fails_is_at_most_an_eighth_longer(limit: int, start: int) -> None:
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit

    found = search(fits, start=start, most=2**21)
    assert found.stopped_by == "memory"
    assert found.next_failed is not None
    assert found.longest <= limit < found.next_failed
    assert found.next_failed - found.longest <= max(found.longest // PRECISION, SHORTEST)
    assert found.longest in (0, *tried)
    assert len(set(tried)) == len(tried) <= 25


def test_a_search_that_nothing_stops_ends_at_the_last_length() -> None:
    tried: list[int] = []
    assert search(lambda length: not tried.append(length), start=100, most=507) == Found(507, None, "length")  # type: ignore[func-returns-value]
    assert tried == [100, 200, 400, 507]


@pytest.mark.parametrize(
    ("answers", "found"),
    [([], (0, None)), ([True, True], (64, None)), ([True, False], (32, 64)), ([True, False, True], (48, 64))],
)
def test_time_leaves_what_was_found_so_far(answers: list[bool], found: tuple[int, int | None]) -> None:
    left = iter(answers)

    def fits(length: int) -> bool:
        for answer in left:
            return answer
        raise TimeUp

    # With longer lengths than SHORTEST apart, which would end the search first.
    longest, failed = found
    scale = 32
    got = search(lambda n: fits(n), start=32 * scale, most=2**20)
    assert got == Found(longest * scale, None if failed is None else failed * scale, "time")


# A worker without torch. A length beyond `limit` is refused; one at `death` kills it, one at `hang` gets no answer.
STUB = """
import json, os, signal, sys, time
print(json.dumps({{"fits": True}}), flush=True) if json.loads(sys.stdin.readline())["within"] else None
for line in sys.stdin:
    length = json.loads(line)["length"]
    if length == {death}:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV) if {by_signal} else sys.exit(3)
    if length == {hang}:
        time.sleep(60)
    answer = {{"fits": True, "peak_bytes": 1000 * length}} if length <= {limit} else {{"fits": False, "why": "full"}}
    print(json.dumps({{"error": "broken"}} if length == {error} else answer), flush=True)
"""


def run_with_stub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, limit: int, seconds: float = 60, **does: int
) -> dict[str, Any]:
    """The file that a search with one provider writes; START of a tiny search is 32."""
    script = tmp_path / "stub.py"
    does = {"death": -1, "hang": -1, "error": -1, "by_signal": 1, **does}
    script.write_text(STUB.format(limit=limit, **does))
    monkeypatch.setattr(longest_process, "WORKER", script)
    path = tmp_path / "rows.json"
    options = ["--tiny", "--device", "cpu", "--provider", "plain", "--seconds", str(seconds), "--json", str(path)]
    assert main(options) == 0
    return results.read(path)


def needs_transformers() -> None:
    pytest.importorskip("transformers", reason="the providers of steps need transformers")


def test_a_row_says_what_fits_what_does_not_and_the_peak_of_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_transformers()
    file = run_with_stub(tmp_path, monkeypatch, limit=100)
    (row,) = file["rows"]
    assert (row["suite"], row["case"], row["provider"]) == ("longest", "longest-tiny", "plain")
    assert (row["longest"], row["next_failed"], row["stopped_by"]) == (96, 112, "memory")
    assert row["peak_bytes"] == 96_000
    assert row["within_bytes"] == 2**26
    assert (row["batch"], row["share"], row["checkpointing"]) == (2, 0.5, True)
    assert file["complete"]
    assert file["skipped"] == []


def test_a_step_that_kills_its_process_does_not_fit_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_transformers()
    (row,) = run_with_stub(tmp_path, monkeypatch, limit=127, death=128)["rows"]
    assert (row["longest"], row["next_failed"], row["stopped_by"]) == (112, 128, "memory")


def test_a_process_that_ends_by_itself_is_a_line_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_transformers()
    file = run_with_stub(tmp_path, monkeypatch, limit=127, death=64, by_signal=0)
    assert file["rows"] == []
    assert [line["reason"] for line in file["skipped"]] == ["its process ended with code 3: last words"]


def test_an_error_that_is_not_about_memory_is_a_line_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_transformers()
    file = run_with_stub(tmp_path, monkeypatch, limit=500, error=64)
    assert file["rows"] == []
    assert [line["reason"] for line in file["skipped"]] == ["broken"]


def test_a_step_without_an_answer_is_stopped_in_time_and_the_longest_is_a_lower_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_transformers()
    (row,) = run_with_stub(tmp_path, monkeypatch, limit=500, hang=128, seconds=1.5)["rows"]
    assert (row["longest"], row["next_failed"], row["stopped_by"]) == (64, None, "time")
    assert row["seconds"] < 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "gpt5", "--within", "1GiB"], "unknown model 'gpt5'; known are tiny, "),
        (["--tiny", "--provider", "plain", "ours"], "unknown provider 'ours'; known are fastpref, "),
        (["--within", "much"], "argument --within: must be bytes or text like"),
        (["--model", "gpt2-head"], "--within says how much memory"),
        (["--within", "100000GiB"], "GiB to give"),
        (["--tiny", "--model", "quick"], "--tiny is the model tiny, and --model says quick"),
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="on a CPU the limit is Linux's")
def test_a_real_step_fails_where_the_kernel_refuses_memory(tmp_path: Path) -> None:
    """The tiny model's logits of 4096 tokens alone take 2·4096·507·4 bytes, a few times over."""
    needs_transformers()
    path = tmp_path / "rows.json"
    assert main(["--tiny", "--device", "cpu", "--provider", "plain", "--json", str(path)]) == 0
    (row,) = results.read(path)["rows"]
    assert START["tiny"] <= row["longest"] < row["next_failed"] <= MOST["tiny"]
    assert row["stopped_by"] == "memory"
    assert 0 < row["peak_bytes"] <= row["within_bytes"]
