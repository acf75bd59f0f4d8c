"""One call of a provider on a case's inputs, forward or forward and backward: what the benchmarks time and weigh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import (
    LinearCase,
    LogpsCase,
    LossCase,
    make_labels,
    make_linear,
    make_logits,
    make_pairs,
    make_upstream,
)
from providers import logps_provider, loss_provider
from providers_linear import linear_call, warm_up
from torch import Tensor

MODES = ("train", "forward")


def logps_call(
    provider: str, mode: str, logits: Tensor, labels: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Values (B,), and with mode "train" the gradient of the logits."""
    function = logps_provider(provider)
    if mode == "forward":
        with torch.no_grad():
            return function(logits, labels), None
    values = function(logits, labels)
    (gradient,) = torch.autograd.grad(values, logits, upstream)
    return values.detach(), gradient


def loss_call(provider: str, loss: str, mode: str, pairs: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """The loss, and with mode "train" the gradients of both policy log-probs."""
    function = loss_provider(loss, provider)
    if mode == "forward":
        with torch.no_grad():
            return function(*pairs), ()
    value = function(*pairs)
    return value.detach(), torch.autograd.grad(value, pairs[:2])


def prepare_inputs(suite: str, case: dict[str, Any]) -> list[Tensor]:
    """For memory_worker.py: a case's inputs on the CPU."""
    if suite == "losses":
        return make_pairs(LossCase(**case), "cpu", 0)
    if suite == "linear":
        # The reference's log-probs change values, not memory.
        return [*make_linear(LinearCase(**case), "cpu", 0), torch.zeros(2 * case["pairs"])]
    shape = LogpsCase(**case)
    return [make_logits(shape, "cpu", 0), make_labels(shape, "cpu", 0), make_upstream(shape, "cpu")]


def prepare_call(
    *, suite: str, case: dict[str, Any], provider: str, mode: str, inputs: list[Tensor]
) -> Callable[[], list[Tensor]]:
    """For memory_worker.py: a call that returns its gradients."""
    if suite == "losses":
        return lambda: list(loss_call(provider, case["loss"], mode, inputs)[1])
    if suite == "linear":
        head = LinearCase(**case)
        warm_up(provider, mode, head, "cpu")
        hidden, weight, labels, ref_logps = inputs
        return lambda: linear_call(provider, mode, head, hidden, weight, labels, ref_logps)[1]
    logits, labels, upstream = inputs
    return lambda: [g for g in logps_call(provider, mode, logits, labels, upstream)[1:] if g is not None]
