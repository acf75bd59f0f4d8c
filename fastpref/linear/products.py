"""The matrix products: operands of one dtype, results in the accumulator's.

On an NVIDIA GPU cuBLAS multiplies 16-bit operands and leaves a float32 result. On a CPU (and on AMD, whose torch has no
such product) operands are widened to float32 slice by slice. A float32 product of values that were bfloat16 is exact in
its factors whatever oneDNN does with them: on a CPU with bfloat16 matrix units it is told to use those.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor


@functools.cache
def bf16_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 (AMX)."""
    return torch.cpu._is_amx_tile_supported()


@contextlib.contextmanager
def precision(operand: torch.dtype, device: torch.device) -> Iterator[None]:
    """On a CPU, for operands that mean bfloat16: how oneDNN may multiply what was widened. Else nothing.

    The setting is the process's; it is put back on the way out.
    """
    if device.type != "cpu" or operand not in (torch.bfloat16, torch.float16):
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if operand == torch.bfloat16 and bf16_matrix_units() else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b; `out` in the operands' dtype or, on a GPU, wider."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if a.is_cuda:
        if add:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    a, b = a.to(out.dtype), b.to(out.dtype)  # a GPU's plan on another device, for tests
    return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
