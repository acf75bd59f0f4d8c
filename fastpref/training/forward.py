"""One batch through the model: its responses' log-probs, for policy, reference and evaluation alike."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastpref.logps import sequence_logps
from fastpref.losses import LossSpec
from fastpref.training.collate import Batch


def batch_logps(model: Any, batch: Batch, *, reduction: str, precision: str) -> tuple[Tensor, Tensor]:
    """Log-probs of the chosen and of the rejected responses, each (P,) float32.

    Autocast is entered here and not by Accelerate, which would convert the logits to float32 afterwards: a
    second (2P, T, V) tensor of twice the size, for numbers that `sequence_logps` computes in float32 anyway.
    """
    device = batch.input_ids.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logps = cast(Tensor, sequence_logps(logits, batch.labels, reduction=reduction))
    chosen, rejected = logps.chunk(2)
    return chosen, rejected


def reference_logps(batch: Batch, spec: LossSpec) -> tuple[Tensor | None, Tensor | None]:
    """The reference as `preference_loss` takes it: the batch's columns, or None for a loss without one."""
    return (batch.ref_chosen, batch.ref_rejected) if spec.needs_reference else (None, None)
