"""The linear path for torch.compile: operators whose outputs have shapes that do not depend on labels.

They run the same sweeps as tokens.py. What eager keeps between forward and backward (tiles, gathered rows) has sizes
that only labels tell, so here nothing is kept but four numbers a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpref.linear.plan import plan_tokens
from fastpref.linear.products import precision
from fastpref.linear.rows import find_rows
from fastpref.linear.sweeps import Finished, fold_sweep
from fastpref.linear.tokens import Request, gradients, head_of, problem_of
from fastpref.tiled import Transform

# They look at how many rows are scored, which a CUDA graph cannot record.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("fastpref::linear_token_logps", mutates_args=(), tags=_TAGS)
def linear_token_logps_op(
    hidden: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    shift: int,
    ignore_index: int,
    transform: Sequence[float],
    operand: torch.dtype,
    budget: int,
) -> tuple[Tensor, Tensor]:  # (B, T) log-probs, (4, B·T) maximum, norm, 1 − p and target of the scored rows, in order
    request = Request(shift, ignore_index, Transform(*transform), operand, budget)
    rows = find_rows(labels, mask, shift, ignore_index, weight.shape[0])
    head = head_of(weight, bias, request)
    plan = plan_tokens(problem_of(hidden, weight, rows, request, dh=False, dw=False), head.machine, budget)
    with torch.autocast(hidden.device.type, enabled=False), precision(operand, hidden.device):
        done, target = fold_sweep(hidden, rows, head, plan)
    out = torch.zeros(labels.numel(), dtype=head.wide, device=hidden.device)
    out[rows.places] = done.logps
    saved = torch.zeros(4, labels.numel(), dtype=head.wide, device=hidden.device)
    saved[:, : len(rows)] = torch.stack([done.maximum, done.norm, done.rest, target])
    return out.view(labels.shape), saved


@linear_token_logps_op.register_fake
def _(hidden, weight, bias, labels, mask, shift, ignore_index, transform, operand, budget):
    wide = torch.float64 if operand == torch.float64 else torch.float32
    return hidden.new_empty(labels.shape, dtype=wide), hidden.new_empty((4, labels.numel()), dtype=wide)


@torch.library.custom_op("fastpref::linear_token_logps_backward", mutates_args=(), tags=_TAGS)
def linear_token_logps_backward_op(
    grad: Tensor,  # (B, T)
    saved: Tensor,  # (4, B·T)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    shift: int,
    ignore_index: int,
    transform: Sequence[float],
    operand: torch.dtype,
    budget: int,
    want: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # dh, dW, dbias; empty where they are not wanted
    request = Request(shift, ignore_index, Transform(*transform), operand, budget)
    rows = find_rows(labels, mask, shift, ignore_index, weight.shape[0])
    head = head_of(weight, bias, request)
    problem = problem_of(hidden, weight, rows, request, dh=want[0], dw=want[1] or want[2])
    plan = plan_tokens(problem, head.machine, budget, force="recompute")
    maximum, norm, rest, target = saved[:, : len(rows)]
    done = Finished(maximum, maximum, norm, rest)
    with torch.autocast(hidden.device.type, enabled=False), precision(operand, hidden.device):
        found = gradients(
            hidden, rows, head, replace(plan, dh_in_forward=False), done, target, grad.flatten()[rows.places],
            kept=None, want=(want[0], want[1], want[2]),
        )  # fmt: skip
    dh, dw, db = (weight.new_empty(0) if x is None else x for x in found)
    return dh, dw, db


@linear_token_logps_backward_op.register_fake
def _(grad, saved, hidden, weight, bias, labels, mask, shift, ignore_index, transform, operand, budget, want):
    wanted = [x if wish and x is not None else None for wish, x in zip(want, (hidden, weight, bias), strict=True)]
    return tuple(weight.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, mask, *ctx.options = inputs
    ctx.save_for_backward(output[1], hidden, weight, bias, labels, mask)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    want = list(ctx.needs_input_grad[:3])
    found = linear_token_logps_backward_op(grad, *ctx.saved_tensors, *ctx.options, want)
    return (*(x if wish else None for wish, x in zip(want, found, strict=True)), *[None] * 7)


def _no_double_backward(ctx: Any, *grads: Tensor) -> tuple:
    raise RuntimeError(
        "fastpref's log-probs have no second derivative; use fastpref.reference.token_logps where one is needed"
    )


linear_token_logps_op.register_autograd(_backward, setup_context=_save)
linear_token_logps_backward_op.register_autograd(_no_double_backward)
