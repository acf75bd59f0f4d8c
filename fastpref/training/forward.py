"""One batch through the model: its responses' log-probs, for policy, reference and evaluation alike."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastpref.logps import sequence_logps
from fastpref.losses import LossSpec
from fastpref.models import model_logps
from fastpref.training.collate import Batch
from fastpref.training.config import TrainConfig


def batch_logps(model: Any, batch: Batch, config: TrainConfig, *, reduction: str) -> tuple[Tensor, Tensor]:
    """Log-probs of the chosen and of the rejected responses, each (P,) float32.

    From hidden states without logits, or with logps=logits from these. Autocast is entered here and not by Accelerate,
    which would convert logits to float32 afterwards: a second (2P, T, V) tensor of twice the size, for numbers that
    `sequence_logps` computes in float32 anyway.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        if config.logps == "linear":
            labelled = {**inputs, "labels": batch.labels}
            found = model_logps(model, labelled, reduction=reduction, memory_budget=config.memory_budget)
        else:
            logits = model(**inputs, use_cache=False).logits
            found = sequence_logps(logits, batch.labels, reduction=reduction)
    chosen, rejected = cast(Tensor, found).chunk(2)  # neither was asked for a second value
    return chosen, rejected


def reference_logps(batch: Batch, spec: LossSpec) -> tuple[Tensor | None, Tensor | None]:
    """The reference as `preference_loss` takes it: the batch's columns, or None for a loss without one."""
    return (batch.ref_chosen, batch.ref_rejected) if spec.needs_reference else (None, None)
