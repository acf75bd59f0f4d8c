"""The original DPO repository's log-probs and loss, under its names.

    from fastpref.integrations.dpo import _get_batch_logps, preference_loss  # in trainers.py, in place of its own two

The originals: `trainers.py` of https://github.com/eric-mitchell/direct-preference-optimization at f8b8c0f (Dec. 2023).
Signatures and values are theirs, except that results are float32 whatever comes in, that the mean of a sequence with
nothing to score is 0 where theirs is 0/0 = NaN, and that arguments are checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import losses
from fastpref.checks import check_bool, check_number, check_tensor
from fastpref.logps import sequence_logps


class PreferenceLoss(NamedTuple):
    losses: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,), detached
    rejected_rewards: Tensor  # (B,), detached


def _get_batch_logps(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T), a causal LM's: they are shifted here; −100 is not scored
    average_log_prob: bool = False,
) -> Tensor:  # (B,) float32
    """The log-prob of each sequence's labels: their sum, or their mean."""
    check_bool("average_log_prob", average_log_prob)
    values = sequence_logps(logits, labels, reduction="mean" if average_log_prob else "sum")
    assert isinstance(values, Tensor)  # without return_lengths it is no tuple
    return values


def preference_loss(
    policy_chosen_logps: Tensor,  # (B,)
    policy_rejected_logps: Tensor,  # (B,)
    reference_chosen_logps: Tensor,  # (B,)
    reference_rejected_logps: Tensor,  # (B,)
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> PreferenceLoss:
    """DPO, cDPO with `label_smoothing`, or IPO: one loss a pair, and the rewards β·(policy − reference).

    `reference_free` leaves the reference out of the losses, but, as in the original, not out of the rewards.
    `label_smoothing` under `ipo`, which has no use for it, is an error (the original does not look at it).
    """
    check_bool("ipo", ipo)
    check_bool("reference_free", reference_free)
    smoothing = check_number("label_smoothing", label_smoothing, minimum=0.0, maximum=0.5, open_maximum=True)
    if ipo and smoothing:
        raise ValueError(f"ipo=True has no label_smoothing, got {label_smoothing!r}: leave it at 0, or use ipo=False")
    loss = "ipo" if ipo else "cdpo" if smoothing else "sigmoid"
    options: dict[str, Any] = {"label_smoothing": smoothing} if loss == "cdpo" else {}
    policy = policy_chosen_logps, policy_rejected_logps
    reference = [
        check_tensor("reference_chosen_logps", reference_chosen_logps, floating=True),
        check_tensor("reference_rejected_logps", reference_rejected_logps, floating=True),
    ]
    out = losses.preference_loss(*policy, *reference, loss=loss, beta=beta, **options)
    if reference_free:
        nothing = [torch.zeros_like(logps) for logps in reference]
        free = losses.preference_loss(*policy, *nothing, loss=loss, beta=beta, **options)
        out = out._replace(losses=free.losses)
    return PreferenceLoss(out.losses, out.chosen_rewards, out.rejected_rewards)
