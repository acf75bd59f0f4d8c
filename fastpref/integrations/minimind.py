"""minimind's log-probs and DPO losses, under its names.

    from fastpref.integrations.minimind import dpo_loss, logits_to_log_probs  # length-normalised: up to 24 March 2026
    from fastpref.integrations.minimind import logits_to_log_probs, summed_dpo_loss as dpo_loss  # since then

The originals: `trainer/train_dpo.py` of https://github.com/jingyaogong/minimind. Its `dpo_loss` divided each sequence's
log-prob by its length from April 2025 (278ec76) to 24 March 2026 (83e52f6) and sums since minimind-3 (101d7df, 25 March
2026; read at d65ef2c): two losses under one name. **`dpo_loss` here is the length-normalised one.** Look which one your
copy has, for β means another thing in each.

Signatures and values are the originals', except that log-probs are float32 (theirs have the dtype of the logits), that
a NaN where the mask is 0 has no effect, and that arguments are checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.checks import check_tensor, describe
from fastpref.integrations.aligned import aligned_logps
from fastpref.losses import preference_loss


def logits_to_log_probs(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T), beside their logits: minimind's data set has shifted them
) -> Tensor:  # (B, T) float32
    """The log-prob of each label. No shift; 0 for the label −100, at which the original fails."""
    return aligned_logps(logits, labels)


def dpo_loss(
    ref_log_probs: Tensor,  # (2P, T), all chosen, then all rejected
    policy_log_probs: Tensor,  # (2P, T)
    mask: Tensor,  # (2P, T), 1 on the responses' tokens
    beta: float,
) -> Tensor:  # ()
    """DPO on the mean log-prob of each response's tokens: the mean loss of P pairs. No tokens count as 0."""
    reference, policy = _sums(ref_log_probs, policy_log_probs, mask)
    lengths = mask.sum(1).clamp(min=1e-8)
    return _loss(reference / lengths, policy / lengths, beta)


def summed_dpo_loss(
    ref_log_probs: Tensor,  # (2P, T), all chosen, then all rejected
    policy_log_probs: Tensor,  # (2P, T)
    mask: Tensor,  # (2P, T), 1 on the responses' tokens
    beta: float,
) -> Tensor:  # ()
    """DPO on the summed log-prob of each response's tokens: the mean loss of P pairs."""
    return _loss(*_sums(ref_log_probs, policy_log_probs, mask), beta)


def _sums(ref_log_probs: Tensor, policy_log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # (2P,) each
    check_tensor("mask", mask)
    for name, logps in (("ref_log_probs", ref_log_probs), ("policy_log_probs", policy_log_probs)):
        check_tensor(name, logps, floating=True)
        if logps.dim() != 2 or logps.shape != mask.shape:
            raise ValueError(
                f"{name} must be (2P, T) with the shape {tuple(mask.shape)} of mask, got {describe(logps)}; the "
                "log-probs of tokens come from logits_to_log_probs"
            )
    if mask.shape[0] % 2 or mask.shape[0] == 0:
        raise ValueError(f"the rows must be all chosen, then as many rejected, got {mask.shape[0]} of them")
    reference, policy = (
        torch.where(mask != 0, logps.float() * mask, 0.0).sum(1) for logps in (ref_log_probs, policy_log_probs)
    )
    return reference, policy


def _loss(reference: Tensor, policy: Tensor, beta: float) -> Tensor:
    return preference_loss(*policy.chunk(2), *reference.chunk(2), beta=beta).loss
