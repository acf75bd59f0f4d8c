"""The order of the data, its cut into steps and micro-batches, and the padded batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpref.training.data.batches import GROUPED_STEPS, BatchPlan, Sizes, cut
from fastpref.training.data.collate import Layout, collate
from fastpref.training.data.tokens import Pair, Response


def response(length: int, start: int, first: int = 1) -> Response:
    return Response(np.arange(first, first + length, dtype=np.int32), start)


def pair(chosen: Response, rejected: Response, row: int = 0) -> Pair:
    return Pair(row, np.arange(1, 3, dtype=np.int32), chosen, rejected)


def sizes(lengths: list[int], *, padded: bool = False) -> Sizes:
    return Sizes(tuple(2 * length for length in lengths), tuple(lengths), tuple(lengths) if padded else None)


def plan(pairs: int, per_step: int, **options: Any) -> BatchPlan:
    lengths = [1 + 7 * index % 11 for index in range(pairs)]
    return BatchPlan(pairs, per_step, **{"batch_size": per_step, "seed": 3, "sizes": sizes(lengths), **options})


@given(
    pairs=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 3),
    batch_tokens=st.sampled_from([None, 1, 30]),
    grouped=st.booleans(),
    padded=st.booleans(),
)
def test_an_epoch_takes_every_pair_once_over_all_processes(
    pairs: int,
    batch_size: int,
    accumulation: int,
    world: int,
    batch_tokens: int | None,
    grouped: bool,
    padded: bool,
) -> None:
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "grouped": grouped, "batch_size": batch_size}
    per_step = batch_size * accumulation * world
    found = sizes([1 + 7 * index % 11 for index in range(pairs)], padded=padded)
    plans = [plan(pairs, per_step, rank=rank, world=world, sizes=found, **options) for rank in range(world)]
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for place in range(plans[0].steps_per_epoch):
            step = plans[0].step(epoch * plans[0].steps_per_epoch + place)
            assert len(step) == per_step or place == plans[0].steps_per_epoch - 1
            shares = [plan.micro_batches(step) for plan in plans]
            assert len({len(share) for share in shares}) == 1  # every process makes as many backward passes
            assert batch_tokens is not None or len(shares[0]) <= accumulation
            assert all(len(micro) <= batch_size for share in shares for micro in share)
            if batch_tokens is not None:
                assert all(len(micro) <= 1 or found.of(micro) <= batch_tokens for share in shares for micro in share)
            seen.update(index for share in shares for micro in share for index in micro)
        assert seen == Counter(range(pairs))


def test_epochs_differ_in_order_and_a_seed_repeats_it() -> None:
    first = plan(50, 50)
    assert first.step(0) != first.step(1)
    assert first.step(1) == plan(50, 50).step(1)
    assert first.step(0) == plan(50, 50).step(0)  # also after another epoch
    assert first.step(0) != plan(50, 50, seed=4).step(0)


def test_epochs_are_counted_by_pairs() -> None:
    assert [plan(13, 8).epoch(steps) for steps in (1, 2, 3)] == [8 / 13, 1.0, 1 + 8 / 13]


def test_the_cut_of_a_step_does_not_change_which_pairs_it_holds() -> None:
    whole, halves = plan(13, 8), plan(13, 8, batch_size=3, batch_tokens=40)
    assert [whole.step(place) for place in range(4)] == [halves.step(place) for place in range(4)]


def test_a_batch_ends_where_its_tokens_would_pass_the_limit() -> None:
    """Packed rows hold the sum of their pairs; padded ones all as much as the longest. A pair too long stands alone."""
    lengths = [3, 1, 9, 2, 2]
    assert cut(range(5), sizes(lengths), batch_size=5, batch_tokens=8) == [[0, 1], [2], [3, 4]]
    assert cut(range(5), sizes(lengths, padded=True), batch_size=5, batch_tokens=8) == [[0], [1], [2], [3, 4]]
    assert cut(range(5), sizes(lengths), batch_size=2, batch_tokens=None) == [[0, 1], [2, 3], [4]]
    assert cut([], sizes(lengths), batch_size=2, batch_tokens=8) == []


@pytest.mark.parametrize("batch_tokens", [64, 80, 100])
def test_the_limit_of_padded_batches_counts_what_their_rows_are_rounded_up_to(batch_tokens: int) -> None:
    layout = Layout("padded", pad_id=0, max_length=20)
    pairs = [pair(response(length, 3), response(4, 3)) for length in (5, 9, 9, 6, 17, 18, 5)]
    widths = tuple(layout.width(found.length) for found in pairs)
    found = Sizes((1,) * 7, tuple(found.length for found in pairs), widths)
    for indices in cut(range(7), found, batch_size=7, batch_tokens=batch_tokens):
        batch = collate([pairs[index] for index in indices], layout)
        assert batch.inputs["input_ids"].numel() == found.of(indices)
        assert len(indices) == 1 or found.of(indices) <= batch_tokens


def test_grouped_steps_hold_like_lengths_in_an_order_that_does_not_fall() -> None:
    lengths = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    options: dict[str, Any] = {"sizes": sizes([length + 1 for length in lengths]), "batch_size": 4, "per_step": 4}
    grouped, free = (plan(1000, grouped=grouped, **options) for grouped in (True, False))

    def spread(found: BatchPlan) -> float:
        steps = [[lengths[index] for index in found.step(place)] for place in range(250)]
        return sum(max(step) - min(step) for step in steps) / 250

    assert spread(grouped) < 0.05 * spread(free)
    longest = [max(lengths[index] for index in grouped.step(place)) for place in range(GROUPED_STEPS)]
    assert longest != sorted(longest, reverse=True)


def test_a_batch_is_all_chosen_then_all_rejected_with_labels_on_the_responses() -> None:
    batch = collate(
        [pair(response(5, 3), response(4, 2, 11), 7), pair(response(9, 8, 21), response(2, 1, 31), 4)],
        Layout("padded", 0, 64),
    )
    assert batch.rows == [7, 4]
    assert batch.inputs["input_ids"].shape == (4, 16)  # the longest has 9 tokens
    assert batch.inputs["input_ids"][:, 0].tolist() == [1, 21, 11, 31]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 9, 4, 2]
    assert batch.tokens == 20
    for place, labels in enumerate([{3: 4, 4: 5}, {8: 29}, {2: 13, 3: 14}, {1: 32}]):
        kept = {i: label for i, label in enumerate(batch.labels[place].tolist()) if label != -100}
        assert kept == labels
    assert batch.ref_chosen is None


def test_a_pad_id_that_is_a_scored_token_too_is_scored_where_it_belongs() -> None:
    eos = 5
    batch = collate([pair(response(5, 3), response(5, 4))], Layout("padded", eos, 64))
    assert batch.inputs["input_ids"][0].tolist() == [1, 2, 3, 4, eos, eos, eos, eos]
    assert batch.labels[0].tolist() == [-100, -100, -100, 4, eos, -100, -100, -100]
    assert batch.inputs["attention_mask"][0].tolist() == [1] * 5 + [0] * 3


@pytest.mark.parametrize(("longest", "max_length", "width"), [(9, 64, 16), (9, 12, 12), (9, 9, 9), (8, 64, 8)])
def test_padding_goes_to_a_multiple_of_8_and_never_beyond_max_length(longest: int, max_length: int, width: int) -> None:
    batch = collate([pair(response(longest, 2), response(3, 2))], Layout("padded", 0, max_length))
    assert batch.inputs["input_ids"].shape == (2, width)
