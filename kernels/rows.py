"""What the kernels over rows of logits share: which row is scored, and how a tile of it becomes z.

Letters: row t of a sequence predicts the label at `position` t + shift.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def row_arguments() -> Iterator[tuple[str, bool, dict[str, str]]]:
    """For compile cases: a note, whether there is a softcap, and the types of what all these kernels take.

    V is a multiple of 16 or GPT-2's odd one, and logits have 2³¹ elements and more (64-bit strides).
    """
    pointers = {"logits": "*{dtype}:16", "labels": "*i64:16", "mask": "*u8:16"}
    factors = dict.fromkeys(["inner", "inner_low", "outer", "outer_low"], "fp32")
    for divisible, softcap in ((True, False), (False, False), (True, True)):
        note = ("V % 16 == 0" if divisible else "odd V") + ", softcap" * softcap
        end = ":16" if divisible else ""
        sizes = {"V": "i32" + end, "stride_b": "i64" + end, "stride_t": "i32" + end}
        yield note, softcap, {**pointers, **dict.fromkeys(UNSPECIALISED, "i32"), **factors, **sizes}
