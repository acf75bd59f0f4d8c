"""The study's measures: spans, intervals on two levels, the proxy judge's wins, and what it can be relied on to see."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="the study needs fastpref[train]")
pytest.importorskip("accelerate", reason="the study needs fastpref[train]")

from fastpref.benchmarks.study.measures import (
    DISTINCT_2,
    MEAN,
    PERPLEXITY,
    bootstrap,
    longest_repeated_span,
    nats_per_token,
)
from fastpref.benchmarks.study.winning import DEGRADATIONS, TIE, calibrate, degrade, win_rate, wins
from fastpref.demo.base import build_model, train_base, train_tokenizer
from fastpref.demo.measures import answer_logps, distinct_bigrams, perplexity, perplexity_of
from fastpref.demo.pairs import make_pairs

# Log-probs of answers


@pytest.fixture(scope="module")
def judge() -> tuple[Any, Any, list[str], list[str]]:
    """A small model trained on answers, and held-out prompts with their answers."""
    made = make_pairs(train=120, heldout=34, seed=2)
    texts = [pair["prompt"] + pair["chosen"] for pair in made.train]
    tokenizer = train_tokenizer(texts)
    model: Any = build_model(tokenizer, width=64, layers=1, seed=2)
    train_base(model, tokenizer, texts, epochs=3, batch_size=8, learning_rate=4e-3, seed=2, advance=lambda: None)
    return model, tokenizer, [row["prompt"] for row in made.heldout], [row["chosen"] for row in made.heldout]


def test_log_probs_are_sums_by_hand_over_the_answer_and_the_end_of_text(judge: tuple[Any, ...]) -> None:
    model, tokenizer, prompts, answers = judge
    scores = answer_logps(model, tokenizer, prompts, answers)
    assert len(scores.logps) == len(scores.tokens) == 34  # more than a batch of 32
    for place in (0, 33):
        start = len(tokenizer(prompts[place])["input_ids"])
        ids = [*tokenizer(prompts[place] + answers[place])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        by_hand = sum(float(logps[at - 1, ids[at]]) for at in range(start, len(ids)))
        assert scores.logps[place] == pytest.approx(by_hand, rel=1e-5)
        assert scores.tokens[place] == len(ids) - start
    assert perplexity(model, tokenizer, prompts, answers) == perplexity_of(*scores)


# Spans


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", 0),
        ("one", 0),
        ("no word twice", 0),
        ("a b a", 1),
        ("at the school and at the school", 3),
        ("so so so so", 3),
        ("x y x y x y", 4),
        ("The the", 0),
        ("a b c. a b c", 2),
    ],
)
def test_the_longest_repeated_span_by_hand(answer: str, words: int) -> None:
    assert longest_repeated_span(answer) == words


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=14))
def test_the_longest_repeated_span_is_that_of_a_search_through_all_spans(words: list[str]) -> None:
    repeated = [
        length
        for length in range(1, len(words))
        for first in range(len(words) - length + 1)
        for second in range(first + 1, len(words) - length + 1)
        if words[first : first + length] == words[second : second + length]
    ]
    assert longest_repeated_span(" ".join(words)) == max(repeated, default=0)


# Intervals


def test_the_quantiles_are_those_of_every_resample_there_is() -> None:
    """Two seeds of two prompts make few enough resamples to list all with their probability."""
    groups = [[0.0, 1.0], [3.0, 5.0]]
    means = [
        float(np.mean([groups[seed][item] for seed, items in zip(seeds, draws, strict=True) for item in items]))
        for seeds in product(range(2), repeat=2)
        for draws in product(product(range(2), repeat=2), repeat=2)
    ]
    interval = bootstrap(groups, samples=40_000, level=0.7)
    assert interval.estimate == 2.25
    # The distribution is in steps of 0.25 and both quantiles fall well inside one.
    assert (interval.low, interval.high) == (np.quantile(means, 0.15), np.quantile(means, 0.85))


def test_the_same_seed_gives_the_same_interval_bit_for_bit_and_another_one_not() -> None:
    groups = np.random.default_rng(0).random((3, 125)).tolist()
    assert bootstrap(groups, seed=4) == bootstrap(groups, seed=4)
    assert bootstrap(groups, seed=4) != bootstrap(groups, seed=5)


def test_seeds_that_differ_widen_the_interval_and_prompts_alone_would_not_show_it() -> None:
    alike = [[0.0, 1.0] * 60] * 3
    apart = [[0.2, 0.4] * 60, [0.4, 0.6] * 60, [0.6, 0.8] * 60]
    within = bootstrap(alike)
    between = bootstrap(apart)
    assert within.estimate == pytest.approx(between.estimate)
    assert within.high - within.low == pytest.approx(4 * 0.5 / math.sqrt(360), rel=0.1)  # 3.92 standard errors
    # Its prompts spread five times less than those of `alike`, its seeds by 0.16.
    assert between.high - between.low > 2 * (within.high - within.low)
    assert bootstrap([[value for group in apart for value in group]]).high < between.high


def test_seeds_count_the_same_whatever_their_number_of_prompts() -> None:
    assert bootstrap([[1.0] * 9, [0.0]]).estimate == 0.5


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [0, 2, 1, 1], [4, 0, 0, 0]])
def test_a_statistic_of_multiplicities_is_that_of_the_items_said_so_often(counts: list[int]) -> None:
    answers = ["a b a b c", "a b", "c", "c d a b"]
    scored = [(-3.0, 2), (-10.5, 7), (-1.0, 1), (-8.0, 5)]
    times = np.array([counts])

    def said(items: list[Any]) -> list[Any]:
        return [item for item, count in zip(items, counts, strict=True) for _ in range(count)]

    assert DISTINCT_2.of(answers)(times) == pytest.approx(distinct_bigrams(said(answers)), rel=1e-12)
    assert PERPLEXITY.of(scored)(times) == pytest.approx(perplexity_of(*zip(*said(scored), strict=True)), rel=1e-12)
    assert MEAN.of([logp for logp, _ in scored])(times) == pytest.approx(np.mean([logp for logp, _ in said(scored)]))


def test_the_interval_of_distinct_2_holds_its_estimate_and_has_the_width_of_new_draws() -> None:
    """Resampling itself makes word pairs occur twice: so done, the interval lies beside its estimate."""
    rng = np.random.default_rng(0)
    # Words by Zipf's law, in answers of 5 to 40.
    draws = [
        [" ".join(map(str, rng.zipf(1.3, size) % 500)) for size in rng.integers(5, 41, size=125)] for _ in range(120)
    ]
    values = [distinct_bigrams(draw) for draw in draws]
    intervals = [bootstrap([draw], statistic=DISTINCT_2) for draw in draws[:10]]
    plain = bootstrap([draws[0]], statistic=dataclasses.replace(DISTINCT_2, jackknifed=False), samples=300)
    assert plain.high < plain.estimate
    assert intervals[0].estimate == plain.estimate == values[0]
    assert all(interval.low < interval.estimate < interval.high for interval in intervals)
    ratio = np.mean([interval.high - interval.low for interval in intervals]) / (2 * 1.96 * np.std(values))
    assert 0.85 < ratio < 1.35  # 120 draws know their own spread to 7%; a jackknife errs on the wide side


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one seed, got none"),
        ([[1.0], []], "group 1 has none"),
        ([[1.0, math.nan]], "values must be finite numbers, got nan at place 1"),
        ([[1.0], [math.inf]], "got inf at place 0"),
    ],
)
def test_an_interval_of_nothing_or_of_what_is_no_number_is_refused(groups: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(groups)


# Wins by the proxy judge


def test_fewer_nats_per_token_win_and_a_tie_is_one_half() -> None:
    assert wins([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]) == [1.0, 0.0, 0.5]
    assert wins([1.0, 1.0], [1.0 + TIE / 2, 1.0 + 2 * TIE]) == [0.5, 1.0]


def test_the_same_answers_scored_in_other_batches_tie(judge: tuple[Any, ...]) -> None:
    model, tokenizer, prompts, answers = judge
    together = nats_per_token(*answer_logps(model, tokenizer, prompts, answers))
    alone = [
        value
        for prompt, answer in zip(prompts, answers, strict=True)
        for value in nats_per_token(*answer_logps(model, tokenizer, [prompt], [answer]))
    ]
    assert wins(together, alone) == [0.5] * 34
    # How a processor rounds is its own affair; without the margin half of these would be wins.
    rounded = [value * (1 + (-1) ** place * 1e-6) for place, value in enumerate(together)]
    assert wins(together, rounded) == [0.5] * 34


def test_a_win_rate_is_paired_and_adds_up_to_one_with_its_mirror() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random((2, 3, 50)).tolist()
    rate, mirror = win_rate(first, second), win_rate(second, first)
    assert rate.estimate == pytest.approx(np.mean(np.array(first) < np.array(second)))
    assert [1 - value for value in mirror] == pytest.approx([rate.estimate, rate.high, rate.low])
    assert win_rate(first, first) == (0.5, 0.5, 0.5)


# How answers are spoilt

ANSWERS = [
    " Ask the school first. It has a course in botany! You can start there.",
    " Botany is taught in many places, and some have gardens.",
    " Yes. There are evening classes, which cost little. Look at their pages. Then choose.",
    " Yes, it is.",
]


@pytest.mark.parametrize("seed", range(5))
def test_each_way_spoils_as_it_says(seed: int) -> None:
    for before, after in zip(ANSWERS, degrade("shuffled", ANSWERS, seed), strict=True):
        assert after != before
        assert Counter(after.split()) == Counter(before.split())
    for before, after in zip(ANSWERS, degrade("repeated", ANSWERS, seed), strict=True):
        sentences = before.strip().replace("! ", "!|").replace(". ", ".|").split("|")
        assert any(after == before.replace(said, " ".join([said] * 3)) for said in sentences)
    for before, after in zip(ANSWERS, degrade("cut", ANSWERS, seed), strict=True):
        assert before.startswith(after)
        assert after[-1] not in ".!?"
        assert 0.3 <= len(after.split()) / len(before.split()) <= 0.8
    swapped = degrade("swapped", ANSWERS, seed)
    assert sorted(swapped) == sorted(ANSWERS)
    assert all(after != before for before, after in zip(ANSWERS, swapped, strict=True))
    assert degrade("looped", ANSWERS, seed)[1] == " Botany is taught in Botany is taught in Botany is"
    assert degrade("shortest", ANSWERS, seed) == [" Yes, it is."] * 4


def test_swapping_gives_no_question_its_own_answer_back_where_answers_occur_twice() -> None:
    answers = [" a b.", " a b.", " a b.", " c d.", " e f.", " g h."]
    for seed in range(10):
        assert all(after != before for before, after in zip(answers, degrade("swapped", answers, seed), strict=True))


def test_calibration_shows_what_a_trained_proxy_sees_and_a_blind_one_does_not(judge: tuple[Any, ...]) -> None:
    model, tokenizer, prompts, answers = judge
    seen = calibrate(model, tokenizer, prompts, answers, 0)
    assert list(seen) == list(DEGRADATIONS)
    assert seen["shuffled"].low > 0.9
    # A model that gives every token the same probability prefers nothing.
    blind = build_model(tokenizer, width=32, layers=1, seed=0)
    with torch.no_grad():
        for parameter in blind.parameters():
            parameter.zero_()
    assert calibrate(blind, tokenizer, prompts[:8], answers[:8], 0) == dict.fromkeys(DEGRADATIONS, (0.5, 0.5, 0.5))


def test_a_proxy_that_likes_repetition_is_found_out_by_its_calibration() -> None:
    """The known weakness of perplexity as a judge, made extreme: a model that expects the word it has just read."""
    prompts = [f"Question: {word}?\nAnswer:" for word in "abcdefgh"]
    answers = [f" {word} x{word} y{word} z{word}." for word in "abcdefgh"]
    tokenizer = train_tokenizer([*prompts, *answers])
    model = build_model(tokenizer, width=32, layers=1, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_f.weight" in name:
                parameter.fill_(3.0)  # what the head sees is the last token's own embedding, and that loud
            elif "wte" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
            else:
                parameter.zero_()
    said_again = [answer.split()[0] for answer in answers]
    repeats = [" " + " ".join([word] * 8) for word in said_again]
    preferred = wins(
        nats_per_token(*answer_logps(model, tokenizer, prompts, answers)),
        nats_per_token(*answer_logps(model, tokenizer, prompts, repeats)),
    )
    assert preferred == [0.0] * 8
