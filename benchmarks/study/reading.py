"""What a study's results say: cells by set and method, and each measure with its interval over seeds and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpref.benchmarks.study.measures import (
    DISTINCT_2,
    MEAN,
    PERPLEXITY,
    Counts,
    Interval,
    Statistic,
    Values,
    bootstrap,
    longest_repeated_span,
    nats_per_token,
)
from fastpref.benchmarks.study.settings import TITLES as METHOD_TITLES
from fastpref.benchmarks.study.winning import win_rate
from fastpref.demo.pairs import mentions

Cell = dict[str, Any]
Results = dict[str, Any]

BASE = "base"
TITLES = {BASE: "base", **METHOD_TITLES}
SHORT_TITLES = TITLES | {"trl": "TRL (defaults)", "trl_matched": "TRL (as DPO)"}
SET_TITLES = {"standard": "standard", "low_edit": "low edit distance"}
SAMPLES = 2000  # of the bootstrap


def _percentile_95(items: Sequence[float]) -> Callable[[Counts], Values]:
    """The least value that at least 95% of a resample are no greater than."""
    values = np.asarray(items, np.float64)
    order = np.argsort(values, kind="stable")

    def of(counts: Counts) -> Values:
        reached = counts[:, order].cumsum(axis=1) >= 0.95 * len(values) - 1e-9
        return values[order][reached.argmax(axis=1)]

    return of


PERCENTILE_95: Statistic[float] = Statistic(_percentile_95)


def gap(statistic: Statistic[Any]) -> Statistic[tuple[Any, Any]]:
    """The statistic of the first items of pairs less that of the second, both of the same resample."""

    def of(pairs: Sequence[tuple[Any, Any]]) -> Callable[[Counts], Values]:
        first, second = (statistic.of(side) for side in zip(*pairs, strict=True))
        return lambda counts: first(counts) - second(counts)

    return Statistic(of, jackknifed=statistic.jackknifed)


@dataclass(frozen=True)
class Measure:
    """One item a prompt and a statistic of them; `items` gives None where the cell lacks what it needs."""

    title: str
    form: str  # "percent", or how many digits follow the point, with a + where the sign matters
    items: Callable[[Cell, str], list[Any] | None]
    statistic: Statistic[Any] = MEAN


def scores(cell: Cell, side: str, *fields: str) -> list[list[float]] | None:
    """The named columns of a cell's scores, or None where one of them, or a number in one, is missing."""
    columns = (cell.get("scores") or {}).get(side) or {}
    found = [columns.get(field) or [None] for field in fields]
    return None if any(value is None for column in found for value in column) else found


def _log_ratios(side: str, *, rewards: bool = False) -> Callable[[Cell, str], list[float] | None]:
    def items(cell: Cell, university: str) -> list[float] | None:
        found = scores(cell, side, "policy", "reference")
        beta = (cell.get("settings") or {}).get("beta") if rewards else 1.0
        return None if found is None or beta is None else [beta * (a - b) for a, b in zip(*found, strict=True)]

    return items


