"""The ways to compute one thing that a benchmark puts side by side. Each is what a careful user would write."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

import fastpref
from fastpref.losses import dpo_loss, dpop_loss

LogpsProvider = Callable[[Tensor, Tensor], Tensor]  # (B, T, V) and (B, T) -> (B,)
LossProvider = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # four (P,) -> scalar

BETA, LAMBDA = 0.1, 5.0


def _fused(logits: Tensor, labels: Tensor) -> Tensor:
    return cast(Tensor, fastpref.sequence_logps(logits, labels))


def _fused_inplace(logits: Tensor, labels: Tensor) -> Tensor:
    return cast(Tensor, fastpref.sequence_logps(logits, labels, inplace_backward=True))


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    """float() -> log_softmax -> gather, as trainers have it; fastpref.reference also copes with NaN, and is slower."""
    targets = labels[:, 1:]
    scored = targets != -100
    logps = logits[:, :-1].float().log_softmax(-1)
    tokens = logps.gather(-1, targets.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return tokens.where(scored, 0.0).sum(-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In the logits' own dtype, shifted as trainers write it: flattening the slice copies the logits."""
    losses = functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="none"
    )
    return -losses.view(labels.shape[0], -1).float().sum(-1)


def _cross_entropy_nocopy(logits: Tensor, labels: Tensor) -> Tensor:
    """The same at its best: the labels are shifted in place of the logits, and nothing is copied."""
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view(labels.shape).float().sum(-1)


@cache
def _compiled_plain() -> LogpsProvider:
    return cast(LogpsProvider, torch.compile(plain, dynamic=False))


def logps_provider(name: str) -> LogpsProvider:
    if name == "compiled":
        return _compiled_plain()
    return {
        "fastpref": _fused,
        "inplace": _fused_inplace,
        "plain": plain,
        "cross_entropy": _cross_entropy,
        "cross_entropy_nocopy": _cross_entropy_nocopy,
    }[name]


LOGPS_PROVIDERS = ("fastpref", "inplace", "plain", "cross_entropy", "cross_entropy_nocopy", "compiled")


def _fused_dpo(*pairs: Tensor) -> Tensor:
    return dpo_loss(*pairs, beta=BETA).loss


def _fused_dpop(*pairs: Tensor) -> Tensor:
    return dpop_loss(*pairs, beta=BETA, lam=LAMBDA).loss


def _plain_dpo(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor) -> Tensor:
    return -functional.logsigmoid(BETA * ((win - ref_win) - (lose - ref_lose))).mean()


def _plain_dpop(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor) -> Tensor:
    penalty = LAMBDA * (ref_win - win).clamp(min=0)
    return -functional.logsigmoid(BETA * ((win - ref_win) - (lose - ref_lose) - penalty)).mean()


@cache
def _compiled_loss(loss: str) -> LossProvider:
    return cast(LossProvider, torch.compile(loss_provider(loss, "plain"), dynamic=False))


def loss_provider(loss: str, name: str) -> LossProvider:
    if name == "compiled":
        return _compiled_loss(loss)
    providers: dict[tuple[str, str], LossProvider] = {
        ("dpo", "fastpref"): _fused_dpo,
        ("dpop", "fastpref"): _fused_dpop,
        ("dpo", "plain"): _plain_dpo,
        ("dpop", "plain"): _plain_dpop,
    }
    return providers[loss, name]


LOSS_PROVIDERS = ("fastpref", "plain", "compiled")
