"""What the kernels share: z = softcap·tanh(logit_scale·x / softcap) / temperature, in two factors and a tanh."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tanh(u):
    """tanh to 1.6 float32 roundings from exp alone (the interpreter has no libdevice).

    Near 0, where 1 − 2/(e^2u + 1) cancels: u + u³·P(u²), a minimax fit on |u| <= 1 with relative error 4e-10.
    """
    square = u * u
    near = square * 0.00012147077556569095 - 0.0008411374239102326
    near = near * square + 0.0030785946191316696
    near = near * square - 0.008595115092331487
    near = near * square + 0.021784731095884035
    near = near * square - 0.05395309848996066
    near = near * square + 0.13333200381863003
    near = near * square - 0.3333332930513227
    near = near * square * u + u
    decay = tl.exp(-2.0 * tl.abs(u))
    far = 1.0 - 2.0 * decay / (1.0 + decay)
    return tl.where(tl.abs(u) < 1.0, near, tl.where(u < 0, -far, far))


@triton.jit
def scaled(x, factor, factor_low, EXACT: tl.constexpr):
    """x·(factor + factor_low): a factor rounded to float32 would shift a whole row by the same relative error."""
    if EXACT:
        return x * factor
    return tl.fma(x, factor, tl.where(tl.abs(x) == float("inf"), 0.0, x) * factor_low)


def factors_of(temperature: float, logit_scale: float, softcap: float) -> tuple[float, float, float, float]:
    """inner and outer, each as a float32 and what that leaves over."""
    inner, outer = 1.0, logit_scale / temperature
    if softcap:
        inner, outer = logit_scale / softcap, softcap / temperature
    high_inner, high_outer = float(np.float32(inner)), float(np.float32(outer))
    return high_inner, inner - high_inner, high_outer, outer - high_outer


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
