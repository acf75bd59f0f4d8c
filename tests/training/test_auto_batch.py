"""The largest micro-batch: the search on measurements that are made up, what a trial leaves behind, and a real run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastpref.memory import Meter
from fastpref.training import MemoryLimitError, TrainConfig, loop, train
from fastpref.training.memory import auto_batch
from fastpref.training.memory.auto_batch import by_extrapolation, by_trial, check_auto_batch, pending_state
from fastpref.training.prepare import prepare

Make = Callable[..., Any]


class Device:
    """Memory in which `fixed` bytes and `each` for a pair are taken; more than `capacity` does not fit."""

    def __init__(self, fixed: float, each: float, capacity: float, *, cold: float = 0.0) -> None:
        self.fixed, self.each, self.capacity, self.cold = fixed, each, capacity, cold
        self.tried: list[int] = []

    def __call__(self, pairs: int) -> float:
        extra = 0.0 if self.tried else self.cold
        self.tried.append(pairs)
        need = self.fixed + self.each * pairs + extra
        return need if need <= self.capacity else math.inf


def test_trials_find_the_largest_that_fits() -> None:
    for most, fits in itertools.product([1, 2, 3, 7, 8, 100, 1000], [1, 2, 3, 5, 6, 7, 8, 63, 64, 65, 999, 5000]):
        device = Device(10, 4, capacity=10 + 4 * fits + 3)
        found = by_trial(device, most=most, limit=device.capacity)
        assert found.pairs == min(most, fits), (most, fits)
        assert len(device.tried) == len(set(device.tried)) <= 2 * math.ceil(math.log2(most + 1)) + 1
        assert max(device.tried) <= most


def test_trials_leave_the_spare_free_though_more_would_fit() -> None:
    device = Device(0, 10, capacity=1000)
    assert by_trial(device, most=500, limit=950).pairs == 95


def test_trials_stop_at_one_pair_that_does_not_fit() -> None:
    device = Device(0, 10, capacity=9)
    found = by_trial(device, most=8, limit=9)
    assert (found.pairs, found.measured, device.tried) == (1, {1: math.inf}, [1])


@pytest.mark.parametrize("fixed", [0, 3, 700])
def test_extrapolation_finds_the_largest_and_tries_nothing_beyond_the_limit(fixed: int) -> None:
    for most, fits in itertools.product([1, 2, 3, 8, 100, 1000], [1, 2, 3, 5, 6, 8, 64, 65, 999, 5000]):
        limit = fixed + 40 * fits + 3
        device = Device(fixed, 40, capacity=math.inf)
        found = by_extrapolation(device, most=most, limit=limit)
        assert all(fixed + 40 * tried <= limit for tried in device.tried), (most, fits)
        if fixed <= 40:  # where the fixed part outweighs a pair's, two pairs are not dared near the limit
            assert found.pairs <= min(most, fits) <= found.pairs + found.pairs // 16, (most, fits)
        assert found.pairs in device.tried
        assert len(device.tried) <= 8


def test_extrapolation_goes_by_what_it_measures_last_when_the_line_bends_up() -> None:
    tried = []

    def bends(pairs: int) -> float:  # attention without a fused kernel: a square of what a batch holds
        tried.append(pairs)
        return 10.0 * pairs + 0.5 * pairs**2

    found = by_extrapolation(bends, most=1000, limit=2000.0)
    assert bends(found.pairs) <= 2000 < bends(found.pairs + 1 + found.pairs // 16)
    assert max(tried) <= 8 * 2 * found.pairs


def test_extrapolation_takes_no_second_pair_that_might_be_too_much() -> None:
    device = Device(0, 60, capacity=math.inf)
    assert by_extrapolation(device, most=9, limit=100).pairs == 1
    assert set(device.tried) == {1}


def test_noise_that_hides_a_pairs_part_is_not_taken_for_none() -> None:
    """Two small batches look alike: the step from them is bounded, and the next measurement corrects it."""
    tried = []

    def quantised(pairs: int) -> float:
        tried.append(pairs)
        return 100.0 * math.ceil(10 * pairs / 100)

    found = by_extrapolation(quantised, most=10_000, limit=1000.0)
    assert 94 <= found.pairs <= 100
    assert max(tried) <= 160


def test_the_first_trial_is_made_twice_because_it_starts_threads_too() -> None:
    device = Device(0, 10, capacity=math.inf, cold=10_000)
    assert by_extrapolation(device, most=20, limit=500).pairs == 20
    assert device.tried[:2] == [1, 1]


def test_the_optimisers_state_counts_until_it_is_there() -> None:
    layer = torch.nn.Linear(8, 4)
    layer.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(layer.parameters())
    assert pending_state(optimizer) == 8 * 32
    layer(torch.ones(8)).sum().backward()
    optimizer.step()
    assert pending_state(optimizer) == 0


def test_losses_that_do_not_separate_and_deepspeed_are_refused(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="auto_batch cuts a step into micro-batches, and loss 'aot' compares all"):
        prepare(make_config(auto_batch=True, loss="aot"), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    spec = prepare(make_config(), model=make_model(), tokenizer=tokenizer, train_dataset=rows).spec
    with pytest.raises(ValueError, match="auto_batch cannot try a backward apart from DeepSpeed's own"):
        check_auto_batch(TrainConfig(auto_batch=True), spec, "DEEPSPEED")


class Limited(Meter):
    """A meter for which a batch of n pairs takes n times 100 bytes."""

    limit = 0
    pairs = 0

    def room(self) -> int:
        return self.limit

    def taken(self) -> int:
        return 100 * self.pairs


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> type[Limited]:
    forward = auto_batch.add_gradient

    def counted(run: Any, model: Any, pairs: list[Any], **options: Any) -> None:
        Limited.pairs = len(pairs)
        forward(run, model, pairs, **options)

    monkeypatch.setattr(auto_batch, "add_gradient", counted)
    monkeypatch.setattr(auto_batch, "Meter", Limited)
    monkeypatch.setattr(auto_batch, "pending_state", lambda optimizer: 0)
    return Limited


def test_a_run_takes_what_was_found_keeps_its_steps_and_its_weights_are_those_of_the_same_plan(
    limited: type[Limited], make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Bitwise: the trials took no step, left no gradient and put the random state back (dropout is on)."""
    monkeypatch.setattr(limited, "limit", 367)  # 90% of it are 330: 3 pairs
    plans = []
    gradient = loop._Loop.gradient

    def seen(self: Any, step: int) -> Any:
        plans.append((self.run.plan, [p.grad for p in self.run.model.parameters()]))
        return gradient(self, step)

    monkeypatch.setattr(loop._Loop, "gradient", seen)
    config = make_config(auto_batch=True, batch_size=8, disable_dropout=False, save_every=1)
    found = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    plan, gradients = plans[0]
    assert gradients == [None] * len(gradients)
    longest = sorted(map(plan.sizes.of, [[index] for index in range(13)]))[-3:]
    assert (plan.per_step, plan.batch_size, plan.batch_tokens) == (8, 8, sum(longest))
    assert max(len(batch) for batch in plan.micro_batches(plan.step(0))) < 8
    lines = " ".join(capsys.readouterr().err.split())
    assert f"auto_batch: micro-batches of up to 8 pairs and {sum(longest)} tokens, where a step has 8" in lines
    assert "of the longest pairs 1 took 0.1 KiB, 2 took 0.2 KiB, 3 took 0.3 KiB; 0.3 KiB of 0.4 KiB may be" in lines

    again = make_config(
        batch_size=8, batch_tokens=sum(longest), disable_dropout=False, output_dir=config.output_dir + "2"
    )
    same = train(again, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    for one, other in zip(found.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(one, other)

    resumed = dataclasses.replace(config, resume="latest", max_steps=5)
    monkeypatch.setattr(limited, "limit", 10_000)
    train(resumed, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert plans[-1][0].batch_tokens == sum(longest)  # what the checkpoint's run found, not what would fit now
    assert "auto_batch: micro-batches as in the checkpoint" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_resumed_run_may_begin_to_use_it(
    limited: type[Limited], make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """After an out-of-memory error, whose message advises just that."""
    monkeypatch.setattr(limited, "limit", 367)
    config = make_config(save_every=2)
    train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    again = dataclasses.replace(config, auto_batch=True, resume="latest", max_steps=5)
    train(again, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert "auto_batch: micro-batches of up to 4 pairs and" in " ".join(capsys.readouterr().err.split())


def test_one_pair_beyond_the_memory_is_an_error_with_the_sizes(
    limited: type[Limited], make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(limited, "limit", 99)
    config = make_config(auto_batch=True)
    with pytest.raises(
        MemoryLimitError,
        match=r"the longest pair alone .* tokens\) needs more than the 0.1 KiB available.* gradient_ch",
    ):
        train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)


@pytest.mark.slow
def test_an_allocators_error_in_a_trial_is_a_size_that_does_not_fit(
    limited: type[Limited], make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What a GPU does: the exception is caught, and gradients are gone all the same."""
    forward = auto_batch.add_gradient

    def short(run: Any, model: Any, pairs: list[Any], **options: Any) -> None:
        forward(run, model, pairs, **options)
        if len(pairs) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(auto_batch, "add_gradient", short)
    monkeypatch.setattr(limited, "limit", 10_000)
    run = prepare(make_config(), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    loop.add_reference(run)
    trials = auto_batch._Trials(run, run.model, list(range(13)))
    assert by_trial(trials, most=8, limit=10_000).pairs == 5
    assert "CUDA out of memory" in trials.trouble
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_on_this_machine_a_real_run_measures_memory_and_takes_the_whole_step(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(auto_batch=True, batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    result = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert result.step == 1
    assert "auto_batch: micro-batches of up to 8 pairs, where a step has 8" in " ".join(capsys.readouterr().err.split())
