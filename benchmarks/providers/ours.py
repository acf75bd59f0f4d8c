"""fastpref's own ways."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from torch.nn import functional

import fastpref
from fastpref.extras import EXTRAS
from fastpref.losses import dpo_loss, dpop_loss

from ..cases import LinearCase
from .base import BETA, LAMBDA, Provider


def dpo_of_logps(logps: Tensor, ref_logps: Tensor) -> Tensor:  # (B,) both, [chosen; rejected]
    """The same loss behind every provider of log-probs: what is compared is how they got those."""
    return dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), beta=BETA).loss


def _logps(logits: Tensor, labels: Tensor) -> Tensor:
    return cast(Tensor, fastpref.sequence_logps(logits, labels))


def _logps_inplace(logits: Tensor, labels: Tensor) -> Tensor:
    return cast(Tensor, fastpref.sequence_logps(logits, labels, inplace_backward=True))


def _logps_extras(logits: Tensor, labels: Tensor) -> Tensor:
    return fastpref.sequence_logps(logits, labels, extras=EXTRAS)[0]


def _linear(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    return fastpref.linear_preference_loss(
        hidden, weight, labels, ref_logps, loss="sigmoid", beta=BETA, memory_budget=case.budget
    ).loss


def _linear_logps(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    logps = fastpref.linear_sequence_logps(hidden, weight, labels, memory_budget=case.budget)
    return dpo_of_logps(cast(Tensor, logps), ref_logps)


def _linear_extras(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    logps, _ = fastpref.linear_sequence_logps(hidden, weight, labels, memory_budget=case.budget, extras=EXTRAS)
    return dpo_of_logps(logps, ref_logps)


def _linear_logits(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    """fastpref's other path, at its best: the logits of all positions exist, and turn into their gradient in place."""
    return dpo_of_logps(_logps_inplace(functional.linear(hidden, weight), labels), ref_logps)


def _loss(loss: str, *pairs: Tensor) -> Tensor:
    if loss == "dpop":
        return dpop_loss(*pairs, beta=BETA, lam=LAMBDA).loss
    return dpo_loss(*pairs, beta=BETA).loss


LOGPS = (
    Provider("fastpref", _logps, "fastpref"),
    Provider("inplace", _logps_inplace, "fastpref", spoils=True),
    Provider("extras", _logps_extras, "fastpref"),
)
LINEAR = (
    Provider("fastpref", _linear, "fastpref"),
    Provider("fastpref_logps", _linear_logps, "fastpref"),
    Provider("extras", _linear_extras, "fastpref"),
    Provider("logits", _linear_logits, "fastpref", slow=True),
)
LOSSES = (Provider("fastpref", _loss, "fastpref"),)
