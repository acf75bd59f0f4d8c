"""One batch through the model: its responses' log-probs, for policy, reference and evaluation alike."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from fastpref.logps import sequence_logps, token_logps
from fastpref.losses import LossSpec
from fastpref.models import model_logps
from fastpref.ops import sequence_reduce_op
from fastpref.training.config import TrainConfig
from fastpref.training.data.collate import IGNORE, Batch


def batch_logps(model: Any, batch: Batch, config: TrainConfig, *, reduction: str) -> tuple[Tensor, Tensor]:
    """Log-probs of the chosen and of the rejected responses, each (P,) float32.

    From hidden states without logits, or with logps=logits from these. Autocast is entered here and not by Accelerate,
    which would convert logits to float32 afterwards: a second (2P, T, V) tensor of twice the size, for numbers that
    `sequence_logps` computes in float32 anyway.
    """
    device = batch.inputs["input_ids"].device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts(config, device)):
        if config.logps == "linear":
            inputs = batch.inputs if batch.labels is None else {**batch.inputs, "labels": batch.labels}
            options: dict[str, Any] = {"reduction": reduction, "memory_budget": config.memory_budget}
            found = model_logps(model, inputs, scored=batch.scored, **options)
        else:
            logits = model(**batch.inputs, use_cache=False).logits
            found = _of_logits(logits, batch, reduction)
    chosen, rejected = cast(Tensor, found).chunk(2)  # neither was asked for a second value
    return chosen, rejected


def _of_logits(logits: Tensor, batch: Batch, reduction: str) -> Tensor | tuple[Tensor, Tensor]:
    if batch.scored is None:
        return sequence_logps(logits, cast(Tensor, batch.labels), reduction=reduction)
    # Where they lie: of (T, V) logits no row is copied. What two sequences share is scored once, and counts for both.
    source, labels, cu_seqlens = batch.scored
    aligned = torch.full(logits.shape[:2], IGNORE, device=logits.device)
    aligned.view(-1)[source] = labels
    tokens = token_logps(logits, aligned, shift=False).view(-1).index_select(0, source)
    values, _ = sequence_reduce_op(tokens[None], labels[None], None, cu_seqlens, 0, IGNORE, reduction == "mean")
    return values


def autocasts(config: TrainConfig, device: torch.device) -> bool:
    """Whether products are made in bfloat16: where it was asked for, and is no slower."""
    return config.precision == "bf16" and multiplies_bf16_faster(device)


@cache
def multiplies_bf16_faster(device: torch.device) -> bool:
    """Whether autocast to bfloat16 saves time: not on an x86 CPU without instructions for it, which emulates them."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def reference_logps(batch: Batch, spec: LossSpec) -> tuple[Tensor | None, Tensor | None]:
    """The reference as `preference_loss` takes it: the batch's columns, or None for a loss without one."""
    return (batch.ref_chosen, batch.ref_rejected) if spec.needs_reference else (None, None)
