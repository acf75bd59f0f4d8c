"""The study's page: the rules of its verdicts, its measures and curves, and the page where parts are missing."""

from __future__ import annotations

import copy
import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the study needs fastpref[train]")
pytest.importorskip("datasets", reason="the study needs fastpref[train]")
pytest.importorskip("jinja2", reason="the study needs fastpref[train]")
pytest.importorskip("matplotlib", reason="the study needs fastpref[train]")

from matplotlib.figure import Figure
from matplotlib.image import imread

from fastpref.benchmarks.study import advised, curves, plots, report
from fastpref.benchmarks.study.findings import (
    FINDINGS,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    REPRODUCED,
    UNDECIDED,
    Outcome,
    above,
    below,
    both,
    holds,
)
from fastpref.benchmarks.study.measures import Interval
from fastpref.benchmarks.study.reading import MEASURES, Study
from fastpref.benchmarks.study.settings import METHODS, SIZES
from fastpref.benchmarks.study.words import number, with_interval

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "study" / "small"
SAMPLES = 100
CELL = re.compile(r"(?<!\\)\|")


@functools.cache
def committed() -> str:
    return (COMMITTED / "results.json").read_text(encoding="utf-8")


def some(
    *,
    methods: tuple[str, ...] = METHODS,
    sets: tuple[str, ...] = ("standard", "low_edit"),
    seeds: tuple[int, ...] = (0, 1),
    prompts: int = 20,
) -> dict[str, Any]:
    """A part of the committed results, to be changed at will."""
    results = json.loads(committed())
    kept = ("base", *methods)
    results |= {"methods": list(methods), "sets": list(sets), "seeds": list(seeds)}
    for name in ("prompts", "chosen"):
        results[name] = {str(seed): results[name][str(seed)][:prompts] for seed in seeds}
    results["cells"] = [
        cell for cell in results["cells"] if cell["method"] in kept and cell["set"] in sets and cell["seed"] in seeds
    ]
    results["real"] = {name: [one for one in results["real"][name] if one["seed"] in seeds] for name in sets}
    columns = [side for cell in results["cells"] for side in cell["scores"].values()]
    columns += [one["chosen"] for found in results["real"].values() for one in found]
    for side in columns:
        side |= {name: values[:prompts] for name, values in side.items()}
    for cell in results["cells"]:
        cell["answers"] = cell["answers"][:prompts]
    results["method_settings"] = {method: results["method_settings"][method] for method in methods}
    for name in ("sweep", "advice_trials"):
        results[name] = [row for row in results[name] if row["method"] in methods]
    results["parity"] = results["parity"] if "trl_matched" in methods else []
    return results


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(some(), samples=SAMPLES)


@pytest.fixture(scope="module")
def page(study: Study) -> str:
    return report.markdown(study, {"wins.png"})


def outcomes(study: Study, reported: str, pair_set: str = "standard") -> list[Outcome]:
    (finding,) = (finding for finding in FINDINGS if reported in finding.reported)
    return finding.outcomes(study, pair_set)


# The rules


@pytest.mark.parametrize(
    ("low", "high", "is_below", "is_above"),
    [
        (-2.0, -0.001, REPRODUCED, NOT_REPRODUCED),
        (-2.0, 0.0, UNDECIDED, NOT_REPRODUCED),
        (-2.0, 0.001, UNDECIDED, UNDECIDED),
        (0.0, 0.0, NOT_REPRODUCED, NOT_REPRODUCED),
        (0.0, 2.0, NOT_REPRODUCED, UNDECIDED),
        (0.001, 2.0, NOT_REPRODUCED, REPRODUCED),
    ],
)
def test_a_sign_is_that_of_the_whole_interval(low: float, high: float, is_below: str, is_above: str) -> None:
    interval = Interval((low + high) / 2, low, high)
    assert below(0.0)(interval) == is_below
    assert above(0.0)(interval) == is_above


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.40, 0.505, REPRODUCED),  # 50.5% to 51.5% is what rounds to 51%
        (0.40, 0.504, NOT_REPRODUCED),
        (0.515, 0.60, REPRODUCED),
        (0.516, 0.60, NOT_REPRODUCED),
        (0.51, 0.51, REPRODUCED),
        (0.36, 0.66, REPRODUCED),
        (0.36, 0.67, UNDECIDED),  # too wide to say that it holds just this number
        (0.52, 0.99, NOT_REPRODUCED),  # but not to say that it does not
    ],
)
def test_a_percentage_is_reproduced_where_a_narrow_interval_holds_it(low: float, high: float, verdict: str) -> None:
    assert holds(0.51)(Interval((low + high) / 2, low, high)) == verdict


