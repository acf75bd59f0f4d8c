"""Log-probs of labels from logits, without the (B, T, V) log-softmax: `token_logps` and `sequence_logps`.

This file checks arguments and brings padded and packed input to one form; ops.py holds the operators.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpref.backend import validate_labels
from fastpref.checks import check_bool, check_choice, check_number, check_tensor, describe
from fastpref.ops import sequence_reduce_op, token_logps_op


def token_logps(
    logits: Tensor,  # (B, T, V), or (N_total, V) packed
    labels: Tensor,  # (B, T), or (N_total,) packed
    *,
    mask: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:  # the shape of labels, float32
    """The log-probability of each label under its position's logits.

    .. warning:: **shift.** With `shift=True` (the default) labels come as a causal LM gets them: position t of `logits`
       predicts `labels[:, t + 1]`, and the first label of a sequence is never scored. With `shift=False` position t
       scores `labels[:, t]`: pass that if you have shifted already (`logits[:, :-1], labels[:, 1:]`). Shifting twice,
       or not at all, gives numbers that look plausible and are wrong.

    The value of a label stands where the label stands: `out[b, t]` is log p(`labels[b, t]`), so `out` lines up with
    `labels` and `mask` whether they are shifted or not. Natural logarithm; float32 whatever the logits are.

    Args:
        logits: (B, T, V), or packed (N_total, V); any float dtype, any strides whose last one is 1, never copied.
        labels: (B, T) or (N_total,) integers in [0, V), or `ignore_index`.
        mask: the shape of `labels`, aligned with it and shifted with it; a label counts where it is non-zero.
        shift: see the warning above.
        cu_seqlens: (S + 1,) int32 or int64, where packed sequences begin, and N_total at the end. Required for packed
            input with `shift=True`: no label is scored across a boundary.
        ignore_index: the label of a position that is not scored.
        temperature, logit_scale, softcap: logits are taken as `softcap·tanh(logit_scale·x / softcap) / temperature`.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. For logits that nothing
            else reads afterwards. A second backward raises. torch.compile, which plans memory itself, raises with
            `fullgraph=True` and otherwise breaks the graph here.

    Returns:
        float32, the shape of `labels`; 0 where a label is not scored. Rows that are not scored are not read: NaN or
        infinity there reaches neither values nor gradient. Deterministic, value and gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit. A scored label outside [0, V) raises
            on a CPU; on a GPU, where looking would make the host wait, it gives NaN, or raises with
            `FASTPREF_VALIDATE=1`.
        RuntimeError: second derivatives and forward-mode differentiation, in backward and forward respectively.
    """
    options = _check_options(temperature, logit_scale, softcap, ignore_index, shift, inplace_backward)
    rows, flat_labels, flat_mask = _check_tensors(logits, labels, mask, cu_seqlens, shift, inplace_backward)
    return _token_logps(rows, flat_labels, flat_mask, shift, ignore_index, options, inplace_backward).view(labels.shape)


def sequence_logps(
    logits: Tensor,  # (B, T, V), or (N_total, V) packed
    labels: Tensor,  # (B, T), or (N_total,) packed
    *,
    reduction: str = "sum",
    cu_seqlens: Tensor | None = None,
    on_empty: str = "zero",
    return_lengths: bool = False,
    mask: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (B,) float32, and with return_lengths (B,) int64
    """The log-probability of each sequence's scored tokens: what DPO and its family need of a model.

    .. warning:: **shift.** `shift=True` (the default) takes labels as a causal LM gets them and shifts them itself;
       pass `shift=False` for logits and labels that are aligned already. See `token_logps`, which also explains `mask`,
       `ignore_index`, `temperature`, `logit_scale`, `softcap` and `inplace_backward`.

    Args:
        logits, labels: (B, T, V) and (B, T); or packed, (N_total, V) and (N_total,) with `cu_seqlens`.
        reduction: "sum" (DPO's own, Rafailov et al. 2023, eq. 7) or "mean" over scored tokens, never over padding.
        cu_seqlens: (B + 1,) int32 or int64 on the device of the logits: sequence i is rows `cu_seqlens[i]` to
            `cu_seqlens[i + 1]` of packed input. Checked on a CPU; on a GPU an offset outside the input gives NaN.
        on_empty: a sequence with nothing to score has value 0 and gradient 0 ("zero"), or raises ("raise", which makes
            the host wait for the GPU, and cannot be traced by torch.compile).
        return_lengths: also return how many tokens were scored.

    Returns:
        (B,) float32, or with `return_lengths` also (B,) int64. Deterministic; a sequence's value does not depend on the
        other sequences or on padding.

    Raises:
        As `token_logps`; and ValueError for an empty sequence with `on_empty="raise"`.
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    check_choice("on_empty", on_empty, ("zero", "raise"))
    check_bool("return_lengths", return_lengths)
    options = _check_options(temperature, logit_scale, softcap, ignore_index, shift, inplace_backward)
    rows, flat_labels, flat_mask = _check_tensors(logits, labels, mask, cu_seqlens, shift, inplace_backward)
    if logits.dim() == 2 and cu_seqlens is None:
        raise ValueError(
            f"packed logits of shape {tuple(logits.shape)} need cu_seqlens to say where sequences begin; for one "
            "sequence pass logits[None], labels[None]"
        )
    tokens = _token_logps(rows, flat_labels, flat_mask, shift, ignore_index, options, inplace_backward)
    values, lengths = sequence_reduce_op(
        tokens, flat_labels, flat_mask, cu_seqlens, int(shift), ignore_index, reduction == "mean"
    )
    if on_empty == "raise" and (lengths == 0).any():
        empty = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"sequences {empty[:10]} of {len(lengths)} have no scored token (on_empty='raise'): drop them, check the "
            "mask and truncation, or take on_empty='zero'"
        )
    return (values, lengths) if return_lengths else values


