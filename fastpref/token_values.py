"""What rows' statistics say of their labels: log-probs and extras, (B, T) tensors whatever the vocabulary is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.parallel.vocab import RowStatistics


class TokenValues(NamedTuple):
    """Each (B, T), where the labels stand, 0 where they are not scored; without an element where not asked for."""

    logps: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor  # bool
    log_sum_sq_probs: Tensor


def sums_for(extras: tuple[str, ...]) -> list[bool]:
    """Which of `RowStatistics`' weighted, squares and sum_z the extras are made of."""
    return [name in extras for name in ("entropy", "log_sum_sq_probs", "mean_logits")]


def token_values(
    rows: RowStatistics,  # each (B, T), where the rows stand
    scored: Tensor,  # (B, T - shift) bool: which rows
    shift: int,
    vocab: int,
) -> TokenValues:
    def at_labels(values: Tensor) -> Tensor:
        out = values.new_zeros(values.shape)
        torch.where(scored, values[:, : scored.shape[1]], values.new_zeros(()), out=out[:, shift:])
        return out

    log_total = rows.total.log()
    entropy, mean_logits, log_sum_sq_probs = (rows.total.new_empty(0) for _ in range(3))  # an operator's: no aliases
    if rows.weighted is not None:
        # Not below 0 by a rounding. (NaN stays NaN.)
        entropy = at_labels((log_total - rows.weighted / rows.total).clamp(min=0.0))
    if rows.sum_z is not None:
        mean_logits = at_labels(rows.sum_z / vocab)
    if rows.squares is not None:
        log_sum_sq_probs = at_labels(rows.squares.log() - 2.0 * log_total)
    return TokenValues(
        # A kernel may round the label's z otherwise than the maximum, and leave it above that. (NaN stays NaN.)
        at_labels(((rows.target - rows.maximum) - log_total).clamp(max=0.0)),
        entropy,
        mean_logits,
        at_labels((rows.target >= rows.maximum) & ~rows.total.isnan()),
        log_sum_sq_probs,
    )


def with_wrong_labels(rows: RowStatistics, wrong: Tensor) -> RowStatistics:
    """NaN, in value and gradient, for rows whose label is outside of the vocabulary: loud without a wait for a GPU."""
    return rows._replace(
        maximum=torch.where(wrong, torch.nan, rows.maximum), target=torch.where(wrong, torch.nan, rows.target)
    )
