"""Which layout a run's batches have: the one asked for, or the padded one where the model cannot be given it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastpref.models import set_attention, why_not_packed
from fastpref.training.collate import Layout
from fastpref.training.config import TrainConfig


def settle_layout(
    config: TrainConfig,
    model: Any,
    *,
    pad_id: int,
    max_length: int,
    device: torch.device,
    say: Callable[[str], None],
) -> Layout:
    """Sets the model's attention to what its layout needs; a line says why, where it is not the one asked for."""
    name = config.layout
    if name != "padded":
        reason = why_not_packed(model, max_length=max_length, attention=config.attention)
        if reason is None:
            set_attention(model, config.attention)
        else:
            say(f"layout={name} is not possible: {reason}. Rows are padded (layout=padded)")
            name = "padded"
    return Layout(name, pad_id, max_length, device, config.attention, repeat_last=config.logps == "logits")
