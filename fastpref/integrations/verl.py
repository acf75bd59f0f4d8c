"""verl's log-probs and entropies, from logits and from hidden states, under its names.

    from fastpref.integrations.verl import entropy_from_logits, logprobs_from_logits  # for verl.utils.torch_functional
    from fastpref.integrations.verl import linear_cross_entropy  # for verl.utils.kernel.linear_cross_entropy

The originals: `verl/utils/torch_functional.py`, `verl/utils/kernel/linear_cross_entropy.py` and the `kernels.py` beside
it, of https://github.com/verl-project/verl at 1dda039 (0.10.0.dev, August 2026). Signatures and values are theirs, with
these differences. Results are float32 (without flash-attn theirs have the dtype of the logits). The label −100 is not
scored: its value and entropy are 0 (their gather fails there, their linear kernel gives a number without meaning).
`linear_cross_entropy` runs on a CPU and at any width. Arguments are checked.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.checks import check_choice, check_tensor, describe
from fastpref.integrations.aligned import aligned_logps
from fastpref.linear import linear_token_logps
from fastpref.logps import token_logps
from fastpref.parallel.groups import agree, members


def logprobs_from_logits(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...), beside their logits: nothing is shifted here
    inplace_backward: bool = True,
) -> Tensor:  # (...) float32
    """The log-prob of each label.

    With `inplace_backward`, on by default, the gradient overwrites the logits; verl does so where flash-attn is
    installed. Pass False where anything else reads the logits afterwards, as verl does where it wants the entropy.
    """
    return aligned_logps(logits, labels, inplace_backward=inplace_backward)


def entropy_from_logits(
    logits: Tensor,  # (..., V)
) -> Tensor:  # (...) float32
    """The entropy of each row's distribution, differentiable. A logit of −inf adds nothing (the original makes NaN)."""
    check_tensor("logits", logits, floating=True)
    rows = logits if logits.dim() <= 3 else logits.flatten(0, -3)
    # Which label is scored beside it does not matter.
    anything = torch.zeros(rows.shape[:-1], dtype=torch.int64, device=logits.device)
    _, extras = token_logps(rows, anything, shift=False, extras=("entropy",), entropy_grad=True)
    return extras.entropy.view(logits.shape[:-1])


def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H), or (V_r, H) with a group
    labels: Tensor,  # (...), beside their hidden states
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:  # (N,) or () float32, and (N,) float32; N the number of labels
    """The log-probs and entropies of the logits `hidden @ weight.T / temperature`, which never exist; differentiable.

    It is log-probs that come back, not their negatives; of them `reduction` "sum" or "mean" makes one number, the mean
    over all N labels. Entropies are never reduced, and both are flat whatever the shape of the labels.

    Args:
        dist_process_group: the ranks over which the vocabulary is split in rank order (`vocab_group` elsewhere); labels
            and hidden states are equal on all of them. **As in the original, hidden's gradient is then each rank's
            share, and the caller sums it over the group**: Megatron does where its sequence parallelism gathered the
            hidden states. `fastpref.linear_token_logps(vocab_group=...)` gives the sum itself. Parts may be of
            different sizes here.
    """
    if dist_process_group is None:
        _check(hidden, labels, reduction)
        rows = hidden.flatten(0, -2)  # (N, H)
    else:
        # What is refused on one rank must be known to the others before any of them waits for it.
        among = members("dist_process_group", dist_process_group)
        agree("dist_process_group", "linear_cross_entropy", among, lambda: _check(hidden, labels, reduction))
        rows = _Share.apply(hidden.flatten(0, -2), among.size)
    logps, extras = linear_token_logps(
        rows,
        weight,
        labels.flatten(),
        shift=False,
        temperature=temperature,
        extras=("entropy",),
        entropy_grad=True,
        vocab_group=dist_process_group,
    )
    if reduction.lower() == "none":
        return logps, extras.entropy
    return logps.sum() if reduction.lower() == "sum" else logps.mean(), extras.entropy


def _check(hidden: Tensor, labels: Tensor, reduction: str) -> dict[str, int]:
    """What must be equal on all ranks; ValueError or TypeError. The rest is `linear_token_logps`' to check."""
    check_choice("reduction", reduction.lower() if isinstance(reduction, str) else reduction, _REDUCTIONS)
    check_tensor("hidden", hidden, floating=True)
    check_tensor("labels", labels)
    if hidden.dim() < 2 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden must be (..., H) and labels its shape without H, got {describe(hidden)} and {describe(labels)}"
        )
    return {"reduction": _REDUCTIONS.index(reduction.lower())}


_REDUCTIONS = ("none", "sum", "mean")


class _Share(torch.autograd.Function):
    """Hidden states as they are; of their gradient, which is summed over the group already, each rank's equal share."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None
