"""The linear path for torch.compile: operators whose outputs have shapes that do not depend on labels.

They run the same sweeps as tokens.py. What eager keeps between forward and backward (tiles, gathered rows) has sizes
that only labels tell, so here nothing is kept but a few numbers a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpref.extras import TokenExtras
from fastpref.linear.entropy import Upstream
from fastpref.linear.plan import plan_tokens
from fastpref.linear.products import precision
from fastpref.linear.statistics import Finished
from fastpref.linear.sweeps import fold_sweep
from fastpref.linear.tokens import Request, gradients, head_of, problem_of, rows_of
from fastpref.ops import no_double_backward
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
    extras: str = "",  # names joined by commas: an operator takes no list of strings
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) log-probs; (K, B, T) extras in the order asked for; (5, B·T) of the scored rows, in order.

    Those five are maximum, norm, 1 − p, target, and the entropy where it is asked for.
    """
    names = tuple(name for name in extras.split(",") if name)
    request = Request(shift, ignore_index, Transform(*transform), operand, budget, extras=names)
    rows = rows_of(labels, mask, weight, request)
    head = head_of(weight, bias, request)
    plan = plan_tokens(problem_of(hidden, weight, rows, request, dh=False, dw=False), head.machine, budget)
    with torch.autocast(hidden.device.type, enabled=False), precision(operand, hidden.device):
        done, target = fold_sweep(hidden, rows, head, plan, extras=names)
    found = torch.zeros(len(names), *labels.shape, dtype=head.wide, device=hidden.device)
    for place, name in enumerate(names):
        found[place] = rows.spread_out(getattr(done.extras, name), labels)
    saved = torch.zeros(5, labels.numel(), dtype=head.wide, device=hidden.device)
    kept = [done.maximum, done.norm, done.rest, target, done.extras.entropy]
    for place, value in enumerate(kept):
        if value is not None:
            saved[place, : len(rows)] = value
    return rows.spread_out(done.logps, labels), found, saved


@linear_token_logps_op.register_fake
def _(
    hidden, weight, bias, labels, mask, shift, ignore_index, transform, operand, budget, extras="", entropy_grad=False
):
    wide = torch.float64 if operand == torch.float64 else torch.float32
    count = len(extras.split(",")) if extras else 0
    shapes = (labels.shape, (count, *labels.shape), (5, labels.numel()))
    return tuple(hidden.new_empty(shape, dtype=wide) for shape in shapes)


@torch.library.custom_op("fastpref::linear_token_logps_backward", mutates_args=(), tags=_TAGS)
def linear_token_logps_backward_op(
    grad: Tensor,  # (B, T)
    grad_entropy: Tensor | None,  # (B, T)
    saved: Tensor,  # (5, B·T)
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
    request = Request(
        shift, ignore_index, Transform(*transform), operand, budget, entropy_grad=grad_entropy is not None
    )
    rows = rows_of(labels, mask, weight, request)
    head = head_of(weight, bias, request)
    problem = problem_of(hidden, weight, rows, request, dh=want[0], dw=want[1] or want[2])
    plan = plan_tokens(problem, head.machine, budget, force="recompute")
    maximum, norm, rest, target, entropy = saved[:, : len(rows)]
    done = Finished(maximum, maximum, norm, rest, TokenExtras(entropy))
    by_entropy = None if grad_entropy is None else grad_entropy.flatten()[rows.places]
    upstream = Upstream(grad.flatten()[rows.places], by_entropy)
    with torch.autocast(hidden.device.type, enabled=False), precision(operand, hidden.device):
        found = gradients(
            hidden, rows, head, replace(plan, dh_in_forward=False), done, target, upstream,
            kept=None, want=(want[0], want[1], want[2]),
        )  # fmt: skip
    dh, dw, db = (weight.new_empty(0) if x is None else x for x in found)
    return dh, dw, db


@linear_token_logps_backward_op.register_fake
def _(
    grad, grad_entropy, saved, hidden, weight, bias, labels, mask, shift, ignore_index, transform, operand, budget, want
):
    wanted = [x if wish and x is not None else None for wish, x in zip(want, (hidden, weight, bias), strict=True)]
    return tuple(weight.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, mask, *ctx.options, extras, entropy_grad = inputs
    _, found, saved = output
    ctx.save_for_backward(saved, hidden, weight, bias, labels, mask)
    ctx.entropy = extras.split(",").index("entropy") if entropy_grad else None
    ctx.mark_non_differentiable(*(saved, found)[: 1 if ctx.entropy is not None else 2])


def _backward(ctx: Any, grad: Tensor, grad_extras: Tensor | None, _: Tensor | None) -> tuple:
    want = list(ctx.needs_input_grad[:3])
    entropy = None if ctx.entropy is None or grad_extras is None else grad_extras[ctx.entropy]
    found = linear_token_logps_backward_op(grad, entropy, *ctx.saved_tensors, *ctx.options, want)
    return (*(x if wish else None for wish, x in zip(want, found, strict=True)), *[None] * 9)


linear_token_logps_op.register_autograd(_backward, setup_context=_save)
linear_token_logps_backward_op.register_autograd(no_double_backward)
