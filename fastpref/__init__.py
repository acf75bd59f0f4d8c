"""fastpref: fused kernels and a thin loop for preference training on PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpref import reference
from fastpref.extras import TokenExtras
from fastpref.linear import (
    LinearPreferenceOutput,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_logps,
)
from fastpref.logps import sequence_logps, token_logps
from fastpref.losses import LOSSES, LossSpec, PreferenceOutput, dpo_loss, dpop_loss, get_loss, preference_loss
from fastpref.models import model_logps, model_token_logps

if TYPE_CHECKING:
    from fastpref.training import TrainConfig, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "LinearPreferenceOutput",
    "LossSpec",
    "PreferenceOutput",
    "TokenExtras",
    "TrainConfig",
    "TrainResult",
    "dpo_loss",
    "dpop_loss",
    "get_loss",
    "linear_preference_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "model_logps",
    "model_token_logps",
    "preference_loss",
    "reference",
    "sequence_logps",
    "token_logps",
    "train",
]

# What needs the [train] extra is imported when it is first used, so that the kernels need torch alone.
_FROM_TRAINING = ("TrainConfig", "TrainResult", "train")


def __getattr__(name: str) -> Any:
    if name in _FROM_TRAINING:
        from fastpref import training

        return getattr(training, name)
    raise AttributeError(f"module 'fastpref' has no attribute {name!r}")
