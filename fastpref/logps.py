"""Log-probs of labels from logits, without the (B, T, V) log-softmax: `token_logps` and `sequence_logps`.

inputs.py checks arguments and brings padded and packed input to one form; ops.py holds the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.checks import check_bool, check_choice, check_tensor, describe
from fastpref.extras import TokenExtras, check_extras
from fastpref.inputs import LogitsBatch, as_batch, check_batch, check_options, check_reduction_input, refuse_empty
from fastpref.ops import sequence_reduce_op, token_extras_op, token_logps_op
from fastpref.parallel.context import ContextCall, check_layout, over_context, size_of
from fastpref.parallel.vocab import VocabShards
from fastpref.token_values import TokenValues, sums_for
from fastpref.vocab_logps import agree_on_vocabulary, local_logits, refuse_dtensor, sharded_token_values


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
    extras: Sequence[str] = (),
    entropy_grad: bool = False,
    vocab_group: Any = None,
) -> Any:  # float32, the shape of labels; with extras a tuple of it and TokenExtras
    """The log-probability of each label under its position's logits.

    Warning: shift
        With `shift=True` (the default) labels come as a causal LM gets them: position t of `logits` predicts
        `labels[:, t + 1]`, and the first label of a sequence is never scored. With `shift=False` position t scores
        `labels[:, t]`: pass that if you have shifted already (`logits[:, :-1], labels[:, 1:]`). Shifting twice, or not
        at all, gives numbers that look plausible and are wrong.

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
        extras: what else to make of the same read of the logits: names from "entropy", "mean_logits", "is_top1",
            "log_sum_sq_probs" (see `TokenExtras`). They carry no gradient.
        entropy_grad: except the entropy's, with this: for an entropy bonus in the loss. The gradient is still written
            once.
        vocab_group: a process group over whose ranks the vocabulary is split, in rank order: logits (B, T, V_r), V_r
            free (also 0), or a DTensor sharded on its last dimension over that group; labels of the whole vocabulary,
            the same on all ranks. Values are the same bits on all ranks. Every rank must make the call, which makes the
            hosts wait for each other once; backward communicates nothing. torch.compile raises.

    Returns:
        float32, the shape of `labels`; with `extras` also a `TokenExtras` whose elements have that shape. 0 where a
        label is not scored. Rows that are not scored are not read: NaN or infinity there reaches neither values nor
        gradient. Deterministic, value and gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit. A scored label outside [0, V) raises
            on a CPU; on a GPU, where looking would make the host wait, it gives NaN, or raises with
            `FASTPREF_VALIDATE=1`.
        RuntimeError: second derivatives and forward-mode differentiation, in backward and forward respectively; the
            transforms of torch.func (functional_call is none, and works).

    There is no context_group as `sequence_logps` has one: where sequences are split over ranks, each part's own call
    with `shift=False` and labels that were aligned before the split is complete.

    On a GPU with Triton nothing here makes the host wait, so that a step can be captured as a CUDA graph (without
    `FASTPREF_VALIDATE`, groups and `on_empty="raise"`; those refuse).
    """

    def prepare() -> LogitsBatch:
        return _prepare(
            logits, labels, mask, shift, cu_seqlens, ignore_index, (temperature, logit_scale, softcap),
            inplace_backward, extras, entropy_grad, vocab_group,
        )  # fmt: skip

    batch, shards = _agreed("token_logps", vocab_group, prepare, cu_seqlens)
    values = _token_values(batch, shards)
    logps = values.logps.view(labels.shape)
    return (logps, _named(values, batch.extras, labels.shape)) if batch.extras else logps


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
    extras: Sequence[str] = (),
    entropy_grad: bool = False,
    vocab_group: Any = None,
    context_group: Any = None,
    context_layout: str = "contiguous",
) -> Any:  # (B,) float32; with return_lengths a tuple with (B,) int64 and with extras one that ends with TokenExtras
    """The log-probability of each sequence's scored tokens: what DPO and its family need of a model.

    Warning: shift
        `shift=True` (the default) takes labels as a causal LM gets them and shifts them itself; pass `shift=False` for
        logits and labels that are aligned already. See `token_logps`, which also explains `mask`, `ignore_index`,
        `temperature`, `logit_scale`, `softcap`, `inplace_backward`, `extras` (a value a token, here too),
        `entropy_grad` and `vocab_group`.

    Args:
        logits, labels: (B, T, V) and (B, T); or packed, (N_total, V) and (N_total,) with `cu_seqlens`.
        reduction: "sum" (DPO's own, Rafailov et al. 2023, eq. 7) or "mean" over scored tokens, never over padding.
        cu_seqlens: (B + 1,) int32 or int64 on the device of the logits: sequence i is rows `cu_seqlens[i]` to
            `cu_seqlens[i + 1]` of packed input. Checked on a CPU; on a GPU an offset outside the input gives NaN.
        on_empty: a sequence with nothing to score has value 0 and gradient 0 ("zero"), or raises ("raise", which makes
            the host wait for the GPU, and cannot be traced by torch.compile).
        return_lengths: also return how many tokens were scored.
        context_group: a process group over whose ranks sequences are split on T, in rank order: logits (B, T_r, V),
            labels and mask (B, T_r), T_r free (also 0); packed, (N_r, V) with `cu_seqlens` of the whole row. Values and
            lengths are the whole sequences', the same bits on all ranks; with `shift=True` the label that a part's last
            position predicts is fetched from the next part. Every rank must make the call. In backward nothing is
            exchanged: each rank has the same loss and the gradient of its own part of it, so the gradients of
            parameters are to be summed over the group (for DDP or FSDP, which average, multiply the loss by its size).
        context_layout: "contiguous"; or "zigzag", where rank i of n holds chunks i and 2n − 1 − i of 2n equal ones.

    Returns:
        (B,) float32; with `return_lengths` also (B,) int64 and with `extras` also a `TokenExtras`, a tuple in that
        order. Deterministic; a sequence's value does not depend on the
        other sequences or on padding.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logps`; ValueError for an empty sequence with `on_empty="raise"`.
    """
    check_layout(context_group, context_layout)
    if context_group is not None:
        call = ContextCall(
            "sequence_logps", context_group, context_layout, vocab_group,
            None if vocab_group is not None else size_of(logits, -1), reduction, on_empty, return_lengths,
            shift, ignore_index, extras, (temperature, logit_scale, softcap),
        )  # fmt: skip
        return over_context(
            call,
            lambda aligned: token_logps(
                logits, aligned, shift=False, ignore_index=ignore_index, temperature=temperature,
                logit_scale=logit_scale, softcap=softcap, inplace_backward=inplace_backward, extras=extras,
                entropy_grad=entropy_grad, vocab_group=vocab_group,
            ),
            "logits", logits, labels, mask, cu_seqlens,
        )  # fmt: skip

    def prepare() -> LogitsBatch:
        check_choice("reduction", reduction, ("sum", "mean"))
        check_choice("on_empty", on_empty, ("zero", "raise"))
        check_bool("return_lengths", return_lengths)
        batch = _prepare(
            logits, labels, mask, shift, cu_seqlens, ignore_index, (temperature, logit_scale, softcap),
            inplace_backward, extras, entropy_grad, vocab_group,
        )  # fmt: skip
        check_reduction_input("logits", logits, cu_seqlens)
        return batch

    named = f"sequence_logps(reduction={reduction!r}, on_empty={on_empty!r})"
    batch, shards = _agreed(named, vocab_group, prepare, cu_seqlens)
    tokens = _token_values(batch, shards)
    values, lengths = sequence_reduce_op(
        tokens.logps, batch.labels, batch.mask, cu_seqlens, batch.shift, ignore_index, reduction == "mean"
    )
    if on_empty == "raise":
        refuse_empty(lengths)
    found = [values, *[lengths] * return_lengths]
    if batch.extras:
        return (*found, _named(tokens, batch.extras, labels.shape))
    return tuple(found) if return_lengths else values


def _prepare(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    shift: bool,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    transform: tuple[float, float, float | None],  # temperature, logit_scale, softcap
    inplace_backward: bool,
    extras: Sequence[str],
    entropy_grad: bool,
    vocab_group: Any,
) -> LogitsBatch:
    """All checks of the arguments, and the one form of padded and packed input."""
    check_bool("inplace_backward", inplace_backward)
    names = check_extras(extras, entropy_grad)
    options = check_options(*transform, ignore_index, shift)
    check_tensor("logits", logits, floating=True)
    if vocab_group is None:
        refuse_dtensor(logits)
    else:
        logits = local_logits(logits, vocab_group)
    check_batch("logits", "V", logits, labels, mask, cu_seqlens, shift)
    _check_logits(logits, inplace_backward, sharded=vocab_group is not None)
    rows, flat_labels, flat_mask = as_batch(logits, labels, mask, cu_seqlens, shift)
    return LogitsBatch(
        rows, flat_labels, flat_mask, int(shift), ignore_index, options, inplace_backward, names, entropy_grad
    )


def _agreed(
    call: str, vocab_group: Any, prepare: Callable[[], LogitsBatch], cu_seqlens: Tensor | None
) -> tuple[LogitsBatch, VocabShards | None]:
    if vocab_group is None:
        return prepare(), None
    if torch.compiler.is_compiling():
        raise RuntimeError("vocab_group does not go through torch.compile: call outside of compiled code")
    return agree_on_vocabulary(call, vocab_group, prepare, cu_seqlens)


def _token_values(batch: LogitsBatch, shards: VocabShards | None) -> TokenValues:  # each (B, T)
    if shards is not None:
        values = sharded_token_values(batch, shards)
        return values._replace(logps=values.logps.float())
    # Raised here, beside the operator: without fullgraph torch.compile leaves the function that raises uncompiled.
    if batch.inplace_backward and torch.compiler.is_compiling():
        raise RuntimeError(
            "inplace_backward=True does not go through torch.compile, which plans memory itself: "
            "use inplace_backward=False in compiled code"
        )
    arguments = batch[:7]
    if not batch.extras:
        logps, _, _ = token_logps_op(*arguments)
        return TokenValues(logps.float(), *[logps] * 4)
    logps, *others, _, _ = token_extras_op(*arguments, sums_for(batch.extras), batch.entropy_grad)
    return TokenValues(logps.float(), *others)


def _named(values: TokenValues, extras: tuple[str, ...], shape: torch.Size) -> TokenExtras:
    found = {name: getattr(values, name).view(shape) for name in extras}
    return TokenExtras(**{name: x if x.dtype == torch.bool else x.float() for name, x in found.items()})


def _check_logits(logits: Tensor, inplace_backward: bool, sharded: bool) -> None:
    if logits.shape[-1] == 0 and not sharded:
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
