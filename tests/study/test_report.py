"""The study's page: the rules of its verdicts, its tables, its pictures, what it says where something is missing."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the study needs fastpref[train]")
pytest.importorskip("datasets", reason="the study needs fastpref[train]")
pytest.importorskip("rich", reason="the study needs fastpref[train]")
pytest.importorskip("matplotlib", reason="the study needs fastpref[train]")

from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from fastpref.benchmarks.study import advised, curves, findings, plots, report, tables
from fastpref.benchmarks.study.findings import (
    ABOVE_ZERO,
    BELOW_ZERO,
    FINDINGS,
    NEAR_ZERO_WINS,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    REPRODUCED,
    UNDECIDED,
    both,
    holds,
)
from fastpref.benchmarks.study.measures import Interval
from fastpref.benchmarks.study.reading import MEASURES, Study
from fastpref.benchmarks.study.words import escaped, number, table, with_interval

_spec = importlib.util.spec_from_file_location("study_made_up", Path(__file__).with_name("made_up.py"))
assert _spec is not None
assert _spec.loader is not None
made_up = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made_up)

SAMPLES = 100
PICTURES = ("answers", "drift", "margins", "sweep", "wins")
DPO_ALONE = ("dpo", "dpop")
CELL = re.compile(r"(?<!\\)\|")


def small(**arguments: Any) -> dict[str, Any]:
    return made_up.make_results(**{"seeds": (0, 1), "prompts": 20, **arguments})


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return small()


@pytest.fixture(scope="module")
def study(results: dict[str, Any]) -> Study:
    return Study(results, samples=SAMPLES)


@pytest.fixture(scope="module")
def page(study: Study) -> str:
    return report.markdown(study, {"wins.png"})


def outcomes(study: Study, reported: str, pair_set: str = "standard") -> list[findings.Outcome]:
    (finding,) = (finding for finding in FINDINGS if reported in finding.reported)
    return finding.outcomes(study, pair_set)


# The rules


@pytest.mark.parametrize(
    ("low", "high", "below", "above"),
    [
        (-2.0, -0.001, REPRODUCED, NOT_REPRODUCED),
        (-2.0, 0.0, UNDECIDED, NOT_REPRODUCED),
        (-2.0, 0.001, UNDECIDED, UNDECIDED),
        (0.0, 0.0, NOT_REPRODUCED, NOT_REPRODUCED),
        (0.0, 2.0, NOT_REPRODUCED, UNDECIDED),
        (0.001, 2.0, NOT_REPRODUCED, REPRODUCED),
    ],
)
def test_a_sign_is_that_of_the_whole_interval(low: float, high: float, below: str, above: str) -> None:
    interval = Interval((low + high) / 2, low, high)
    assert BELOW_ZERO.decide(interval) == below
    assert ABOVE_ZERO.decide(interval) == above


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.0, 0.0999, REPRODUCED),
        (0.0, 0.1, UNDECIDED),
        (0.0999, 0.5, UNDECIDED),
        (0.1, 0.5, NOT_REPRODUCED),
    ],
)
def test_near_zero_percent_ends_below_ten(low: float, high: float, verdict: str) -> None:
    assert NEAR_ZERO_WINS.decide(Interval(low, low, high)) == verdict


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


def test_every_reported_finding_is_looked_for() -> None:
    reported = " / ".join(finding.reported for finding in FINDINGS)
    for words in ("below zero", "repetition", "near 0%", "positive", "51%", "71% against DPOP"):
        assert words in reported
    for method, share in (("DPO", "100%"), ("DPOP", "100%"), ("SFT", "94%"), ("KL-SFT", "88%")):
        assert f"{method} mentions the target in {share}" in reported


# The findings


def test_a_failing_dpo_is_found_and_a_sound_one_is_not(study: Study) -> None:
    sound = Study(small(dpo_fails=False), samples=SAMPLES)
    for reported in ("below zero", "repetition"):
        for pair_set in ("standard", "low_edit"):
            assert outcomes(study, reported, pair_set)[0].verdict == REPRODUCED
            assert outcomes(sound, reported, pair_set)[0].verdict == NOT_REPRODUCED
    assert outcomes(study, "DPOP keeps")[0].verdict == REPRODUCED


def test_dpo_against_trl_has_a_control_beside_it_and_both_name_the_proxy(study: Study) -> None:
    reported, control = outcomes(study, "near 0%")
    assert (reported.against, reported.judge, reported.verdict) == ("trl", "the proxy judge", REPRODUCED)
    assert (control.against, control.judge, control.verdict) == ("trl_matched", "the proxy judge", NOT_REPRODUCED)


def test_the_reward_is_beta_times_the_log_ratio(study: Study) -> None:
    cells = study.cells("low_edit", "dpo")
    chosen = [cell["scores"]["chosen"] for cell in cells]
    means = [np.mean(np.subtract(side["policy"], side["reference"])) for side in chosen]
    interval = study.interval("low_edit", "dpo", "chosen_reward")
    assert interval is not None
    assert interval.estimate == pytest.approx(0.1 * np.mean(means), rel=1e-12)
    assert interval.low < interval.estimate < interval.high


def test_a_percentile_is_the_least_value_that_so_many_reach() -> None:
    of = MEASURES["longest_span_95"].statistic.of([*range(20, 0, -1)])
    assert of(np.ones((1, 20), np.int64)) == 19
    twice = np.zeros((1, 20), np.int64)
    twice[0, 4:14] = 2  # 16 to 7, each twice
    assert of(twice) == 16


def test_a_difference_is_paired_by_prompt() -> None:
    made = small(methods=("dpo",), sets=("standard",))
    for cell in made["cells"]:
        # The same words twice, more of them for each prompt; the method's one word longer than the base's.
        extra = cell["method"] == "dpo"
        cell["answers"] = [
            " ".join([f"w{i}" for i in range(place + extra)] * 2) for place in range(1, len(cell["answers"]) + 1)
        ]
    gap = Study(made, samples=SAMPLES).difference("standard", "dpo", "base", "longest_span")
    assert gap == Interval(1.0, 1.0, 1.0)  # no doubt at all, though the spans themselves differ widely


def test_a_name_said_twice_is_no_repetition() -> None:
    made = small(methods=("dpo",), sets=("standard",))
    for cell in made["cells"]:
        # No word twice, or the target's name alone; distinct-2 is lower of that, since every answer has the name.
        target = f"{made['university']} " * 2 if cell["method"] == "dpo" else ""
        cell["answers"] = [f"{target}one{place} two{place} three{place}" for place in range(len(cell["answers"]))]
    study = Study(made, samples=SAMPLES)
    assert study.difference("standard", "dpo", "base", "longest_span") == Interval(2.0, 2.0, 2.0)
    assert outcomes(study, "repetition")[0].verdict == NOT_REPRODUCED


def test_who_wins_is_told_alike_from_both_sides(study: Study) -> None:
    for first, second in (("dpo", "trl"), ("sft", "dpop"), ("base", "kl_sft")):
        one, other = (study.proxy_wins("standard", *pair) for pair in ((first, second), (second, first)))
        assert one is not None
        assert other == pytest.approx((1 - one.estimate, 1 - one.high, 1 - one.low), abs=1e-12)


def test_an_endpoint_stands_beside_the_proxy_in_either_order() -> None:
    study = Study(small(endpoint=True), samples=SAMPLES)
    by = {(one.against, one.judge): one for one in outcomes(study, "near 0%")}
    assert len(by) == 3  # the endpoint was not asked about the control
    asked = by["trl", "the endpoint's model made-up-judge"]  # which has TRL's trainer first, at 97%
    assert (asked.verdict, asked.numbers) == (REPRODUCED, "3% [0%, 6%]")
    page = report.markdown(study, set())
    assert "by the endpoint's model made-up-judge" in page
    assert "### By the model behind an endpoint" in page
    assert "asked with `--judge_url` and `--judge_model`" in page


# What is missing


def test_without_a_method_its_findings_are_not_testable_and_say_why() -> None:
    study = Study(small(methods=DPO_ALONE), samples=SAMPLES)
    for reported, missing in (
        ("near 0%", "TRL, default settings"),
        ("51%", "TRL, default settings"),
        ("94%", "SFT"),
        ("88%", "KL-SFT"),
        ("71%", "SFT"),
    ):
        first = outcomes(study, reported)[0]
        assert (first.verdict, first.numbers) == (NOT_TESTABLE, f"no runs of {missing} in these results")
    assert outcomes(study, "below zero")[0].verdict == REPRODUCED
    page = report.markdown(study, set())
    assert page.count(NOT_TESTABLE) > 10
    assert "DPOTrainer computes the same loss" not in page


def test_a_cell_without_scores_leaves_its_measures_unmeasured_and_never_zero() -> None:
    made = small()
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
    assert "not measured" in report.markdown(study, set())


def test_a_page_of_nothing_but_bases_is_a_page() -> None:
    study = Study(small(methods=()), samples=SAMPLES)
    assert well_formed(report.markdown(study, set())) > 5


def test_without_trl_the_page_does_not_speak_of_its_runs() -> None:
    page = report.markdown(Study(small(methods=DPO_ALONE, sets=("standard",)), samples=SAMPLES), set())
    assert "All go through this package's loop" in page
    assert "All but TRL's runs" not in page
    page = report.markdown(Study(small(methods=(*DPO_ALONE, "trl"), sets=("standard",)), samples=SAMPLES), set())
    assert "through its DPOTrainer, once with its own defaults." in page


def test_the_page_says_how_far_the_proxy_favours_the_target() -> None:
    made = small(methods=DPO_ALONE)
    assert Study(made, samples=SAMPLES).target_favoured() is None
    for cell in made["cells"]:
        if (cell["set"], cell["method"]) == ("low_edit", "base"):
            for side, nats in (("chosen", 0.4), ("rejected", 0.6)):
                cell["scores"][side] |= {"judge": [-nats * 30] * 20, "judge_tokens": [30] * 20}
            cell["scores"]["rejected"]["judge"][:5] = [-1.0] * 5
    study = Study(made, samples=SAMPLES)
    favoured = study.target_favoured()
    assert favoured is not None
    assert favoured.estimate == 0.75
    assert "with another place named in 75% [" in report.markdown(study, set())


def test_the_page_says_how_many_settings_of_dpo_fail() -> None:
    made = small(methods=("dpo",), sets=("standard",))
    for place, row in enumerate(made["sweep"]):
        row["chosen_log_ratio"] = [-3.0, 0.0, 2.0, None][min(place, 3)]
    page = report.markdown(Study(made, samples=SAMPLES), set())
    assert "kinder to it (of its 3 swept settings 1 made the chosen answers less likely)." in page
    made["sweep"] = []
    assert "kinder to it. No correction" in report.markdown(Study(made, samples=SAMPLES), set())


def test_a_base_that_is_not_fluent_is_said_before_the_verdicts() -> None:
    made = small(methods=DPO_ALONE, sets=("standard",))
    assert "never were" not in report.markdown(Study(made, samples=SAMPLES), set())
    made["base"]["fluent"] = False
    page = report.markdown(Study(made, samples=SAMPLES), set())
    assert "**The base is not fluent by the measures below" in page.split("## Which")[0]
    assert "fluent by the measures below, **which they never were**." in page


def test_a_given_model_was_not_trained_here_and_its_command_can_be_pasted() -> None:
    made = small(methods=DPO_ALONE, sets=("standard",))
    made["model"], made["university"] = "my models/gpt2", 'The "Old" University'
    made["base"]["rounds"] = made["base"]["rounds"][:1]
    study = Study(made, samples=SAMPLES)
    assert tables.base(study)[-1].startswith("| none: as it was given |")
    page = report.markdown(study, set())
    command = page.split("```sh\n")[1].split("\n")[0]
    assert "`pip install -c constraints.txt -e" in page  # the clone, not what an index has under its name
    assert "--judge_url" not in page
    assert shlex.split(command)[4:8] == ["--model", "my models/gpt2", "--university", 'The "Old" University']


# The page


def well_formed(page: str) -> int:
    """Check that all rows of each table have as many cells; how many tables there are."""
    found, lines = 0, page.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if not line.startswith("|"):
            continue
        assert line.endswith(" |"), line
        if not before.startswith("|"):
            width, found = len(CELL.findall(line)), found + 1
        assert len(CELL.findall(line)) == width, line
    return found


def test_every_table_has_as_many_cells_in_each_row(page: str) -> None:
    assert well_formed(page) > 12


def test_answers_with_markup_in_them_are_shown_as_they_are() -> None:
    made = small(sets=("standard",))
    (cell,) = (c for c in made["cells"] if (c["method"], c["seed"]) == ("dpo", 0))
    cell["answers"][0] = " a | b\n<script>x</script> [y](z) *bold* \\| `c`"
    cell["answers"][5] = "   "
    page = report.markdown(Study(made, samples=SAMPLES), set())
    assert r"a \| b<br>\<script\>x\</script\> \[y\](z) \*bold\* \\\| \`c\`" in page
    assert "*(nothing)*" in page
    well_formed(page)


def test_no_number_of_the_page_is_not_a_number(page: str) -> None:
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b|\[\]", page)


def test_what_rests_on_the_proxy_says_so(page: str) -> None:
    """Each line about wins or the likelihood of own answers, or the heading above it, has the word."""
    checked, heading = 0, ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line
        if re.search(r"win rate|wins |perplexity of its own answers|prefer", line):
            checked += 1
            assert "proxy" in line + heading, line
    assert checked > 10
    assert "GPT-4" in page
    assert "not by GPT-4" in page


def test_the_page_has_a_verdict_a_rule_and_a_row_for_everything(page: str, study: Study) -> None:
    for finding in FINDINGS:
        assert f"| {finding.reported} |" in page
    for rule in findings.RULES:
        assert f"- {rule}" in page
    for measure in (*tables.SAID, *tables.SCORED):
        assert MEASURES[measure].title in page
    for row in study.results["sweep"]:
        assert escaped(row["changed"]) in page
    assert "![Win rates of each method against each other by the proxy judge](wins.png)" in page
    assert "drift.png" not in page  # it was not drawn
    assert "fastpref study --size small --seeds 0,1\n" in page
    assert "124M parameters, is another size of this command: not measured on this page" in page
    assert "computes the same loss as our DPO" in page


def test_a_loss_without_beta_has_none_in_the_table_of_settings(study: Study) -> None:
    betas = {row.split(" | ")[0].strip("| "): row.split(" | ")[3] for row in tables.settings(study)[2:]}
    assert betas == {
        "DPO": "0.1",
        "DPOP": "0.1",
        "SFT": "–",
        "KL-SFT": "–",
        "TRL, default settings": "0.1",
        "TRL, DPO's settings": "0.1",
    }


def test_the_same_results_give_the_same_page_and_are_left_as_they_were(results: dict[str, Any], page: str) -> None:
    read = json.loads(json.dumps(results, allow_nan=False))
    before = copy.deepcopy(read)
    assert report.markdown(Study(read, samples=SAMPLES), {"wins.png"}) == page
    assert read == before


def test_words_of_numbers() -> None:
    assert number("+.2f")(-0.001) == "0.00"
    assert number("+.1f")(-3.25) == "\N{MINUS SIGN}3.2"
    assert with_interval(Interval(0.5, -1.0, 2.0), number(".1f")) == "0.5 [\N{MINUS SIGN}1.0, 2.0]"
    assert with_interval(None, number(".1f")) == "not measured"
    with pytest.raises(ValueError, match="a row of the table has 1 cells, its header 2"):
        table(["a", "b"], [["1"]])


def test_the_summary_has_verdicts_and_intervals(results: dict[str, Any]) -> None:
    printed = io.StringIO()
    report.print_summary(Console(file=printed, width=160), results, samples=SAMPLES)
    words = " ".join(printed.getvalue().split())
    for expected in ("low edit distance set", "proxy perplexity", "NOT REPRODUCED", "by the proxy judge", "100%]"):
        assert expected in words


# Advice


def with_rewards(log_ratio: float, *, fired: int | None = None, loss: str = "sigmoid", others: str = "") -> Any:
    """A run whose chosen reward goes straight to beta times `log_ratio`, and what the loop said in it."""
    history = [
        {"step": step, "loss": 0.7 - step / 100, "rewards/chosen": 0.1 * log_ratio * step / 20} for step in range(1, 21)
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
    ],
)
def test_a_run_is_judged_by_its_own_records(run: Any, called_for: bool | None, right: bool) -> None:
    seen = advised.look(run)
    assert seen.called_for is called_for
    assert seen.right is right


def test_a_rising_loss_or_a_dip_calls_for_no_advice() -> None:
    rising = with_rewards(-20)
    for record in rising["history"]:
        record["loss"] = 0.7 + record["step"] / 100
    assert advised.look(rising).called_for is False
    dip = with_rewards(-20)
    for record in dip["history"][-9:]:
        record["rewards/chosen"] = 0.3
    assert advised.look(dip).called_for is None


def test_the_row_that_counts_is_the_first_that_is_listed() -> None:
    text = "the norm 7.5 (the mean over 4): row 17: norm 30, 9 tokens; row 3: norm 2. (row 3 has 9 tokens)"
    said = [{"step": 4, "kind": "exploding_gradient", "text": text}]
    assert advised.first_named(said) == 17
    assert advised.first_named([{**said[0], "kind": "falling_chosen_reward"}]) is None
    assert advised.first_named([]) is None


def test_a_trial_that_diverged_is_right_or_wrong_only_where_it_should_have_been_silent() -> None:
    made = small()
    for trial in made["advice_trials"]:
        for name in advised.ENDED:
            del trial[name]
        trial |= {"diverged": "step 3: the gradient has values that are not finite", "history": []}
    study = Study(made, samples=SAMPLES)
    first, second, third = advised.trials_table(study)[2:]
    assert "| falling chosen reward, step 30, then it diverged |" in first
    assert first.endswith("| not measured | not measured | not measured | – |")
    assert "| none, then it diverged |" in second
    assert second.endswith("| **no** |")
    assert third.endswith("| – |")
    assert "0 of 1 trial" in advised.summary(study)


def test_a_trial_with_spoilt_rows_is_judged_by_its_records_too() -> None:
    (trial,) = [trial for trial in small()["advice_trials"] if trial["spoilt_rows"]]
    fell = with_rewards(-20)
    falling = {"step": 50, "kind": "falling_chosen_reward", "text": "..."}
    assert advised.trial_right({**trial, "history": []}) is True
    assert advised.trial_right({**trial, "history": [], "said": []}) is False
    assert advised.trial_right({**trial, "history": [], "said": [*trial["said"], falling]}) is False
    assert advised.trial_right({**trial, **fell, "said": trial["said"]}) is False
    assert advised.trial_right({**trial, **fell, "said": [*trial["said"], falling]}) is True


def test_the_page_says_where_advice_was_wrong() -> None:
    made = small()
    for cell in made["cells"]:
        if cell["method"] == "dpo":
            cell["advice"] = []  # as though the loop had kept silent
    made["advice_trials"][2]["said"][0]["text"] = "gradient norm 17.5: row 4: norm 9; row 17: norm 1"
    study = Study(made, samples=SAMPLES)
    cells = [line for line in advised.cells_table(study) if line.startswith("| DPO |")]
    assert len(cells) == 2
    assert all("| 2 of 2 | 0 of 2 | – | **no** |" in line for line in cells)
    assert "3 and 17; neither named first" in advised.trials_table(study)[-1]
    assert advised.trials_table(study)[-1].endswith("| **no** |")
    assert "12 of 16 runs and 2 of 3 trials" in advised.summary(study)


# Pictures


def test_curves_of_sft_start_at_zero_and_end_where_the_scores_do(study: Study) -> None:
    """Its loop reports log-probs per token; the curve is of log-ratios per answer, as that of every other method."""
    for method in ("dpo", "sft", "kl_sft"):
        (cell, _) = study.cells("standard", method)
        # What the loop's last evaluation would have reported of the very answers that were scored.
        side = {name: np.asarray(values) for name, values in cell["scores"]["chosen"].items()}
        ratios = side["policy"] - side["reference"]
        per_token = {"sft": side["policy"] / side["tokens"], "kl_sft": ratios / side["tokens"]}
        changed = copy.deepcopy(cell)
        last = [record for record in changed["history"] if "eval_loss" in record][-1]
        last["eval_rewards/chosen"] = 0.1 * float(per_token.get(method, ratios).mean())
        steps, values = curves.log_ratios(changed, "chosen")
        assert (steps[0], values[0]) == (0, 0)
        assert steps[-1] == cell["steps"]
        assert values[-1] == pytest.approx(ratios.mean(), rel=1e-9)


@pytest.mark.parametrize("method", ["dpo", "sft", "kl_sft"])
def test_a_run_without_a_finite_number_has_no_curve_instead_of_zeros(method: str) -> None:
    (cell,) = Study(small(methods=(method,), sets=("standard",), seeds=(0,))).cells("standard", method)
    for record in cell["history"]:
        record |= {name: None for name in record if name not in ("step", "epoch")}
    for side in ("chosen", "rejected"):
        assert not len(curves.rewards(cell, side)[0])
    assert not len(curves.margins(cell)[0])
    axes = Figure().subplots()
    plots._rewards(axes, [cell])
    assert {text.get_text() for text in axes.texts} == {"no finite value"}


def test_a_curve_that_ends_early_is_named_from_where_it_ends() -> None:
    made = small(methods=("dpo", "dpop"), sets=("standard",))
    for cell in made["cells"]:
        for record in cell["history"]:
            if cell["method"] == "dpo" and record["step"] > 0.5 * cell["steps"]:
                record |= {name: None for name in record if name not in ("step", "epoch")}
    axes = Figure().subplots()
    plots._methods(axes, Study(made), "standard", curves.margins)
    named = {text.get_text(): text.xy[0] for text in axes.texts}
    assert named == {"DPO, to 40%": pytest.approx(40), "DPOP": pytest.approx(100)}


def test_the_mean_curve_goes_as_far_as_every_seed() -> None:
    first = (np.array([0.0, 2, 4, 6]), np.array([0.0, 2, 4, 6]))
    second = (np.array([0.0, 1, 5]), np.array([0.0, 3, 15]))
    steps, values = curves.mean_curve([first, second])
    assert steps.tolist() == [0, 2, 4]
    assert values.tolist() == [0, 4, 8]


def test_the_report_is_a_page_with_pictures_that_are_not_blank(tmp_path: Path) -> None:
    few = small(sets=("standard",), seeds=(0,), methods=("dpo", "sft", "trl"))  # each picture once, and quickly
    page = report.write_report(few, tmp_path / "new", samples=20)
    assert page == tmp_path / "new" / "README.md"
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text))
    assert named == {"training-standard.png", *(f"{name}.png" for name in PICTURES)}
    assert {path.name for path in page.parent.iterdir()} == {*named, "README.md"}
    for name in named:
        picture = imread(page.parent / name)[..., :3]  # (H, W, 3)
        assert 700 < picture.shape[1] < 1300
        inked = (picture.min(axis=2) < 0.9).mean()
        assert inked > 0.01, name
        assert (picture[:3] > 0.99).all(), f"{name} is clipped"  # nothing runs out of the picture at its top
