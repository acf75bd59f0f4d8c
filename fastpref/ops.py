"""The torch operators under `token_logps` and `sequence_logps`: dispatch, shapes for torch.compile, autograd.

    fastpref::token_logps            (B, T, V) logits -> (B, T) log-probs, and each row's maximum and sum
    fastpref::token_extras           the same with entropy and other outputs
    fastpref::token_logps_backward   the gradient of the logits in new memory
    fastpref::token_logps_backward_  the same in the logits' own memory
    fastpref::sequence_reduce        (B, T) log-probs -> sum or mean a sequence, and how many were scored

Arguments arrive checked (logps.py). Each operator goes to the Triton kernels or to the torch path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref import tiled
from fastpref.backend import use_triton, validate_labels
from fastpref.parallel.vocab import RowStatistics
from fastpref.tiled import Transform
from fastpref.token_values import token_values, with_wrong_labels


def _runs_triton(x: Tensor) -> bool:
    # float64 is for gradient checks: the kernels compute in float32.
    return x.dtype != torch.float64 and use_triton(x)


@torch.library.custom_op("fastpref::token_logps", mutates_args=())
def token_logps_op(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    shift: int,
    ignore_index: int,
    transform: Sequence[float],  # temperature, logit_scale, softcap (0: none)
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _runs_triton(logits):
        return tiled.token_logps_forward(logits, labels, mask, shift, ignore_index, Transform(*transform))
    from fastpref.kernels import logps as kernels

    if validate_labels() or not logits.is_cuda:
        scored = tiled.scored_labels(labels, mask, ignore_index, shift)
        tiled.check_labels_in_range(labels, scored, shift, logits.shape[2])
    return kernels.token_logps_forward(logits, labels, mask, shift, ignore_index, *transform)


@token_logps_op.register_fake
def _(logits, labels, mask, shift, ignore_index, transform, inplace_backward):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(logits.shape[:2], dtype=dtype) for _ in range(3))


@torch.library.custom_op("fastpref::token_extras", mutates_args=())
def token_extras_op(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    shift: int,
    ignore_index: int,
    transform: Sequence[float],
    inplace_backward: bool,
    sums: Sequence[bool],  # weighted, squares, sum_z
    entropy_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # token_values.TokenValues, row_max, row_sum
    scored = tiled.scored_labels(labels, mask, ignore_index, shift)
    if not _runs_triton(logits) or validate_labels() or not logits.is_cuda:
        tiled.check_labels_in_range(labels, scored, shift, logits.shape[2])
    rows = row_statistics(logits, labels, mask, shift, ignore_index, transform, sums)
    if logits.is_cuda:
        wrong = torch.zeros_like(rows.maximum, dtype=torch.bool)
        wrong[:, : scored.shape[1]] = scored & ((labels < 0) | (labels >= logits.shape[2]))[:, shift:]
        rows = with_wrong_labels(rows, wrong)
    return (*token_values(rows, scored, shift, logits.shape[2]), rows.maximum, rows.total)


@token_extras_op.register_fake
def _(logits, labels, mask, shift, ignore_index, transform, inplace_backward, sums, entropy_grad):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def empty(present=True):
        return logits.new_empty(logits.shape[:2] if present else 0, dtype=dtype)

    entropy, squares, mean = (empty(present) for present in sums)
    is_top1 = logits.new_empty(logits.shape[:2], dtype=torch.bool)
    return empty(), entropy, mean, is_top1, squares, empty(), empty()


def row_statistics(
    logits: Tensor,  # (B, T, V), V = 0 too
    labels: Tensor,  # (B, T)
    mask: Tensor | None,
    shift: int,
    ignore_index: int,
    transform: Sequence[float],
    sums: Sequence[bool],
) -> RowStatistics:  # each (B, T), where the rows stand
    """Sums over (a part of) the vocabulary; the target is anything where the label is not in it."""
    wanted = dict(zip(("weighted", "squares", "sum_z"), sums, strict=True))
    if not _runs_triton(logits) or logits.shape[2] == 0:
        scored = tiled.scored_labels(labels, mask, ignore_index, shift)
        return tiled.row_statistics(logits, labels, scored, shift, Transform(*transform), **wanted)
    from fastpref.kernels import statistics as kernels

    found = kernels.row_statistics(logits, labels, mask, shift, ignore_index, *transform, sums=any(sums))
    return RowStatistics(*found[:3], *(x if want else None for x, want in zip(found[3:], sums, strict=True)))


@torch.library.custom_op("fastpref::token_logps_backward", mutates_args=())
def token_logps_backward_op(
    grad: Tensor,  # (B, T), any strides
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    row_max: Tensor,  # (B, T)
    row_sum: Tensor,  # (B, T)
    shift: int,
    ignore_index: int,
    transform: Sequence[float],
    entropy: Tensor | None = None,  # (B, T), where the labels stand
    grad_entropy: Tensor | None = None,  # (B, T), any strides
) -> Tensor:  # (B, T, V)
    entropies = (entropy, grad_entropy)
    return _backward(grad, logits, labels, mask, row_max, row_sum, shift, ignore_index, transform, entropies, False)


@token_logps_backward_op.register_fake
def _(grad, logits, *_):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("fastpref::token_logps_backward_", mutates_args=("logits",))
def token_logps_backward_inplace_op(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    shift: int,
    ignore_index: int,
    transform: Sequence[float],
    entropy: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> None:
    entropies = (entropy, grad_entropy)
    _backward(grad, logits, labels, mask, row_max, row_sum, shift, ignore_index, transform, entropies, True)


def _backward(grad, logits, labels, mask, row_max, row_sum, shift, ignore_index, transform, entropies, inplace):
    arguments = (grad, logits, labels, mask, row_max, row_sum, shift, ignore_index)
    if not _runs_triton(logits):
        return tiled.token_logps_backward(*arguments, Transform(*transform), inplace, *entropies)
    from fastpref.kernels import logps_backward as kernels

    return kernels.token_logps_backward(*arguments, *transform, *entropies, inplace=inplace)


def _save_for_token_logps(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, mask, *ctx.options, ctx.inplace = inputs
    _, row_max, row_sum = output
    ctx.save_for_backward(logits, labels, mask, row_max, row_sum)
    ctx.mark_non_differentiable(row_max, row_sum)
    ctx.consumed = False


def refuse_consumed(ctx: Any) -> None:
    if ctx.consumed:
        raise RuntimeError(
            "a second backward through token_logps(inplace_backward=True): the first one has overwritten the logits "
            "with their gradient; use inplace_backward=False where a graph is walked twice"
        )


def _token_logps_autograd(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple:
    refuse_consumed(ctx)
    return (grad_of_logits(ctx, grad, ctx.saved_tensors), *[None] * 6)


def grad_of_logits(ctx: Any, grad: Tensor, saved: Sequence[Any], *entropies: Tensor) -> Tensor:
    """The gradient in new memory or, once, in the logits' own: `saved` are the tensors that the operator takes."""
    if not ctx.inplace:
        return token_logps_backward_op(grad, *saved, *ctx.options, *entropies)
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph=True needs the logits again; use inplace_backward=False")
    ctx.consumed = True
    token_logps_backward_inplace_op(grad, *saved, *ctx.options, *entropies)
    return saved[0].detach()


