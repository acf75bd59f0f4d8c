"""Token log-probs from hidden states as an autograd function: the plan's sweeps in forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.extras import TokenExtras
from fastpref.linear.entropy import Upstream
from fastpref.linear.operands import Head, Kept
from fastpref.linear.plan import Plan, Problem, machine_of, plan_tokens
from fastpref.linear.products import precision
from fastpref.linear.rows import PIECE, Rows, find_rows
from fastpref.linear.statistics import Finished
from fastpref.linear.sweeps import fold_sweep, gradient_sweep
from fastpref.ops import no_double_backward
from fastpref.parallel.groups import sum_over
from fastpref.parallel.vocab import VocabShards
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
    extras: tuple[str, ...] = ()
    entropy_grad: bool = False
    shards: VocabShards | None = None  # where weight and bias are this rank's part of them


def head_of(weight: Tensor, bias: Tensor | None, request: Request) -> Head:
    return Head(weight, bias, request.transform, request.operand, machine_of(weight.device), request.shards)


def rows_of(
    labels: Tensor, mask: Tensor | None, weight: Tensor, request: Request, cu_seqlens: Tensor | None = None
) -> Rows:
    """The scored rows, with labels that count from the first entry of `weight`."""
    shards = request.shards
    vocab = weight.shape[0] if shards is None else shards.vocab
    rows = find_rows(labels, mask, request.shift, request.ignore_index, vocab, cu_seqlens)
    return rows if shards is None else replace(rows, labels=rows.labels - shards.offset)


def problem_of(
    hidden: Tensor, weight: Tensor, rows: Rows, request: Request, *, dh: bool, dw: bool, **streaming: int
) -> Problem:
    # Of the largest part: from equal problems all ranks make equal plans, and equal errors.
    sizes = weight.shape[:1] if request.shards is None else request.shards.sizes
    return Problem(
        rows=len(rows),
        hidden_size=hidden.shape[-1],
        vocab=max(sizes),
        operand=request.operand,
        hidden_dtype=hidden.dtype,
        weight_dtype=weight.dtype,
        hidden=dh,
        weight=dw,
        softcap=bool(request.transform.softcap),
        sums="entropy" in request.extras or "log_sum_sq_probs" in request.extras,
        entropy=request.entropy_grad and (dh or dw),
        ranks=len(sizes),
        **streaming,
    )


def inputs_of(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What an autograd function is given: under no_grad constants, for its `needs_input_grad` does not know of that."""
    return tensors if torch.is_grad_enabled() else tuple(x if x is None else x.detach() for x in tensors)


class Once(torch.autograd.Function):
    """A gradient as it is, whose own derivative is an error: taken for a constant it would be wrong without a word.

    `inputs` are what it depends on; `once_differentiable` would look at the upstream gradient alone.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    backward = staticmethod(no_double_backward)

    @staticmethod
    def mark(found: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Gradients as a backward returns them; only with create_graph does anybody differentiate them."""
        if not torch.is_grad_enabled():
            return found
        return tuple(x if x is None else Once.apply(x, *inputs) for x in found)