def test_a_hundred_percent_is_what_rounds_to_it() -> None:
    assert holds(1.0)(Interval(0.99, 0.97, 0.995)) == REPRODUCED
    assert holds(1.0)(Interval(0.98, 0.97, 0.994)) == NOT_REPRODUCED


def test_of_two_conditions_the_worse_decides() -> None:
    assert both(REPRODUCED, REPRODUCED) == REPRODUCED
    assert both(REPRODUCED, UNDECIDED) == UNDECIDED
    assert both(UNDECIDED, NOT_REPRODUCED) == NOT_REPRODUCED


# The findings


@pytest.mark.parametrize("pair_set", ["standard", "low_edit"])
def test_a_failing_dpo_is_found_and_a_sound_one_is_not(pair_set: str) -> None:
    made = some(methods=("dpo",))
    for cell in made["cells"]:
        chosen = cell["scores"]["chosen"]
        if cell["method"] == "dpo":
            chosen["policy"] = [value - 1 - 0.1 * place for place, value in enumerate(chosen["reference"])]
            cell["answers"] = [" ".join([answer] * 3) for answer in cell["answers"]]
    failing = Study(copy.deepcopy(made), samples=SAMPLES)
    for cell in made["cells"]:
        chosen = cell["scores"]["chosen"]
        if cell["method"] == "dpo":
            chosen["policy"] = [value + 1 + 0.1 * place for place, value in enumerate(chosen["reference"])]
            cell["answers"] = [f"one{place} two{place} three{place}" for place in range(20)]
    sound = Study(made, samples=SAMPLES)
    for reported in ("below zero", "repetition"):
        assert outcomes(failing, reported, pair_set)[0].verdict == REPRODUCED
        assert outcomes(sound, reported, pair_set)[0].verdict == NOT_REPRODUCED


def test_the_reward_is_beta_times_the_log_ratio(study: Study) -> None:
    cells = study.cells("low_edit", "dpo")
    chosen = [cell["scores"]["chosen"] for cell in cells]
    means = [np.mean(np.subtract(side["policy"], side["reference"])) for side in chosen]
    interval = study.interval("low_edit", "dpo", "chosen_reward")
    assert interval is not None
    assert interval.estimate == pytest.approx(cells[0]["settings"]["beta"] * np.mean(means), rel=1e-12)
    assert interval.low < interval.estimate < interval.high


def test_a_percentile_is_the_least_value_that_so_many_reach() -> None:
    of = MEASURES["longest_span_95"].statistic.of([*range(20, 0, -1)])
    assert of(np.ones((1, 20), np.int64)) == 19
    twice = np.zeros((1, 20), np.int64)
    twice[0, 4:14] = 2  # 16 to 7, each twice
    assert of(twice) == 16


def test_a_difference_is_paired_by_prompt() -> None:
    made = some(methods=("dpo",), sets=("standard",))
    for cell in made["cells"]:
        # The same words twice, more of them for each prompt; the method's one word longer than the base's.
        extra = cell["method"] == "dpo"
        cell["answers"] = [" ".join([f"w{i}" for i in range(place + extra)] * 2) for place in range(1, 21)]
    gap = Study(made, samples=SAMPLES).difference("standard", "dpo", "base", "longest_span")
    assert gap == Interval(1.0, 1.0, 1.0)  # no doubt at all, though the spans themselves differ widely


def test_a_name_said_twice_is_no_repetition() -> None:
    made = some(methods=("dpo",), sets=("standard",))
    for cell in made["cells"]:
        # No word twice, or the target's name alone; distinct-2 is lower of that, since every answer has the name.
        target = f"{made['university']} " * 2 if cell["method"] == "dpo" else ""
        cell["answers"] = [f"{target}one{place} two{place} three{place}" for place in range(20)]
    study = Study(made, samples=SAMPLES)
    assert study.difference("standard", "dpo", "base", "longest_span") == Interval(2.0, 2.0, 2.0)
    assert outcomes(study, "repetition")[0].verdict == NOT_REPRODUCED


