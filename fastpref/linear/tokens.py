"""Token log-probs from hidden states as an autograd function: the plan's sweeps in forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.linear.plan import Plan, Problem, machine_of, plan_tokens
from fastpref.linear.products import precision
from fastpref.linear.rows import Rows, find_rows
from fastpref.linear.sweeps import Finished, Head, Kept, fold_sweep, gradient_sweep
from fastpref.tiled import Transform, zeros_untouched


class Request(NamedTuple):
    """What a call asks for besides its tensors."""

    shift: int
    ignore_index: int
    transform: Transform
    operand: torch.dtype  # autocast's where it is on, else the inputs'
    budget: int
    plan: str | None = None  # a plan's name, to force it
    on_plan: Any = None  # called with the plan, for those who want to know


def head_of(weight: Tensor, bias: Tensor | None, request: Request) -> Head:
    return Head(weight, bias, request.transform, request.operand, machine_of(weight.device))


def problem_of(
    hidden: Tensor, weight: Tensor, rows: Rows, request: Request, *, dh: bool, dw: bool, **streaming: int
) -> Problem:
    return Problem(
        rows=len(rows),
        hidden_size=hidden.shape[-1],
        vocab=weight.shape[0],
        operand=request.operand,
        hidden_dtype=hidden.dtype,
        weight_dtype=weight.dtype,
        hidden=dh,
        weight=dw,
        softcap=bool(request.transform.softcap),
        **streaming,
    )


class LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (B, T, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (B, T)
        mask: Tensor | None,  # (B, T) bool
        request: Request,
    ) -> Tensor:  # (B, T)
        dh, dw, db = ctx.needs_input_grad[:3]
        rows = find_rows(labels, mask, request.shift, request.ignore_index, weight.shape[0])
        problem = problem_of(hidden, weight, rows, request, dh=dh, dw=dw or db)
        head = head_of(weight, bias, request)
        plan = plan_tokens(problem, head.machine, request.budget, force=request.plan)
        if request.on_plan is not None:
            request.on_plan(plan)
        with torch.autocast(hidden.device.type, enabled=False), precision(request.operand, hidden.device):
            kept = Kept.empty(len(rows), head, plan)
            unscaled = None
            if plan.dh_in_forward:
                unscaled = torch.empty(len(rows), hidden.shape[-1], dtype=head.wide, device=hidden.device)
            done, target = fold_sweep(hidden, rows, head, plan, kept=kept, dh=unscaled)
        out = torch.zeros(labels.numel(), dtype=head.wide, device=hidden.device)
        out[rows.places] = done.logps

        ctx.rows, ctx.plan, ctx.request = rows, plan, request
        kept_parts = (None, None) if kept is None else (kept.tiles, kept.maxima)
        saved = () if unscaled is not None else (done.maximum, done.norm, done.rest, target)
        ctx.save_for_backward(hidden, weight, bias, unscaled, *kept_parts, *saved)
        return out.view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, unscaled, tiles, maxima, *saved = ctx.saved_tensors
        rows, plan, request = ctx.rows, ctx.plan, ctx.request
        want_dh, want_dw, want_db = ctx.needs_input_grad[:3]
        upstream = grad.flatten()[rows.places]
        if unscaled is not None:
            dh = rows.scatter(unscaled * upstream.to(unscaled.dtype).unsqueeze(1), zeros_untouched(hidden))
            return dh, *[None] * 5
        head = head_of(weight, bias, request)
        maximum, norm, rest, target = saved
        done = Finished(maximum, maximum, norm, rest)  # the log-probs themselves are not read again
        kept = None if tiles is None else Kept(tiles, maxima)
        with torch.autocast(hidden.device.type, enabled=False), precision(request.operand, hidden.device):
            dh, dw, db = gradients(
                hidden, rows, head, plan, done, target, upstream, kept=kept, want=(want_dh, want_dw, want_db)
            )
        return dh, dw, db, *[None] * 3


def gradients(
    hidden: Tensor,
    rows: Rows,
    head: Head,
    plan: Plan,
    done: Finished,
    target: Tensor,
    upstream: Tensor,
    *,
    kept: Kept | None,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh (B, T, H), dW (V, H) and dbias (V,), those that are wanted."""
    want_dh, want_dw, want_db = want
    dw = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if want_dw else None
    db = torch.empty_like(head.bias) if want_db and head.bias is not None else None
    arguments: dict[str, Any] = {"kept": kept, "dw": dw, "db": db}
    dh_full = None
    if plan.two_pass and want_dh:
        dh_full = zeros_untouched(hidden)
        for start in range(0, len(rows), plan.row_block):
            stop = min(start + plan.row_block, len(rows))
            block_sums = torch.zeros(stop - start, hidden.shape[-1], dtype=head.wide, device=hidden.device)
            span = slice(start, stop)
            gradient_sweep(
                hidden, rows, head, plan, done.span(start, stop), target[span], upstream[span],
                start=start, stop=stop, dh=block_sums,
            )  # fmt: skip
            rows.scatter(block_sums, dh_full, start=start)
    sums: Tensor | None = None
    if want_dh and not plan.two_pass:
        sums = torch.zeros(len(rows), hidden.shape[-1], dtype=head.wide, device=hidden.device)
    if sums is not None or dw is not None or db is not None:
        gradient_sweep(hidden, rows, head, plan, done, target, upstream, dh=sums, **arguments)
    if sums is not None:
        dh_full = rows.scatter(sums, zeros_untouched(hidden))
    return dh_full, dw, db
