"""Token log-probs from logits: one pass over each scored row forward, one more backward.

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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_report import CompileCase
from .rows import UNSPECIALISED, mask_bytes, scored_label, transformed
from .transform import factors_of, on_device, scaled, tanh

# Not swept on a GPU yet. 4 warps of 32 threads with 8 bfloat16 each make the 1024; DEPTH 4 keeps 64 bytes a thread in
# flight without spills.
WIDTH = 1024
DEPTH = 4
# The backward has nothing to reduce; its tile is small so that element-wise addresses (odd V) fit the registers.
BLOCK = 2048
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

    # A label outside [0, V) makes value and gradient NaN: loud, and without the host having to wait.
    wrong = scored & (valid == 0)
    top = tl.where(wrong, float("nan"), top)
    logp = tl.where(wrong, float("nan"), logp)
    # With shift = 1 nothing predicts the first label: the last row, which predicts nothing, writes its zero.
    target = b * T + tl.where(position < T, position, position - T)
    tl.store(logps + target, tl.where(scored, logp, 0.0))
    tl.store(row_max + row, tl.where(scored, top, 0.0))
    tl.store(row_sum + row, total)


@triton.jit
def _gradient(
    x,
    column,
    label,
    g,
    bonus,
    level,
    m,
    scale,
    inner,
    inner_low,
    outer,
    outer_low,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """dL/dx of a tile: (g·(onehot − p) − bonus·p·(log p + H))·dz/dx in float32, p = exp(z − m) / s.

    `scale` is 1 / s and `level` H − log s: log p + H = (z − m) + level.
    """
    x = x.to(tl.float32)
    if HAS_SOFTCAP:
        t = tanh(scaled(x, inner, inner_low, EXACT))
        slope = outer * inner * (1.0 - t * t)
        z = scaled(t, outer, outer_low, EXACT)
    else:
        slope = outer
        z = scaled(x, outer, outer_low, EXACT)
    p = tl.exp(z - m) * scale
    dz = g * (tl.where(column == label, 1.0, 0.0) - p)
    if ENTROPY:
        # Where p is 0, the logarithm may be −inf, and 0·(−inf) NaN.
        dz -= bonus * p * (tl.where(p == 0.0, 0.0, z - m) + level)
    return dz * slope


@triton.jit(
    do_not_specialize=[*UNSPECIALISED, *(f"{name}_stride_{axis}" for name in ("grad", "bonus") for axis in "bt")]
)
def token_logps_backward_kernel(
    grad,  # (B, T) upstream, where the labels stand; strides may be 0
    bonus,  # (B, T) upstream of the entropy, where the labels stand, if ENTROPY
    entropy,  # (B, T) float32, contiguous, where the labels stand, if ENTROPY
    logits,  # (B, T, V)
    labels,  # (B, T)
    mask,  # (B, T) uint8
    row_max,  # (B, T) float32
    row_sum,  # (B, T) float32
    out,  # (B, T, V), which may be the logits
    T,
    V,
    stride_b,
    stride_t,
    out_stride_b,
    out_stride_t,
    grad_stride_b,
    grad_stride_t,
    bonus_stride_b,
    bonus_stride_t,
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
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dL/dx = g·(onehot − p)·dz/dx, with ENTROPY − bonus·p·(log p + H)·dz/dx; one program a row.

    Reads N·V·itemsize bytes, writes B·T·V·itemsize bytes: gradients of scored rows and zeros elsewhere; a row that is
    not scored is not read. Each element is read before it is written and by the same program, so `out` may be `logits`.
    """
    row = tl.program_id(0).to(tl.int64)
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
    out_start = out + b * out_stride_b + t * out_stride_t
    whole = V // BLOCK * BLOCK
    index = tl.arange(0, BLOCK)
    if scored:
        g = tl.load(grad + b * grad_stride_b + position * grad_stride_t).to(tl.float32)
        m = tl.load(row_max + row)
        total = tl.load(row_sum + row)
        scale = 1.0 / total
        g_entropy = 0.0
        level = 0.0
        if ENTROPY:
            g_entropy = tl.load(bonus + b * bonus_stride_b + position * bonus_stride_t).to(tl.float32)
            level = tl.load(entropy + b * T + position) - tl.log(total)
        for first in range(0, whole, BLOCK):
            x = tl.load(start + first + index)
            dx = _gradient(
                x,
                first + index,
                label,
                g,
                g_entropy,
                level,
                m,
                scale,
                inner,
                inner_low,
                outer,
                outer_low,
                HAS_SOFTCAP,
                EXACT,
                ENTROPY,
            )
            tl.store(out_start + first + index, dx.to(out.dtype.element_ty))
        if whole < V:
            column = whole + index
            x = tl.load(start + column, mask=column < V, other=float("-inf"))
            dx = _gradient(
                x,
                column,
                label,
                g,
                g_entropy,
                level,
                m,
                scale,
                inner,
                inner_low,
                outer,
                outer_low,
                HAS_SOFTCAP,
                EXACT,
                ENTROPY,
            )
            tl.store(out_start + column, dx.to(out.dtype.element_ty), mask=column < V)
    else:
        zeros = tl.zeros([BLOCK], out.dtype.element_ty)
        for first in range(0, whole, BLOCK):
            tl.store(out_start + first + index, zeros)
        if whole < V:
            tl.store(out_start + whole + index, zeros, mask=whole + index < V)


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


