"""Log-probs of labels that stand beside their logits already: what the functions of several trainers come down to."""

from __future__ import annotations

from torch import Tensor

from fastpref.logps import token_logps


def aligned_logps(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:  # (...) float32, 0 where the label is −100
    """`token_logps` without shift, for any number of leading dimensions; logits are copied only where a view cannot."""
    if logits.dim() > 3 and labels.dim() == logits.dim() - 1:
        return aligned_logps(
            logits.flatten(0, -3), labels.flatten(0, -2), temperature=temperature, inplace_backward=inplace_backward
        ).view(labels.shape)
    return token_logps(logits, labels, shift=False, temperature=temperature, inplace_backward=inplace_backward)
