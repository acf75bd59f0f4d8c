"""The loss of a fused call: a name or a user's function, its checks, and its derivatives by sequence log-probs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref.checks import check_number, check_tensor, describe
from fastpref.losses import LossSpec, PreferenceOutput, get_loss, preference_loss

LossFunction = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


@dataclass(frozen=True)
class ChosenLoss:
    """A loss by name or a user's own, called with the log-probs of all sequences."""

    spec: LossSpec | None
    function: LossFunction | None
    beta: float
    options: dict[str, Any]
    grad: bool = False  # whether the caller has gradients on

    @property
    def reduction(self) -> str:
        return "sum" if self.spec is None else self.spec.reduction

    def __call__(self, logps: Tensor, ref_logps: Tensor | None) -> PreferenceOutput:
        chosen, rejected = logps.chunk(2)
        ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps.chunk(2)
        if self.spec is not None:
            named: dict[str, Any] = {"loss": self.spec.name, "beta": self.beta, **self.options}
            return preference_loss(chosen, rejected, ref_chosen, ref_rejected, **named)
        assert self.function is not None
        losses = self.function(chosen, rejected, ref_chosen, ref_rejected)
        floating = isinstance(losses, Tensor) and losses.is_floating_point()
        if not floating or losses.shape not in (chosen.shape, torch.Size()):
            raise ValueError(
                f"a callable loss must return {tuple(chosen.shape)} losses or a scalar tensor, got {describe(losses)}; "
                "a floating-point dtype is needed"
            )
        rewards = [
            self.beta * (policy.detach() if ref is None else policy.detach() - ref)
            for policy, ref in ((chosen, ref_chosen), (rejected, ref_rejected))
        ]
        return PreferenceOutput(losses.mean(), losses, *rewards)


def check_loss(loss: str | LossFunction, beta: float, options: dict[str, Any]) -> ChosenLoss:
    beta = check_number("beta", beta, minimum=0.0, open_minimum=True)
    if callable(loss):
        if options:
            raise TypeError(
                f"a callable loss takes no options here, got {', '.join(map(repr, options))}: bind them, for instance "
                "with functools.partial"
            )
        return ChosenLoss(None, loss, beta, {}, grad=torch.is_grad_enabled())
    spec = get_loss(loss)
    return ChosenLoss(spec, None, beta, spec.check_options(options))


def check_pairs(hidden: Tensor, cu_seqlens: Tensor | None, ref_logps: Tensor | None, spec: LossSpec | None) -> None:
    count = hidden.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if count == 0 or count % 2:
        raise ValueError(
            f"a batch of pairs holds all chosen sequences and then all rejected ones, an even number; got {count}"
        )
    if ref_logps is None:
        if spec is not None and spec.needs_reference:
            raise ValueError(
                f"loss {spec.name!r} needs the reference's log-probs, but ref_logps is None: compute them by "
                "linear_sequence_logps with the reference model, under torch.no_grad()"
            )
        return
    if spec is not None and not spec.needs_reference:
        raise ValueError(f"loss {spec.name!r} has no reference: ref_logps must be None, got {describe(ref_logps)}")
    check_tensor("ref_logps", ref_logps, floating=True)
    if ref_logps.shape != (count,) or ref_logps.device != hidden.device:
        raise ValueError(
            f"ref_logps must be one log-prob a sequence, shape ({count},) on {hidden.device}, chosen first; got "
            f"{describe(ref_logps)}"
        )
    if ref_logps.requires_grad:
        raise ValueError("ref_logps requires a gradient, but the reference is a constant: pass ref_logps.detach()")


def coefficients(
    loss: ChosenLoss,
    logps: Tensor,  # (2P,)
    ref_logps: Tensor | None,
) -> tuple[PreferenceOutput, Tensor]:
    """The loss, and the derivatives (2P,) of its mean by each sequence's log-prob, by autograd on 2P numbers."""
    output, policy = attached(loss, logps, ref_logps)
    if not output.loss.requires_grad:
        raise ValueError("the loss does not depend on the policy's log-probs: a callable must not detach them")
    (slopes,) = torch.autograd.grad(output.loss, policy)
    return output, slopes


def attached(loss: ChosenLoss, logps: Tensor, ref_logps: Tensor | None) -> tuple[PreferenceOutput, Tensor]:
    """The loss with a history that begins at the log-probs (2P,), which are returned too."""
    with torch.enable_grad():
        policy = logps.detach().requires_grad_()
        output = loss(policy, ref_logps)
    _refuse_other_leaves(output.loss, policy)
    return output, policy


def _refuse_other_leaves(loss: Tensor, policy: Tensor) -> None:
    """A parameter that a callable reads would go without its gradient: the derivatives taken are those by log-probs."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", policy)
        if leaf is not policy:
            raise ValueError(
                f"a callable loss may differentiate by the log-probs alone, but it reads {describe(leaf)} that "
                "requires a gradient, which would be cut: detach it, or use linear_sequence_logps and your own loss"
            )
        todo.extend(following for following, _ in node.next_functions)