def _token_logps(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    mask: Tensor | None,
    shift: bool,
    ignore_index: int,
    options: list[float],
    inplace_backward: bool,
) -> Tensor:  # (B, T) float32
    # Raised here, beside the operator: without fullgraph torch.compile leaves the function that raises uncompiled.
    if inplace_backward and torch.compiler.is_compiling():
        raise RuntimeError(
            "inplace_backward=True does not go through torch.compile, which plans memory itself: "
            "use inplace_backward=False in compiled code"
        )
    logps, _, _ = token_logps_op(logits, labels, mask, int(shift), ignore_index, options, inplace_backward)
    return logps.float()


def _check_options(
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    shift: bool,
    inplace_backward: bool,
) -> list[float]:
    """temperature, logit_scale and softcap as floats, 0 for no softcap."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {describe(ignore_index)}")
    check_bool("shift", shift)
    check_bool("inplace_backward", inplace_backward)
    return [
        check_number("temperature", temperature, minimum=0, open_minimum=True),
        check_number("logit_scale", logit_scale, minimum=0, open_minimum=True),
        0.0 if softcap is None else check_number("softcap", softcap, minimum=0, open_minimum=True),
    ]


def _check_tensors(
    logits: Tensor, labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, shift: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (B, T, V), labels (B, T) and a boolean mask or None; packed input is one row, masked at its borders."""
    check_tensor("logits", logits, floating=True)
    check_tensor("labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must have an integer dtype, got {describe(labels)}")
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must be (B, T, V), or (N_total, V) with cu_seqlens; got {describe(logits)}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape {tuple(logits.shape[:-1])} of the logits without their last dimension, got "
            f"{describe(labels)}; with shift=True pass both unshifted"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least one entry, got {describe(logits)}")
    if logits.shape[-1] > 1 and logits.numel() and logits.stride(-1) != 1:
        raise ValueError(
            f"logits must have stride 1 in their last dimension, got strides {logits.stride()}; pass "
            "logits.contiguous(), or avoid the transpose that made them"
        )
    if inplace and logits.numel() and 0 in _strides_that_move(logits):
        raise ValueError(
            f"inplace_backward=True needs logits whose elements do not share memory, got strides {logits.stride()} "
            "(an expanded tensor); use inplace_backward=False"
        )
    if mask is not None:
        check_tensor("mask", mask)
        if mask.shape != labels.shape:
            raise ValueError(f"mask must have the shape {tuple(labels.shape)} of labels, got {describe(mask)}")
    _check_cu_seqlens(logits, cu_seqlens, shift)
    for name, value in (("labels", labels), ("mask", mask), ("cu_seqlens", cu_seqlens)):
        if value is not None and value.device != logits.device:
            raise ValueError(f"{name} is on {value.device}, logits are on {logits.device}; move one of them")
    _refuse_forward_mode(logits)

    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
        mask = None if mask is None else mask.unsqueeze(0)
        if shift and cu_seqlens is not None:
            mask = _mask_sequence_starts(labels, mask, cu_seqlens)
    return logits, labels, mask


def _strides_that_move(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _check_cu_seqlens(logits: Tensor, cu_seqlens: Tensor | None, shift: bool) -> None:
    if cu_seqlens is None:
        if logits.dim() == 2 and shift:
            raise ValueError(
                f"packed logits of shape {tuple(logits.shape)} with shift=True need cu_seqlens, or labels would be "
                "scored across sequence boundaries; pass cu_seqlens, or aligned labels with shift=False"
            )
        return
    check_tensor("cu_seqlens", cu_seqlens)
    if logits.dim() == 3:
        raise ValueError(
            f"cu_seqlens goes with packed logits (N_total, V), got logits of shape {tuple(logits.shape)}; drop it, or "
            "pack the batch"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be (B + 1,), got {describe(cu_seqlens)}")
    # Reading the values makes a GPU wait, and cannot be traced.
    if torch.compiler.is_compiling() or not (cu_seqlens.device.type == "cpu" or validate_labels()):
        return
    total = logits.shape[0]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError(
            f"cu_seqlens must begin with 0, never decrease and end with N_total = {total}, got "
            f"{cu_seqlens.tolist()[:20]}"
        )


def _mask_sequence_starts(labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor) -> Tensor:  # (1, N_total)
    """The mask without each sequence's first label, which no position of its own sequence predicts."""
    total = labels.shape[1]
    # One place more than positions: an empty last sequence starts at N_total.
    keep = torch.ones(total + 1, dtype=torch.bool, device=labels.device)
    keep = keep.index_fill(0, cu_seqlens[:-1].long(), False)[:total].unsqueeze(0)
    return keep if mask is None else keep & mask


def _refuse_forward_mode(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(logits).tangent is not None:
        raise RuntimeError(
            "fastpref's log-probs have no forward-mode derivative; use reverse mode, or fastpref.reference.token_logps"
        )
