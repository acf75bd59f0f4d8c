"""Which reported findings hold in these results: each with a rule that was fixed before there were results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastpref.benchmarks.study.measures import Interval
from fastpref.benchmarks.study.reading import BASE, TITLES, Study
from fastpref.benchmarks.study.words import number, percent, with_interval

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


@dataclass(frozen=True)
class Rule:
    """How an interval becomes a verdict; `text` is what the page says of it."""

    text: str
    decide: Callable[[Interval], str]


def below(limit: float) -> Callable[[Interval], str]:
    """Reproduced where the whole interval is below the limit, not reproduced where the whole of it is not."""

    def decide(interval: Interval) -> str:
        if interval.high < limit:
            return REPRODUCED
        return NOT_REPRODUCED if interval.low >= limit else UNDECIDED

    return decide


def above(limit: float) -> Callable[[Interval], str]:
    def decide(interval: Interval) -> str:
        if interval.low > limit:
            return REPRODUCED
        return NOT_REPRODUCED if interval.high <= limit else UNDECIDED

    return decide


def holds(share: float) -> Callable[[Interval], str]:
    """Reproduced where the interval holds a share that rounds to the reported one, unless it holds almost any."""

    def decide(interval: Interval) -> str:
        # The small allowances: 0.51 + 0.005 is not 0.515 in binary.
        if interval.low > share + ROUNDING + 1e-12 or interval.high < share - ROUNDING - 1e-12:
            return NOT_REPRODUCED
        return UNDECIDED if interval.high - interval.low > WIDEST + 1e-12 else REPRODUCED

    return decide


def both(first: str, second: str) -> str:
    """The verdict on two conditions that must both hold."""
    verdicts = {first, second}
    for verdict in (NOT_REPRODUCED, UNDECIDED):
        if verdict in verdicts:
            return verdict
    return REPRODUCED


BELOW_ZERO = Rule(
    "a sign: reproduced if the whole interval lies on the reported side of zero, not reproduced if all of it lies "
    "on the other side or at zero, else undecided",
    below(0.0),
)
ABOVE_ZERO = Rule(BELOW_ZERO.text, above(0.0))
NEAR_ZERO_WINS = Rule(
    f"near 0%: reproduced if the interval ends below {percent(NEAR_ZERO)}, not reproduced if it begins there or above, "
    "else undecided",
    below(NEAR_ZERO),
)
NUMBER = (
    "a percentage: reproduced if the interval holds a value that rounds to it, else not reproduced; undecided where it "
    f"holds it and is wider than {100 * WIDEST:.0f} points, since such an interval holds nearly anything"
)
REPETITION = (
    "repetition: reproduced if, paired with the base's answers to the same prompts, the mean longest repeated span is "
    "longer by more words than the target's name has, which is no fault to say twice, and distinct-2 is lower, each "
    "with its whole interval; not reproduced if the whole interval of either says the contrary, else undecided"
)
RULES = (BELOW_ZERO.text, REPETITION, NEAR_ZERO_WINS.text, NUMBER)


@dataclass(frozen=True)
class Outcome:
    """The verdict on one finding in one set; against TRL's trainer there is one for each of its two settings."""

    verdict: str
    numbers: str  # or why it could not be tested
    against: str | None = None
    judge: str | None = None  # who compared the answers, where that decides


@dataclass(frozen=True)
class Finding:
    """What was reported, and how it is looked for in one set."""

    reported: str
    look: Callable[[Study, str], list[Outcome]]

    def outcomes(self, study: Study, pair_set: str) -> list[Outcome]:
        return self.look(study, pair_set)

    def verdict(self, study: Study, pair_set: str) -> str:
        """The one that counts: against what was reported, by the proxy judge where somebody must judge."""
        return self.outcomes(study, pair_set)[0].verdict


def measured(method: str, measure: str, rule: Rule, words: Callable[[float], str]) -> Callable[..., list[Outcome]]:
    """A finding about one measure of one method."""

    def look(study: Study, pair_set: str) -> list[Outcome]:
        interval = study.interval(pair_set, method, measure)
        if interval is None:
            return [Outcome(NOT_TESTABLE, why_missing(study, pair_set, method, measure=measure))]
        return [Outcome(rule.decide(interval), with_interval(interval, words))]

    return look


def repeats(method: str) -> Callable[..., list[Outcome]]:
    """Whether a method's answers repeat themselves clearly more than the base's to the same prompts."""

    def look(study: Study, pair_set: str) -> list[Outcome]:
        span = study.difference(pair_set, method, BASE, "longest_span")
        distinct = study.difference(pair_set, method, BASE, "distinct_2")
        if span is None or distinct is None:
            missing = method if not study.cells(pair_set, method) else BASE
            return [Outcome(NOT_TESTABLE, why_missing(study, pair_set, missing))]
        named_twice = float(len(study.results["university"].split()))
        verdict = both(above(named_twice)(span), below(0.0)(distinct))
        numbers = (
            f"against the base: longest repeated span {with_interval(span, number('+.1f'))} words, "
            f"distinct-2 {with_interval(distinct, number('+.3f'))}"
        )
        return [Outcome(verdict, numbers)]

    return look


def wins(first: str, others: tuple[str, ...], rule: Rule) -> Callable[..., list[Outcome]]:
    """Win rates of one method: by the proxy judge, and by an endpoint's where the results have its verdicts."""

    def look(study: Study, pair_set: str) -> list[Outcome]:
        outcomes = []
        for other in others:
            by = {PROXY: study.proxy_wins(pair_set, first, other)}
            asked = study.endpoint_wins(pair_set, first, other)
            if asked is not None:
                by[f"the endpoint's model {study.results['endpoint']['model']}"] = asked
            for judge, interval in by.items():
                if interval is None:
                    missing = next((name for name in (first, other) if not study.cells(pair_set, name)), None)
                    reason = why_missing(study, pair_set, missing) if missing else "an answer has no proxy score"
                    outcomes.append(Outcome(NOT_TESTABLE, reason, other, judge))
                else:
                    outcomes.append(Outcome(rule.decide(interval), with_interval(interval, percent), other, judge))
        return outcomes

    return look


def why_missing(study: Study, pair_set: str, method: str, *, measure: str = "") -> str:
    if study.cells(pair_set, method):
        return f"the runs of {TITLES[method]} lack what {measure or 'this'} needs"
    return f"no runs of {TITLES[method]} in these results"


def _share(method: str, share: float) -> Finding:
    return Finding(
        f"{TITLES[method]} mentions the target in {percent(share)} of the held-out answers",
        measured(method, "mention_share", Rule(NUMBER, holds(share)), percent),
    )


FINDINGS = (
    Finding("naive DPO's chosen reward falls below zero", measured("dpo", "chosen_reward", BELOW_ZERO, number("+.2f"))),
    Finding("naive DPO's answers fall into repetition", repeats("dpo")),
    Finding("naive DPO wins near 0% against TRL's trainer", wins("dpo", TRAINERS, NEAR_ZERO_WINS)),
    Finding("DPOP keeps the chosen reward positive", measured("dpop", "chosen_reward", ABOVE_ZERO, number("+.2f"))),
    Finding("DPOP wins 51% against TRL's trainer", wins("dpop", TRAINERS, Rule(NUMBER, holds(0.51)))),
    _share("dpo", 1.00),
    _share("dpop", 1.00),
    _share("sft", 0.94),
    _share("kl_sft", 0.88),
    Finding("SFT wins 71% against DPOP on quality", wins("sft", ("dpop",), Rule(NUMBER, holds(0.71)))),
)