class LinearTokenLogps(torch.autograd.Function):
    """Log-probs (B, T); or, where extras are asked for, a tuple of them and one tensor for each of `TokenExtras`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (B, T, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (B, T)
        mask: Tensor | None,  # (B, T) bool
        request: Request,
    ) -> Any:
        dh, dw, db = ctx.needs_input_grad[:3]
        rows = rows_of(labels, mask, weight, request)
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
            done, target = fold_sweep(hidden, rows, head, plan, kept=kept, dh=unscaled, extras=request.extras)

        ctx.rows, ctx.plan, ctx.request = rows, plan, request
        kept_parts = (None, None) if kept is None else (kept.tiles, kept.maxima)
        saved: tuple[Tensor | None, ...] = () if unscaled is not None else (done.maximum, done.norm, done.rest, target)
        if saved and request.entropy_grad:
            saved = (*saved, done.extras.entropy)
        ctx.save_for_backward(hidden, weight, bias, unscaled, *kept_parts, *saved)
        logps = rows.spread_out(done.logps, labels)
        if not request.extras:
            return logps
        extras = [None if x is None else rows.spread_out(x, labels) for x in done.extras]
        ctx.mark_non_differentiable(*(x for x in extras[request.entropy_grad :] if x is not None))
        ctx.set_materialize_grads(False)
        return logps, *extras

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, entropy: Tensor | None = None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None and entropy is None:
            return (None,) * 6
        saved = ctx.saved_tensors  # once: checkpointing gives them no second time
        with torch.no_grad():
            found = LinearTokenLogps._gradients(ctx, grad, entropy, *saved)
        return *Once.mark(found, (grad, entropy, *saved[:3])), *[None] * 3

    @staticmethod
    def _gradients(
        ctx: Any,
        grad: Tensor | None,
        grad_entropy: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        unscaled: Tensor | None,
        tiles: Tensor | None,
        maxima: Tensor | None,
        *saved: Tensor,
    ) -> tuple[Tensor | None, ...]:
        rows, plan, request = ctx.rows, ctx.plan, ctx.request
        want_dh, want_dw, want_db = ctx.needs_input_grad[:3]
        if unscaled is not None:
            assert grad is not None  # this plan is not taken where the entropy has a gradient
            dh = zero_gradient(hidden)
            by_row = grad.flatten()[rows.places].to(unscaled.dtype).unsqueeze(1)
            for low in range(0, len(rows), PIECE):
                part = slice(low, low + PIECE)
                rows.scatter(unscaled[part] * by_row[part], dh, start=low)
            return dh, None, None
        head = head_of(weight, bias, request)
        maximum, norm, rest, target, *entropy = saved
        # The log-probs themselves are not read again.
        done = Finished(maximum, maximum, norm, rest, TokenExtras(*entropy))
        logps = torch.zeros_like(maximum) if grad is None else grad.flatten()[rows.places]
        upstream = Upstream(logps, None if grad_entropy is None else grad_entropy.flatten()[rows.places])
        kept = None if tiles is None or maxima is None else Kept(tiles, maxima)
        with torch.autocast(hidden.device.type, enabled=False), precision(request.operand, hidden.device):
            return gradients(
                hidden, rows, head, plan, done, target, upstream, kept=kept, want=(want_dh, want_dw, want_db)
            )


def gradient_dtype(x: Tensor, half: torch.dtype) -> torch.dtype:
    return half if x.dtype == torch.float16 else x.dtype


def zero_gradient(x: Tensor, half: torch.dtype = torch.float16) -> Tensor:
    """Zeros of the shape of x, contiguous, not yet touched; for a float16 x in the dtype `half`."""
    return zeros_untouched(x.new_empty((), dtype=gradient_dtype(x, half)).expand(x.shape))


def gradients(
    hidden: Tensor,
    rows: Rows,
    head: Head,
    plan: Plan,
    done: Finished,
    target: Tensor,
    upstream: Upstream,
    *,
    kept: Kept | None,
    want: tuple[bool, bool, bool],
    half: torch.dtype = torch.float16,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh (B, T, H), dW (V, H) and dbias (V,), those that are wanted; for float16 tensors in the dtype `half`."""
    want_dh, want_dw, want_db = want
    weight, bias = head.weight, head.bias
    dw = weight.new_empty(weight.shape, dtype=gradient_dtype(weight, half)) if want_dw else None
    db = bias.new_empty(bias.shape, dtype=gradient_dtype(bias, half)) if want_db and bias is not None else None
    arguments: dict[str, Any] = {"kept": kept, "dw": dw, "db": db}
    dh_full = None
    if plan.two_pass and want_dh:
        dh_full = zero_gradient(hidden, half)
        for start in range(0, len(rows), plan.row_block):
            stop = min(start + plan.row_block, len(rows))
            block_sums = torch.zeros(stop - start, hidden.shape[-1], dtype=head.wide, device=hidden.device)
            span = slice(start, stop)
            gradient_sweep(
                hidden, rows, head, plan, done.span(start, stop), target[span],
                upstream.span(start, stop), start=start, stop=stop, dh=block_sums,
            )  # fmt: skip
            _over_ranks(block_sums, head)
            rows.scatter(block_sums, dh_full, start=start)
    sums: Tensor | None = None
    if want_dh and not plan.two_pass:
        sums = torch.zeros(len(rows), hidden.shape[-1], dtype=head.wide, device=hidden.device)
    if sums is not None or dw is not None or db is not None:
        gradient_sweep(hidden, rows, head, plan, done, target, upstream, dh=sums, **arguments)
    if sums is not None:
        dh_full = rows.scatter(_over_ranks(sums, head), zero_gradient(hidden, half))
    return dh_full, dw, db


def _over_ranks(dh: Tensor, head: Head) -> Tensor:
    """Each rank has what its part of the vocabulary gives of dh; in float32, before it is rounded."""
    return dh if head.shards is None else sum_over(dh, head.shards.among)
