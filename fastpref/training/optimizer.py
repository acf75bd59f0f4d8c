"""AdamW over what is trained, and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import get_scheduler

from fastpref.training.prepare import Run


def make_optimizer(run: Run) -> torch.optim.AdamW:
    config, device = run.config, run.accelerator.device
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=run.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        # One pass over weights, gradients and moments: on a CPU a sixth of the time.
        fused=True if device.type in ("cuda", "cpu") else None,
    )


def make_schedule(optimizer: Any, run: Run) -> Any:
    config = run.config
    # 0.07 of 100 steps are 7, though the product is a little more.
    warmup = config.warmup_steps or math.ceil(round(config.warmup_ratio * run.steps, 6))
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=run.steps)
