"""The order of the data, its cut into steps and micro-batches, and the padded batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.training.batches import BatchPlan
from fastpref.training.collate import collate
from fastpref.training.data import Pair, Response


def response(length: int, start: int, first: int = 1) -> Response:
    return Response(np.arange(first, first + length, dtype=np.int32), start)


def pair(chosen: Response, rejected: Response, row: int = 0) -> Pair:
    return Pair(row, np.arange(1, 3, dtype=np.int32), chosen, rejected)


@given(pairs=st.integers(1, 40), batch_size=st.integers(1, 5), accumulation=st.integers(1, 3), world=st.integers(1, 3))
def test_an_epoch_takes_every_pair_once_over_all_processes(
    pairs: int, batch_size: int, accumulation: int, world: int
) -> None:
    plans = [BatchPlan(pairs, batch_size, accumulation, seed=3, rank=rank, world=world) for rank in range(world)]
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for place in range(plans[0].steps_per_epoch):
            step = plans[0].step(epoch * plans[0].steps_per_epoch + place)
            shares = [plan.micro_batches(step) for plan in plans]
            assert len({len(share) for share in shares}) == 1  # every process makes as many backward passes
            assert len(shares[0]) <= accumulation
            assert all(len(micro) <= batch_size for share in shares for micro in share)
            seen.update(index for share in shares for micro in share for index in micro)
        assert seen == Counter(range(pairs))


def test_epochs_differ_in_order_and_a_seed_repeats_it() -> None:
    plan = BatchPlan(pairs=50, batch_size=50, accumulation=1, seed=3)
    assert plan.step(0) != plan.step(1)
    assert plan.step(1) == BatchPlan(pairs=50, batch_size=50, accumulation=1, seed=3).step(1)
    assert plan.step(0) != BatchPlan(pairs=50, batch_size=50, accumulation=1, seed=4).step(0)


def test_epochs_are_counted_by_pairs() -> None:
    plan = BatchPlan(pairs=13, batch_size=4, accumulation=2, seed=0)
    assert [plan.epoch(steps) for steps in (1, 2, 3)] == [8 / 13, 1.0, 1 + 8 / 13]


def test_a_batch_is_all_chosen_then_all_rejected_with_labels_on_the_responses() -> None:
    batch = collate(
        [pair(response(5, 3), response(4, 2, 11), 7), pair(response(9, 8, 21), response(2, 1, 31), 4)],
        pad_id=0,
        max_length=64,
    )
    assert batch.rows == [7, 4]
    assert batch.input_ids.shape == (4, 16)  # the longest has 9 tokens
    assert batch.input_ids[:, 0].tolist() == [1, 21, 11, 31]
    assert batch.attention_mask.sum(1).tolist() == [5, 9, 4, 2]
    assert batch.tokens == 20
    for place, labels in enumerate([{3: 4, 4: 5}, {8: 29}, {2: 13, 3: 14}, {1: 32}]):
        kept = {i: label for i, label in enumerate(batch.labels[place].tolist()) if label != -100}
        assert kept == labels
    assert batch.ref_chosen is None


def test_a_pad_id_that_is_a_scored_token_too_is_scored_where_it_belongs() -> None:
    eos = 5
    batch = collate([pair(response(5, 3), response(5, 4))], pad_id=eos, max_length=64)
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4, eos, eos, eos, eos]
    assert batch.labels[0].tolist() == [-100, -100, -100, 4, eos, -100, -100, -100]
    assert batch.attention_mask[0].tolist() == [1] * 5 + [0] * 3


@pytest.mark.parametrize(("longest", "max_length", "width"), [(9, 64, 16), (9, 12, 12), (9, 9, 9), (8, 64, 8)])
def test_padding_goes_to_a_multiple_of_8_and_never_beyond_max_length(longest: int, max_length: int, width: int) -> None:
    batch = collate([pair(response(longest, 2), response(3, 2))], pad_id=0, max_length=max_length)
    assert batch.input_ids.shape == (2, width)