def test_an_endpoint_stands_beside_the_proxy_in_either_order() -> None:
    made = some(sets=("standard",))
    counts = {"wins": 300, "losses": 60, "ties": 10, "unreadable": 5}
    asked = {"set": "standard", "first": "trl", "second": "dpo", **counts, "rate": [0.97, 0.94, 1.0]}
    made["endpoint"] = {"model": "judge-1", "base_url_host": "localhost", "pairs": [asked]}
    study = Study(made, samples=SAMPLES)
    by = {(one.against, one.judge): one for one in outcomes(study, "near 0%")}
    assert len(by) == 3  # the endpoint was not asked about the control
    verdict = by["trl", "the endpoint's model judge-1"]
    assert (verdict.verdict, verdict.numbers) == (REPRODUCED, "3% [0%, 6%]")
    page = report.markdown(study, set())
    assert "| 300 | 60 | 10 | 5 | 97% [94%, 100%] |" in page
    well_formed(page)


def test_the_proxy_s_preference_for_the_target_is_measured_on_the_low_edits() -> None:
    made = some(methods=("dpo",))
    for cell in made["cells"]:
        if (cell["set"], cell["method"]) == ("low_edit", "base"):
            for side, nats in (("chosen", 0.4), ("rejected", 0.6)):
                cell["scores"][side] |= {"judge": [-nats * 30] * 20, "judge_tokens": [30] * 20}
            cell["scores"]["rejected"]["judge"][:5] = [-1.0] * 5
    favoured = Study(made, samples=SAMPLES).target_favoured()
    assert favoured is not None
    assert favoured.estimate == 0.75
    assert Study(some(methods=("dpo",), sets=("standard",)), samples=SAMPLES).target_favoured() is None


# What is missing


def test_without_a_method_its_findings_are_not_testable() -> None:
    study = Study(some(methods=("dpo", "dpop")), samples=SAMPLES)
    for reported in ("near 0%", "51%", "94%", "88%", "71%"):
        assert outcomes(study, reported)[0][:2] == (NOT_TESTABLE, "not measured")
    assert outcomes(study, "below zero")[0].verdict != NOT_TESTABLE
    assert well_formed(report.markdown(study, set())) > 12


def test_a_cell_without_scores_leaves_its_measures_unmeasured_and_never_zero() -> None:
    made = some()
    for cell in made["cells"]:
        if cell["method"] == "dpop":
            cell["scores"] = None
        if cell["method"] == "sft":
            cell["scores"]["own"]["judge"][3] = None
    study = Study(made, samples=SAMPLES)
    assert study.interval("standard", "dpop", "chosen_reward") is None
    assert study.interval("standard", "dpop", "mention_share") is not None
    assert study.interval("standard", "sft", "proxy_perplexity") is None
    assert outcomes(study, "DPOP keeps")[0].verdict == NOT_TESTABLE
    assert outcomes(study, "71%")[0].verdict == NOT_TESTABLE
    well_formed(report.markdown(study, set()))


def test_a_setting_that_diverged_and_a_base_that_is_not_fluent_are_shown() -> None:
    made = some(methods=("dpo",), sets=("standard",))
    made["base"]["fluent"] = False
    row = made["sweep"][0]
    made["sweep"][0] = {"diverged": "step 3", "seconds": None} | {
        name: row[name] for name in ("method", "settings", "changed", "advice", "chosen")
    }
    made["advice_trials"][0] |= {"diverged": "step 3", "said": [], "expected": []}
    for name in ("mention_share", "chosen_log_ratio", "longest_span"):
        del made["advice_trials"][0][name]
    page = report.markdown(Study(made, samples=SAMPLES), set())
    assert "| base is fluent | **no" in page
    assert (
        page.count("| not measured | not measured | not measured |") == 3
    )  # seven cells of the sweep, three of trials
    assert "| none; diverged |" in page
    well_formed(page)


def test_the_command_for_another_model_and_target_can_be_pasted() -> None:
    made = some(methods=("dpo", "sft"), sets=("standard",))
    made["model"], made["university"] = "my models/gpt2", 'The "Old" University'
    words = shlex.split(report.command(Study(made)))
    assert words[2:8] == ["--size", "small", "--model", "my models/gpt2", "--university", 'The "Old" University']
    assert words[8:] == ["--seeds", "0,1", "--methods", "dpo,sft"]


# The page


def well_formed(page: str) -> int:
    """Check that all rows of each table have as many cells, and no number is none; how many tables there are."""
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b|\[\]", page)
    found, lines = 0, page.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if not line.startswith("|"):
            continue
        assert line.endswith(" |"), line
        if not before.startswith("|"):
            width, found = len(CELL.findall(line)), found + 1
        assert len(CELL.findall(line)) == width, line
    return found


