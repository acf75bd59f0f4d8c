"""Losses and gradients that are not finite: noticed, and traced to the rows of their batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SHOWN = 32  # pairs an error message lists


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the message names the step and the dataset's rows with values."""


@dataclass
class _Step:
    step: int
    rows: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)  # each (3, P): loss, chosen log-prob, rejected log-prob
    bad: Tensor | None = None  # ()


class FiniteGuard:
    """Watches every step, and when asked looks at all it saw since, with one host synchronisation."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._steps: list[_Step] = []

    def begin(self, step: int) -> None:
        self._steps.append(_Step(step))

    def see_batch(self, rows: list[int], losses: Tensor, chosen: Tensor, rejected: Tensor) -> None:
        current = self._steps[-1]
        current.rows.extend(rows)
        current.values.append(torch.stack([losses.detach(), chosen.detach(), rejected.detach()]))

    def see_gradient(self, norm: Tensor) -> None:
        current = self._steps[-1]
        losses = torch.cat([value[0] for value in current.values])
        current.bad = ~(torch.isfinite(norm) & torch.isfinite(losses).all())

    def look(self) -> str | None:
        """Forget the steps seen so far; a description of the first one that was not finite, if any was."""
        steps, self._steps = self._steps, []
        flags = torch.stack([step.bad for step in steps if step.bad is not None]).float()
        bad = self._accelerator.reduce(flags, "sum").tolist()  # the same on every process
        for step, flag in zip(steps, bad, strict=True):
            if flag:
                return self._describe(step)
        return None

    def _describe(self, step: _Step) -> str:
        from accelerate.utils import gather_object

        values = torch.cat(step.values, dim=1).T.tolist()
        pairs = gather_object([(row, *value) for row, value in zip(step.rows, values, strict=True)])
        pairs.sort(key=lambda pair: all(map(math.isfinite, pair[1:])))  # the broken ones first
        listed = "; ".join(
            f"row {row}: loss {loss:.4g}, log-probs {chosen:.4g} and {rejected:.4g}"
            for row, loss, chosen, rejected in pairs[:SHOWN]
        )
        more = f"; and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
        broken = sum(not all(map(math.isfinite, pair[1:])) for pair in pairs)
        what = f"{broken} of {len(pairs)} pairs have values" if broken else "the gradient has values"
        where = "The batch, with the log-probs of chosen and rejected"
        return f"step {step.step}: {what} that are not finite. {where}: {listed}{more}"
