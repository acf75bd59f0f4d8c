"""DPO and DPOP from per-sequence log-probs, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ..cases import LossCase, loss_cases
from ..inputs import make_pairs
from ..measure import MAX_COPIES, relative_error
from ..providers.base import BETA, LAMBDA
from .base import Inputs, Output, Suite, beside

BESIDE = beside("losses")


class LossesSuite(Suite):
    name = "losses"
    case_type = LossCase
    limit = "a copy's bandwidth"
    work_unit = "B"
    shape = ("loss", "pairs")
    gradient_names = ("chosen", "rejected")

    def cases(self, device_class: str, *, memory: int) -> list[LossCase]:
        return loss_cases(device_class)

    def entries(self, case: LossCase, device_class: str) -> list[tuple[str, str]]:
        return [(name, "train") for name in BESIDE[case.beside]]

    def load(self, case: LossCase, device: str, *, truth: bool) -> Inputs:
        sets: list[list[Any]] = [make_pairs(case, device, seed) for seed in range(MAX_COPIES if truth else 1)]
        return Inputs(sets, _truth(case, sets[0]) if truth else None)

    def call(self, case: LossCase, provider: str, mode: str, inputs: list[Any]) -> Output:
        value = self.providers[provider].call(case.loss, *inputs)
        return Output(value.detach(), list(torch.autograd.grad(value, inputs[:2])))

    def errors(self, case: LossCase, truth: Output, output: Output) -> dict[str, Any]:
        if output.value is None or truth.value is None:
            raise ValueError("a provider of losses gave no value")
        pairs = zip(self.gradient_names, output.gradients, truth.gradients, strict=True)
        return {
            "value_error": abs(float(output.value) - float(truth.value)),
            "gradient_errors": {name: relative_error(got, wanted) for name, got, wanted in pairs},
        }

    def work(self, case: LossCase, mode: str) -> int:
        return case.bytes_that_must_move


def _truth(case: LossCase, pairs: list[Any]) -> Output:
    """The loss and both gradients in float64; DPOP as Pal et al. 2024 correct it, the penalty inside the sigmoid."""
    win, lose, ref_win, ref_lose = (x.detach().double() for x in pairs)
    win.requires_grad_()
    lose.requires_grad_()
    penalty = (LAMBDA if case.loss == "dpop" else 0.0) * (ref_win - win).clamp(min=0)
    loss = -functional.logsigmoid(BETA * ((win - ref_win) - (lose - ref_lose) - penalty)).mean()
    return Output(loss.detach(), list(torch.autograd.grad(loss, (win, lose))))
