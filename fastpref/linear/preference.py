"""linear_preference_loss: from hidden states to the loss and its gradients, the head's included, in one call.

The reference is known, so the coefficients of a pair's log-probs are known as soon as these are: gradients are formed
in the forward, while tiles are at hand, and the backward hands them over. Losses of one argument can also stream
(streaming.py). The mathematics of a loss stands in fastpref.losses alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastpref.checks import check_choice, parse_budget
from fastpref.inputs import as_batch, check_batch, check_options, check_reduction_input, refuse_forward_mode
from fastpref.linear.api import check_head, linear_sequence_logps
from fastpref.linear.coefficients import ChosenLoss, LossFunction, attached, check_loss, check_pairs, coefficients
from fastpref.linear.entropy import Upstream
from fastpref.linear.operands import Kept
from fastpref.linear.plan import plan_preference
from fastpref.linear.products import precision
from fastpref.linear.shards import Call, agreed, bits_checksum, local_part, refuse_compiled, text_checksum
from fastpref.linear.streaming import stream
from fastpref.linear.sweeps import fold_sweep
from fastpref.linear.tokens import Once, Request, gradients, head_of, inputs_of, problem_of, rows_of, zero_gradient
from fastpref.ops import sequence_reduce_op
from fastpref.parallel.groups import checksum
from fastpref.tiled import Transform

# Gradients of float16 tensors wait for the backward as float32: a loss scale must meet them before they are rounded.
_HALF = torch.float32


class LinearPreferenceOutput(NamedTuple):
    """What `preference_loss` gives back, and the log-probs. Only `loss` has a gradient.

    A backward through `losses` raises. The rest is detached: metrics. A loss with further terms is a callable.
    """

    loss: Tensor  # (), the mean of losses
    losses: Tensor  # (P,), or () for a callable that returns a scalar
    chosen_rewards: Tensor  # (P,), β·(policy − reference)
    rejected_rewards: Tensor  # (P,)
    penalty: Tensor | None  # (P,), what the loss adds
    chosen_logps: Tensor  # (P,)
    rejected_logps: Tensor  # (P,)


def linear_preference_loss(
    hidden: Tensor,  # (2P, T, H), or (N_total, H) packed
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (2P, T), or (N_total,) packed
    ref_logps: Tensor | None = None,  # (2P,)
    *,
    loss: str | Sequence[str] | LossFunction = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    bias: Tensor | None = None,  # (V,)
    memory_budget: int | str | None = None,
    reduction: str | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_group: Any = None,
    **loss_options: Any,
) -> LinearPreferenceOutput:
    """The preference loss of P pairs straight from hidden states: `preference_loss` of `linear_sequence_logps`.

    The first P sequences are the chosen responses, the last P the rejected ones. The gradients of hidden states, head
    and bias are formed in the forward: three products of 2·N·H·V operations where the tiles fit the budget, and for
    a loss of one argument (sigmoid, cdpo, robust, hinge, ipo, dpop, sigmoid_norm) at any length, where the budget holds
    a float32 copy of the head (two for more than one pair); else up to four. A frozen head takes two.

    Warning: shift
        `shift=True` (the default) takes labels as a causal LM gets them; see `fastpref.token_logps`.

    Args:
        hidden, weight, labels, bias, memory_budget and the rest: as `linear_sequence_logps`.
        ref_logps: (2P,), the reference's sequence log-probs under the same reduction; None for a loss without one.
        loss: a loss by name (`fastpref.LOSSES`), with its options as keywords; or a callable
            `loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected)` on (P,) tensors that returns (P,) losses or
            a scalar, differentiable by autograd. It sees the log-probs of all pairs at once, and any further term that
            is to have a gradient belongs into it. A list of names, with `loss_weights`, as `preference_loss` takes it.
            For "kto" the first P sequences are responses, labelled by the option `desirable`, (P,) bool, and the last P
            mismatched ones for its KL estimate: see `kto_loss`.
        reduction: "sum" or "mean" over scored tokens; by default what the loss's paper means, "sum" for a callable.
        vocab_group: as `linear_token_logps`: this rank has a part of the head. ref_logps and loss are the same on all
            ranks; no streaming.

    Returns:
        LinearPreferenceOutput. Only `loss` can be differentiated, once: the backward hands the gradients over, scaled
        by what arrives; those of float16 tensors are float32 until then, beyond the budget, so that a loss scale
        works. A backward through `losses` raises instead of dropping gradients.

    Raises:
        ValueError, TypeError: as `linear_sequence_logps` and `preference_loss`; ValueError for an odd number of
            sequences.
    """
    chosen_loss: Any = None

    def check() -> Call:
        nonlocal chosen_loss, reduction
        chosen_loss = check_loss(loss, beta, loss_options, loss_weights)
        chosen = chosen_loss.reduction if reduction is None else reduction
        reduction = check_choice("reduction", chosen, ("sum", "mean"))
        if chosen_loss.needs_tokens and reduction != "sum":
            raise ValueError(f"loss {chosen_loss.spec.name!r} takes sums: leave out reduction={reduction!r}")
        options = check_options(temperature, logit_scale, softcap, ignore_index, shift)
        check_batch("hidden states", "H", hidden, labels, mask, cu_seqlens, shift)
        part, bias_part = local_part("weight", weight, vocab_group), local_part("bias", bias, vocab_group)
        operand = check_head(hidden, part, bias_part, part=vocab_group is not None)
        refuse_forward_mode(part, bias_part)
        check_reduction_input("hidden states", hidden, cu_seqlens)
        check_pairs(hidden, cu_seqlens, ref_logps, chosen_loss.spec)
        request = Request(int(shift), ignore_index, Transform(*options), operand, parse_budget(memory_budget))
        rows, row_labels, row_mask = as_batch(hidden, labels, mask, cu_seqlens, shift)
        return Call(rows, part, bias_part, row_labels, row_mask, request)

    def also() -> dict[str, int]:
        named = chosen_loss.spec.name if chosen_loss.spec is not None else "a callable"
        return {
            "loss, beta, its options and reduction (checksum)": text_checksum(
                (named, loss_weights, beta, loss_options, reduction)
            ),
            "ref_logps (checksum)": bits_checksum(ref_logps),
            "cu_seqlens (checksum)": checksum(cu_seqlens),
        }

    call = agreed("linear_preference_loss", vocab_group, check, also)
    if torch.compiler.is_compiling():
        refuse_compiled(call.request.shards)
        logps = cast(Tensor, linear_sequence_logps(
            hidden, weight, labels, bias=bias, memory_budget=memory_budget, reduction=cast(str, reduction),
            cu_seqlens=cu_seqlens, mask=mask, shift=shift, ignore_index=ignore_index, temperature=temperature,
            logit_scale=logit_scale, softcap=softcap,
        ))  # fmt: skip
        if chosen_loss.needs_tokens:
            chosen_loss = chosen_loss.counting(call.labels, call.mask, cu_seqlens, call.request)
        out = chosen_loss(logps, ref_logps)
        return LinearPreferenceOutput(*out, *logps.detach().chunk(2))
    found = _LinearPreference.apply(
        *inputs_of(call.hidden, call.weight, call.bias), call.labels, call.mask, cu_seqlens, ref_logps, call.request,
        chosen_loss, reduction,
    )  # fmt: skip
    return LinearPreferenceOutput(*found)


class _LinearPreference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (B, T, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,
        labels: Tensor,  # (B, T)
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        ref_logps: Tensor | None,  # (2P,)
        request: Request,
        loss: ChosenLoss,
        reduction: str,
    ) -> tuple[Tensor | None, ...]:
        dh, dw, db = want = ctx.needs_input_grad[:3]
        rows = rows_of(labels, mask, weight, request, cu_seqlens)
        pairs = len(rows.counts) // 2
        # A part of the head cannot stream: its ranks would communicate at every block.
        margin = loss.spec.margin if loss.spec is not None and request.shards is None else None
        largest = max((a + b for a, b in zip(rows.counts[:pairs], rows.counts[pairs:], strict=True)), default=0)
        problem = problem_of(
            hidden, weight, rows, request, dh=dh, dw=dw or db,
            largest_pair=largest if margin is not None else 0, pairs=pairs,
        )  # fmt: skip
        head = head_of(weight, bias, request)
        plan = plan_preference(problem, head.machine, request.budget, force=request.plan)
        if request.on_plan is not None:
            request.on_plan(plan)
        mean = reduction == "mean"
        if loss.needs_tokens:
            loss = loss.counting(labels, mask, cu_seqlens, request)
        with torch.autocast(hidden.device.type, enabled=False), precision(request.operand, hidden.device):
            if plan.name == "stream":
                assert margin is not None
                form = margin(loss.beta, **loss.options)
                logps, found = stream(
                    hidden, rows, head, plan, form, lambda some, ref: coefficients(loss, some, ref)[1], ref_logps,
                    mean=mean, want=want, half=_HALF,
                )  # fmt: skip
                output = loss(logps, ref_logps)
            else:
                kept = Kept.empty(len(rows), head, plan) if any(want) else None
                unscaled = None
                if plan.dh_in_forward:
                    unscaled = torch.empty(len(rows), hidden.shape[-1], dtype=head.wide, device=hidden.device)
                done, target = fold_sweep(hidden, rows, head, plan, kept=kept, dh=unscaled)
                tokens = rows.spread_out(done.logps, labels)
                logps, _ = sequence_reduce_op(
                    tokens, labels, mask, cu_seqlens, request.shift, request.ignore_index, mean
                )
                found = (None, None, None)
                if any(want):
                    output, slopes = coefficients(loss, logps, ref_logps)
                    upstream = rows.spread(slopes, mean=mean).to(head.wide)
                    if unscaled is not None:
                        dh_full = rows.scatter(unscaled.mul_(upstream.unsqueeze(1)), zero_gradient(hidden, _HALF))
                        found = (dh_full, None, None)
                    else:
                        found = gradients(
                            hidden, rows, head, plan, done, target, Upstream(upstream), kept=kept, want=want, half=_HALF
                        )
                elif loss.grad:
                    output, _ = attached(loss, logps, ref_logps)
                else:
                    output = loss(logps, ref_logps)
        ctx.gradients, ctx.dtypes = found, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(hidden, weight, bias)  # for create_graph alone
        ctx.set_materialize_grads(False)
        metrics = [output.chosen_rewards, output.rejected_rewards, output.penalty, *logps.chunk(2)]
        metrics = [x if x is None else x.detach().clone() for x in metrics]
        ctx.mark_non_differentiable(*(x for x in metrics if x is not None))
        return output.loss.detach(), output.losses.detach().clone(), *metrics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_losses is not None:
            raise RuntimeError(
                "a backward through `losses` of linear_preference_loss: the gradients of `loss` are all it has. "
                "Differentiate `loss`, or pass what you make of the losses as a callable, loss=function"
            )
        if grad is None:
            return (None,) * 10
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward through linear_preference_loss: the first one has handed its gradients over; call "
                "the function again, or use linear_sequence_logps with preference_loss"
            )
        found, ctx.gradients = ctx.gradients, None
        # On a GPU to look at the value would be to wait for it.
        if grad.device.type != "cpu" or grad.item() != 1.0:
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(grad.detach())
        found = tuple(x if x is None else x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))
        inputs = ctx.saved_tensors if torch.is_grad_enabled() else ()
        return (*Once.mark(found, (grad, *inputs)), *[None] * 7)
