"""TRL: its log-softmax of one entry, and the function behind the fused head of its trainers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..cases import LinearCase
from .base import Provider
from .ours import dpo_of_logps
from .torch_own import dpo_of_rows


def _selective(logits: Tensor, labels: Tensor) -> Tensor:  # (B, T, V), (B, T) -> (B,)
    """Per-token values stay in the dtype in which TRL returns them, and so does their sum, as in its CPOTrainer."""
    from trl.trainer.utils import selective_log_softmax

    targets = labels[:, 1:]
    scored = targets != -100
    return selective_log_softmax(logits[:, :-1], targets.where(scored, 0), row_mask=scored).sum(-1)


def _linear_selective(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    return dpo_of_logps(_selective(functional.linear(hidden, weight), labels), ref_logps)


# Entries of the vocabulary that TRL's trainers take at a time.
CHUNK = 32768


def _chunked(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, case: LinearCase) -> Tensor:
    """Scored rows alone, as TRL does where it has Triton; elsewhere TRL takes all rows, which is slower."""
    from trl.kernels import ChunkedLogProbFunction

    def losses(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        temperature, softcap, scale, outputs = 1.0, None, 1.0, ("log_probs",)
        return -ChunkedLogProbFunction.apply(rows, head, None, targets, temperature, CHUNK, softcap, scale, outputs)[0]

    return dpo_of_rows(losses, hidden, weight, labels, ref_logps)


_TRL = {"trl": "trl"}

LOGPS = (Provider("trl", _selective, "trl", rival=True, modules=_TRL),)
LINEAR = (
    Provider("trl_selective", _linear_selective, "trl", rival=True, slow=True, modules=_TRL),
    Provider("trl_chunked", _chunked, "trl", rival=True, slow=True, modules=_TRL),
)
