"""QuACK: its cross-entropy of logits, behind a plain product, and its chunked linear cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cases import LinearCase
from .base import Provider
from .ours import dpo_of_logps
from .torch_own import dpo_of_rows, logps_without_copy


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:  # (B, T, V), (B, T) -> (B,)
    from quack import cross_entropy

    return logps_without_copy(cross_entropy, logits, labels)


def _linear(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    """What its module LinearCrossEntropy does for one loss a token; the gradient takes the place of the logits."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    def losses(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy_func(rows, head, None, targets, reduction="none", inplace_backward=True)

    return dpo_of_rows(losses, hidden, weight, labels, ref_logps)


def _chunked(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    """It gives sums only, whose gradient is one scalar's: so it is called for each sequence, and that is exact."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    sums = []
    for rows, targets in zip(hidden[:, :-1], labels[:, 1:], strict=True):
        scored = targets != -100
        sums.append(chunked_linear_cross_entropy(rows[scored], weight, targets[scored], reduction="sum"))
    return dpo_of_logps(-torch.stack(sums), ref_logps)


def _gpu_serves(case: Any) -> str | None:
    major, minor = torch.cuda.get_device_capability()
    return None if major in (9, 10, 12) else f"needs a Hopper or Blackwell GPU, and this one is sm_{major}{minor}"


def _chunks_serve(case: LinearCase) -> str | None:
    if reason := _gpu_serves(case):
        return reason
    sizes = {"scored rows": case.scored_per_sequence, "hidden": case.hidden, "vocab": case.vocab}
    odd = [f"{name} {size}" for name, size in sizes.items() if size % 8]
    if odd:
        return f"needs multiples of 8 and has {', '.join(odd)}"
    return "its products take bf16 or fp16, not fp32" if case.dtype == "fp32" else None


_QUACK = {"quack": "quack-kernels"}

LOGPS = (Provider("quack", _cross_entropy, "quack", rival=True, modules=_QUACK, gpu_only=True, serves=_gpu_serves),)
LINEAR = (
    Provider("quack", _linear, "quack", rival=True, modules=_QUACK, gpu_only=True, serves=_gpu_serves),
    Provider("quack_chunked", _chunked, "quack", rival=True, modules=_QUACK, gpu_only=True, serves=_chunks_serve),
)
