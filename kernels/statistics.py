"""What a row of logits says besides its label's log-prob, in the same one pass: sums for entropy, mean logit and Σ p².

The tiles, the order of summation and the letters are those of logps.py. The row may be a part of a vocabulary that is
split over processes: it may be all −inf, and its label may be elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logps import DEPTH, HIP_NUM_WARPS, NUM_WARPS, WIDTH
from .rows import UNSPECIALISED, mask_bytes, scored_label, transformed
from .transform import factors_of, on_device

# Three more numbers a column: with a DEPTH of 4 an odd V leaves a compute unit of AMD's 8 wavefronts for want of
# registers, with 2 it holds 12, and an H100 20 in place of 16.
SUMS_DEPTH = 2
# A distance from the maximum: exp(−1000) is 0, and 0·(−1000) is not the NaN of 0·(−inf). A NaN stays one.
NOTHING = tl.constexpr(-1000.0)


@triton.jit
def _fold(z, inside, m, s, weighted, squares, sum_z, SUMS: tl.constexpr, MASKED: tl.constexpr):
    """Folds a tile z (DEPTH, WIDTH) into each column's maximum m and its sums relative to m."""
    if SUMS:
        sum_z += tl.sum(tl.where(inside, z, 0.0) if MASKED else z, axis=0)
    if MASKED:
        z = tl.where(inside, z, float("-inf"))
    new = tl.maximum(m, tl.max(z, axis=0))
    base = tl.where(new == float("-inf"), 0.0, new)  # a column that is all −inf must not make NaN
    distance = z - base[None, :]
    power = tl.exp(distance)
    moved = m - base
    factor = tl.exp(moved)
    if SUMS:
        # Σ e·(z − new) = factor·(Σ e·(z − m) + (m − new)·Σ e), before s moves itself
        step = tl.where(moved == float("-inf"), 0.0, moved)
        weighted = factor * (weighted + step * s)
        weighted += tl.sum(power * tl.where(distance < NOTHING, NOTHING, distance), axis=0)
        squares = squares * (factor * factor) + tl.sum(power * power, axis=0)
    s = s * factor + tl.sum(power, axis=0)
    return new, s, weighted, squares, sum_z


@triton.jit(do_not_specialize=UNSPECIALISED)
def row_statistics_kernel(
    logits,  # (B, T, V)
    labels,  # (B, T)
    mask,  # (B, T) uint8
    maximum,  # (B, T) float32, where the rows stand, as all the others
    total,
    target,
    weighted_sum,  # this and the next two if SUMS
    squares_sum,
    z_sum,
    T,
    V,
    stride_b,
    stride_t,
    labels_stride_b,
    labels_stride_t,
    mask_stride_b,
    mask_stride_t,
    shift,
    ignore_index,
    inner,
    inner_low,
    outer,
    outer_low,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """m = max z, s = Σ e^(z−m), z[y]; with SUMS also Σ e^(z−m)·(z−m), Σ e^2(z−m), Σ z; one program a row.

    Reads N·V·itemsize bytes, plus a label (and a mask byte) a position; writes 12 or 24 bytes a position. A row that is
    not scored is not read: it gets the numbers of a row with one possible entry, 0.
    """
    row = tl.program_id(0).to(tl.int64)  # B·T·V passes 2³¹ at 16k tokens of 152k logits
    b = row // T
    t = row % T
    position = t + shift
    label, scored = scored_label(
        labels,
        mask,
        b * labels_stride_b + position * labels_stride_t,
        position < T,
        ignore_index,
        b * mask_stride_b + position * mask_stride_t,
        HAS_MASK,
    )
    start = logits + b * stride_b + t * stride_t
    read = tl.where(scored, V, 0)
    whole = read // (WIDTH * DEPTH) * (WIDTH * DEPTH)

    index = tl.arange(0, DEPTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    m = tl.full([WIDTH], float("-inf"), tl.float32)
    s = tl.zeros([WIDTH], tl.float32)
    weighted = tl.zeros([WIDTH], tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    sum_z = tl.zeros([WIDTH], tl.float32)
    for first in range(0, whole, WIDTH * DEPTH):
        x = tl.load(start + first + index)
        z = transformed(x, inner, inner_low, outer, outer_low, HAS_SOFTCAP, EXACT)
        m, s, weighted, squares, sum_z = _fold(z, index < V, m, s, weighted, squares, sum_z, SUMS, False)
    if whole < read:
        column = whole + index
        x = tl.load(start + column, mask=column < V, other=0.0)
        z = transformed(x, inner, inner_low, outer, outer_low, HAS_SOFTCAP, EXACT)
        m, s, weighted, squares, sum_z = _fold(z, column < V, m, s, weighted, squares, sum_z, SUMS, True)

    top = tl.max(m, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    moved = m - base
    factor = tl.exp(moved)
    valid = (label >= 0) & (label < V)
    x = tl.load(start + label, mask=scored & valid, other=0.0)
    z = transformed(x, inner, inner_low, outer, outer_low, HAS_SOFTCAP, EXACT)
    tl.store(maximum + row, tl.where(scored, top, 0.0))
    tl.store(total + row, tl.where(scored, tl.sum(s * factor, axis=0), 1.0))
    tl.store(target + row, tl.where(scored, z, 0.0))
    if SUMS:
        step = tl.where(moved == float("-inf"), 0.0, moved)
        tl.store(weighted_sum + row, tl.where(scored, tl.sum(factor * (weighted + step * s), axis=0), 0.0))
        tl.store(squares_sum + row, tl.where(scored, tl.sum(squares * (factor * factor), axis=0), 1.0))
        tl.store(z_sum + row, tl.where(scored, tl.sum(sum_z, axis=0), 0.0))


def row_statistics(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    shift: int,
    ignore_index: int,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    *,
    sums: bool,
    width: int = WIDTH,
    depth: int | None = None,
    num_warps: int = NUM_WARPS if torch.version.hip is None else HIP_NUM_WARPS,
) -> tuple[Tensor, ...]:  # each (B, T), where the rows stand: maximum, total, target, weighted, squares, sum_z
    """The last three only with `sums`; the target of a label outside [0, V) is anything."""
    batch, length, vocab = logits.shape
    found = [logits.new_empty(batch, length, dtype=torch.float32) for _ in range(6 if sums else 3)]
    out = found if sums else found * 2  # without them, pointers that nobody looks at
    if out[0].numel() == 0:
        return tuple(out)
    bytes_of_mask, mask_strides = mask_bytes(labels, mask)
    factors = factors_of(temperature, logit_scale, softcap)
    with on_device(logits):
        row_statistics_kernel[(batch * length,)](
            logits,
            labels,
            bytes_of_mask,
            *out,
            length,
            vocab,
            *logits.stride()[:2],
            *labels.stride(),
            *mask_strides,
            shift,
            ignore_index,
            *factors,
            HAS_MASK=mask is not None,
            HAS_SOFTCAP=softcap != 0.0,
            EXACT=factors[1] == factors[3] == 0.0,
            SUMS=sums,
            WIDTH=width,
            DEPTH=depth or (SUMS_DEPTH if sums else DEPTH),
            num_warps=num_warps,
        )
    return tuple(out)
