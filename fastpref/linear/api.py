"""linear_token_logps and linear_sequence_logps: checks, then the autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.checks import check_bool, check_choice, check_tensor, describe, parse_budget
from fastpref.extras import TokenExtras, check_extras
from fastpref.inputs import (
    as_batch,
    check_batch,
    check_options,
    check_reduction_input,
    refuse_empty,
    refuse_forward_mode,
)
from fastpref.linear.compiled import linear_token_logps_op
from fastpref.linear.shards import Call, agreed, local_part, refuse_compiled, text_checksum
from fastpref.linear.tokens import LinearTokenLogps, Request, inputs_of
from fastpref.ops import sequence_reduce_op
from fastpref.parallel.context import ContextCall, check_layout, over_context, size_of
from fastpref.parallel.groups import checksum
from fastpref.tiled import Transform


def linear_token_logps(
    hidden: Tensor,  # (B, T, H), or (N_total, H) packed
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, T), or (N_total,) packed
    *,
    bias: Tensor | None = None,  # (V,)
    memory_budget: int | str | None = None,
    mask: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    extras: Sequence[str] = (),
    entropy_grad: bool = False,
    vocab_group: Any = None,
) -> Any:  # the shape of labels, float32; with extras a tuple of that and a TokenExtras
    """`token_logps` of the logits `hidden @ weight.T + bias`, which never exist beyond a tile.

    Warning: shift
        With `shift=True` (the default) position t of `hidden` predicts `labels[:, t + 1]`; pass `shift=False` for
        labels that are aligned already. See `fastpref.token_logps`, which also explains `mask`, `cu_seqlens`,
        `ignore_index`, `temperature`, `logit_scale` and `softcap`.

    Only scored rows reach a matrix product. One product gives the values; the gradients take one more with a frozen
    head (2·N·H·V operations each), two more with a trainable one while a row's softmax fits the budget, and up to one
    more where it does not. Exact for any upstream gradient. Under autocast, operands are rounded as `F.linear`'s are,
    a slice at a time, where that makes products faster; else they are taken as they are.

    Args:
        hidden: (B, T, H) or packed (N_total, H): what the model hands to its head; any float dtype, any strides.
        weight: (V, H), the head's, of the same dtype (under autocast, any).
        labels: (B, T) or (N_total,) integers in [0, V), or `ignore_index`.
        bias: (V,), the head's.
        memory_budget: bytes, or text like "512MiB": what forward and backward may take beyond inputs, outputs and
            gradients; 1 GiB by default. ValueError, naming the least, where one tile does not fit. Libraries may hold
            some MiB of their own besides (cuBLAS a workspace of 32 MiB on Hopper).
        extras: names of what else to return of each token (`fastpref.extras.EXTRAS`): "entropy", "mean_logits",
            "is_top1", "log_sum_sq_probs". Summed up while the log-probs are: no product more.
        entropy_grad: the entropy has a gradient too, for a bonus in the loss; else extras are constants. It needs the
            logits again: no tile is kept, and a frozen head takes three products.
        vocab_group: a torch.distributed ProcessGroup over whose ranks V is split, in rank order: `weight` (V_r, H) and
            `bias` (V_r,) are this rank's part, of any size (also none), or DTensors sharded on V over exactly this
            group. Hidden states, labels (entries of the whole vocabulary) and options are the same on all ranks,
            upstream gradients too, and every rank must run the backward. Values and the gradient of `hidden`, summed
            over the group, are the same bits on all ranks; those of weight and bias are of the part. Arguments that do
            not fit raise on every rank (for that a GPU is waited for). torch.compile raises with `fullgraph=True` and
            otherwise breaks the graph here.

    Returns:
        float32, the shape of `labels`, each label's value where the label stands; 0 where it is not scored. Rows that
        are not scored are not read. Deterministic; rows beside it may change a value's rounding, not more.
        With `extras` a tuple of that and a `TokenExtras` of tensors of the same shape.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, options or a budget that do not fit; a sharded or empty weight.
            A scored label outside [0, V) raises on a CPU; on a GPU it gives NaN, or raises with `FASTPREF_VALIDATE=1`.
        RuntimeError: second derivatives, forward-mode differentiation and the transforms of torch.func; while a CUDA
            graph is captured, for the host has to know how many rows are scored.
    """
    call = agreed(
        "linear_token_logps",
        vocab_group,
        lambda: _check(
            hidden, weight, labels, bias, memory_budget, mask, shift, cu_seqlens,
            ignore_index, temperature, logit_scale, softcap, extras, entropy_grad, vocab_group,
        ),
        dict,
    )  # fmt: skip
    logps, found = _tokens(call)
    if found is None:
        return logps.view(labels.shape)
    return logps.view(labels.shape), _viewed(found, labels)


def linear_sequence_logps(
    hidden: Tensor,  # (B, T, H), or (N_total, H) packed
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, T), or (N_total,) packed
    *,
    bias: Tensor | None = None,  # (V,)
    memory_budget: int | str | None = None,
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
    extras: Sequence[str] = (),
    entropy_grad: bool = False,
    vocab_group: Any = None,
    context_group: Any = None,
    context_layout: str = "contiguous",
) -> Any:  # (B,) float32; with return_lengths and with extras a tuple: it, (B,) int64, TokenExtras
    """`sequence_logps` of the logits `hidden @ weight.T + bias`, which never exist beyond a tile.

    See `linear_token_logps` for hidden, weight, bias and memory_budget, and `sequence_logps` for the rest, the warning
    about `shift` included. Where the loss is known too, `linear_preference_loss` needs fewer products or less memory.
    """
    check_layout(context_group, context_layout)
    if context_group is not None:
        call = ContextCall(
            "linear_sequence_logps", context_group, context_layout, vocab_group,
            size_of(weight, 0) if vocab_group is None else None, reduction, on_empty,
            return_lengths, shift, ignore_index, extras, (temperature, logit_scale, softcap),
        )  # fmt: skip
        return over_context(
            call,
            lambda aligned: linear_token_logps(
                hidden, weight, aligned, bias=bias, memory_budget=memory_budget, shift=False,
                ignore_index=ignore_index, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
                extras=extras, entropy_grad=entropy_grad, vocab_group=vocab_group,
            ),
            "hidden states", hidden, labels, mask, cu_seqlens,
        )  # fmt: skip

    def check() -> Call:
        check_choice("reduction", reduction, ("sum", "mean"))
        check_choice("on_empty", on_empty, ("zero", "raise"))
        check_bool("return_lengths", return_lengths)
        arguments = _check(
            hidden, weight, labels, bias, memory_budget, mask, shift, cu_seqlens,
            ignore_index, temperature, logit_scale, softcap, extras, entropy_grad, vocab_group,
        )  # fmt: skip
        check_reduction_input("hidden states", hidden, cu_seqlens)
        return arguments

    def also() -> dict[str, int]:
        return {
            "reduction and on_empty (checksum)": text_checksum((reduction, on_empty)),
            "cu_seqlens (checksum)": checksum(cu_seqlens),
        }

    checked = agreed("linear_sequence_logps", vocab_group, check, also)
    tokens, found = _tokens(checked)
    values, lengths = sequence_reduce_op(
        tokens, checked.labels, checked.mask, cu_seqlens, int(shift), ignore_index, reduction == "mean"
    )
    if on_empty == "raise":
        refuse_empty(lengths)
    parts: list[Any] = [values]
    if return_lengths:
        parts.append(lengths)
    if found is not None:
        parts.append(_viewed(found, labels))
    return tuple(parts) if len(parts) > 1 else values


def _tokens(call: Call) -> tuple[Tensor, TokenExtras | None]:  # (B, T) float32
    hidden, weight, bias, labels, mask, request = call
    if torch.compiler.is_compiling():
        refuse_compiled(request.shards)
        # Shapes must be known without looking at labels, so nothing is kept: one product more than eager at its best.
        options = (request.shift, request.ignore_index, list(request.transform.values), request.operand, request.budget)
        wanted = (",".join(request.extras), request.entropy_grad)
        logps, stacked, _ = linear_token_logps_op(hidden, weight, bias, labels, mask, *options, *wanted)
        named = dict(zip(request.extras, stacked.unbind(0), strict=True))
        found = TokenExtras(**{name: x != 0 if name == "is_top1" else x for name, x in named.items()})
        if request.entropy_grad:
            constants = (None if x is None else x.detach() for x in found[1:])
            found = TokenExtras(found.entropy, *constants)
    else:
        out = LinearTokenLogps.apply(*inputs_of(hidden, weight, bias), labels, mask, request)
        logps, *rest = out if request.extras else (out,)
        found = TokenExtras(*rest)
    if not request.extras:
        return logps.float(), None
    return logps.float(), TokenExtras(*(x if x is None or x.dtype == torch.bool else x.float() for x in found))


def _viewed(found: TokenExtras, labels: Tensor) -> TokenExtras:
    return TokenExtras(*(None if x is None else x.view(labels.shape) for x in found))


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    memory_budget: int | str | None,
    mask: Tensor | None,
    shift: bool,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    extras: Sequence[str],
    entropy_grad: bool,
    vocab_group: Any,
) -> Call:
    options = check_options(temperature, logit_scale, softcap, ignore_index, shift)
    wanted = check_extras(extras, entropy_grad)
    check_batch("hidden states", "H", hidden, labels, mask, cu_seqlens, shift)
    weight, bias = local_part("weight", weight, vocab_group), local_part("bias", bias, vocab_group)
    operand = check_head(hidden, weight, bias, part=vocab_group is not None)
    refuse_forward_mode(weight, bias)
    budget = parse_budget(memory_budget)
    request = Request(
        int(shift), ignore_index, Transform(*options), operand, budget, extras=wanted, entropy_grad=entropy_grad
    )
    rows, row_labels, row_mask = as_batch(hidden, labels, mask, cu_seqlens, shift)
    return Call(rows, weight, bias, row_labels, row_mask, request)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, part: bool = False) -> torch.dtype:
    """Checks the head, or this rank's part of one, against hidden states; the dtype in which products are meant."""
    check_tensor("weight", weight, floating=True)
    if hasattr(weight, "full_tensor") or hasattr(hidden, "full_tensor"):
        name = "weight" if hasattr(weight, "full_tensor") else "hidden"
        raise ValueError(
            f"{name} is a DTensor, of which each rank has a part: call inside the sharded module's own forward, where "
            f"it is whole, or pass {name}.full_tensor(grad_placements=[Partial('avg')]), which gathers it and, in "
            "data-parallel training, brings its gradient back as the ranks' mean. Where the ranks see the same hidden "
            "states and share the vocabulary (tensor parallel), pass their group as vocab_group, and hidden states as "
            "plain tensors"
        )
    if weight.dim() != 2 or (weight.numel() == 0 and not (part and weight.shape[1])):
        hint = (
            "; DeepSpeed ZeRO-3 and FSDP leave such a tensor outside of a module's forward: gather it for the whole of "
            "forward and backward (deepspeed.zero.GatheredParameters, FSDP.summon_full_params or unshard())"
            if weight.numel() == 0 or weight.dim() == 1
            else ""
        )
        raise ValueError(f"weight must be (V, H) with at least one entry, got {describe(weight)}{hint}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (V, H) with the H = {hidden.shape[-1]} of the hidden states, got {describe(weight)}"
            + ("; it looks transposed" if weight.shape[0] == hidden.shape[-1] else "")
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, hidden states are on {hidden.device}; move one of them")
    for name, wide in (("hidden states", hidden), ("weight", weight)):
        if wide.dtype.itemsize < 2:
            raise TypeError(f"{name} must have 16 bits or more, got {describe(wide)}; convert to bfloat16")
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype)
    if bias is not None:
        check_tensor("bias", bias, floating=True)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {describe(bias)}")
        if bias.device != hidden.device:
            raise ValueError(f"bias is on {bias.device}, hidden states are on {hidden.device}; move one of them")
    if autocast:
        return torch.get_autocast_dtype(device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of the hidden states, {str(hidden.dtype).removeprefix('torch.')}, got "
                f"{describe(tensor)}; convert one of them, or use torch.autocast"
            )
    return hidden.dtype
