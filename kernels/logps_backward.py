"""The gradient of token log-probs, and of entropies, by the logits: one read and one write of each scored row.

Letters as in logps.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logps import HIP_NUM_WARPS, NUM_WARPS
from .rows import UNSPECIALISED, mask_bytes, scored_label
from .transform import factors_of, on_device, scaled, tanh

# There is nothing to reduce; the tile is small so that element-wise addresses (odd V) fit the registers.
BLOCK = 2048


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
