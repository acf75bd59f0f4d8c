"""dpop and cdpo among TRL's loss types: its own `_compute_loss` runs, and what they add is added to its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from fastpref.losses import get_loss, preference_loss

OURS = ("dpop", "cdpo")  # which TRL lacks


def loss_options(trainer: Any, name: str) -> dict[str, Any]:
    """What `preference_loss` takes for one of ours, checked: TRL's own options where it has them."""
    lam = getattr(trainer.args, "dpop_lambda", None)  # a plain DPOConfig has none
    options: dict[str, Any] = {} if lam is None else {"lam": lam}
    return get_loss(name).check_options(options if name == "dpop" else {"label_smoothing": trainer.label_smoothing})


def compute_loss(
    trainer: Any, theirs: Callable[..., Any], model: Any, inputs: dict[str, Any], return_outputs: bool
) -> Any:
    """TRL's `_compute_loss` (`theirs`, bound) with the loss types that it knows, and then ours, by their weights."""
    mix = list(zip(trainer.loss_types, trainer.loss_weights, strict=True))
    ours = [(name, weight) for name, weight in mix if name in OURS]
    if not ours:
        return theirs(model, inputs, return_outputs)
    known = [(name, weight) for name, weight in mix if name not in OURS]
    kept = trainer.loss_types, trainer.loss_weights
    # With PEFT the policy is its own reference, with its adapters off.
    reference = trainer.model if trainer.ref_model is None else trainer.ref_model
    trainer.loss_types, trainer.loss_weights = [name for name, _ in known], [weight for _, weight in known]
    try:
        with _watched(model) as of_policy, _watched(reference) as of_reference:
            found = theirs(model, inputs, return_outputs)
    finally:
        trainer.loss_types, trainer.loss_weights = kept
    loss = found[0] if return_outputs else found
    loss = loss + _added(
        trainer, ours, inputs, of_policy[0], None if trainer.precompute_ref_logps else of_reference[-1]
    )
    return (loss, found[1]) if return_outputs else loss


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[FusedCausalLMOutput]]:
    """What a module gives for `fused_lm_head=True`."""
    seen: list[FusedCausalLMOutput] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, FusedCausalLMOutput):
            seen.append(output)

    handle = module.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def _added(
    trainer: Any,
    ours: list[tuple[str, float]],
    inputs: dict[str, Any],
    policy: Any,
    reference: Any,  # None: its log-probs are columns of the batch
) -> Tensor:  # ()
    mask = inputs["completion_mask"][:, 1:]
    width = mask.shape[1]  # prompt learning prepends virtual tokens to the outputs
    tokens = policy.log_probs[:, -width:]
    chosen, rejected = _sequence_logps(tokens, mask, trainer.ld_alpha).chunk(2)
    if reference is None:
        ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    else:
        ref_tokens = reference.log_probs[:, -width:].detach()
        ref_chosen, ref_rejected = _sequence_logps(ref_tokens, mask, trainer.ld_alpha).chunk(2)
    weights = _pair_weights(tokens, policy.log_sum_sq_probs[:, -width:], mask) if trainer.use_weighting else 1.0
    total = tokens.new_zeros(())
    for name, weight in ours:
        found = preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, loss=name, beta=trainer.beta, **loss_options(trainer, name)
        )
        total = total + weight * (found.losses * weights).mean()
        if found.penalty is not None:
            metrics = trainer._metrics["train" if trainer.model.training else "eval"]
            penalty = trainer.accelerator.gather(found.penalty)
            metrics[f"{name}/penalty"].append(penalty.mean().item())
            metrics[f"{name}/active_frac"].append((penalty > 0).float().mean().item())
    return total


def _sequence_logps(tokens: Tensor, mask: Tensor, ld_alpha: float | None) -> Tensor:  # (2P, T − 1) -> (2P,)
    """Sums as TRL makes them; LD-DPO weights by alpha what goes beyond the shorter response of a pair.

    Liu et al. 2024, https://arxiv.org/abs/2409.06411.
    """
    if ld_alpha is None:
        return tokens.sum(1)
    shorter = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    beyond = mask.cumsum(1) > shorter[:, None]
    return torch.where(beyond, ld_alpha * tokens, tokens).sum(1)


def _pair_weights(tokens: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:  # (P,)
    """WPO's, length-normalised and aligned as TRL has them: Zhou et al. 2024, https://arxiv.org/abs/2406.11827."""
    aligned = torch.where(mask.bool(), tokens.detach() - log_sum_sq_probs, 0.0)
    chosen, rejected = (aligned.sum(1) / mask.sum(1).clamp(min=1)).exp().chunk(2)
    return chosen * rejected
