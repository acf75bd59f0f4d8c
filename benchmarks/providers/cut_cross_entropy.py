"""Cut cross-entropy: its Triton kernels, with and without their gradient filter, and its version for other devices."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..cases import LinearCase
from .base import Provider
from .ours import dpo_of_logps


def _dpo(
    hidden: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, T)
    ref_logps: Tensor,  # (B,)
    case: LinearCase,
    *,
    impl: str,
    filter_eps: str | None = "high",
) -> Tensor:
    """`shift=True`, as its documentation advises: the hidden states are not copied to be shifted."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(
        hidden, weight, labels, reduction="none", shift=True, filter_eps=filter_eps, impl=impl
    )
    return dpo_of_logps(-losses.sum(-1), ref_logps)


def _sixteen_bit(case: LinearCase) -> str | None:
    return f"its backward takes bf16 or fp16 hidden states, not {case.dtype}" if case.dtype == "fp32" else None


_cce = partial(Provider, family="cut-cross-entropy", rival=True, modules={"cut_cross_entropy": "cut-cross-entropy"})
_kernels = partial(_cce, gpu_only=True, serves=_sixteen_bit)

LINEAR = (
    _kernels("cut_cross_entropy", partial(_dpo, impl="cce")),
    _kernels("cut_cross_entropy_exact", partial(_dpo, impl="cce", filter_eps=None)),
    _cce("cut_cross_entropy_compile", partial(_dpo, impl="torch_compile"), slow=True, compiles=True),
)
