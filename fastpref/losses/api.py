"""preference_loss and its two common cases by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.checks import check_number, check_tensor, describe
from fastpref.losses.fused import fused_margin_loss
from fastpref.losses.registry import KTO, get_loss
from fastpref.losses.spec import LossSpec, PairLogps, ResponseTokens, common_dtype


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
    loss: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    tokens: ResponseTokens | None = None,
    **loss_options: Any,
) -> PreferenceOutput:
    """The preference loss of B pairs, from the log-prob of each response under the policy and the reference.

    The log-probs are `sequence_logps` of the reduction that the loss means: `get_loss(loss).reduction`, "sum"
    for most and "mean" for ipo, sigmoid_norm, simpo, orpo, sft and kl_sft. `LOSSES` lists the losses with
    formula, paper and options; an option that the loss does not take is an error.

    A list of losses, with `loss_weights` (1 each by default), is their weighted sum: `["sigmoid", "sft"]` with
    `[1.0, 0.2]` is DPO and a fifth of the chosen response's cross-entropy per token. β is that of all, and so are the
    options, each of the losses that take it. Where one is of sums and one of means, the log-probs are sums, and
    `tokens` has how many tokens were scored in the chosen and in the rejected responses, (B,) each.

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
    spec = get_loss(loss, loss_weights)
    beta = check_number("beta", beta, minimum=0.0, open_minimum=True)
    options: dict[str, Any] = spec.check_options(loss_options)
    pairs = _check_pairs(spec, PairLogps(policy_chosen, policy_rejected, ref_chosen, ref_rejected))
    options |= _check_tokens(spec, tokens, pairs)
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


class KTOOutput(NamedTuple):
    """What `kto_loss` gives back: float32, or float64 where every log-prob was."""

    loss: Tensor  # (), the mean of losses
    losses: Tensor  # (N,)
    rewards: Tensor  # (N,), β·(policy − reference); detached
    kl: Tensor  # (), the estimate z that was subtracted


def kto_loss(
    policy: Tensor,  # (N,)
    reference: Tensor,  # (N,)
    desirable: Tensor,  # (N,) bool
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOOutput:
    """w·(1 − σ(β·(c − z))) of desirable responses, w·(1 − σ(β·(z − c))) of undesirable ones; c = policy − reference.

    Ethayarajh et al. 2024 (KTO), https://arxiv.org/abs/2402.01306, as TRL computes it. z estimates the KL divergence
    from the reference on responses that do not belong to their prompts: the mean of their log-ratios, at least 0, and a
    constant of the loss.

    Args:
        policy, reference: the sums of each response's log-probs under the two models.
        desirable: the label of each.
        kl: the log-ratios log π(y'|x) − log π_ref(y'|x) of mismatched pairs (x, y'), (M,), of which z is the mean; or
            that mean, where it is taken over several batches or processes.

    Dtypes, units and errors as `preference_loss`.
    """
    beta = check_number("beta", beta, minimum=0.0, open_minimum=True)
    weights: dict[str, Any] = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    weights = KTO.check_options(weights)
    check_tensor("policy", policy, floating=True)
    check_tensor("reference", reference, floating=True)
    if policy.dim() != 1 or not len(policy) or reference.shape != policy.shape or reference.device != policy.device:
        raise ValueError(
            f"policy and reference must be one log-prob a response, shape (N,) with N >= 1 on one device; got "
            f"{describe(policy)} and {describe(reference)}"
        )
    if reference.requires_grad:
        raise ValueError("reference requires a gradient, but it is a constant of the loss: pass reference.detach()")
    label = check_tensor("desirable", desirable)
    if label.dtype != torch.bool or label.shape != policy.shape or label.device != policy.device:
        raise ValueError(
            f"desirable must be one bool a response, like policy {describe(policy)}; got {describe(label)}"
        )
    if isinstance(kl, Tensor):
        if check_tensor("kl", kl, floating=True).numel() == 0:
            raise ValueError(f"kl must hold the log-ratio of at least one mismatched pair, got {describe(kl)}")
    else:
        kl = torch.tensor(check_number("kl", kl), dtype=torch.float64)
    dtype = common_dtype(policy, reference)
    policy, reference = policy.to(dtype), reference.to(dtype)
    z = kl.detach().to(policy.device, dtype).mean().clamp(min=0)
    losses = KTO.formula(policy, reference, label, z, beta, **weights)
    return KTOOutput(losses.mean(), losses, (beta * (policy - reference)).detach(), z)


def coefficients(
    spec: LossSpec,
    policy_chosen: Tensor,  # (B,)
    policy_rejected: Tensor,  # (B,)
    ref_chosen: Tensor | None = None,  # (B,)
    ref_rejected: Tensor | None = None,  # (B,)
    *,
    beta: float = 0.1,
    tokens: ResponseTokens | None = None,
    **loss_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # each (B,), detached
    """The losses and, as numbers, the derivatives of their sum by π_w and π_l, for a fused linear path.

    For a loss that separates by pair (`spec.separable`), entry i of each is the derivative of the loss of
    pair i. They are the numbers that `preference_loss` backpropagates: the same op for the fused losses,
    autograd on B numbers for the rest (which cannot record inside the implementation of a custom op; inside
    `autograd.Function.forward` it can). Arguments and errors as `preference_loss`.
    """
    beta = check_number("beta", beta, minimum=0.0, open_minimum=True)
    options: dict[str, Any] = spec.check_options(loss_options)
    pairs = _check_pairs(spec, PairLogps(policy_chosen, policy_rejected, ref_chosen, ref_rejected))
    options |= _check_tokens(spec, tokens, pairs)
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
    if spec.unpaired:
        raise ValueError(f"loss {spec.name!r} is of single responses, each labelled desirable or not: use kto_loss")
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


def _check_tokens(spec: LossSpec, tokens: ResponseTokens | None, pairs: PairLogps) -> dict[str, ResponseTokens]:
    """The token counts as the formula of a loss that takes them does; the others take none, and pass over them."""
    if not spec.needs_tokens:
        return {}
    if tokens is None:
        raise ValueError(
            f"loss {spec.name!r} is of sums and of means over tokens: pass their sums, and tokens=(chosen, rejected), "
            "the scored tokens of each response"
        )
    if not isinstance(tokens, (tuple, list)) or len(tokens) != 2:
        raise TypeError(f"tokens must be two tensors, of the chosen and the rejected responses, got {describe(tokens)}")
    for name, count in zip(("chosen", "rejected"), tokens, strict=True):
        count = check_tensor(f"tokens of {name}", count)
        if count.shape != pairs.policy_chosen.shape or count.device != pairs.policy_chosen.device:
            raise ValueError(
                f"tokens must have the shape and device of policy_chosen, {describe(pairs.policy_chosen)}; got "
                f"{describe(count)} for the {name} responses"
            )
    return {"tokens": (tokens[0], tokens[1])}
