"""Liger Kernel: its fused DPO loss, its fused cross-entropies of one value a token, and its Triton cross-entropy."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from ..cases import LinearCase
from .base import BETA, Provider
from .torch_own import dpo_of_rows, logps_without_copy


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:  # (B, T, V), (B, T) -> (B,)
    """The gradient takes the place of the logits in the forward: no caller of it has them back."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return logps_without_copy(liger_cross_entropy, logits, labels)


@cache
def fused_dpo_loss(compiled: bool) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    # It takes a reference model's head and hidden states, never its log-probs. Without one the reference is 0, and
    # that is the same loss here, because the two references of a pair are equal (suites/linear_truth.py).
    return LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled, use_ref_model=False)


def _fused_dpo(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    loss, *_ = fused_dpo_loss(case.compiled)(weight, hidden[:, :-1], labels[:, 1:])
    return cast(Tensor, loss[0] if isinstance(loss, tuple) else loss)


def _scaled(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return dpo_of_rows(LigerFusedLinearScaledCrossEntropyFunction.apply, hidden, weight, labels, ref_logps)


def _fused_ce(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    from liger_kernel.functional import fused_linear_cross_entropy

    def losses(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return fused_linear_cross_entropy(rows, head, targets, reduction="none")[0]

    return dpo_of_rows(losses, hidden, weight, labels, ref_logps)


class _Scaled(Provider):
    """What it needs depends on the device: on Hopper it is a CuTe kernel, elsewhere chunks of torch operations."""

    def why_not(self, case: Any, device: str) -> str | None:
        if reason := super().why_not(case, device):
            return reason
        if not device.startswith("cuda") or torch.cuda.get_device_capability(device) != (9, 0):
            return None
        if importlib.util.find_spec("cutlass") is None:
            return "nvidia-cutlass-dsl is not installed, which it needs on a Hopper GPU"
        return None if case.dtype == "bf16" else f"its kernel for Hopper GPUs takes bf16, not {case.dtype}"


_LIGER = {"liger_kernel": "liger-kernel"}

LOGPS = (Provider("liger", _cross_entropy, "liger", rival=True, modules=_LIGER, gpu_only=True, spoils=True),)
LINEAR = (
    Provider("liger", _fused_dpo, "liger", rival=True, slow=True, compiles=True, modules=_LIGER),
    _Scaled("liger_ce", _scaled, "liger", rival=True, slow=True, modules=_LIGER),
    Provider("liger_fused_ce", _fused_ce, "liger", rival=True, modules=_LIGER, gpu_only=True),
)
