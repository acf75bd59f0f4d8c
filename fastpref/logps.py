"""Log-probs of labels from logits, without the (B, T, V) log-softmax: `token_logps` and `sequence_logps`.

inputs.py checks arguments and brings padded and packed input to one form; ops.py holds the operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.checks import check_bool, check_choice, describe
from fastpref.inputs import as_batch, check_batch, check_options, check_reduction_input, refuse_empty
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
    check_bool("inplace_backward", inplace_backward)
    options = check_options(temperature, logit_scale, softcap, ignore_index, shift)
    check_batch("logits", "V", logits, labels, mask, cu_seqlens, shift)
    _check_logits(logits, inplace_backward)
    rows, flat_labels, flat_mask = as_batch(logits, labels, mask, cu_seqlens, shift)
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
    check_bool("inplace_backward", inplace_backward)
    options = check_options(temperature, logit_scale, softcap, ignore_index, shift)
    check_batch("logits", "V", logits, labels, mask, cu_seqlens, shift)
    _check_logits(logits, inplace_backward)
    rows, flat_labels, flat_mask = as_batch(logits, labels, mask, cu_seqlens, shift)
    check_reduction_input("logits", logits, cu_seqlens)
    tokens = _token_logps(rows, flat_labels, flat_mask, shift, ignore_index, options, inplace_backward)
    values, lengths = sequence_reduce_op(
        tokens, flat_labels, flat_mask, cu_seqlens, int(shift), ignore_index, reduction == "mean"
    )
    if on_empty == "raise":
        refuse_empty(lengths)
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


def _check_logits(logits: Tensor, inplace_backward: bool) -> None:
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least one entry, got {describe(logits)}")
    if logits.shape[-1] > 1 and logits.numel() and logits.stride(-1) != 1:
        raise ValueError(
            f"logits must have stride 1 in their last dimension, got strides {logits.stride()}; pass "
            "logits.contiguous(), or avoid the transpose that made them"
        )
    moving = [stride for size, stride in zip(logits.shape, logits.stride(), strict=True) if size > 1]
    if inplace_backward and logits.numel() and 0 in moving:
        raise ValueError(
            f"inplace_backward=True needs logits whose elements do not share memory, got strides {logits.stride()} "
            "(an expanded tensor); use inplace_backward=False"
        )
