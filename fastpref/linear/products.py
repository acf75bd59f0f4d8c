"""The matrix products: operands of one dtype, results in the accumulator's.

On an NVIDIA GPU cuBLAS multiplies 16-bit operands and leaves a float32 result. On a CPU (and on AMD, whose torch has no
such product) operands are widened to float32 slice by slice. A float32 product of values that were bfloat16 is exact in
its factors whatever oneDNN does with them: on a CPU with bfloat16 matrix units it is told to use those.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@functools.cache
def bf16_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 (AMX)."""
    return torch.cpu._is_amx_tile_supported()


@contextlib.contextmanager
def precision(operand: torch.dtype, device: torch.device) -> Iterator[None]:
    """How float32 products may be rounded: not at all, whatever the process allows (TF32, or bfloat16 on a CPU).

    But on a CPU whose operands mean bfloat16, and were widened, oneDNN may multiply them as such. The setting is the
    process's; it is put back on the way out.
    """
    if device.type not in ("cpu", "cuda"):
        yield
        return
    backend: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    settings = backend.matmul
    before = settings.fp32_precision
    narrow = device.type == "cpu" and operand == torch.bfloat16 and bf16_matrix_units()
    settings.fp32_precision = "bf16" if narrow else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


@functools.cache
def adds_wider(device: torch.device, operand: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit operands to a float32 matrix in one call; asked once, by trying."""
    a = torch.full((16, 16), 0.5, dtype=operand, device=device)
    out = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except (RuntimeError, TypeError):
        return False
    return bool((out == 5.0).all())


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b; `out` in the operands' dtype or, on a GPU, wider."""
    if a.dtype != out.dtype and a.is_cuda:
        if not add:
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
        if adds_wider(a.device, a.dtype):
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return out.add_(torch.mm(a, b, out_dtype=out.dtype))  # slower, and with memory for the product
    a, b = a.to(out.dtype), b.to(out.dtype)  # a GPU's plan on another device, for tests
    return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
