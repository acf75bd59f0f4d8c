"""What is measured of a model's answers beside the demo's measures, and how sure one can be of a number.

An interval here is a percentile bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6,
8 and 13) on two levels: seeds are drawn with replacement, then prompts within each seed drawn, since a seed has its
own data, order and sampling, and its answers stand or fall together. With three seeds the upper level is
coarse: there are ten different ways to draw them, all three draws are of one seed one time in nine, and the spread
among seeds comes out smaller than it is, by a factor of sqrt(2/3). Read such an interval as a lower bound of the doubt:
of shares near one half from 3 seeds of 125 prompts, simulated, it holds the true one 98 times in 100 where seeds do not
differ, 90 times where they differ by 5 points (standard deviation), 80 times where they differ by 10.
With one seed it knows nothing of how seeds differ. A share of 0% or 100% comes with an interval of no width, though n
answers leave room for some 3 in n (Hanley and Lippman-Hand 1983).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastpref.checks import check_number

Counts = NDArray[np.int64]  # (B, N): how often each of a seed's N items occurs in each of B resamples
Values = NDArray[np.float64]  # (B,)
Item = TypeVar("Item")


class Interval(NamedTuple):
    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Statistic(Generic[Item]):
    """A number made of one seed's items. `of` looks at the items once and gives a function of their multiplicities."""

    of: Callable[[Sequence[Item]], Callable[[Counts], Values]]
    # Whether its jackknife is resampled instead of itself: for a statistic that holding an item twice biases.
    jackknifed: bool = False


def bootstrap(
    groups: Sequence[Sequence[Any]],  # a sequence of items for each seed
    *,
    statistic: Statistic[Any] | None = None,  # None: MEAN
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The statistic of each seed's items, averaged over the seeds, with its bootstrap interval at `level`.

    The same arguments give the same interval, bit for bit.

    Raises:
        ValueError: no groups, an empty group, an item that is not finite.
    """
    if not len(groups):
        raise ValueError("bootstrap needs the items of at least one seed, got none")
    for place, group in enumerate(groups):
        if not len(group):
            raise ValueError(f"bootstrap needs at least one item a seed, and group {place} has none")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    level = check_number("level", level, minimum=0, maximum=1, open_minimum=True, open_maximum=True)
    chosen = MEAN if statistic is None else statistic
    functions = [chosen.of(group) for group in groups]
    once = [function(np.ones((1, len(group)), np.int64))[0] for function, group in zip(functions, groups, strict=True)]
    estimate = float(np.mean(once))
    if chosen.jackknifed:
        functions = [_jackknife(function, len(group)) for function, group in zip(functions, groups, strict=True)]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(groups), size=(samples, len(groups)))  # (B, S): which seed
    values = np.empty(drawn.shape)
    for which, (function, group) in enumerate(zip(functions, groups, strict=True)):
        here = drawn == which
        counts = _resamples(rng, int(here.sum()), len(group))
        values[here] = function(counts)
    means = values.mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def _resamples(rng: np.random.Generator, samples: int, items: int) -> Counts:  # (samples, items)
    drawn = rng.integers(items, size=(samples, items)) + items * np.arange(samples)[:, None]
    return np.bincount(drawn.ravel(), minlength=samples * items).reshape(samples, items)


def _jackknife(function: Callable[[Counts], Values], items: int) -> Callable[[Counts], Values]:
    """The statistic of all items, plus the mean influence of those drawn: what leaving each of them out would change.

    Its spread is the jackknife's (Efron and Tibshirani, chapter 11), which errs on the wide side (Efron and Stein
    1981).
    """
    everything = np.ones((items, items), np.int64)
    whole = function(everything[:1])[0]
    without = function(everything - np.eye(items, dtype=np.int64))
    influence = (items - 1) * (without.mean() - without)
    return lambda counts: whole + counts @ influence / items


def _mean(items: Sequence[float]) -> Callable[[Counts], Values]:
    values = np.asarray(items, np.float64)
    _check_finite("values", values)
    return lambda counts: counts @ values / counts.sum(axis=1)


def _perplexity(items: Sequence[tuple[float, int]]) -> Callable[[Counts], Values]:
    logps = np.asarray([logp for logp, _ in items], np.float64)
    tokens = np.asarray([count for _, count in items], np.float64)
    _check_finite("log-probs", logps)
    _check_tokens(tokens)
    return lambda counts: np.exp(-(counts @ logps) / (counts @ tokens))


def _distinct_2(items: Sequence[str]) -> Callable[[Counts], Values]:
    pairs = [list(pairwise(answer.split())) for answer in items]
    places = {pair: place for place, pair in enumerate(dict.fromkeys(pair for held in pairs for pair in held))}
    held = np.zeros((len(items), len(places)), np.float32)  # (N, pairs): whether the answer has the pair
    for row, row_pairs in zip(held, pairs, strict=True):
        row[[places[pair] for pair in row_pairs]] = 1
    totals = np.asarray([len(row_pairs) for row_pairs in pairs], np.float64)

    def values(counts: Counts) -> Values:
        distinct = ((counts > 0).astype(np.float32) @ held > 0).sum(axis=1)
        return distinct / np.maximum(counts @ totals, 1)  # no pairs at all: 0, as in distinct_bigrams

    return values


# Of numbers, such as 0 and 1 for whether an answer mentions the target.
MEAN: Statistic[float] = Statistic(_mean)
# Of (log-prob, tokens), an answer each: exp of the nats per token of all of them.
PERPLEXITY: Statistic[tuple[float, int]] = Statistic(_perplexity)
# Of answers: distinct-2 over a seed's answers (Li et al. 2016, arXiv:1510.03055), as `distinct_bigrams` has it. A
# resample holds some answers twice, whose word pairs are then not distinct: it would lie below the estimate.
DISTINCT_2: Statistic[str] = Statistic(_distinct_2, jackknifed=True)


def longest_repeated_span(answer: str) -> int:
    """The words of the longest run of words that occurs at least twice in the answer; 0 where no word does.

    The two may overlap: "so so so so" has "so so so" twice. Words are what white space parts, punctuation included.
    """
    words = answer.split()
    shortest, longest = 0, max(len(words) - 1, 0)
    while shortest < longest:  # whatever occurs twice has every shorter span of it occur twice
        length = (shortest + longest + 1) // 2
        spans = [tuple(words[begin : begin + length]) for begin in range(len(words) - length + 1)]
        if len(set(spans)) < len(spans):
            shortest = length
        else:
            longest = length - 1
    return shortest


def nats_per_token(logps: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """The mean negative log-probability of each answer's tokens: what the proxy judge goes by, lower being better."""
    if len(logps) != len(tokens):
        raise ValueError(f"there must be a number of tokens for every log-prob, got {len(tokens)} and {len(logps)}")
    values, counts = np.asarray(logps, np.float64), np.asarray(tokens, np.float64)
    _check_finite("log-probs", values)
    _check_tokens(counts)
    return [float(value) for value in -values / counts]


def _check_finite(name: str, values: NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{name} must be finite numbers, got {values[bad[0]]} at place {bad[0]}; leave that run out")


def _check_tokens(tokens: NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~(tokens >= 1))
    if len(bad):
        raise ValueError(f"an answer must have at least 1 token, got {tokens[bad[0]]:g} at place {bad[0]}")
