"""Hugging Face causal LMs: sequence log-probs from the head's input and weight, without logits.

The model's own forward runs, so that adapters, wrappers (PEFT, DDP, FSDP2), auxiliary losses and router outputs stay as
they are; only the head is kept from computing: it hands over the hidden states, and sees a few rows. What the model
does to its logits afterwards is read from its config, and held against the model itself before it is relied on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastpref.checks import check_bool, check_tensor, describe
from fastpref.linear import linear_sequence_logps
from fastpref.models.head import (
    INSTEAD,
    PROBED_SEQUENCES,
    active_head,
    check_logits,
    check_transforms,
    checked,
    first_scored,
    head_parameters,
    read_transforms,
    unwrap,
    without_logits,
)


class ScoredTokens(NamedTuple):
    """Which hidden state predicts which token, for rows that are not one sequence each.

    One position may predict several tokens: with a prompt that two responses share, its last one does.
    """

    source: Tensor  # (N,) int64, flat positions b·T + t of the hidden states (B, T, H)
    labels: Tensor  # (N,) int64, the token that each predicts
    cu_seqlens: Tensor  # (S + 1,) int64, where each sequence's tokens begin and end: 0, ..., N


def model_logps(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    scored: ScoredTokens | None = None,
    reduction: str = "sum",
    ignore_index: int = -100,
    temperature: float = 1.0,
    on_empty: str = "zero",
    transforms: Mapping[str, float] | None = None,
    memory_budget: int | str | None = None,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Any]:  # (B,) float32, or (S,) with scored; and with return_outputs the model's outputs
    """The log-probability of each sequence's labels under a causal LM, whose logits are never built.

    Equal, value and gradient, to `sequence_logps(model(**inputs).logits, labels)`. Policy, reference and evaluation are
    all this one call; under `torch.no_grad` it costs the forward alone.

    Args:
        model: a transformers causal LM, also inside PEFT, DistributedDataParallel or FSDP2. Its head must be a plain
            linear layer that owns `weight` (V, H) and perhaps `bias` (V,), and nothing else.
        batch: `labels` (B, T) as a causal LM gets them (position t predicts label t + 1; `ignore_index` where nothing
            is scored), and what the model's forward takes: `input_ids`, `attention_mask`, `position_ids`, ... With
            `output_router_logits=True` in it, a mixture of experts has its `aux_loss` in the outputs.
        scored: instead of labels, for rows of several sequences: which hidden state predicts which token. The batch
            must hold the `position_ids` and the mask that keep those apart (see `fastpref.models.pack_pairs`).
        reduction, ignore_index, temperature, on_empty, memory_budget: as `linear_sequence_logps` takes them.
        transforms: what the model does to its logits, as `{"logit_scale": a, "softcap": c}` (either may be missing),
            for `c·tanh(a·x / c)`. By default it is read from the model's config. Either way it is checked.
        return_outputs: also return the model's outputs, whose `logits` are None.

    Returns:
        (B,) float32, or (S,) with `scored`; with `return_outputs` a tuple of them and the model's own output object.

    Raises:
        ValueError, TypeError: arguments that do not fit; a model without a head, or with an encoder; a head with LoRA
            layers, quantised or sharded. Once for each model a few rows go through head and model, and must come out
            as computed here: a mismatch names the model and shows both values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers causal LM (an nn.Module), got {describe(model)}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping with input_ids and labels, got {describe(batch)}")
    check_bool("return_outputs", return_outputs)
    shape = _shape(batch, scored)
    labels = scored.labels if scored is not None else batch["labels"]

    def probed() -> Tensor:
        return first_scored(labels, ignore_index) if scored is None else _first_of_each(scored)

    causal_lm = unwrap(model)
    head = active_head(causal_lm)
    applied = read_transforms(causal_lm) if transforms is None else check_transforms(transforms)
    weight_checked, how = checked.get(causal_lm, (None, None))
    with without_logits(head, shape, probed, weight_checked if how == applied else None) as calls:
        # Without the labels: the model would compute its own loss on them.
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs = model(**{"use_cache": False, **inputs})
    if not calls:
        raise ValueError(
            f"{type(causal_lm).__name__} did not call its output embeddings ({type(head).__name__}) in its forward (a "
            f"compiled model may have it inlined): {INSTEAD}"
        )
    call = calls[0]
    weight, bias = head_parameters(head, call.hidden)
    with call.autocast:
        check_logits(causal_lm, getattr(outputs, "logits", None), call, weight, bias, applied)
        hidden = call.hidden.to(weight.device)  # a model may be spread over several devices
        if scored is not None:
            hidden = hidden.flatten(0, 1).index_select(0, scored.source.to(weight.device))
        found = linear_sequence_logps(
            hidden,
            weight,
            labels.to(weight.device),
            bias=bias,
            shift=scored is None,
            cu_seqlens=None if scored is None else scored.cu_seqlens.to(weight.device),
            reduction=reduction,
            ignore_index=ignore_index,
            on_empty=on_empty,
            temperature=temperature,
            logit_scale=applied.logit_scale,
            softcap=applied.softcap,
            memory_budget=memory_budget,
        )
    logps = cast(Tensor, found)  # no lengths were asked for
    return (logps, dataclasses.replace(outputs, logits=None)) if return_outputs else logps


def _shape(batch: Mapping[str, Any], scored: ScoredTokens | None) -> tuple[int, ...]:
    """(B, T) of the hidden states that the batch's labels, or `scored`, are about."""
    if scored is None:
        if batch.get("labels") is None:
            raise ValueError(f"batch must hold labels (B, T), -100 where nothing is scored; it has {sorted(batch)}")
        return tuple(check_tensor("batch['labels']", batch["labels"]).shape)
    if not isinstance(scored, ScoredTokens):
        raise TypeError(f"scored must be a ScoredTokens, got {describe(scored)}")
    if batch.get("labels") is not None:
        raise ValueError("give labels in the batch or scored, not both")
    source, labels = check_tensor("scored.source", scored.source), check_tensor("scored.labels", scored.labels)
    check_tensor("scored.cu_seqlens", scored.cu_seqlens)
    if source.dtype != torch.int64 or source.dim() != 1 or source.shape != labels.shape:
        raise ValueError(
            f"scored.source and scored.labels must be (N,), source int64; got {describe(source)} and {describe(labels)}"
        )
    if batch.get("input_ids") is None and batch.get("inputs_embeds") is None:
        raise ValueError(f"batch must hold input_ids (B, T) or inputs_embeds; it has {sorted(batch)}")
    given = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    shape = tuple(check_tensor("batch['input_ids']", given).shape[:2])
    # Reading the values would make a GPU wait.
    if source.device.type == "cpu" and ((source < 0) | (source >= math.prod(shape))).any():
        raise ValueError(
            f"scored.source must be in [0, {math.prod(shape)}), flat positions of the batch's {shape}; got "
            f"{int(source.min())} to {int(source.max())}"
        )
    return shape


def _first_of_each(scored: ScoredTokens) -> Tensor:
    """The source of the first token of a few sequences; one past the end, of an empty last one, is the last."""
    firsts = scored.cu_seqlens[:PROBED_SEQUENCES].clamp(max=len(scored.source) - 1)
    return scored.source[firsts.to(scored.source.device)]
