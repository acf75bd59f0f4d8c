"""Losses and gradients of every step: what is not finite is noticed, and traced to the rows of its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpref.training.step import Scored

SHOWN = 32  # pairs an error message lists


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the message names the step and the dataset's rows with values."""


@dataclass
class SeenStep:
    """A step's rows on this process, with their values still on the device."""

    step: int
    rows: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)  # each (3, P): loss, chosen log-prob, rejected; or the first two
    found: Tensor | None = None  # (3,): whether a value is not finite, the gradient's norm, the mean loss here


class FiniteGuard:
    """Watches every step, and when asked looks at all it saw since, with one host synchronisation."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._steps: list[SeenStep] = []

    def begin(self, step: int) -> None:
        self._steps.append(SeenStep(step))

    def see_batch(self, scored: Scored) -> None:
        current = self._steps[-1]
        current.rows.extend(scored.batch.rows)
        current.values.append(torch.stack([value.detach() for value in (scored.output.losses, *scored.policy)]))

    def see_gradient(self, norm: Tensor) -> None:
        current = self._steps[-1]
        losses = torch.cat([value[0] for value in current.values])
        bad = ~(torch.isfinite(norm) & torch.isfinite(losses).all())
        current.found = torch.stack([bad.float(), norm.to(bad.device).float(), losses.mean().float()])

    def look(self) -> tuple[str | None, list[tuple[SeenStep, float, float]]]:
        """Forget the steps seen so far.

        Gives a description of the first one that was not finite, if any was; and those before it with the norms of
        their gradients and their mean losses, which are the same numbers on every process.
        """
        steps, self._steps = self._steps, []
        found = torch.stack([step.found for step in steps if step.found is not None])  # (S, 3)
        sums = self._accelerator.reduce(found, "sum").tolist()
        good: list[tuple[SeenStep, float, float]] = []
        for step, (flags, norms, losses) in zip(steps, sums, strict=True):
            if flags:
                return self._describe(step), good
            good.append((step, norms / self._accelerator.num_processes, losses / self._accelerator.num_processes))
        return None, good

    def _describe(self, step: SeenStep) -> str:
        from accelerate.utils import gather_object

        values = torch.cat(step.values, dim=1).T.tolist()
        pairs = gather_object([(row, *value) for row, value in zip(step.rows, values, strict=True)])
        pairs.sort(key=lambda pair: all(map(math.isfinite, pair[1:])))  # the broken ones first
        listed = "; ".join(
            f"row {row}: loss {loss:.4g}, log-probs {' and '.join(f'{value:.4g}' for value in logps)}"
            for row, loss, *logps in pairs[:SHOWN]
        )
        more = f"; and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
        broken = sum(not all(map(math.isfinite, pair[1:])) for pair in pairs)
        what = f"{broken} of {len(pairs)} pairs have values" if broken else "the gradient has values"
        where = f"The batch, with the log-probs of {'chosen and rejected' if len(pairs[0]) > 3 else 'its responses'}"
        return f"step {step.step}: {what} that are not finite. {where}: {listed}{more}"
