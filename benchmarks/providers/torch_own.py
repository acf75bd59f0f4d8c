"""torch's own functions, at their best: F.cross_entropy and the chunked F.linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cases import LinearCase
from .base import Provider
from .ours import dpo_of_logps


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In the logits' own dtype, shifted as trainers write it: flattening the slice copies the logits."""
    losses = functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="none"
    )
    return -losses.view(labels.shape[0], -1).float().sum(-1)


def logps_without_copy(cross_entropy: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """By a cross-entropy at its best: the labels are shifted in place of the logits, and nothing is copied."""
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view(labels.shape).float().sum(-1)


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase
) -> Tensor:
    return _with_options(hidden, weight, labels, ref_logps, torch.nn.LinearCrossEntropyOptions())


# Rows of a chunk. Of the 510 rows of a pair of 512 tokens, torch's own choice makes 255 chunks.
TUNED_ROWS = 256


def _linear_cross_entropy_tuned(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase
) -> Tensor:
    wide = torch.float32 if hidden.dtype.itemsize == 2 else None
    options = torch.nn.LinearCrossEntropyOptions(
        acc_policy="compact" if hidden.is_cuda else "accurate",
        chunking_method=None,
        batch_chunk_size=TUNED_ROWS,
        acc_dtype=wide,
    )
    return _with_options(hidden, weight, labels, ref_logps, options)


def _with_options(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, options: Any) -> Tensor:
    losses = partial(functional.linear_cross_entropy, reduction="none", options=options)
    return dpo_of_rows(losses, hidden, weight, labels, ref_logps)


def dpo_of_rows(
    losses_of: Callable[[Tensor, Tensor, Tensor], Tensor],  # rows (N, H), weight (V, H), targets (N,) -> (N,)
    hidden: Tensor,  # (B, T, H)
    weight: Tensor,
    labels: Tensor,  # (B, T)
    ref_logps: Tensor,  # (B,)
) -> Tensor:
    """The DPO loss by a linear cross-entropy of the scored rows, whose values are summed in float32."""
    scored = labels[:, 1:] != -100
    losses = losses_of(hidden[:, :-1][scored], weight, labels[:, 1:][scored])
    sums = losses.new_zeros(scored.shape).masked_scatter(scored, losses).float().sum(-1)
    return dpo_of_logps(-sums, ref_logps)


def _needs_linear_cross_entropy(case: Any) -> str | None:
    # Looked up by name: older versions of torch, which are supported, lack it.
    if hasattr(functional, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"


_torch = partial(Provider, family="torch", rival=True)
_chunked = partial(_torch, slow=True, serves=_needs_linear_cross_entropy)

LOGPS = (
    _torch("cross_entropy", _cross_entropy),
    _torch("cross_entropy_nocopy", partial(logps_without_copy, functional.cross_entropy)),
)
LINEAR = (
    _chunked("linear_cross_entropy_tuned", _linear_cross_entropy_tuned),
    _chunked("linear_cross_entropy", _linear_cross_entropy),
)
