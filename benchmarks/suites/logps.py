"""Log-probs from logits: forward and backward, and forward alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cases import LogpsCase, logps_cases
from ..inputs import make_labels, make_logits, make_upstream
from ..measure import copies_needed, relative_error
from .base import Inputs, Output, Suite, beside

BESIDE = beside("logps")
# Forward alone is timed where it is cheap to, or of interest: the headline and every case of a GPU.
FORWARD = ("fastpref", "extras", "plain", "cross_entropy")
TRUTH_ROWS = 4


class LogpsSuite(Suite):
    name = "logps"
    case_type = LogpsCase
    limit = "a copy's bandwidth"
    work_unit = "B"
    shape = ("batch", "length", "vocab", "share", "dtype", "scored_rows")
    gradient_names = ("logits",)
    extra = {"value_error_per_token": None, "gradient_error_largest": None}  # noqa: RUF012 (typed as ClassVar in Suite)

    def cases(self, device_class: str, *, memory: int) -> list[LogpsCase]:
        return logps_cases(device_class, memory=memory)

    def entries(self, case: LogpsCase, device_class: str) -> list[tuple[str, str]]:
        beside = BESIDE[case.beside]
        forward_too = case.name == "headline" or (device_class in ("gpu", "tiny") and case.beside != "lengths")
        forward = [(name, "forward") for name in beside if forward_too and name in FORWARD]
        return [*((name, "train") for name in beside), *forward]

    def load(self, case: LogpsCase, device: str, *, truth: bool) -> Inputs:
        labels, upstream = make_labels(case, device, 0), make_upstream(case, device)
        count = copies_needed(case.logits_bytes) if truth else 1
        sets = [[make_logits(case, device, seed), labels, upstream] for seed in range(count)]
        return Inputs(sets, LogpsTruth.of(case, *sets[0]) if truth else None)

    def call(self, case: LogpsCase, provider: str, mode: str, inputs: list[Any]) -> Output:
        logits, labels, upstream = inputs
        function = self.providers[provider].call
        if mode == "forward":
            with torch.no_grad():
                return Output(function(logits, labels), [])
        values = function(logits, labels)
        (gradient,) = torch.autograd.grad(values, logits, upstream.to(values.dtype))
        return Output(values.detach(), [gradient])

    def errors(self, case: LogpsCase, truth: LogpsTruth, output: Output) -> dict[str, Any]:
        return truth.errors(output)

    def work(self, case: LogpsCase, mode: str) -> int:
        return case.bytes_that_must_move(mode)


@dataclass(frozen=True)
class LogpsTruth:
    """float64 values of the first sequence and gradients of a few rows, from the logits as they are stored."""

    value: float  # of sequence 0
    rows: list[int]  # of sequence 0
    gradients: Tensor  # (len(rows), V) float64
    scored: int

    @classmethod
    def of(cls, case: LogpsCase, logits: Tensor, labels: Tensor, upstream: Tensor) -> LogpsTruth:
        first = case.length - case.scored_per_sequence - 1  # row t predicts label t + 1
        rows = list(range(first, case.length - 1))
        targets = labels[0, first + 1 :]
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for part, wanted in zip(logits[0, rows[0] : rows[-1] + 1].detach().split(64), targets.split(64), strict=True):
            total += part.double().log_softmax(-1).gather(-1, wanted[:, None]).sum()
        few = rows[:: max(1, len(rows) // TRUTH_ROWS)][:TRUTH_ROWS]
        gradients = -logits[0, few].detach().double().softmax(-1)
        gradients[range(len(few)), labels[0, [row + 1 for row in few]]] += 1
        return cls(float(total), few, gradients * upstream[0].double(), len(rows))

    def errors(self, output: Output) -> dict[str, Any]:
        """Of the first sequence in nats, and of a token of it; of the gradient relative, and the largest."""
        if output.value is None:
            raise ValueError("a provider of log-probs gave no value")
        error = abs(float(output.value[0]) - self.value)
        out: dict[str, Any] = {"value_error": error, "value_error_per_token": error / self.scored}
        if output.gradients:
            (gradient,) = output.gradients
            some = gradient[0, self.rows]
            out["gradient_errors"] = {"logits": relative_error(some, self.gradients)}
            out["gradient_error_largest"] = float((some.double() - self.gradients).abs().max())
        return out
