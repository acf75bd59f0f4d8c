"""fastpref: fused kernels and a thin loop for preference training on PyTorch.

Names are imported when they are first used: `fastpref --help` must not wait for torch, and the kernels must not need
the [train] extra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpref import linear as linear
    from fastpref import logps as logps
    from fastpref import losses as losses
    from fastpref import models as models
    from fastpref import ops as ops
    from fastpref import parallel as parallel
    from fastpref import reference
    from fastpref import training as training
    from fastpref.extras import TokenExtras
    from fastpref.linear import (
        LinearPreferenceOutput,
        linear_preference_loss,
        linear_sequence_logps,
        linear_token_logps,
    )
    from fastpref.logps import sequence_logps, token_logps
    from fastpref.losses import (
        LOSSES,
        LossSpec,
        PreferenceOutput,
        dpo_loss,
        dpop_loss,
        get_loss,
        kto_loss,
        preference_loss,
    )
    from fastpref.models import model_logps, model_token_logps
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
    "kto_loss",
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

_MODULES = ("linear", "logps", "losses", "models", "ops", "parallel", "reference", "training")
_HOMES = {
    "extras": ("TokenExtras",),
    "linear": ("LinearPreferenceOutput", "linear_preference_loss", "linear_sequence_logps", "linear_token_logps"),
    "logps": ("sequence_logps", "token_logps"),
    "losses": (
        "LOSSES",
        "LossSpec",
        "PreferenceOutput",
        "dpo_loss",
        "dpop_loss",
        "get_loss",
        "kto_loss",
        "preference_loss",
    ),
    "models": ("model_logps", "model_token_logps"),
    "training": ("TrainConfig", "TrainResult", "train"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fastpref.{name}")
    if name in _HOME_OF:
        value = getattr(import_module(f"fastpref.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastpref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