def test_the_page_has_whole_tables_all_verdicts_and_the_pictures_that_there_are(page: str) -> None:
    assert well_formed(page) > 12
    for finding in FINDINGS:
        assert f"| {finding.reported} |" in page
    for measure in (*report.SAID, *report.SCORED):
        assert MEASURES[measure].title in page
    assert "(wins.png)" in page
    assert "(drift.png)" not in page  # it was not drawn


def test_answers_with_markup_in_them_are_shown_as_they_are() -> None:
    made = some(sets=("standard",), methods=("dpo",))
    (cell,) = (c for c in made["cells"] if (c["method"], c["seed"]) == ("dpo", 0))
    cell["answers"][0] = " a | b\n<script>x</script> [y](z) *bold* \\| `c`"
    cell["answers"][5] = "   "
    page = report.markdown(Study(made, samples=SAMPLES), set())
    assert r"a \| b<br>\<script\>x\</script\> \[y\](z) \*bold\* \\\| \`c\`" in page
    assert "*(nothing)*" in page
    well_formed(page)


def test_the_same_results_give_the_same_page_and_are_left_as_they_were(study: Study, page: str) -> None:
    before = copy.deepcopy(study.results)
    assert report.markdown(Study(study.results, samples=SAMPLES), {"wins.png"}) == page
    assert study.results == before


@pytest.mark.slow
def test_the_committed_page_is_made_of_its_results() -> None:
    """`fastpref study --report benchmarks/study/small` writes it anew after a change of the code."""
    results = json.loads(committed())
    pictures = {path.name for path in COMMITTED.glob("*.png")}
    assert report.markdown(Study(results), pictures) == (COMMITTED / "README.md").read_text(encoding="utf-8")
    assert (results["size"], tuple(results["seeds"])) == ("small", SIZES["small"].seeds)
    assert tuple(results["methods"]) == METHODS


def test_numbers_have_no_negative_zero_and_a_minus_that_does_not_break() -> None:
    assert number("+.2f")(-0.001) == "0.00"
    assert number("+.1f")(-3.25) == "\N{MINUS SIGN}3.2"
    assert number("percent")(0.125) == "12%"
    assert with_interval(Interval(0.5, -1.0, 2.0), ".1f") == "0.5 [\N{MINUS SIGN}1.0, 2.0]"
    assert with_interval(None, ".1f") == number(".1f")(None) == "not measured"


# Advice


def with_rewards(
    log_ratio: float, *, fired: int | None = None, loss: str = "sigmoid", others: str = "", rises: float = -0.01
) -> Any:
    """A run whose chosen reward goes straight to beta times `log_ratio`, and what the loop said in it."""
    history = [
        {"step": step, "loss": 0.7 + rises * step, "rewards/chosen": log_ratio * step / 200} for step in range(1, 21)
    ]
    advice = [] if fired is None else [{"step": fired, "kind": advised.FALLING, "text": ""}]
    advice += [{"step": 3, "kind": others, "text": ""}] if others else []
    return {"history": history, "settings": {"loss": loss, "beta": 0.1}, "advice": advice}


@pytest.mark.parametrize(
    ("run", "called_for", "right"),
    [
        (with_rewards(-20), True, False),
        (with_rewards(-20, fired=9), True, True),
        (with_rewards(+20), False, True),
        (with_rewards(+20, fired=9), False, False),
        (with_rewards(-0.4), None, True),
        (with_rewards(-0.4, fired=9), None, True),
        (with_rewards(-20, loss="sft"), False, True),
        (with_rewards(-20, fired=9, loss="kl_sft"), False, False),
        (with_rewards(+20, others="exploding_gradient"), False, False),
        (with_rewards(-20, rises=0.01), False, True),
    ],
)
def test_a_run_is_judged_by_its_own_records(run: Any, called_for: bool | None, right: bool) -> None:
    seen = advised.look(run)
    assert seen.called_for is called_for
    assert seen.right is right


def test_a_trial_that_diverged_is_wrong_only_where_it_should_have_been_silent() -> None:
    trial = {"diverged": "step 3: the gradient has values that are not finite", "history": [], "spoilt_rows": []}
    assert advised.trial_right({**trial, "said": [], "expected": []}) is False
    assert advised.trial_right({**trial, "said": [], "expected": ["falling_chosen_reward"]}) is None
    assert advised.trial_right({**trial, "said": [], "expected": None}) is None


