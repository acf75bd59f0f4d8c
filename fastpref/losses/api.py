"""preference_loss and its two common cases by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.checks import check_number, check_tensor, describe
from fastpref.losses.fused import fused_margin_loss
from fastpref.losses.registry import get_loss
from fastpref.losses.spec import LossSpec, PairLogps, common_dtype


class PreferenceOutput(NamedTuple):
    """What a preference loss gives back: float32, or float64 where every input was."""

    loss: Tensor  # (), the mean of losses
    losses: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,), β·(policy − reference), or β·policy for a loss without reference; detached
    rejected_rewards: Tensor  # (B,), the same
    penalty: Tensor | None = None  # (B,), what the loss adds (dpop: λ·max(0, ref_w − π_w); kl_sft: its drift); detached


def preference_loss(
    policy_chosen: Tensor,  # (B,)
    policy_rejected: Tensor,  # (B,)
    ref_chosen: Tensor | None = None,  # (B,)
    ref_rejected: Tensor | None = None,  # (B,)
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    **loss_options: Any,
) -> PreferenceOutput:
    """The preference loss of B pairs, from the log-prob of each response under the policy and the reference.

    The log-probs are `sequence_logps` of the reduction that the loss means: `get_loss(loss).reduction`, "sum"
    for most and "mean" for ipo, sigmoid_norm, simpo, orpo, sft and kl_sft. `LOSSES` lists the losses with
    formula, paper and options; an option that the loss does not take is an error.

    Any float dtype; computed and returned in float32, or in float64 where every input is float64. The
    references are constants: they may come precomputed, must not require a gradient, and must be None for a
    loss without reference. `margin_clip`, for the losses that take it, bounds the argument of the sigmoid to
    ±margin_clip, and the gradient of a pair outside the bounds is zero.

    A NaN among the log-probs that a pair's loss reads makes that loss NaN (aot sorts, and reads the whole
    batch's), and no other. A log-prob of −inf gives the limit where there is one:
    for the sigmoid loss, infinite with finite gradient for the chosen response, 0 for the rejected one, NaN
    for both at once.

    Raises ValueError for shapes, devices, values, an unknown loss and a reference missing or not wanted;
    TypeError for types and for an unknown option. The fused losses raise on double backward (RuntimeError)
    and in forward mode (NotImplementedError).
    """
    spec = get_loss(loss)
    beta = check_number("beta", beta, minimum=0.0, open_minimum=True)
    options = spec.check_options(loss_options)
    pairs = _check_pairs(spec, PairLogps(policy_chosen, policy_rejected, ref_chosen, ref_rejected))
    if spec.margin is not None:
        fused = fused_margin_loss(pairs, spec.margin(beta, **options), beta)
        losses, chosen, rejected = fused.losses, fused.chosen_rewards, fused.rejected_rewards
        penalty = None if spec.penalty is None else fused.penalty.detach()
    else:
        losses = spec.formula(pairs, beta, **options)
        chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
        penalty = None if spec.penalty is None else spec.penalty(pairs, **options).detach()
    return PreferenceOutput(losses.mean(), losses, chosen.detach(), rejected.detach(), penalty)


def dpo_loss(
    policy_chosen: Tensor,  # (B,)
    policy_rejected: Tensor,  # (B,)
    ref_chosen: Tensor,  # (B,)
    ref_rejected: Tensor,  # (B,)
    *,
    beta: float = 0.1,
    margin_clip: float | None = None,
) -> PreferenceOutput:
    """−log σ(β·((π_w − ref_w) − (π_l − ref_l))).

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7. `preference_loss` with loss="sigmoid"; see
    there for units, dtypes and errors.
    """
    return preference_loss(
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        loss="sigmoid",
        beta=beta,
        margin_clip=margin_clip,
    )


def dpop_loss(
    policy_chosen: Tensor,  # (B,)
    policy_rejected: Tensor,  # (B,)
    ref_chosen: Tensor,  # (B,)
    ref_rejected: Tensor,  # (B,)
    *,
    beta: float = 0.1,
    lam: float = 50.0,
    margin_clip: float | None = None,
) -> PreferenceOutput:
    """−log σ(β·((π_w − ref_w) − (π_l − ref_l) − λ·max(0, ref_w − π_w))), λ = `lam`; λ = 0 is DPO exactly.

    Pal et al. 2024, https://arxiv.org/abs/2402.13228. `penalty` is λ·max(0, ref_w − π_w).
    `preference_loss` with loss="dpop"; see there for units, dtypes and errors.
    """
    return preference_loss(
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        loss="dpop",
        beta=beta,
        lam=lam,
        margin_clip=margin_clip,
    )


def coefficients(
    spec: LossSpec,
    policy_chosen: Tensor,  # (B,)
    policy_rejected: Tensor,  # (B,)
    ref_chosen: Tensor | None = None,  # (B,)
    ref_rejected: Tensor | None = None,  # (B,)
    *,
    beta: float = 0.1,
    **loss_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # each (B,), detached
    """The losses and, as numbers, the derivatives of their sum by π_w and π_l, for a fused linear path.

    For a loss that separates by pair (`spec.separable`), entry i of each is the derivative of the loss of
    pair i. They are the numbers that `preference_loss` backpropagates: the same op for the fused losses,
    autograd on B numbers for the rest (which cannot record inside the implementation of a custom op; inside
    `autograd.Function.forward` it can). Arguments and errors as `preference_loss`.
    """
    beta = check_number("beta", beta, minimum=0.0, open_minimum=True)
    options = spec.check_options(loss_options)
    pairs = _check_pairs(spec, PairLogps(policy_chosen, policy_rejected, ref_chosen, ref_rejected))
    if spec.margin is not None:
        with torch.no_grad():
            fused = fused_margin_loss(pairs, spec.margin(beta, **options), beta)
        return fused.losses, fused.d_chosen, fused.d_rejected
    with torch.enable_grad():
        chosen = pairs.policy_chosen.detach().requires_grad_()
        rejected = pairs.policy_rejected.detach().requires_grad_()
        losses = spec.formula(pairs._replace(policy_chosen=chosen, policy_rejected=rejected), beta, **options)
        d_chosen, d_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected), materialize_grads=True)
    return losses.detach(), d_chosen, d_rejected


def _check_pairs(spec: LossSpec, pairs: PairLogps) -> PairLogps:
    """The log-probs checked and in one dtype."""
    first = check_tensor("policy_chosen", pairs.policy_chosen, floating=True)
    if first.dim() != 1 or first.numel() == 0:
        raise ValueError(
            f"policy_chosen must be one log-prob a pair, shape (B,) with B >= 1, got {describe(first)}; "
            "reduce log-probs of tokens by sequence_logps first"
        )
    for name, value in zip(pairs._fields[1:], pairs[1:], strict=True):
        reference = name.startswith("ref_")
        if reference and not spec.needs_reference:
            if value is not None:
                raise ValueError(f"loss {spec.name!r} has no reference: {name} must be None, got {describe(value)}")
            continue
        if value is None and reference:
            raise ValueError(
                f"loss {spec.name!r} needs the reference's log-probs, but {name} is None: compute them "
                "with the reference model under torch.no_grad()"
            )
        value = check_tensor(name, value, floating=True)
        if value.shape != first.shape or value.device != first.device:
            raise ValueError(
                f"{name} must have the shape and device of policy_chosen, {describe(first)}; got {describe(value)}"
            )
        if reference and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, but the reference is a constant of the loss: pass {name}.detach()"
            )
    dtype = common_dtype(*pairs)
    return PairLogps(*(None if t is None else t.to(dtype) for t in pairs))  # type: ignore[arg-type]
