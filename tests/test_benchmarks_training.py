"""Whole training runs as benchmarks: clock, inputs, losses held against TRL's, the longest pair, promises, the page."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')
pytest.importorskip("accelerate", reason='needs pip install "fastpref[train]"')

from transformers import LlamaConfig, LlamaForCausalLM

from fastpref.benchmarks import results, training
from fastpref.benchmarks.cases_training import CASES, CLASSES
from fastpref.benchmarks.inputs_training import Inputs, write_inputs
from fastpref.benchmarks.promises import judge
from fastpref.benchmarks.providers import providers_of
from fastpref.benchmarks.providers.training import check_same_tokens
from fastpref.benchmarks.report.page import report, tables_block
from fastpref.benchmarks.report.plots import pictures, plot_all
from fastpref.benchmarks.training import compare_losses, row_of
from fastpref.benchmarks.training_clock import PHASES, Clock

MIB = 2**20
TINY = CASES["training-tiny"]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks on a CPU are read from Linux's /proc")


def tiny_model() -> Any:
    shape = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1))


def test_the_clock_tells_steps_reference_and_phases_of_any_loop() -> None:
    model, ids = tiny_model(), torch.arange(12).view(2, 6)
    optimizer = torch.optim.AdamW(model.parameters())
    seen: list[int] = []
    clock = Clock("cpu", lambda: seen.append(len(clock.seconds)))
    with clock.running():
        with torch.no_grad():
            model(input_ids=ids)
        for _ in range(3):
            model(input_ids=ids).logits.square().sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert seen == [1, 2, 3]
    assert len(clock.seconds) == len(clock.phases) == 3
    assert clock.reference_seconds > 0
    for seconds, phases in zip(clock.seconds, clock.phases, strict=True):
        assert set(phases) == {*PHASES, "rest"}
        assert sum(phases.values()) == pytest.approx(seconds, rel=1e-9)
        assert all(spent > 0 for spent in phases.values())
    backward = torch.autograd.backward
    model(input_ids=ids).logits.sum().backward()
    optimizer.step()
    assert len(clock.seconds) == 3  # its hooks are gone
    assert backward.__module__ == "torch.autograd"


def test_the_layers_time_is_the_backbones_and_not_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps by an hour in the head, and by a second in the backbone's only layer."""
    now = 0.0
    monkeypatch.setattr("fastpref.benchmarks.training_clock.perf_counter", lambda: now)

    def costs(seconds: float) -> Any:
        def hook(*_: Any) -> None:
            nonlocal now
            now += seconds

        return hook

    model = tiny_model()
    model.model.layers[0].register_forward_hook(costs(1.0))
    model.model.layers[0].register_full_backward_hook(costs(2.0))
    model.lm_head.register_forward_hook(costs(3600.0))
    model.lm_head.register_full_backward_hook(costs(7200.0))
    clock = Clock("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with clock.running():
        model(inputs_embeds=torch.randn(1, 5, 8, requires_grad=True)).logits.sum().backward()
        optimizer.step()
    assert clock.phases == [{"layers": 3.0, "optimiser": 0.0, "clipping": 0.0, "rest": 10800.0}]


def test_a_run_whose_backbone_was_never_seen_is_an_error() -> None:
    clock, linear = Clock("cpu"), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1e-3)
    with clock.running():
        linear(torch.ones(1, 2)).sum().backward()
        with pytest.raises(RuntimeError, match="no forward of the backbone was seen"):
            optimizer.step()


def test_made_pairs_have_the_lengths_and_the_order_of_the_loop(tmp_path: Path) -> None:
    case = replace(TINY, ragged=False, max_length=41, references=True)
    write_inputs(case, tmp_path, tmp_path)
    inputs = Inputs(case, tmp_path, "cpu")
    pairs = [pair for pairs in inputs.steps for pair in pairs]
    assert [len(pairs) for pairs in inputs.steps] == [2, 2, 2]
    assert sorted(pair["row"] for pair in pairs) == list(range(6))
    assert [pair["row"] for pair in pairs] != list(range(6))  # shuffled, as the loop does
    for pair in pairs:
        assert len(pair["chosen"]["ids"]) == len(pair["rejected"]["ids"]) == 40
        assert pair["chosen"]["start"] == pair["rejected"]["start"] == 20
        assert pair["references"] == [-95.0, -95.0]
    assert inputs.tokens == [160, 160, 160]