def token_logps_backward(
    grad: Tensor,  # (B, T), any strides
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,  # (B, T) bool
    row_max: Tensor,  # (B, T)
    row_sum: Tensor,  # (B, T)
    shift: int,
    ignore_index: int,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    entropy: Tensor | None = None,  # (B, T), where the labels stand
    grad_entropy: Tensor | None = None,  # (B, T), any strides
    *,
    inplace: bool = False,
    block: int = BLOCK,
    num_warps: int = NUM_WARPS if torch.version.hip is None else HIP_NUM_WARPS,
) -> Tensor:  # (B, T, V)
    """The gradient of the logits, in new contiguous memory or in their own."""
    batch, length, vocab = logits.shape
    out = logits if inplace else logits.new_empty(logits.shape)
    if out.numel() == 0:
        return out
    with_entropy = entropy is not None and grad_entropy is not None  # without it neither is read
    bonus, entropy = grad if grad_entropy is None else grad_entropy, row_sum if entropy is None else entropy
    bytes_of_mask, mask_strides = mask_bytes(labels, mask)
    factors = factors_of(temperature, logit_scale, softcap)
    with on_device(logits):
        token_logps_backward_kernel[(batch * length,)](
            grad,
            bonus,
            entropy,
            logits,
            labels,
            bytes_of_mask,
            row_max,
            row_sum,
            out,
            length,
            vocab,
            *logits.stride()[:2],
            *out.stride()[:2],
            *grad.stride(),
            *bonus.stride(),
            *labels.stride(),
            *mask_strides,
            shift,
            ignore_index,
            *factors,
            HAS_MASK=mask is not None,
            HAS_SOFTCAP=softcap != 0.0,
            EXACT=factors[1] == factors[3] == 0.0,
            ENTROPY=with_entropy,
            BLOCK=block,
            num_warps=num_warps,
        )
    return out


def _compile_cases() -> list[CompileCase]:
    """V a multiple of 16 and the odd V of GPT-2, each with 2³¹ elements and more (64-bit strides)."""
    pointers = {"logits": "*{dtype}:16", "labels": "*i64:16", "mask": "*u8:16"}
    pointers |= {"row_max": "*fp32:16", "row_sum": "*fp32:16"}
    small = [
        "T",
        "labels_stride_b",
        "labels_stride_t",
        "mask_stride_b",
        "mask_stride_t",
        "shift",
        "ignore_index",
    ]
    factors = dict.fromkeys(["inner", "inner_low", "outer", "outer_low"], "fp32")
    cases = []
    for divisible, softcap in ((True, False), (False, False), (True, True)):
        note = ("V % 16 == 0" if divisible else "odd V") + (", softcap" if softcap else "")
        end = ":16" if divisible else ""
        sizes = {"V": "i32" + end, "stride_b": "i64" + end, "stride_t": "i32" + end}
        shared = {**pointers, **dict.fromkeys(small, "i32"), **factors, **sizes}
        forward = {**shared, "logps": "*fp32:16"}
        backward = {**shared, "grad": "*fp32:16", "bonus": "*fp32:16", "entropy": "*fp32:16", "out": "*{dtype}:16"}
        backward |= {"out_stride_b": "i64" + end, "out_stride_t": "i32" + end}
        backward |= {f"{name}_stride_{axis}": "i32" for name in ("grad", "bonus") for axis in "bt"}
        flags = {"HAS_MASK": True, "HAS_SOFTCAP": softcap, "EXACT": not softcap}
        tile = {"WIDTH": WIDTH, "DEPTH": DEPTH}
        warps: dict[str, Any] = {"num_warps": NUM_WARPS, "hip_num_warps": HIP_NUM_WARPS}
        cases += [
            CompileCase(token_logps_forward_kernel, forward, flags | tile, note=note, **warps),
            *(
                CompileCase(
                    token_logps_backward_kernel,
                    backward,
                    flags | {"BLOCK": BLOCK, "ENTROPY": entropy},
                    note=note + (", entropy" if entropy else ""),
                    **warps,
                )
                for entropy in (False, True)
            ),
        ]
    return cases


COMPILE_CASES = _compile_cases()
