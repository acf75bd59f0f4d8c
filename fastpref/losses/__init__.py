"""The preference losses: formulas on per-sequence log-probs, their registry, and `preference_loss`."""

from fastpref.losses.api import (
    KTOOutput,
    PreferenceOutput,
    coefficients,
    dpo_loss,
    dpop_loss,
    kto_loss,
    preference_loss,
)
from fastpref.losses.registry import KTO, LOSSES, get_loss
from fastpref.losses.spec import LossOption, LossSpec, MarginForm, PairLogps

__all__ = [
    "KTO",
    "LOSSES",
    "KTOOutput",
    "LossOption",
    "LossSpec",
    "MarginForm",
    "PairLogps",
    "PreferenceOutput",
    "coefficients",
    "dpo_loss",
    "dpop_loss",
    "get_loss",
    "kto_loss",
    "preference_loss",
]
