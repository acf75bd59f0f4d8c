"""What trainers log of a token besides its log-prob: names, the tuple they come in, and how they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastpref.checks import check_bool, check_choice, describe

# Named as TRL names them.
EXTRAS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


class TokenExtras(NamedTuple):
    """One value a label, where the label stands, 0 (False) where it is not scored; None for what was not asked for.

    All are of the distribution that the label was scored under: after `logit_scale`, `softcap` and `temperature`.
    """

    entropy: Tensor | None = None  # float32, nats: −Σ p·log p; a constant unless `entropy_grad` was set
    mean_logits: Tensor | None = None  # float32, the mean of the transformed logits over the vocabulary; a constant
    is_top1: Tensor | None = None  # bool: no other entry has a larger logit than the label
    log_sum_sq_probs: Tensor | None = None  # float32, log Σ p² (WPO, Zhou et al. 2024, arXiv:2406.11827); a constant


def check_extras(extras: Any, entropy_grad: Any) -> tuple[str, ...]:
    """The names asked for, each once, in the order of `EXTRAS`; ValueError or TypeError."""
    check_bool("entropy_grad", entropy_grad)
    if isinstance(extras, str) or not isinstance(extras, Sequence):
        raise TypeError(f'extras must be a sequence of names, for instance ("entropy",); got {describe(extras)}')
    for name in extras:
        check_choice("extras", name, EXTRAS)
    if entropy_grad and "entropy" not in extras:
        raise ValueError(f'entropy_grad=True needs "entropy" among extras, got extras={extras!r}')
    return tuple(name for name in EXTRAS if name in extras)