def test_a_case_of_real_pairs_without_its_data_says_where_it_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["--case", "training-quick", "--device", "cpu", "--data", str(tmp_path)]) == 2
    assert f"case training-quick needs {tmp_path / 'dpo_en.jsonl'}: --data names" in capsys.readouterr().err


def test_tokens_that_differ_from_ours_are_refused_by_row() -> None:
    pair = {"row": 7, "chosen": {"ids": [1, 2, 3], "start": 2}, "rejected": {"ids": [1, 2, 4, 5], "start": 2}}
    same = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]}
    check_same_tokens([same], [pair], 4)
    for other in ({"rejected_ids": [4]}, {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 4, 5]}):
        with pytest.raises(
            ValueError, match=r"row 7: TRL's tokens of the (chosen|rejected) response are not fastpref's"
        ):
            check_same_tokens([{**same, **other}], [pair], 4)
    with pytest.raises(ValueError, match="TRL kept 1 rows, fastpref 2 pairs"):
        check_same_tokens([same], [pair, pair], 4)


def an_answer(step: float = 2.0, *, peak: int = 900, losses: tuple[float, ...] = (0.7, 0.6, 0.5)) -> dict[str, Any]:
    phase = {"layers": 0.75 * step, "optimiser": 0.0, "clipping": 0.0, "rest": 0.25 * step}
    return {
        "seconds": [10.0, step, step],
        "phases": [{"layers": 1.0, "optimiser": 0.0, "clipping": 0.0, "rest": 9.0}, phase, phase],
        "reference_seconds": 1.5, "losses": list(losses), "tokens": [1000, 200, 400], "peak_bytes": peak * MIB,
        "base_bytes": 400 * MIB, "stolen_share": 0.0,
    }  # fmt: skip


def a_row(provider: str, *, case: str = "training-fp32", **answer: Any) -> dict[str, Any]:
    found = next(p for p in providers_of("training") if p.name == provider)
    return row_of(CASES[case], found, an_answer(**answer))


def test_a_row_keeps_the_first_step_and_the_reference_apart() -> None:
    row = a_row("fastpref")
    assert (row["median_ms"], row["first_ms"], row["times_ms"]) == (2000.0, 10_000.0, [2000.0, 2000.0])
    assert (row["reference_ms"], row["whole_ms"]) == (1500.0, 15_500.0)
    assert row["tokens_per_second"] == 150.0
    assert row["growth_bytes"] == 500 * MIB
    assert row["outside_layers"] == 0.25
    assert row["outside_layers_with_reference"] == pytest.approx(1.0 / 2.5)  # 0.5 s of it a step


def test_losses_beyond_rounding_are_named_by_step_in_fp32_alone() -> None:
    rows = [a_row("fastpref", losses=(0.7, 0.6, 0.50004)), a_row("trl"), a_row("plain", losses=(0.7, 0.59, 0.5))]
    (line,) = compare_losses(rows)
    assert line.startswith("training-fp32: the losses of plain are not those of trl: 1.7e-02 of them at step 2 (0.59")
    assert [row["loss_error_against"] for row in rows] == ["trl", None, "trl"]
    assert rows[0]["loss_error"] == pytest.approx(8e-5, rel=1e-6)
    loose = [a_row("fastpref", case="training-bf16", losses=(0.7, 0.6, 0.4)), a_row("trl", case="training-bf16")]
    assert compare_losses(loose) == []
    assert loose[0]["loss_error"] == pytest.approx(0.2)


def test_without_trl_the_plain_loop_is_the_measure_of_losses() -> None:
    (line,) = compare_losses([a_row("fastpref", losses=(0.7, 0.6, 0.4)), a_row("plain")])
    assert "the losses of fastpref are not those of plain: 2.0e-01 of them at step 3" in line


def test_a_run_with_a_loss_that_is_not_finite_has_no_row() -> None:
    with pytest.raises(RuntimeError, match=r"its losses of steps 2, 3 are not finite"):
        a_row("fastpref", losses=(0.7, math.nan, math.inf))


