"""What people write without a library, as it stands and under torch.compile."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cases import LinearCase
from .base import BETA, LAMBDA, Provider
from .ours import dpo_of_logps


def plain_logps(logits: Tensor, labels: Tensor) -> Tensor:  # (B, T, V), (B, T) -> (B,)
    """float() -> log_softmax -> gather, as trainers have it; fastpref.reference also copes with NaN, and is slower."""
    targets = labels[:, 1:]
    scored = targets != -100
    logps = logits[:, :-1].float().log_softmax(-1)
    tokens = logps.gather(-1, targets.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return tokens.where(scored, 0.0).sum(-1)


def _logps_16bit(logits: Tensor, labels: Tensor) -> Tensor:
    """The same without float(): values, and their sum, are rounded to the dtype of the logits."""
    targets = labels[:, 1:]
    scored = targets != -100
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, targets.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return tokens.where(scored, 0.0).sum(-1)


def _linear(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    return dpo_of_logps(plain_logps(functional.linear(hidden, weight), labels), ref_logps)


def _linear_fp32(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    """Widened before the product: a CPU without bfloat16 instructions is slow at bfloat16 products."""
    return dpo_of_logps(plain_logps(functional.linear(hidden.float(), weight.float()), labels), ref_logps)


def _dpo(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor) -> Tensor:
    return -functional.logsigmoid(BETA * ((win - ref_win) - (lose - ref_lose))).mean()


def _dpop(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor) -> Tensor:
    penalty = LAMBDA * (ref_win - win).clamp(min=0)
    return -functional.logsigmoid(BETA * ((win - ref_win) - (lose - ref_lose) - penalty)).mean()


_LOSSES = {"dpo": _dpo, "dpop": _dpop}


def _loss(loss: str, *pairs: Tensor) -> Tensor:
    return _LOSSES[loss](*pairs)


@cache
def compiled(function: Any) -> Any:
    # One graph a shape, as the benchmark's fixed shapes allow and as is fastest.
    return torch.compile(function, dynamic=False)


def _logps_compiled(logits: Tensor, labels: Tensor) -> Tensor:
    return compiled(plain_logps)(logits, labels)


def plain_loss(logits: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    return _dpo(*plain_logps(logits, labels).chunk(2), *ref_logps.chunk(2))


def _linear_plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    return plain_loss(functional.linear(hidden, weight), labels, ref_logps)


def _linear_compiled(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    return compiled(_linear_plain_loss)(hidden, weight, labels, ref_logps)


def _loss_compiled(loss: str, *pairs: Tensor) -> Tensor:
    return compiled(_LOSSES[loss])(*pairs)


LOGPS = (
    Provider("plain", plain_logps, "plain"),
    Provider("plain_16bit", _logps_16bit, "plain"),
    Provider("compiled", _logps_compiled, "plain", rival=True, compiles=True),
)
LINEAR = (
    Provider("plain", _linear, "plain", slow=True),
    Provider("plain_fp32", _linear_fp32, "plain", rival=True, slow=True, cpu_only=True),
    Provider("compiled", _linear_compiled, "plain", rival=True, slow=True, compiles=True),
)
LOSSES = (
    Provider("plain", _loss, "plain"),
    Provider("compiled", _loss_compiled, "plain", rival=True, compiles=True),
)
