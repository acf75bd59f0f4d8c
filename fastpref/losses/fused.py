"""The fused path of the losses of one argument: losses, rewards, penalty and both coefficients in one pass.

The forward computes dL/dπ_w and dL/dπ_l along with the values, in closed form, so that the backward is two
multiplications. On a GPU the forward is one small kernel (`kernels/preference.py`), elsewhere
`margin_coefficients`.

The same computation is registered twice: as an autograd function, which eager mode calls, and as a torch
custom op, which torch.compile needs. The custom op's dispatch takes longer than all of the rest on a batch of
pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpref.backend import use_triton
from fastpref.losses.margin import margin_coefficients
from fastpref.losses.spec import MarginForm, PairLogps

_ONCE = (
    "the fused preference losses have a first derivative only, by reverse mode; for {} take the formula, "
    "get_loss(name).formula(PairLogps(...), beta, **options)"
)


class FusedOutput(NamedTuple):
    losses: Tensor  # (B,), the one with a derivative
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    penalty: Tensor  # (B,)
    d_chosen: Tensor  # (B,), dL/dπ_w
    d_rejected: Tensor  # (B,), dL/dπ_l


def _compute(
    policy_chosen: Tensor,  # (B,) float32 or float64, the same for all four
    policy_rejected: Tensor,  # (B,)
    ref_chosen: Tensor,  # (B,)
    ref_rejected: Tensor,  # (B,)
    beta: float,
    form: MarginForm,
) -> tuple[Tensor, ...]:  # the fields of FusedOutput
    # A kernel's scalars are float32; float64, which is there to check the others, stays with torch.
    if policy_chosen.dtype == torch.float32 and use_triton(policy_chosen):
        from fastpref.kernels.preference import launch_margin_loss

        inputs = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
        return launch_margin_loss(*(t.contiguous() for t in inputs), beta=beta, **form._asdict())
    c, r = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    losses, penalty, d_chosen, d_rejected = margin_coefficients(c, r, form)
    return losses, beta * c, beta * r, penalty, d_chosen, d_rejected


class _Product(torch.autograd.Function):
    """The backward's products, as a function of its own whose derivative is an error.

    The coefficients are outputs with a history: to differentiate through a plain product would take their
    derivative for zero and be wrong without a word.
    """

    @staticmethod
    def forward(grad: Tensor, d_chosen: Tensor, d_rejected: Tensor) -> tuple[Tensor, Tensor]:
        return grad * d_chosen, grad * d_rejected

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(_ONCE.format("a double backward"))


def _save_coefficients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[4], output[5])
    ctx.set_materialize_grads(False)


class _MarginLoss(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _compute(*inputs)

    setup_context = staticmethod(_save_coefficients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        raise NotImplementedError(_ONCE.format("torch.func.vmap"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Product.apply(grad, *ctx.saved_tensors), None, None, None, None)


@torch.library.custom_op("fastpref::margin_loss", mutates_args=())
def _margin_loss_op(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    shape: str,
    scale: float,
    lam: float,
    tilt: float,
    target: float,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    form = MarginForm(shape, scale, lam, tilt, target, clip)  # type: ignore[arg-type]
    return _compute(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, form)  # type: ignore[return-value]


@_margin_loss_op.register_fake
def _(policy_chosen: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(policy_chosen, memory_format=torch.contiguous_format) for _ in range(6))


def _op_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*_Product.apply(grad, *ctx.saved_tensors), *[None] * 9)


_margin_loss_op.register_autograd(_op_backward, setup_context=_save_coefficients)


def fused_margin_loss(pairs: PairLogps, form: MarginForm, beta: float) -> FusedOutput:
    """The losses, differentiable once in π_w and π_l, and what comes with them.

    All four log-probs on one device, any strides, all float32 or all float64. NotImplementedError in forward
    mode.
    """
    if torch.compiler.is_compiling():
        return FusedOutput(*_margin_loss_op(*pairs, beta, *form))
    if any(forward_ad.unpack_dual(t).tangent is not None for t in pairs):
        raise NotImplementedError(_ONCE.format("forward-mode differentiation"))
    return FusedOutput(*_MarginLoss.apply(*pairs, beta, form))
