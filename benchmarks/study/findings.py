"""Which reported findings hold in these results: each with a rule that was fixed before there were results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastpref.benchmarks.study.measures import Interval
from fastpref.benchmarks.study.reading import BASE, TITLES, Study
from fastpref.benchmarks.study.words import MISSING, with_interval

REPRODUCED = "REPRODUCED"
NOT_REPRODUCED = "NOT REPRODUCED"
UNDECIDED = "UNDECIDED"
NOT_TESTABLE = "NOT TESTABLE HERE"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNDECIDED, NOT_TESTABLE)

NEAR_ZERO = 0.10
# A reported 51% is anything that rounds to it.
ROUNDING = 0.005
# An interval wider than this holds most numbers that could have been reported: it decides nothing by holding one.
WIDEST = 0.30

PROXY = "the proxy judge"
TRAINERS = ("trl", "trl_matched")

Rule = Callable[[Interval], str]  # how an interval becomes a verdict


def below(limit: float) -> Rule:
    """Reproduced where the whole interval is below the limit, not reproduced where the whole of it is not."""

    def decide(interval: Interval) -> str:
        if interval.high < limit:
            return REPRODUCED
        return NOT_REPRODUCED if interval.low >= limit else UNDECIDED

    return decide


def above(limit: float) -> Rule:
    """`below`, mirrored."""
    return lambda interval: below(-limit)(Interval(-interval.estimate, -interval.high, -interval.low))


def holds(share: float) -> Rule:
    """Reproduced where the interval holds a share that rounds to the reported one, unless it holds almost any."""

    def decide(interval: Interval) -> str:
        # The small allowances: 0.51 + 0.005 is not 0.515 in binary.
        if interval.low > share + ROUNDING + 1e-12 or interval.high < share - ROUNDING - 1e-12:
            return NOT_REPRODUCED
        return UNDECIDED if interval.high - interval.low > WIDEST + 1e-12 else REPRODUCED

    return decide


def both(first: str, second: str) -> str:
    """The verdict on two conditions that must both hold."""
    return next((one for one in (NOT_REPRODUCED, UNDECIDED) if one in (first, second)), REPRODUCED)


class Outcome(NamedTuple):
    """The verdict on one finding in one set; against TRL's trainer there is one for each of its two settings."""

    verdict: str
    numbers: str
    against: str | None = None
    judge: str | None = None  # who compared the answers, where that decides


class Finding(NamedTuple):
    """What was reported, and how it is looked for in one set.

    The first outcome is the one that counts: against what was reported, by the proxy judge where somebody must judge.
    """

    reported: str
    outcomes: Callable[[Study, str], list[Outcome]]


def measured(method: str, measure: str, rule: Rule, form: str) -> Callable[[Study, str], list[Outcome]]:
    """A finding about one measure of one method."""
    return lambda study, pair_set: [_outcome(study.interval(pair_set, method, measure), rule, form)]


def repeats(method: str) -> Callable[[Study, str], list[Outcome]]:
    """Whether a method's answers repeat themselves clearly more than the base's to the same prompts."""

    def outcomes(study: Study, pair_set: str) -> list[Outcome]:
        span = study.difference(pair_set, method, BASE, "longest_span")
        distinct = study.difference(pair_set, method, BASE, "distinct_2")
        if span is None or distinct is None:
            return [Outcome(NOT_TESTABLE, MISSING)]
        named_twice = float(len(study.results["university"].split()))  # to say the name twice is no fault
        numbers = f"span {with_interval(span, '+.1f')} words, distinct-2 {with_interval(distinct, '+.3f')}"
        return [Outcome(both(above(named_twice)(span), below(0.0)(distinct)), numbers, BASE)]

    return outcomes


def wins(first: str, others: tuple[str, ...], rule: Rule) -> Callable[[Study, str], list[Outcome]]:
    """Win rates of one method: by the proxy judge, and by an endpoint's where the results have its verdicts."""

    def outcomes(study: Study, pair_set: str) -> list[Outcome]:
        found = []
        for other in others:
            found.append(_outcome(study.proxy_wins(pair_set, first, other), rule, "percent", other, PROXY))
            asked = study.endpoint_wins(pair_set, first, other)
            if asked is not None:
                judge = f"the endpoint's model {study.results['endpoint']['model']}"
                found.append(_outcome(asked, rule, "percent", other, judge))
        return found

    return outcomes


def _outcome(
    interval: Interval | None, rule: Rule, form: str, against: str | None = None, judge: str | None = None
) -> Outcome:
    verdict = NOT_TESTABLE if interval is None else rule(interval)
    return Outcome(verdict, with_interval(interval, form), against, judge)


def _share(method: str, share: float) -> Finding:
    return Finding(
        f"{TITLES[method]} mentions the target in {100 * share:.0f}% of the held-out answers",
        measured(method, "mention_share", holds(share), "percent"),
    )


FINDINGS = (
    Finding("naive DPO's chosen reward falls below zero", measured("dpo", "chosen_reward", below(0.0), "+.2f")),
    Finding("naive DPO's answers fall into repetition", repeats("dpo")),
    Finding("naive DPO wins near 0% against TRL's trainer", wins("dpo", TRAINERS, below(NEAR_ZERO))),
    Finding("DPOP keeps the chosen reward positive", measured("dpop", "chosen_reward", above(0.0), "+.2f")),
    Finding("DPOP wins 51% against TRL's trainer", wins("dpop", TRAINERS, holds(0.51))),
    _share("dpo", 1.00),
    _share("dpop", 1.00),
    _share("sft", 0.94),
    _share("kl_sft", 0.88),
    Finding("SFT wins 71% against DPOP on quality", wins("sft", ("dpop",), holds(0.71))),
)
