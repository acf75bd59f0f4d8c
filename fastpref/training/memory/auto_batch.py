"""The largest micro-batch that fits: found by trial on a GPU, by measuring two small ones on a CPU.

The pairs of an optimiser step stay what they are; only how they are cut into micro-batches changes. A trial is a
forward and a backward over the longest pairs, with every gradient allocated. It leaves nothing behind: no step of the
optimiser, the gradients dropped, the random state put back.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from fastpref.losses import LossSpec
from fastpref.memory import Meter
from fastpref.tables import size_text
from fastpref.training.config import TrainConfig
from fastpref.training.data.batches import BatchPlan
from fastpref.training.distributed.processes import is_sharded
from fastpref.training.memory.oom import MemoryLimitError, out_of_memory, what_to_change
from fastpref.training.run import Run
from fastpref.training.step import add_gradient

SPARE = {"cuda": 0.05, "cpu": 0.10}  # of what is there; a CPU's allocations vary more, and it kills without a warning
STRIDE = 8  # a CPU is not asked for more than so many times what was measured before it
STATE_BYTES = 8  # AdamW's two moments of a float32 weight

Measure = Callable[[int], float]  # pairs -> bytes they take beyond what is held, inf where they did not fit


@dataclass
class Found:
    """The largest number of the longest pairs that fits, and what was measured on the way."""

    pairs: int
    measured: dict[int, float] = field(default_factory=dict)


def check_auto_batch(config: TrainConfig, spec: LossSpec, distributed: str) -> None:
    """ValueError where micro-batches cannot be chosen freely."""
    if not config.auto_batch:
        return
    if not spec.separable:
        raise ValueError(
            f"auto_batch cuts a step into micro-batches, and loss {spec.name!r} compares all pairs of a step with each "
            "other: leave auto_batch out and set batch_size"
        )
    if distributed == "DEEPSPEED":
        raise ValueError("auto_batch cannot try a backward apart from DeepSpeed's own: set batch_size and batch_tokens")


def auto_batch(run: Run, model: Any, optimizer: Any) -> BatchPlan:
    """The run's plan, with auto_batch cut into the largest micro-batches that fit on every process.

    Args:
        model, optimizer: as the loop uses them, wrapped; the reference log-probs of the pairs must be known.

    Raises:
        MemoryLimitError: not even the longest pair fits.
    """
    plan = run.plan
    if not run.config.auto_batch:
        return plan
    stored = None if run.state is None else run.state.get("micro_batch")
    if stored is not None:  # found before; another cut would round otherwise, and the bits are to be the same
        run.console.say(f"auto_batch: micro-batches as in the checkpoint, {_describe(*stored)}")
        return dataclasses.replace(plan, batch_size=stored[0], batch_tokens=stored[1])
    order = sorted(plan.used(run.steps), key=lambda index: -plan.sizes.of([index]))
    share = math.ceil(min(plan.per_step, len(order)) / plan.world)
    trials = _Trials(run, model, order)
    # A state that the optimiser has not allocated yet will take its part of what is there now.
    room = _everywhere(trials.meter.room() - pending_state(optimizer), min)
    device = run.accelerator.device.type
    limit = (1 - SPARE.get(device, SPARE["cuda"])) * room
    found = (by_extrapolation if device == "cpu" else by_trial)(trials, most=share, limit=limit)
    if found.measured[found.pairs] > room:
        raise MemoryLimitError(
            f"auto_batch: the longest pair alone ({plan.sizes.of(order[:1]):,} tokens) needs more than the "
            f"{size_text(room)} available{trials.trouble}. {what_to_change(run, pairs=1)}"
        )
    tokens = plan.batch_tokens
    if found.pairs < share:  # shorter pairs are more to a micro-batch: what it holds is counted in tokens
        tokens = min(plan.sizes.of(order[: found.pairs]), tokens or math.inf)  # type: ignore[assignment]
    basis = ", ".join(f"{pairs} {_took(size)}" for pairs, size in sorted(found.measured.items()))
    run.console.say(
        f"auto_batch: micro-batches of {_describe(share, tokens)}, where a step has {share} on each process; of the "
        f"longest pairs {basis}; {size_text(limit)} of {size_text(room)} may be taken"
    )
    return dataclasses.replace(plan, batch_size=share, batch_tokens=tokens)


def by_trial(measure: Measure, *, most: int, limit: float) -> Found:
    """Doubling, then bisecting; for a device on which too much is an exception."""
    found = Found(1)

    def fits(pairs: int) -> bool:
        found.measured[pairs] = measure(pairs)
        return found.measured[pairs] <= limit

    low, high = 1, most + 1
    if not fits(1):
        return found
    while low < most and high > most:
        tried = min(2 * low, most)
        low, high = (tried, high) if fits(tried) else (low, tried)
    while high - low > 1:
        tried = (low + high) // 2
        low, high = (tried, high) if fits(tried) else (low, tried)
    found.pairs = low
    return found


def by_extrapolation(measure: Measure, *, most: int, limit: float) -> Found:
    """A line through what small micro-batches took; nothing is tried that it puts beyond the limit.

    For a CPU, where too much ends the process. The last number was tried itself.
    """
    measure(1)  # the first of all also starts threads and loads libraries
    found = Found(1, {1: measure(1)})
    one = found.measured[1]
    if most == 1 or 2 * one > limit:  # two pairs take twice what one does, at worst
        return found
    low, ceiling, target = 1, most, 2
    # A trial takes as long as a step: it is made for a sixteenth more and not for less.
    while target - low > low // 16:
        size = found.measured[target] = measure(target)
        low, ceiling = (target, ceiling) if size <= limit else (low, target - 1)
        last = max(found.measured)
        slope = (found.measured[last] - one) / (last - 1)
        if last < STRIDE:  # what a pair takes may be lost in noise: it is held to be some part of all
            slope = max(slope, one / STRIDE)
        target = min(ceiling, STRIDE * low, low + int((limit - found.measured[low]) / max(slope, 1)))
    found.pairs = low
    return found


def pending_state(optimizer: Any) -> int:
    """Bytes that the optimiser's state will take when it is made, in its first step."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    parameters = (parameter for group in inner.param_groups for parameter in group["params"])
    missing = (p for p in parameters if p.requires_grad and not inner.state.get(p))
    return STATE_BYTES * sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in missing)


