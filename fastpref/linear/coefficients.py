"""The loss of a fused call: a name or a user's function, its checks, and its derivatives by sequence log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastpref.checks import check_number, check_tensor, describe
from fastpref.linear.tokens import Request
from fastpref.losses import LossSpec, PreferenceOutput, get_loss, kto_loss, preference_loss
from fastpref.ops import sequence_reduce_op

LossFunction = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


@dataclass(frozen=True)
class ChosenLoss:
    """A loss by name or a user's own, called with the log-probs of all sequences."""

    spec: LossSpec | None
    function: LossFunction | None
    beta: float
    options: dict[str, Any]
    grad: bool = False  # whether the caller has gradients on
    weights: Sequence[float] | None = None  # of several losses
    tokens: Tensor | None = None  # (2P,), scored tokens of each sequence, for a loss that needs them

    @property
    def reduction(self) -> str:
        return "sum" if self.spec is None else self.spec.reduction

    @property
    def needs_tokens(self) -> bool:
        return self.spec is not None and self.spec.needs_tokens

    def counting(
        self,
        labels: Tensor,  # (B, T)
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        request: Request,
    ) -> ChosenLoss:
        """This loss, told how many tokens of each sequence are scored: the sum of as many ones."""
        ones = torch.ones(labels.shape, device=labels.device)
        counts, _ = sequence_reduce_op(ones, labels, mask, cu_seqlens, request.shift, request.ignore_index, False)
        return replace(self, tokens=counts)

    def __call__(self, logps: Tensor, ref_logps: Tensor | None) -> PreferenceOutput:
        chosen, rejected = logps.chunk(2)
        ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps.chunk(2)
        if self.spec is not None:
            names = [term.name for term, _ in self.spec.terms] or self.spec.name
            named: dict[str, Any] = {"loss": names, "loss_weights": self.weights, "beta": self.beta, **self.options}
            if self.tokens is not None:
                named["tokens"] = self.tokens.chunk(2)
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


def check_loss(
    loss: str | Sequence[str] | LossFunction, beta: float, options: dict[str, Any], weights: Sequence[float] | None
) -> ChosenLoss:
    beta = check_number("beta", beta, minimum=0.0, open_minimum=True)
    if callable(loss):
        if options:
            raise TypeError(
                f"a callable loss takes no options here, got {', '.join(map(repr, options))}: bind them, for instance "
                "with functools.partial"
            )
        return ChosenLoss(None, loss, beta, {}, grad=torch.is_grad_enabled())
    spec = get_loss(loss, weights)
    if spec.unpaired:
        return ChosenLoss(None, _with_mismatched(beta, options), beta, {}, grad=torch.is_grad_enabled())
    return ChosenLoss(spec, None, beta, spec.check_options(options), weights=weights)


def _with_mismatched(beta: float, options: dict[str, Any]) -> LossFunction:
    """`kto_loss` of P responses, with the KL estimate from the P mismatched ones that follow them."""
    label = options.get("desirable")
    if not isinstance(label, Tensor):
        raise TypeError(f"loss 'kto' needs desirable, (P,) bool, for each response; got {describe(label)}")

    def function(policy: Tensor, mismatched: Tensor, ref: Tensor | None, ref_mismatched: Tensor | None) -> Tensor:
        if ref is None or ref_mismatched is None:
            raise ValueError("loss 'kto' needs the reference's log-probs, but ref_logps is None")
        return kto_loss(policy, ref, kl=mismatched - ref_mismatched, beta=beta, **options).losses

    return function


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