def test_the_promises_of_training_are_judged_where_their_rows_are() -> None:
    rows = [a_row("fastpref"), a_row("trl", step=17.0, peak=2000), a_row("plain", step=5.0)]
    compare_losses(rows)
    rows.append(a_row("fastpref", case="training-share"))
    rows.append(a_row("trl_fastpref", step=4.0, peak=1010))
    longest = {"suite": "longest", "case": "longest-training"}
    rows += [{**longest, "provider": "fastpref", "longest": 900}, {**longest, "provider": "plain", "longest": 100}]
    verdicts = {(p.case, p.what): (round(p.got, 3), p.met) for p in judge(rows, "cpu")}
    assert verdicts == {
        ("training-fp32", "times faster a step than trl"): (8.5, True),
        ("training-fp32", "times faster a step than plain"): (2.5, False),
        ("training-fp32", "of the peak of trl's process"): (0.45, False),
        ("training-fp32", "times faster a step with fastpref in trl"): (4.25, True),
        ("training-fp32", "of the peak of trl's process with fastpref in trl"): (0.505, False),
        ("training-fp32", "of trl's loss at the step that is furthest from it"): (0.0, True),
        ("training-share", "of a step outside the layers"): (0.25, True),
        ("longest-training", "times the plain loop's longest pair"): (9.0, True),
    }
    assert [(p.got, p.met) for p in judge(rows, "gpu")] == [(8.5, True)]


def a_file(rows: list[dict[str, Any]], device_class: str = "cpu") -> dict[str, Any]:
    return {
        "schema": 2, "date": "2026-11-21T03:28:28+00:00", "commit": None, "device": "a CPU", "threads": 2,
        "device_class": device_class, "python": "3.11.7", "versions": {"torch": "2.13.0", "trl": "1.16.0"},
        "copy_gb_per_s": 20.0, "complete": True, "rows": rows, "skipped": [],
    }  # fmt: skip


def runs() -> list[dict[str, Any]]:
    rows = [a_row("fastpref"), a_row("trl", step=17.0, peak=2000), a_row("plain", step=5.0)]
    compare_losses(rows)
    return rows


def test_the_page_tells_time_whole_run_peak_share_and_losses_of_each_contestant() -> None:
    page = report({"cpu": a_file(runs())}, {"training": [{"suite": "training", "case": "x", **TINY.fields()}]})
    assert "| **2000 ms** | `trl` 8.50× | 2.50× | 900 MiB | 1.95 GiB |" in page
    assert "| **`fastpref`** | 2000 ms | 1.00× | 10.0 s | 15.5 s | 150 | 900 MiB | 500 MiB | 25% (40%) | 0 |" in page
    assert "![training-fp32](plots/cpu/training-fp32.png)" in page
    assert "| Whole training runs | `x` |" in page.split("## GPU")[1]
    block = tables_block({"cpu": a_file(runs())}, "results")
    assert "![Whole training runs](results/plots/cpu/training-fp32.png)" in block


def test_the_picture_of_training_runs_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert set(pictures(a_file(runs()))) == {"training-fp32"}
    assert pictures(a_file(runs()[:2])) == {}  # a table says it
    (path,) = plot_all(a_file(runs()), tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give --case or --class; cases are training-bf16, "),
        (["--case", "tiny"], "unknown case 'tiny'; known here are training-bf16, "),
        (["--class", "tiny", "--provider", "ours"], "unknown provider 'ours'; known here are fastpref, "),
        (["--class", "tiny", "--steps", "1"], "--steps must be at least 2"),
        (["--class", "tiny", "--seconds", "nan"], "--seconds must be above 0"),
    ],
)
def test_bad_input_is_one_line_with_what_is_known(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["--device", "cpu", *options]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_every_class_names_cases_that_exist_and_providers_that_are_known() -> None:
    known = {provider.name for provider in providers_of("training")}
    for names in CLASSES.values():
        for name in names:
            assert set(CASES[name].providers) <= known


@linux
@pytest.mark.slow
def test_fastpref_and_the_plain_loop_train_alike_each_in_its_process(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert (
        training.main(["--class", "tiny", "--device", "cpu", "--provider", "fastpref", "plain", "--json", str(path)])
        == 0
    )
    file = results.read(path)
    assert file["complete"]
    ours, plain = file["rows"]
    assert (ours["provider"], plain["provider"], ours["loss_error_against"]) == ("fastpref", "plain", "plain")
    assert len(ours["losses"]) == 3
    assert ours["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(ours["losses"][2] - math.log(2)) > 1e-3  # it moved, so that agreeing says something
    assert ours["loss_error"] < 1e-5
    for row in (ours, plain):
        assert row["rounds"] == 2
        assert 0 < row["growth_bytes"] < row["peak_bytes"]
        assert 0 < row["outside_layers"] < 1
    assert ours["reference_ms"] > 10 * plain["reference_ms"]  # a pass, and none