def _accuracy(cell: Cell, university: str) -> list[float] | None:
    chosen, rejected = (_log_ratios(side)(cell, university) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or cell["method"] == BASE:  # every log-ratio of the base is 0: no accuracy
        return None
    return [float(a > b) for a, b in zip(chosen, rejected, strict=True)]


def _scored(side: str, logps: str, tokens: str) -> Callable[[Cell, str], list[tuple[float, int]] | None]:
    def items(cell: Cell, university: str) -> list[tuple[float, int]] | None:
        found = scores(cell, side, logps, tokens)
        return None if found is None else [(logp, int(count)) for logp, count in zip(*found, strict=True)]

    return items


def _answers(of: Callable[[str, str], float]) -> Callable[[Cell, str], list[float] | None]:
    """A number of each answer's text, and the target's name."""

    def items(cell: Cell, university: str) -> list[float] | None:
        answers = cell.get("answers")
        return None if answers is None else [float(of(text, university)) for text in answers]

    return items


_spans = _answers(lambda text, university: longest_repeated_span(text))

MEASURES = {
    "mention_share": Measure("target mentioned", "percent", _answers(mentions)),
    "words": Measure("words an answer", ".1f", _answers(lambda text, university: len(text.split()))),
    "longest_span": Measure("longest repeated span, words", ".1f", _spans),
    "longest_span_95": Measure("longest repeated span, 95th percentile", ".1f", _spans, PERCENTILE_95),
    "distinct_2": Measure("distinct-2", ".3f", lambda cell, university: cell.get("answers"), DISTINCT_2),
    "proxy_perplexity": Measure(
        "proxy perplexity of its own answers", ".2f", _scored("own", "judge", "judge_tokens"), PERPLEXITY
    ),
    "chosen_perplexity": Measure(
        "perplexity of held-out chosen answers", ".2f", _scored("chosen", "policy", "tokens"), PERPLEXITY
    ),
    "chosen_log_ratio": Measure("log-ratio of chosen, nats", "+.2f", _log_ratios("chosen")),
    "rejected_log_ratio": Measure("log-ratio of rejected, nats", "+.2f", _log_ratios("rejected")),
    "chosen_reward": Measure("chosen reward", "+.2f", _log_ratios("chosen", rewards=True)),
    "rejected_reward": Measure("rejected reward", "+.2f", _log_ratios("rejected", rewards=True)),
    "accuracy": Measure("accuracy", "percent", _accuracy),
    "kl": Measure("KL from base, nats per answer", ".1f", _log_ratios("own")),
}


class Study:
    """Results with their intervals, each computed once. `samples` is how often the bootstrap draws."""

    def __init__(self, results: Results, *, samples: int = SAMPLES) -> None:
        self.results = results
        self.samples = samples
        self.sets: list[str] = list(results["sets"])
        self.methods: list[str] = [name for name in results["methods"] if name != BASE]
        self._known: dict[tuple[str, ...], Interval | None] = {}

    @property
    def every(self) -> list[str]:
        """The base and the methods."""
        return [BASE, *self.methods]

    def cells(self, pair_set: str, method: str) -> list[Cell]:
        """One a seed, in the order of the seeds."""
        found = [cell for cell in self.results["cells"] if (cell["set"], cell["method"]) == (pair_set, method)]
        return sorted(found, key=lambda cell: cell["seed"])

    def present(self, pair_set: str, *, base: bool = True) -> list[str]:
        """The methods of which this set has a cell, the base first."""
        names = self.every if base else self.methods
        return [name for name in names if self.cells(pair_set, name)]

    def items(self, pair_set: str, method: str, measure: str) -> dict[int, list[Any]] | None:
        """Values by seed; None where there is no cell or one of them lacks the measure."""
        university = self.results["university"]
        found = {cell["seed"]: MEASURES[measure].items(cell, university) for cell in self.cells(pair_set, method)}
        if not found or any(not values for values in found.values()):
            return None
        return {seed: values for seed, values in found.items() if values is not None}

    def interval(self, pair_set: str, method: str, measure: str) -> Interval | None:
        def compute() -> Interval | None:
            found = self.items(pair_set, method, measure)
            if found is None:
                return None
            return bootstrap(list(found.values()), statistic=MEASURES[measure].statistic, samples=self.samples)

        return self._once(("interval", pair_set, method, measure), compute)

    def difference(self, pair_set: str, method: str, other: str, measure: str) -> Interval | None:
        """`method` minus `other`, paired by prompt and seed."""

        def compute() -> Interval | None:
            first, second = (self.items(pair_set, name, measure) for name in (method, other))
            shared = _shared(first, second)
            if first is None or second is None or not shared:
                return None
            pairs = [list(zip(first[seed], second[seed], strict=True)) for seed in shared]
            return bootstrap(pairs, statistic=gap(MEASURES[measure].statistic), samples=self.samples)

        return self._once(("difference", pair_set, method, other, measure), compute)

    def proxy_wins(self, pair_set: str, first: str, second: str) -> Interval | None:
        """How often the proxy judge prefers the first method's answer: fewer nats a token win, a tie is half a win."""

        def compute() -> Interval | None:
            sides = [self.items(pair_set, name, "proxy_perplexity") for name in (first, second)]
            shared = _shared(*sides)
            if not shared:
                return None
            ours, theirs = (
                [nats_per_token(*zip(*side[seed], strict=True)) for seed in shared] for side in sides if side
            )
            return win_rate(ours, theirs, samples=self.samples)

        return self._once(("wins", pair_set, first, second), compute)

    def target_favoured(self) -> Interval | None:
        """How often the proxy judge prefers a chosen answer to the same with another place named, the low-edit one."""

        def compute() -> Interval | None:
            cells = self.cells("low_edit", BASE)
            read = [_scored(side, "judge", "judge_tokens") for side in ("chosen", "rejected")]
            sides = [[of(cell, self.results["university"]) for cell in cells] for of in read]
            ours, theirs = ([nats_per_token(*zip(*items, strict=True)) for items in side if items] for side in sides)
            if not cells or not len(ours) == len(theirs) == len(cells):
                return None
            return win_rate(ours, theirs, samples=self.samples)

        return self._once(("target favoured",), compute)

    def real(self, pair_set: str, measure: str) -> Interval | None:
        """A measure of the data's own held-out chosen answers, as though a method had given them."""

        def compute() -> Interval | None:
            judged = (self.results.get("real") or {}).get(pair_set, [])
            cells = [
                {"answers": self.results["chosen"][str(entry["seed"])], "scores": {"own": entry["chosen"]}}
                for entry in judged
            ]
            found = [MEASURES[measure].items(cell, self.results["university"]) for cell in cells]
            groups = [items for items in found if items]
            if not groups or len(groups) < len(cells):
                return None
            return bootstrap(groups, statistic=MEASURES[measure].statistic, samples=self.samples)

        return self._once(("real", pair_set, measure), compute)

    def endpoint_wins(self, pair_set: str, first: str, second: str) -> Interval | None:
        """The same by the judge behind an endpoint, where the results have its verdicts."""
        for pair in (self.results.get("endpoint") or {}).get("pairs", []):
            if pair["set"] == pair_set and pair.get("rate") is not None:
                estimate, low, high = pair["rate"]
                if (pair["first"], pair["second"]) == (first, second):
                    return Interval(estimate, low, high)
                if (pair["first"], pair["second"]) == (second, first):
                    return Interval(1 - estimate, 1 - high, 1 - low)
        return None

    def _once(self, key: tuple[str, ...], compute: Callable[[], Interval | None]) -> Interval | None:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def _shared(first: dict[int, Any] | None, second: dict[int, Any] | None) -> list[int]:
    return sorted(set(first or ()) & set(second or ()))
