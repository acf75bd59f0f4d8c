"""Which of two answers to a question the proxy judge prefers, and how far its preference can be trusted.

The proxy judge is a small language model trained apart on the study's text; it prefers the answer to which it gives
fewer nats per token. That measures fluency as the study's text has it, not quality. Its known weakness: a language
model can find repetition and short, safe answers likely, whatever they are worth (Holtzman et al. 2020, "The Curious
Case of Neural Text Degeneration", arXiv:1904.09751). So real answers are spoilt in known ways, these among them, and
`calibrate` counts how often the proxy prefers the untouched answer. Where that is near one half or below, the proxy
cannot see the fault, and a win rate that may rest on it says nothing.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastpref.benchmarks.study.measures import Interval, bootstrap, nats_per_token
from fastpref.checks import check_choice
from fastpref.demo.measures import answer_logps

Spoil = Callable[[Sequence[str], random.Random], list[str]]

# Nats per token. The same answer scored in another batch differs by the rounding of float32, which is no preference.
TIE = 1e-4
LOOP = 4  # words that a looping answer says again and again
DEGRADATIONS = {
    "shuffled": "the answer's words in random order",
    "repeated": "one of its sentences said three times",
    "looped": f"its first {LOOP} words said over and over, to its own length",
    "cut": "cut off in the middle of a sentence",
    "swapped": "the answer to another question",
    "shortest": "the shortest of all the answers, whatever the question",
}


def wins(
    first: Sequence[float],  # nats per token of the proxy judge, by prompt
    second: Sequence[float],
) -> list[float]:
    """1 where the proxy judge prefers the first answer to the prompt, 0 where the second, 0.5 where neither."""
    if not len(first) or len(first) != len(second):
        raise ValueError(f"wins needs two numbers for each of some prompts, got {len(first)} and {len(second)} numbers")
    gains = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    bad = np.flatnonzero(~np.isfinite(gains))
    if len(bad):
        place = bad[0]
        raise ValueError(f"nats per token must be finite, got {first[place]} and {second[place]} at place {place}")
    return [0.5 if abs(gain) <= TIE else float(gain > 0) for gain in gains]


def win_rate(
    first: Sequence[Sequence[float]],  # nats per token by seed, then by prompt
    second: Sequence[Sequence[float]],
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """How often the proxy judge prefers the first method's answer to the second's, to the same prompt in the same seed.

    A tie counts one half. The interval is `fastpref.benchmarks.study.measures.bootstrap`'s, over seeds and prompts.
    """
    if len(first) != len(second):
        raise ValueError(f"win_rate needs both methods in the same seeds, got {len(first)} and {len(second)} seeds")
    groups = [wins(*pair) for pair in zip(first, second, strict=True)]
    return bootstrap(groups, samples=samples, level=level, seed=seed)


def calibrate(
    judge: Any, judge_tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], seed: int
) -> dict[str, Interval]:
    """For each way to spoil real answers, how often the proxy judge prefers the untouched one.

    The interval is over the prompts alone: there is one judge.
    """

    def score(texts: Sequence[str]) -> list[float]:
        return nats_per_token(*answer_logps(judge, judge_tokenizer, prompts, texts))

    untouched = score(answers)
    return {kind: win_rate([untouched], [score(degrade(kind, answers, seed))]) for kind in DEGRADATIONS}


def degrade(kind: str, answers: Sequence[str], seed: int) -> list[str]:
    """Every answer spoilt in one of the ways of DEGRADATIONS; white space before it stays.

    An answer that this cannot make another (one word in random order, the shortest of all) stays, and ties with itself.

    Raises:
        ValueError: no answers, or none that can be spoilt so.
    """
    check_choice("kind", kind, DEGRADATIONS)
    if not answers:
        raise ValueError("degrade needs at least one answer, got none")
    spoilt = _SPOIL[kind](answers, random.Random(f"{kind} {seed}"))
    if spoilt == list(answers):
        raise ValueError(
            f"none of the {len(answers)} answers can be spoilt by {kind!r}, the first being {answers[0]!r}"
        )
    return spoilt


def _each(spoil: Callable[[list[str], random.Random], list[str]]) -> Spoil:
    """Of a change to one answer's words, the change to all answers."""

    def every(answers: Sequence[str], rng: random.Random) -> list[str]:
        return [_margin(answer) + " ".join(spoil(answer.split(), rng)) for answer in answers]

    return every


def _margin(answer: str) -> str:
    return answer[: len(answer) - len(answer.lstrip())]


def _shuffled(words: list[str], rng: random.Random) -> list[str]:
    if len(set(words)) < 2:
        return words
    while (order := rng.sample(words, len(words))) == words:
        pass
    return order


def _repeated(words: list[str], rng: random.Random) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(words))
    place = rng.randrange(len(sentences))
    return [*sentences[:place], *[sentences[place]] * 3, *sentences[place + 1 :]]


def _looped(words: list[str], rng: random.Random) -> list[str]:
    return [words[place % LOOP] for place in range(len(words))]


def _cut(words: list[str], rng: random.Random) -> list[str]:
    """Between 30% and 80% of the words, the last of them not the end of a sentence."""
    ends = [
        end
        for end in range(1, len(words))
        if words[end - 1][-1] not in ".!?" and 0.3 * len(words) <= end <= 0.8 * len(words)
    ]
    return words[: rng.choice(ends)] if ends else words


def _swapped(answers: Sequence[str], rng: random.Random) -> list[str]:
    """Equal answers lie side by side, and everything moves on by the longest such run, so that none meets its like."""
    texts = sorted(set(answers))
    rank = dict(zip(texts, rng.sample(range(len(texts)), len(texts)), strict=True))
    order = sorted(range(len(answers)), key=lambda place: rank[answers[place]])
    step = max(Counter(answers).values())
    spoilt = list(answers)
    for here, place in enumerate(order):
        spoilt[place] = answers[order[(here + step) % len(order)]]
    return spoilt


def _shortest(answers: Sequence[str], rng: random.Random) -> list[str]:
    return [min(answers, key=lambda answer: len(answer.split()))] * len(answers)


_SPOIL: dict[str, Spoil] = {
    "shuffled": _each(_shuffled),
    "repeated": _each(_repeated),
    "looped": _each(_looped),
    "cut": _each(_cut),
    "swapped": _swapped,
    "shortest": _shortest,
}
