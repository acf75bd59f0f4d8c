"""Hugging Face causal LMs: log-probs from the head's input and weight, without logits.

The model's own forward runs, so that adapters, wrappers (PEFT, DDP, FSDP2, ZeRO-3), auxiliary losses and router outputs
stay as they are; only the head does not make logits: in its own forward, where a sharded weight is whole, it scores the
labels, and sees a few rows. What the model does to its logits afterwards is read from its config, and held against the
model itself before it is relied on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref.checks import check_bool, check_tensor, describe
from fastpref.extras import TokenExtras, check_extras
from fastpref.linear import linear_sequence_logps, linear_token_logps
from fastpref.models.head import (
    INSTEAD,
    PROBED_SEQUENCES,
    active_head,
    check_logits,
    check_transforms,
    checked,
    first_scored,
    read_transforms,
    through,
    unwrap,
    without_logits,
)

# Inside a compiled function they run as they are, and with fullgraph=True this is the reason of the error.
_OUTSIDE_GRAPHS = torch.compiler.disable(
    reason="fastpref's model_logps takes the place of the model's head for a call, which torch.compile cannot trace: "
    "compile the model, model_logps(torch.compile(model), batch), and call it outside of compiled code"
)


class ScoredTokens(NamedTuple):
    """Which hidden state predicts which token, for rows that are not one sequence each.

    One position may predict several tokens: with a prompt that two responses share, its last one does.
    """

    source: Tensor  # (N,) int64, flat positions b·T + t of the hidden states (B, T, H)
    labels: Tensor  # (N,) int64, the token that each predicts
    cu_seqlens: Tensor  # (S + 1,) int64, where each sequence's tokens begin and end: 0, ..., N


@_OUTSIDE_GRAPHS
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
    extras: Sequence[str] = (),
    entropy_grad: bool = False,
    return_outputs: bool = False,
    run: Callable[..., Any] | None = None,
) -> Any:  # (B,) float32, or (S,) with scored; with extras and with return_outputs a tuple
    """The log-probability of each sequence's labels under a causal LM, whose logits are never built.

    Equal, value and gradient, to `sequence_logps(model(**inputs).logits, labels)`. Policy, reference and evaluation are
    all this one call; under `torch.no_grad` it costs the forward alone.

    Args:
        model: a transformers causal LM, also inside PEFT, DistributedDataParallel, FSDP2 or DeepSpeed (any stage). Its
            head must be a plain linear layer that owns `weight` (V, H) and perhaps `bias` (V,), and nothing else.
        batch: `labels` (B, T) as a causal LM gets them (position t predicts label t + 1; `ignore_index` where nothing
            is scored), and what the model's forward takes: `input_ids`, `attention_mask`, `position_ids`, ... With
            `output_router_logits=True` in it, a mixture of experts has its `aux_loss` in the outputs.
        scored: instead of labels, for rows of several sequences: which hidden state predicts which token. The batch
            must hold the `position_ids` and the mask that keep those apart (see `fastpref.models.pack_pairs`).
        reduction, ignore_index, temperature, on_empty, memory_budget: as `linear_sequence_logps` takes them.
        transforms: what the model does to its logits, as `{"logit_scale": a, "softcap": c}` (either may be missing),
            for `c·tanh(a·x / c)`. By default it is read from the model's config. Either way it is checked.
        extras, entropy_grad: also return a `TokenExtras`, as `token_logps` does; (N,) each with `scored`.
        return_outputs: also return the model's outputs, whose `logits` are None.
        run: called with the batch's inputs instead of `model`, by code that stands in the model's own forward.

    Returns:
        (B,) float32, or (S,) with `scored`; with `extras` and with `return_outputs` a tuple: of them, the extras and
        the model's own output object, as far as they were asked for.

    Raises:
        ValueError, TypeError: arguments that do not fit; a model without a head, or with an encoder; a head with LoRA
            layers, quantised or tensor-parallel. Once for each model a few rows go through head and model, and must
            come out as computed here: a mismatch names the model and shows both values.
    """
    options = {"reduction": reduction, "on_empty": on_empty}
    return _scores(
        linear_sequence_logps, options, model, batch, scored, ignore_index, temperature, transforms, memory_budget,
        extras, entropy_grad, return_outputs, run,
    )  # fmt: skip


@_OUTSIDE_GRAPHS
def model_token_logps(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    scored: ScoredTokens | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    transforms: Mapping[str, float] | None = None,
    memory_budget: int | str | None = None,
    extras: Sequence[str] = (),
    entropy_grad: bool = False,
    return_outputs: bool = False,
    run: Callable[..., Any] | None = None,
) -> Any:  # (B, T) float32, or (N,) with scored; with extras and with return_outputs a tuple
    """`token_logps` under a causal LM whose logits are never built: see `model_logps` for arguments and errors.

    Each label's value stands where the label stands; with `scored`, in the order of its labels, (N,).
    """
    return _scores(
        linear_token_logps, {}, model, batch, scored, ignore_index, temperature, transforms, memory_budget,
        extras, entropy_grad, return_outputs, run,
    )  # fmt: skip


def _scores(
    function: Callable[..., Any],
    options: dict[str, Any],
    model: nn.Module,
    batch: Mapping[str, Any],
    scored: ScoredTokens | None,
    ignore_index: int,
    temperature: float,
    transforms: Mapping[str, float] | None,
    memory_budget: int | str | None,
    extras: Sequence[str],
    entropy_grad: bool,
    return_outputs: bool,
    run: Callable[..., Any] | None,
) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers causal LM (an nn.Module), got {describe(model)}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping with input_ids and labels, got {describe(batch)}")
    check_bool("return_outputs", return_outputs)
    wanted = check_extras(extras, entropy_grad)
    if wanted:  # passed on only where they are asked for
        options = {**options, "extras": wanted, "entropy_grad": entropy_grad}
    shape = _shape(batch, scored)
    labels = scored.labels if scored is not None else batch["labels"]
    causal_lm = unwrap(model)
    head = active_head(causal_lm)
    applied = read_transforms(causal_lm) if transforms is None else check_transforms(transforms)

    def probed() -> Tensor:
        return first_scored(labels, ignore_index) if scored is None else _first_of_each(scored)

    def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        device = weight.device
        if scored is not None:
            hidden = hidden.flatten(0, 1).index_select(0, scored.source.to(device))
        found = function(
            hidden,
            weight,
            labels.to(device),
            bias=bias,
            shift=scored is None,
            cu_seqlens=None if scored is None else scored.cu_seqlens.to(device),
            ignore_index=ignore_index,
            temperature=temperature,
            logit_scale=applied.logit_scale,
            softcap=applied.softcap,
            memory_budget=memory_budget,
            **options,
        )
        return (found[0], *found[1]) if wanted else (found,)

    weight_checked, how = checked.get(causal_lm, (None, None))
    with without_logits(head, shape, probed, weight_checked if how == applied else None, score) as call:
        # Without the labels: the model would compute its own loss on them.
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs = (model if run is None else run)(**{"use_cache": False, **inputs})
    if call.weight is None:
        raise ValueError(
            f"{type(causal_lm).__name__} did not call its output embeddings ({type(head).__name__}) in its forward (a "
            f"compiled model may have it inlined): {INSTEAD}"
        )
    if isinstance(outputs, tuple):
        raise ValueError(f"{type(causal_lm).__name__} gave a tuple, not an output with logits: drop return_dict=False")
    check_logits(causal_lm, getattr(outputs, "logits", None), call, applied)
    logps, *others = through(outputs.logits, call.scores)
    results = [logps]
    if wanted:
        results.append(TokenExtras(*others))
    if return_outputs:
        results.append(dataclasses.replace(outputs, logits=None))
    return results[0] if len(results) == 1 else tuple(results)


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
    if len(scored.source) == 0:
        return scored.source
    firsts = scored.cu_seqlens[:PROBED_SEQUENCES].clamp(max=len(scored.source) - 1)
    return scored.source[firsts.to(scored.source.device)]
