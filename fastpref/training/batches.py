"""Which pairs belong to which step, process and micro-batch: by seed and step alone, so that runs resume."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BatchPlan:
    """The order of the data. A step's pairs are dealt to the processes in turn and cut into micro-batches.

    The last step of an epoch takes what is left, be it a single pair; no pair is dropped, none is repeated.
    """

    pairs: int
    batch_size: int
    accumulation: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.pairs / self.per_step)

    def step(self, step: int) -> list[int]:
        """All pairs of the given step (counted from 0), over every process."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.pairs, generator=generator)
        return order[place * self.per_step : (place + 1) * self.per_step].tolist()

    def micro_batches(self, pairs: list[int]) -> list[list[int]]:
        """This process's share of a step in micro-batches; as many on every process, so some may be empty."""
        share = pairs[self.rank :: self.world]
        count = math.ceil(math.ceil(len(pairs) / self.world) / self.batch_size)
        return [share[k * self.batch_size : (k + 1) * self.batch_size] for k in range(count)]

    def used(self, steps: int) -> list[int]:
        """The pairs that so many steps take, in order of their index."""
        first = range(min(steps, self.steps_per_epoch))  # an epoch takes them all
        return sorted({pair for step in first for pair in self.step(step)})

    def epoch(self, steps: int) -> float:
        """Passes over the data after so many steps."""
        epochs, place = divmod(steps, self.steps_per_epoch)
        return epochs + min(place * self.per_step, self.pairs) / self.pairs
