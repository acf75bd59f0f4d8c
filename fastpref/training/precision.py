"""Whether matrix products are made in bfloat16."""

from __future__ import annotations

import platform
from functools import cache

import torch

from fastpref.training.config import TrainConfig


def autocasts(config: TrainConfig, device: torch.device) -> bool:
    """Whether products are made in bfloat16: where it was asked for, and is no slower."""
    return config.precision == "bf16" and multiplies_bf16_faster(device)


@cache
def multiplies_bf16_faster(device: torch.device) -> bool:
    """Whether autocast to bfloat16 saves time: not on an x86 CPU without instructions for it, which emulates them."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
