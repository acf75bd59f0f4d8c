"""The checks and the one form that log-probs from logits and from hidden states share.

Rows are (B, T, W), W = V for logits and W = H for hidden states; packed input (N_total, W) becomes one sequence, masked
where a sequence begins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpref.backend import validate_labels
from fastpref.checks import check_bool, check_number, check_tensor, describe, refuse_capture


class LogitsBatch(NamedTuple):
    """What `token_logps` was asked for: arguments checked and in one form."""

    logits: Tensor  # (B, T, V), or this rank's (B, T, V_r)
    labels: Tensor  # (B, T)
    mask: Tensor | None  # (B, T) bool
    shift: int
    ignore_index: int
    options: list[float]  # temperature, logit_scale, softcap (0: none)
    inplace_backward: bool = False
    extras: tuple[str, ...] = ()
    entropy_grad: bool = False

    def row_labels(self) -> Tensor:  # (B, T)
        """Labels where the rows stand that predict them; a last row that predicts nothing has any label."""
        return self.labels.roll(-self.shift, 1)


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
        if hasattr(value, "full_tensor"):
            raise ValueError(
                f"{other} must be no DTensor: pass {other}.to_local() where this rank has what the call needs, else "
                f"{other}.full_tensor()"
            )
        if value is not None and value.device != x.device:
            raise ValueError(f"{other} is on {value.device}, {name} are on {x.device}; move one of them")
    refuse_forward_mode(x)
    refuse_function_transforms()


def as_batch(
    x: Tensor, labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows (B, T, W), labels (B, T) and a boolean mask or None; packed input is one row, masked at its borders."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    if labels.dtype not in (torch.int32, torch.int64):
        labels = labels.long()  # in 8 bits −100 is 156, and a vocabulary's size wraps too
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
    refuse_capture("on_empty='raise' looks at how many tokens are scored", "use on_empty='zero' in captured code")
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


def refuse_function_transforms() -> None:
    """Inside torch.func.grad, vmap and the like, which see neither into an operator nor into an autograd function."""
    # No public function tells; autograd.Function.apply asks this one.
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fastpref's log-probs do not go through torch.func's transforms (grad, vjp, vmap, jacrev, ...): use "
            "torch.autograd.grad or backward(), and one batch instead of vmap; fastpref.reference goes through them "
            "(torch.func.functional_call is no transform, and works)"
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