class _Trials:
    """Forward and backward over the longest pairs, as the loop makes them; called with a number of pairs."""

    def __init__(self, run: Run, model: Any, order: list[int]) -> None:
        self.run, self.model, self.order = run, model, order
        self.meter = Meter(run.accelerator.device, processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.trouble = ""  # the last error of the allocator

    def __call__(self, pairs: int) -> float:
        """The most that any process took: all of them decide alike."""
        return _everywhere(self._measure(pairs), max)

    def _measure(self, pairs: int) -> float:
        run, device = self.run, self.run.accelerator.device
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        failed = False
        run.model.train()
        try:
            self.meter.begin()
            for parameter in trained:  # as in every micro-batch after the first
                parameter.grad = torch.zeros_like(parameter)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                # As a micro-batch that is not a step's last, for which DDP's processes do not wait for each other: one
                # may be out of memory. A sharded model knows no such way.
                chunk = [run.pairs[index] for index in self.order[:pairs]]
                kl = torch.zeros((), device=device) if run.spec.unpaired else None
                add_gradient(run, self.model, chunk, scale=1 / pairs, last=is_sharded(run.accelerator), kl=kl)
            return self.meter.taken()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.trouble = f" ({' '.join(str(error).split())})"
            error.__traceback__ = None  # its frames hold the trial's tensors
            failed = True
            return math.inf
        finally:
            for parameter in trained:
                parameter.grad = None
            if failed:
                gc.collect()  # so that no cycle keeps them
            self.meter.end()


def _everywhere(value: float, choose: Callable[[list[float]], float]) -> float:
    return choose(gather_object([value]))


def _describe(pairs: int, tokens: int | None) -> str:
    return f"up to {pairs} pairs" + ("" if tokens is None else f" and {tokens:,} tokens")


def _took(size: float) -> str:
    return "did not fit" if math.isinf(size) else f"took {size_text(size)}"