def _save_for_extras(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, labels, mask, *ctx.options, ctx.inplace, _, ctx.entropy_grad = inputs
    _, entropy, *constants, row_max, row_sum = output
    ctx.save_for_backward(logits, labels, mask, row_max, row_sum, entropy)
    ctx.mark_non_differentiable(*constants, row_max, row_sum, *([] if ctx.entropy_grad else [entropy]))
    ctx.consumed = False


def _extras_autograd(ctx: Any, grad: Tensor, grad_entropy: Tensor, *_: Tensor | None) -> tuple:
    refuse_consumed(ctx)
    *saved, entropy = ctx.saved_tensors
    entropies = (entropy, grad_entropy) if ctx.entropy_grad else ()
    return (grad_of_logits(ctx, grad, saved, *entropies), *[None] * 8)


def no_double_backward(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "fastpref's log-probs have no second derivative; use fastpref.reference.token_logps where one is needed"
    )


token_logps_op.register_autograd(_token_logps_autograd, setup_context=_save_for_token_logps)
token_extras_op.register_autograd(_extras_autograd, setup_context=_save_for_extras)
token_logps_backward_op.register_autograd(no_double_backward)


@torch.library.custom_op("fastpref::sequence_reduce", mutates_args=())
def sequence_reduce_op(
    logps: Tensor,  # (B, T), or (1, N_total) with cu_seqlens
    labels: Tensor,  # the same shape
    mask: Tensor | None,
    cu_seqlens: Tensor | None,  # (S + 1,)
    shift: int,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:  # (S,) float32 and (S,) int64, S = B without cu_seqlens
    if _runs_triton(logps):
        from fastpref.kernels import sequence as kernels

        return kernels.sequence_reduce(
            logps, labels, mask, cu_seqlens, shift=shift, ignore_index=ignore_index, mean=mean
        )
    scored = tiled.scored_labels(labels, mask, ignore_index, shift)
    values = logps[:, shift:][scored]
    count = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sequence = _sequence_of(logps.shape, logps.device, cu_seqlens)[:, shift:][scored]
    lengths = torch.bincount(sequence, minlength=count)
    # Added one after another in float64: neither padding nor the other sequences can change the rounded result.
    wide = torch.float32 if logps.device.type == "mps" else torch.float64
    sums = torch.zeros(count, dtype=wide, device=logps.device).index_add_(0, sequence, values.to(wide))
    return (sums / lengths.clamp(min=1) if mean else sums).to(logps.dtype), lengths


@sequence_reduce_op.register_fake
def _(logps, labels, mask, cu_seqlens, shift, ignore_index, mean):
    count = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return logps.new_empty(count), logps.new_empty(count, dtype=torch.int64)


def _sequence_of(shape: torch.Size, device: torch.device, cu_seqlens: Tensor | None) -> Tensor:
    """(B, T) int64: which sequence a position belongs to."""
    if cu_seqlens is None:
        return torch.arange(shape[0], device=device).unsqueeze(1).expand(shape)
    positions = torch.arange(shape[1], device=device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True).unsqueeze(0)


def _save_for_reduce(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logps, _, _, cu_seqlens, _, _, ctx.mean = inputs
    ctx.shape = logps.shape
    ctx.save_for_backward(output[1], cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _reduce_autograd(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    # Positions that are not scored receive a gradient too; token_logps does not read it.
    lengths, cu_seqlens = ctx.saved_tensors
    if ctx.mean:
        grad = grad / lengths.clamp(min=1)
    if cu_seqlens is None:
        spread = grad.unsqueeze(1).expand(ctx.shape)
    else:
        spread = grad[_sequence_of(ctx.shape, grad.device, cu_seqlens)]
    return (spread, *[None] * 6)


sequence_reduce_op.register_autograd(_reduce_autograd, setup_context=_save_for_reduce)
