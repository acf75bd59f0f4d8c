"""What the kernels over rows of logits share: which row is scored, and how a tile of it becomes z.

Letters: row t of a sequence predicts the label at `position` t + shift.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .transform import scaled, tanh

# Values that change from batch to batch and that no address depends on: one compiled kernel serves all of them.
UNSPECIALISED = ["T", "shift", "ignore_index"]
UNSPECIALISED += [f"{name}_stride_{axis}" for name in ("labels", "mask") for axis in "bt"]


@triton.jit
def transformed(x, inner, inner_low, outer, outer_low, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    x = x.to(tl.float32)
    if HAS_SOFTCAP:
        x = tanh(scaled(x, inner, inner_low, EXACT))
    return scaled(x, outer, outer_low, EXACT)


@triton.jit
def scored_label(labels, mask, position, inside, ignore_index, mask_offset, HAS_MASK: tl.constexpr):
    """The label at `position` (an offset) and whether it counts."""
    label = tl.load(labels + position, mask=inside, other=0).to(tl.int64)
    scored = inside & (label != ignore_index)
    if HAS_MASK:
        scored = scored & (tl.load(mask + mask_offset, mask=inside, other=0) != 0)
    return label, scored


def mask_bytes(labels: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """The mask as bytes; without one any pointer will do, it is not read."""
    return (labels, (0, 0)) if mask is None else (mask.view(torch.uint8), mask.stride())
