"""The losses of one argument, with rewards and coefficients, in one kernel over pairs.

    c = π_w − ref_w,  r = π_l − ref_l,  pen = λ·max(0, −c)
    u = clamp(scale·(c − r − pen), −clip, clip)
    logistic: f(u) = log(1 + exp(−u)) + tilt·u,   f'(u) = tilt − 1/(1 + exp(u))
    hinge:    f(u) = max(0, 1 − u),               f'(u) = −1 where u < 1, else 0
    square:   f(u) = (u − target)²,               f'(u) = 2·(u − target)
    df/dπ_w = f'·scale·(1 + λ·[c < 0]),  df/dπ_l = −f'·scale,  both 0 where the clamp acts

Bytes: 16 read and 24 written a pair, float32. At any batch size that fits a GPU the launch is the cost.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# B is a few to a few thousand: one block of one warp for the usual batch. There is nothing here to tune.
BLOCK = 256
NUM_WARPS = 1


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for e in [0, 1], to float32 rounding: 2·atanh(s) with s = e/(2 + e) ≤ 1/3, by its series.

    `tl.log(1 + e)` loses every digit of e below 1e-7, and with it the loss of a pair with a large margin.
    """
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 17.0
    series = series * q + 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return 2.0 * (s + s * q * series)


@triton.jit
def _margin_loss_kernel(
    policy_chosen,  # (B,) float32, as all tensors here
    policy_rejected,  # (B,)
    ref_chosen,  # (B,)
    ref_rejected,  # (B,)
    losses,  # (B,) out
    chosen_rewards,  # (B,) out
    rejected_rewards,  # (B,) out
    penalty,  # (B,) out
    d_chosen,  # (B,) out
    d_rejected,  # (B,) out
    size,
    beta,
    scale,
    lam,
    tilt,
    target,
    clip,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64 as everywhere
    mask = at < size
    c = tl.load(policy_chosen + at, mask=mask, other=0.0) - tl.load(ref_chosen + at, mask=mask, other=0.0)
    r = tl.load(policy_rejected + at, mask=mask, other=0.0) - tl.load(ref_rejected + at, mask=mask, other=0.0)

    # Every `where` lets NaN through: a comparison with NaN is false, and the second value is the one that
    # holds it. A weight of 0 must not meet an infinite factor: 0·inf is NaN, and λ = 0 is to be DPO.
    fell = c < 0.0
    pen = tl.where(lam == 0.0, 0.0, lam * tl.where(c >= 0.0, 0.0, -c))
    u = scale * (c - r - pen)
    outside = tl.abs(u) > clip
    u = tl.where(u > clip, clip, tl.where(u < -clip, -clip, u))
    if SHAPE == "logistic":
        e = tl.exp(-tl.abs(u))  # in [0, 1]: neither branch below can overflow
        value = tl.where(u >= 0.0, 0.0, -u) + _log1p_unit(e) + tl.where(tilt == 0.0, 0.0, tilt * u)
        slope = tilt - tl.where(u >= 0.0, e, 1.0) / (1.0 + e)
    elif SHAPE == "hinge":
        value = tl.where(u >= 1.0, 0.0, 1.0 - u)
        slope = tl.where(u < 1.0, -1.0, 0.0)
    else:
        value = (u - target) * (u - target)
        slope = 2.0 * (u - target)
    slope = tl.where(outside, 0.0, scale * slope)

    tl.store(losses + at, value, mask=mask)
    tl.store(chosen_rewards + at, beta * c, mask=mask)
    tl.store(rejected_rewards + at, beta * r, mask=mask)
    tl.store(penalty + at, pen, mask=mask)
    tl.store(d_chosen + at, tl.where(fell, 1.0 + lam, 1.0) * slope, mask=mask)
    tl.store(d_rejected + at, -slope, mask=mask)


def launch_margin_loss(
    policy_chosen: Tensor,  # (B,) float32, contiguous, as all four
    policy_rejected: Tensor,  # (B,)
    ref_chosen: Tensor,  # (B,)
    ref_rejected: Tensor,  # (B,)
    *,
    beta: float,
    shape: str,
    scale: float,
    lam: float,
    tilt: float,
    target: float,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # each (B,)
    """Losses, chosen and rejected rewards, penalty, dL/dπ_w, dL/dπ_l."""
    size = policy_chosen.numel()
    outputs = tuple(torch.empty_like(policy_chosen) for _ in range(6))
    with torch.cuda.device(policy_chosen.device) if policy_chosen.is_cuda else contextlib.nullcontext():
        _margin_loss_kernel[(triton.cdiv(size, BLOCK),)](
            policy_chosen,
            policy_rejected,
            ref_chosen,
            ref_rejected,
            *outputs,
            size,
            beta,
            scale,
            lam,
            tilt,
            target,
            clip,
            SHAPE=shape,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return outputs  # type: ignore[return-value]
