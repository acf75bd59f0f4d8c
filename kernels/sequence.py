"""Per-sequence sum or mean of token log-probs, with the number of scored tokens."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def sequence_reduce_kernel(
    logps,  # (B, T) float32
    labels,  # (B, T)
    mask,  # (B, T) uint8
    cu_seqlens,  # (S + 1,), where packed
    values,  # (S,) float32
    lengths,  # (S,) int64
    T,
    logps_stride_b,
    logps_stride_t,
    labels_stride_b,
    labels_stride_t,
    mask_stride_b,
    mask_stride_t,
    shift,
    ignore_index,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """value = Σ_t logp_t (/ n), n = how many labels are scored; one program a sequence, one order of summation.

    Reads 4 bytes, a label and a mask byte a position; writes 12 bytes a sequence. The sum is taken in float64 and
    rounded once, so that where a sequence stands in its row does not show in the float32 result.
    """
    sequence = tl.program_id(0).to(tl.int64)
    if PACKED:
        row = 0
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        stop = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        # The host does not look at offsets on a GPU: wrong ones must neither read elsewhere nor pass for right.
        wrong = (start < 0) | (stop < start) | (stop > T)
        stop = tl.where(wrong, start, stop)
    else:
        row = sequence
        start = 0
        stop = T
        wrong = False
    sums = tl.zeros([BLOCK], tl.float64)
    counts = tl.zeros([BLOCK], tl.int32)
    # The first label of a sequence is predicted by nothing if labels are shifted.
    for first in range(start + shift, stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        inside = t < stop
        label = tl.load(labels + row * labels_stride_b + t * labels_stride_t, mask=inside, other=0).to(tl.int64)
        scored = inside & (label != ignore_index)
        if HAS_MASK:
            scored = scored & (tl.load(mask + row * mask_stride_b + t * mask_stride_t, mask=inside, other=0) != 0)
        value = tl.load(logps + row * logps_stride_b + t * logps_stride_t, mask=scored, other=0.0)
        sums += value.to(tl.float64)
        counts += scored.to(tl.int32)
    total = tl.sum(sums, axis=0)
    count = tl.sum(counts, axis=0)
    if MEAN:
        total = total / tl.maximum(count, 1).to(tl.float64)
    tl.store(values + sequence, tl.where(wrong, float("nan"), total.to(tl.float32)))
    tl.store(lengths + sequence, count.to(tl.int64))


def sequence_reduce(
    logps: Tensor,  # (B, T) float32, or (1, N_total) with cu_seqlens
    labels: Tensor,  # the same shape
    mask: Tensor | None,  # the same shape, bool
    cu_seqlens: Tensor | None,  # (S + 1,)
    *,
    shift: int,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Values (S,) float32 and lengths (S,) int64, S = B without `cu_seqlens`; 0 where nothing is scored."""
    count = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    values = logps.new_empty(count)
    lengths = logps.new_empty(count, dtype=torch.int64)
    if count == 0:
        return values, lengths
    with torch.cuda.device(logps.device) if logps.is_cuda else contextlib.nullcontext():
        sequence_reduce_kernel[(count,)](
            logps,
            labels,
            labels if mask is None else mask.view(torch.uint8),
            labels if cu_seqlens is None else cu_seqlens,
            values,
            lengths,
            logps.shape[1],
            *logps.stride(),
            *labels.stride(),
            *((0, 0) if mask is None else mask.stride()),
            shift,
            ignore_index,
            PACKED=cu_seqlens is not None,
            HAS_MASK=mask is not None,
            MEAN=mean,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return values, lengths
