"""Token log-probs from logits: one pass over each scored row; logps_backward.py has the gradient.

A row is read in tiles of DEPTH × WIDTH elements. A thread owns the same few columns of WIDTH in each of the DEPTH
slices, so that a tile's maxima and sums are taken inside the thread, and threads meet once, at the end of the row. That
leaves 1 + 1/DEPTH exponentials an element, which the special-function units can do at the speed of the memory.

Which columns are summed together depends on the column alone, never on a row's address: a sequence's value is bitwise
the same wherever it stands in a batch. Where V is a multiple of 16, loads and stores are 16 bytes wide; elsewhere
(GPT-2's 50257) rows start at odd addresses and threads move element by element, still coalesced.

Letters: row t of a sequence predicts the label at `position` t + shift; z = outer·x, or with a softcap
outer·tanh(inner·x).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import UNSPECIALISED, mask_bytes, scored_label, transformed
from .transform import factors_of, on_device

# Not swept on a GPU yet. 4 warps of 32 threads with 8 bfloat16 each make the 1024; DEPTH 4 keeps 64 bytes a thread in
# flight without spills.
WIDTH = 1024
DEPTH = 4
# A wavefront of AMD's has 64 threads: as many threads in half as many.
NUM_WARPS, HIP_NUM_WARPS = 4, 2


@triton.jit
def _fold(z, m, s):
    """Folds a tile z (DEPTH, WIDTH) into each column's running maximum m and sum s = Σ exp(z − m)."""
    new = tl.maximum(m, tl.max(z, axis=0))
    base = tl.where(new == float("-inf"), 0.0, new)  # a column that is all −inf must not make NaN
    s = s * tl.exp(m - base) + tl.sum(tl.exp(z - base[None, :]), axis=0)
    return new, s


@triton.jit(do_not_specialize=UNSPECIALISED)
def token_logps_forward_kernel(
    logits,  # (B, T, V)
    labels,  # (B, T)
    mask,  # (B, T) uint8
    logps,  # (B, T) float32, where the labels stand
    row_max,  # (B, T) float32, where the rows stand
    row_sum,  # (B, T) float32
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
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """logp = (z[y] − m) − log s, m = max z, s = Σ exp(z − m); one program a row.

    Reads N·V·itemsize bytes, plus a label (and a mask byte) a position; writes 12 bytes a position. A row that is not
    scored is not read.
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
    for first in range(0, whole, WIDTH * DEPTH):
        x = tl.load(start + first + index)
        m, s = _fold(transformed(x, inner, inner_low, outer, outer_low, HAS_SOFTCAP, EXACT), m, s)
    if whole < read:
        column = whole + index
        x = tl.load(start + column, mask=column < V, other=0.0)
        z = transformed(x, inner, inner_low, outer, outer_low, HAS_SOFTCAP, EXACT)
        m, s = _fold(tl.where(column < V, z, float("-inf")), m, s)

    top = tl.max(m, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(scored, tl.sum(s * tl.exp(m - base), axis=0), 1.0)
    valid = (label >= 0) & (label < V)
    x = tl.load(start + label, mask=scored & valid, other=0.0)
    logp = (transformed(x, inner, inner_low, outer, outer_low, HAS_SOFTCAP, EXACT) - top) - tl.log(total)
    # Multiply and add may be one rounding in the loop and two here: the label's z may come out above the maximum.
    logp = tl.where(logp > 0.0, 0.0, logp)

    # A label outside [0, V) makes value and gradient NaN: loud, and without the host having to wait.
    wrong = scored & (valid == 0)
    top = tl.where(wrong, float("nan"), top)
    logp = tl.where(wrong, float("nan"), logp)
    # With shift = 1 nothing predicts the first label: the last row, which predicts nothing, writes its zero.
    target = b * T + tl.where(position < T, position, position - T)
    tl.store(logps + target, tl.where(scored, logp, 0.0))
    tl.store(row_max + row, tl.where(scored, top, 0.0))
    tl.store(row_sum + row, total)


def token_logps_forward(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    shift: int,
    ignore_index: int,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    *,
    width: int = WIDTH,
    depth: int = DEPTH,
    num_warps: int = NUM_WARPS if torch.version.hip is None else HIP_NUM_WARPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (B, T) where the labels stand; row maxima and sums (B, T) where the rows stand."""
    batch, length, vocab = logits.shape
    logps, row_max, row_sum = (logits.new_empty(batch, length, dtype=torch.float32) for _ in range(3))
    if logps.numel() == 0:
        return logps, row_max, row_sum
    bytes_of_mask, mask_strides = mask_bytes(labels, mask)
    factors = factors_of(temperature, logit_scale, softcap)
    with on_device(logits):
        token_logps_forward_kernel[(batch * length,)](
            logits,
            labels,
            bytes_of_mask,
            logps,
            row_max,
            row_sum,
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
            WIDTH=width,
            DEPTH=depth,
            num_warps=num_warps,
        )
    return logps, row_max, row_sum
