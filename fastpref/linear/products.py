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
    """On a CPU, how oneDNN may round float32 products: not at all, whatever the process allows.

    But it may multiply operands that mean bfloat16, and were widened, as such. The setting is the process's; it is put
    back on the way out. On a GPU the process's own setting counts: beside `set_float32_matmul_precision` torch refuses
    products under another value of `torch.backends.cuda.matmul.fp32_precision`.
    """
    if device.type != "cpu":
        yield
        return
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if operand == torch.bfloat16 and bf16_matrix_units() else "ieee"
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
