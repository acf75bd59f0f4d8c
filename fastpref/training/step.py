"""One batch through the model: log-probs, loss, gradient. Training, evaluation, reference and trials all come here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastpref.logps import sequence_logps, token_logps
from fastpref.losses import LossSpec, PreferenceOutput, preference_loss
from fastpref.models import model_logps
from fastpref.ops import sequence_reduce_op
from fastpref.training.config import TrainConfig
from fastpref.training.data.collate import IGNORE, Batch
from fastpref.training.data.tokens import Pair
from fastpref.training.distributed.processes import backward, micro_batch
from fastpref.training.memory.offload import offloading
from fastpref.training.precision import autocasts
from fastpref.training.run import Run


class Scored(NamedTuple):
    """Pairs as a batch, their log-probs under the policy, and the run's loss of them."""

    batch: Batch
    chosen: Tensor  # (P,) float32
    rejected: Tensor  # (P,)
    output: PreferenceOutput


def add_gradient(run: Run, model: Any, pairs: Sequence[Pair], *, scale: float, last: bool = True) -> Scored:
    """Forward and backward of a micro-batch: the gradient of `scale` times the sum of its losses is added up.

    Args:
        model: as the loop runs it, wrapped.
        last: whether it is a step's last one, with which the processes add their gradients.
    """
    with micro_batch(run.accelerator, model, last=last):
        scored = score(run, model, pairs)
        backward(run.accelerator, model, scored.output.losses.sum() * scale)
    return scored


def score(run: Run, model: Any, pairs: Sequence[Pair]) -> Scored:
    """The pairs under `model`, which is the run's as it is or wrapped; with gradients where these are on."""
    batch, policy = log_probs(run, model, pairs)
    output = preference_loss(
        *policy, *reference_logps(batch, run.spec), tokens=batch.scored_tokens, **run.config.loss_arguments
    )
    return Scored(batch, *policy, output)


def log_probs(run: Run, model: Any, pairs: Sequence[Pair]) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """The pairs as a batch, and the log-probs that the run's loss takes, of chosen and rejected, each (P,)."""
    batch = run.collate(pairs)
    with offloading(run.config, run.model, run.accelerator.device):
        return batch, batch_logps(model, batch, run.config, reduction=run.spec.reduction)


def batch_logps(model: Any, batch: Batch, config: TrainConfig, *, reduction: str) -> tuple[Tensor, Tensor]:
    """Log-probs of the chosen and of the rejected responses, each (P,) float32.

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
            found = _of_logits(logits, batch, reduction)
    chosen, rejected = cast(Tensor, found).chunk(2)  # neither was asked for a second value
    return chosen, rejected


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
