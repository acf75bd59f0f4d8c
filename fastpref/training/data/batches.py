"""Which pairs belong to which step, process and micro-batch: by seed and step alone, so that runs resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

GROUPED_STEPS = 50  # steps among whose pairs those of like lengths are brought together


@dataclass(frozen=True)
class Sizes:
    """What pairs take in a batch, in tokens; of unpaired data what the longer of their two sequences takes."""

    tokens: tuple[int, ...]  # of each pair
    longest: tuple[int, ...]  # its longer sequence
    widths: tuple[int, ...] | None  # that sequence as a padded row; None where rows are not padded
    sequences: int = 2  # of a pair in a batch

    def of(self, indices: Sequence[int]) -> int:
        """Tokens of a batch of these pairs, padding included."""
        if self.widths is not None:
            return self.sequences * len(indices) * max((self.widths[index] for index in indices), default=0)
        return sum(self.tokens[index] for index in indices)

    def longest_first(self, indices: Sequence[int]) -> list[int]:
        return sorted(indices, key=lambda index: (-self.longest[index], index))


def cut(indices: Sequence[int], sizes: Sizes, *, batch_size: int, batch_tokens: int | None) -> list[list[int]]:
    """Indices in batches, in order: at most `batch_size` pairs and `batch_tokens` tokens, but a pair at least."""
    batches: list[list[int]] = []
    for index in indices:
        grown = [*batches[-1], index] if batches else []
        if not grown or len(grown) > batch_size or (batch_tokens is not None and sizes.of(grown) > batch_tokens):
            batches.append([index])
        else:
            batches[-1] = grown
    return batches


@dataclass(frozen=True)
class BatchPlan:
    """The order of the data. A step's pairs are dealt to the processes in turn and cut into micro-batches.

    The last step of an epoch takes what is left, be it a single pair; no pair is dropped, none is repeated. Which pairs
    a step holds depends on `per_step`, `seed` and `grouped`; how they are cut changes nothing but rounding.
    """

    pairs: int
    per_step: int  # pairs of an optimiser step, over all processes and micro-batches
    batch_size: int  # most pairs of a micro-batch
    seed: int
    sizes: Sizes
    batch_tokens: int | None = None  # most tokens of a micro-batch
    grouped: bool = False  # by length
    rank: int = 0
    world: int = 1
    _epoch: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.pairs / self.per_step)

    def step(self, step: int) -> list[int]:
        """All pairs of the given step (counted from 0), over every process."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch not in self._epoch:  # a million pairs are shuffled once an epoch, not once a step
            self._epoch.clear()
            self._epoch[epoch] = self._steps(epoch)
        return self._epoch[epoch][place]

    def micro_batches(self, pairs: list[int]) -> list[list[int]]:
        """This process's share of a step in micro-batches; as many on every process, so some may be empty."""
        # Longest first: what does not fit in memory fails at once, and every process gets its part of the long ones.
        order = self.sizes.longest_first(pairs)
        shares = [
            cut(order[rank :: self.world], self.sizes, batch_size=self.batch_size, batch_tokens=self.batch_tokens)
            for rank in range(self.world)
        ]
        mine = shares[self.rank]
        return mine + [[]] * (max(map(len, shares)) - len(mine))

    def used(self, steps: int) -> list[int]:
        """The pairs that so many steps take, in order of their index."""
        first = range(min(steps, self.steps_per_epoch))  # an epoch takes them all
        return sorted({pair for step in first for pair in self.step(step)})

    def epoch(self, steps: int) -> float:
        """Passes over the data after so many steps."""
        epochs, place = divmod(steps, self.steps_per_epoch)
        return epochs + min(place * self.per_step, self.pairs) / self.pairs

    def _steps(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(self.pairs, generator=generator).tolist()
        if not self.grouped:
            return [order[begin : begin + self.per_step] for begin in range(0, self.pairs, self.per_step)]
        steps: list[list[int]] = []
        for begin in range(0, self.pairs, GROUPED_STEPS * self.per_step):
            near = self.sizes.longest_first(order[begin : begin + GROUPED_STEPS * self.per_step])
            group = [near[first : first + self.per_step] for first in range(0, len(near), self.per_step)]
            # Lengths must not fall from step to step; what is left over stays an epoch's last step.
            whole = [step for step in group if len(step) == self.per_step]
            shuffled = torch.randperm(len(whole), generator=generator).tolist()
            steps += [whole[place] for place in shuffled] + [step for step in group if len(step) < self.per_step]
        return steps
