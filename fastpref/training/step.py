"""One batch through the model: log-probs, loss, gradient. Training, evaluation, reference and trials all come here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastpref.logps import sequence_logps, token_logps
from fastpref.losses import KTOOutput, LossSpec, PreferenceOutput, kto_loss, preference_loss
from fastpref.models import model_logps
from fastpref.ops import sequence_reduce_op
from fastpref.training.config import TrainConfig
from fastpref.training.data.collate import IGNORE, Batch, Part
from fastpref.training.data.tokens import Pair
from fastpref.training.distributed.processes import backward, micro_batch
from fastpref.training.memory.offload import offloading
from fastpref.training.precision import autocasts
from fastpref.training.run import Run


class Scored(NamedTuple):
    """Pairs as a batch, their log-probs under the policy, and the run's loss of them."""

    batch: Batch
    policy: tuple[Tensor, ...]  # (P,) float32: of chosen and rejected responses, or of the responses of unpaired data
    output: PreferenceOutput | KTOOutput


def add_gradient(
    run: Run, model: Any, pairs: Sequence[Pair], *, scale: float, last: bool = True, kl: Tensor | None = None
) -> Scored:
    """Forward and backward of a micro-batch: the gradient of `scale` times the sum of its losses is added up.

    Args:
        model: as the loop runs it, wrapped.
        last: whether it is a step's last one, with which the processes add their gradients.
        kl: of unpaired data, what `kl_estimate` gave for the step.
    """
    with micro_batch(run.accelerator, model, last=last):
        scored = score(run, model, pairs, kl=kl)
        backward(run.accelerator, model, scored.output.losses.sum() * scale)
    return scored


def score(run: Run, model: Any, pairs: Sequence[Pair], *, kl: Tensor | None = None) -> Scored:
    """The pairs under `model`, which is the run's as it is or wrapped; with gradients where these are on."""
    batch, policy = log_probs(run, model, pairs, run.part)
    output: PreferenceOutput | KTOOutput
    if kl is not None:
        options: Any = {"beta": run.config.beta, **run.config.options_of_loss}
        reference, label = cast(Tensor, batch.ref_chosen), cast(Tensor, batch.desirable)
        output = kto_loss(policy[0], reference, label, kl=kl, **options)
    else:
        chosen, rejected = policy
        references = reference_logps(batch, run.spec)
        tokens = batch.scored_tokens if run.spec.needs_tokens else None
        output = preference_loss(chosen, rejected, *references, tokens=tokens, **run.config.loss_arguments)
    return Scored(batch, policy, output)


def kl_estimate(run: Run, batches: Iterable[tuple[Sequence[Pair], bool]]) -> Tensor | None:
    """How far the policy is from the reference on mismatched responses, over all batches and processes; at least 0.

    None where the loss is of pairs. A step's one number for all of its micro-batches: how they are cut changes nothing.

    Args:
        batches: this process's pairs, as many batches on each process, and whether they count.
    """
    if not run.spec.unpaired:
        return None
    total = torch.zeros(2, dtype=torch.float32, device=run.accelerator.device)  # log-ratios, and how many
    with torch.no_grad():
        for pairs, counts in batches:
            batch, (policy,) = log_probs(run, run.model, pairs, "rejected")
            if counts:
                ratios = policy - cast(Tensor, batch.ref_rejected)
                total += torch.stack([ratios.sum(), torch.ones_like(ratios).sum()])
    summed, count = run.accelerator.reduce(total, "sum")
    return (summed / count).clamp(min=0)


def log_probs(
    run: Run, model: Any, pairs: Sequence[Pair], part: Part = "both"
) -> tuple[Batch, tuple[Tensor, ...]]:  # each (P,)
    """The pairs as a batch, and the log-probs that the run's loss takes, of chosen and rejected or of one of them."""
    batch = run.collate(pairs, part)
    with offloading(run.config, run.model, run.accelerator.device):
        return batch, batch_logps(model, batch, run.config, reduction=run.spec.reduction)


def batch_logps(model: Any, batch: Batch, config: TrainConfig, *, reduction: str) -> tuple[Tensor, ...]:
    """Log-probs of the chosen and of the rejected responses, each (P,) float32; or of those that the batch holds.

    From hidden states without logits, or with logps=logits from these. Autocast is entered here and not by Accelerate,
    which would convert logits to float32 afterwards: a second (2P, T, V) tensor of twice the size, for numbers that
    `sequence_logps` computes in float32 anyway.
    """
    device = batch.inputs["input_ids"].device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts(config, device)):
        if config.logps == "linear":
            inputs = batch.inputs if batch.labels is None else {**batch.inputs, "labels": batch.labels}
            options: dict[str, Any] = {"reduction": reduction, "memory_budget": config.memory_budget}
            found = model_logps(model, inputs, scored=batch.scored, **options)
        else:
            logits = model(**batch.inputs, use_cache=False).logits
            virtual = logits.shape[1] - batch.inputs["input_ids"].shape[1]  # of prompt and p-tuning, before the rest
            logits = logits[:, virtual:] if virtual else logits
            found = _of_logits(logits, batch, reduction)
    logps = cast(Tensor, found)  # neither was asked for a second value
    return logps.chunk(2) if batch.part == "both" else (logps,)


def _of_logits(logits: Tensor, batch: Batch, reduction: str) -> Tensor | tuple[Tensor, Tensor]:
    if batch.scored is None:
        return sequence_logps(logits, cast(Tensor, batch.labels), reduction=reduction)
    # Where they lie: of (T, V) logits no row is copied. What two sequences share is scored once, and counts for both.
    source, labels, cu_seqlens = batch.scored
    aligned = torch.full(logits.shape[:2], IGNORE, device=logits.device)
    aligned.view(-1)[source] = labels
    tokens = token_logps(logits, aligned, shift=False).view(-1).index_select(0, source)
    values, _ = sequence_reduce_op(tokens[None], labels[None], None, cu_seqlens, 0, IGNORE, reduction == "mean")
    return values


def reference_logps(batch: Batch, spec: LossSpec) -> tuple[Tensor | None, Tensor | None]:
    """The reference as `preference_loss` takes it: the batch's columns, or None for a loss without one."""
    return (batch.ref_chosen, batch.ref_rejected) if spec.needs_reference else (None, None)