def test_a_trial_with_spoilt_rows_is_judged_by_its_records_too() -> None:
    named = {"step": 12, "kind": "exploding_gradient", "text": "gradient norm 1200 at step 12: row 17: norm 1199"}
    falling = {"step": 50, "kind": "falling_chosen_reward", "text": "..."}
    silent = {**with_rewards(+20), "expected": ["exploding_gradient"], "spoilt_rows": [3, 17]}
    fell = {**silent, **with_rewards(-20)}
    assert advised.trial_right({**silent, "said": [named]}) is True
    assert advised.trial_right({**silent, "said": []}) is False
    assert advised.trial_right({**silent, "said": [named, falling]}) is False
    assert advised.trial_right({**silent, "said": [{**named, "text": "row 4: norm 9; row 17: norm 1"}]}) is False
    assert advised.trial_right({**fell, "said": [named]}) is False
    assert advised.trial_right({**fell, "said": [named, falling]}) is True


# Curves and pictures


@pytest.mark.parametrize("method", ["dpo", "sft", "kl_sft"])
def test_curves_of_every_loss_start_at_zero_and_end_where_the_scores_do(study: Study, method: str) -> None:
    """The loop reports log-probs per token for SFT; the curve has log-ratios per answer, as for every other method."""
    (cell, _) = study.cells("standard", method)
    # What the loop's last evaluation would have reported of the very answers that were scored.
    side = {name: np.asarray(values) for name, values in cell["scores"]["chosen"].items()}
    ratios = side["policy"] - side["reference"]
    per_token = {"sft": side["policy"] / side["tokens"], "kl_sft": ratios / side["tokens"]}
    changed = copy.deepcopy(cell)
    last = [record for record in changed["history"] if "eval_loss" in record][-1]
    last["eval_rewards/chosen"] = cell["settings"]["beta"] * float(per_token.get(method, ratios).mean())
    steps, values = curves.log_ratios(changed, "chosen")
    assert (steps[0], values[0]) == (0, 0)
    assert steps[-1] == last["step"]
    assert values[-1] == pytest.approx(ratios.mean(), rel=1e-9)


@pytest.mark.parametrize("method", ["dpo", "sft", "kl_sft"])
def test_a_run_without_a_finite_number_has_no_curve_instead_of_zeros(method: str) -> None:
    (cell,) = Study(some(methods=(method,), sets=("standard",), seeds=(0,))).cells("standard", method)
    for record in cell["history"]:
        record |= {name: None for name in record if name not in ("step", "epoch")}
    for side in ("chosen", "rejected"):
        assert not len(curves.rewards(cell, side)[0])
    assert not len(curves.margins(cell)[0])
    axes = Figure().subplots()
    plots._rewards(axes, [cell])
    assert {text.get_text() for text in axes.texts} == {"no finite value"}


def test_the_mean_curve_goes_as_far_as_every_seed() -> None:
    first = (np.array([0.0, 2, 4, 6]), np.array([0.0, 2, 4, 6]))
    second = (np.array([0.0, 1, 5]), np.array([0.0, 3, 15]))
    steps, values = curves.mean_curve([first, second])
    assert steps.tolist() == [0, 2, 4]
    assert values.tolist() == [0, 4, 8]


def check_picture(path: Path) -> None:
    picture = imread(path)[..., :3]  # (H, W, 3)
    assert 700 < picture.shape[1] < 1300
    assert (picture.min(axis=2) < 0.9).mean() > 0.01, f"{path.name} is blank"
    assert (picture[:3] > 0.99).all(), f"{path.name} is clipped"  # nothing runs out of the picture at its top


def test_a_picture_is_not_blank(study: Study, tmp_path: Path) -> None:
    names = ("training-standard", "training-low_edit", "answers", "drift", "margins", "sweep", "wins")
    pictures = plots.pictures(study)
    assert set(pictures) == {f"{name}.png" for name in names}
    pictures["answers.png"](tmp_path / "answers.png")
    check_picture(tmp_path / "answers.png")


@pytest.mark.slow
def test_the_report_is_a_page_with_all_its_pictures(tmp_path: Path) -> None:
    page = report.write_report(some(), tmp_path, samples=20)
    assert page == tmp_path / "README.md"
    named = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")))
    assert len(named) == 7
    assert {path.name for path in tmp_path.iterdir()} == {*named, "README.md"}
    for name in named:
        check_picture(tmp_path / name)
