"""The checks and the one form that log-probs from logits and from hidden states share.

Rows are (B, T, W), W = V for logits and W = H for hidden states; packed input (N_total, W) becomes one sequence, masked
where a sequence begins.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpref.backend import validate_labels
from fastpref.checks import check_bool, check_number, check_tensor, describe


def check_options(
    temperature: float, logit_scale: float, softcap: float | None, ignore_index: int, shift: bool
) -> list[float]:
    """temperature, logit_scale and softcap as floats, 0 for no softcap."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {describe(ignore_index)}")
    check_bool("shift", shift)
    return [
        check_number("temperature", temperature, minimum=0, open_minimum=True),
        check_number("logit_scale", logit_scale, minimum=0, open_minimum=True),
        0.0 if softcap is None else check_number("softcap", softcap, minimum=0, open_minimum=True),
    ]


def check_batch(
    name: str,  # what the rows are called: "logits" or "hidden states"
    width: str,  # and their last dimension: "V" or "H"
    x: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
) -> None:
    """Types, shapes and devices of a batch of rows with labels; ValueError or TypeError."""
    check_tensor(name, x, floating=True)
    check_tensor("labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must have an integer dtype, got {describe(labels)}")
    if x.dim() not in (2, 3):
        raise ValueError(f"{name} must be (B, T, {width}), or (N_total, {width}) with cu_seqlens; got {describe(x)}")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have the shape {tuple(x.shape[:-1])} of the {name} without their last dimension, got "
            f"{describe(labels)}; with shift=True pass both unshifted"
        )
    if mask is not None:
        check_tensor("mask", mask)
        if mask.shape != labels.shape:
            raise ValueError(f"mask must have the shape {tuple(labels.shape)} of labels, got {describe(mask)}")
    _check_cu_seqlens(name, width, x, cu_seqlens, shift)
    for other, value in (("labels", labels), ("mask", mask), ("cu_seqlens", cu_seqlens)):
        if value is not None and value.device != x.device:
            raise ValueError(f"{other} is on {value.device}, {name} are on {x.device}; move one of them")
    refuse_forward_mode(x)


def as_batch(
    x: Tensor, labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows (B, T, W), labels (B, T) and a boolean mask or None; packed input is one row, masked at its borders."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    if x.dim() == 2:
        x, labels = x.unsqueeze(0), labels.unsqueeze(0)
        mask = None if mask is None else mask.unsqueeze(0)
        if shift and cu_seqlens is not None:
            mask = _mask_sequence_starts(labels, mask, cu_seqlens)
    return x, labels, mask


def check_reduction_input(name: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Packed rows can be reduced only if it is known where sequences begin."""
    if x.dim() == 2 and cu_seqlens is None:
        raise ValueError(
            f"packed {name} of shape {tuple(x.shape)} need cu_seqlens to say where sequences begin; for one "
            f"sequence pass {name.split()[0]}[None], labels[None]"
        )


def refuse_empty(lengths: Tensor) -> None:
    """Raises for sequences without a scored token (`on_empty="raise"`). Makes a GPU wait."""
    if (lengths == 0).any():
        empty = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"sequences {empty[:10]} of {len(lengths)} have no scored token (on_empty='raise'): drop them, check the "
            "mask and truncation, or take on_empty='zero'"
        )


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "fastpref's log-probs have no forward-mode derivative; use reverse mode, or "
                "fastpref.reference.token_logps"
            )


def _check_cu_seqlens(name: str, width: str, x: Tensor, cu_seqlens: Tensor | None, shift: bool) -> None:
    if cu_seqlens is None:
        if x.dim() == 2 and shift:
            raise ValueError(
                f"packed {name} of shape {tuple(x.shape)} with shift=True need cu_seqlens, or labels would be "
                "scored across sequence boundaries; pass cu_seqlens, or aligned labels with shift=False"
            )
        return
    check_tensor("cu_seqlens", cu_seqlens)
    if x.dim() == 3:
        raise ValueError(
            f"cu_seqlens goes with packed {name} (N_total, {width}), got {name} of shape {tuple(x.shape)}; drop it, or "
            "pack the batch"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be (B + 1,), got {describe(cu_seqlens)}")
    # Reading the values makes a GPU wait, and cannot be traced.
    if torch.compiler.is_compiling() or not (cu_seqlens.device.type == "cpu" or validate_labels()):
        return
    total = x.shape[0]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError(
            f"cu_seqlens must begin with 0, never decrease and end with N_total = {total}, got "
            f"{cu_seqlens.tolist()[:20]}"
        )


def _mask_sequence_starts(labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor) -> Tensor:  # (1, N_total)
    """The mask without each sequence's first label, which no position of its own sequence predicts."""
    total = labels.shape[1]
    # One place more than positions: an empty last sequence starts at N_total. Clamped, because nobody looks at offsets
    # on a GPU, and a wrong one would end the process there; the reduction makes it NaN.
    keep = torch.ones(total + 1, dtype=torch.bool, device=labels.device)
    keep = keep.index_fill(0, cu_seqlens[:-1].long().clamp(0, total), False)[:total].unsqueeze(0)
    return keep if mask is None else keep & mask
