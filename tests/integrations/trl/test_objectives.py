"""Sums of losses and KTO beside TRL's trainers: the loss and the gradient of a batch that their collators made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import trl

import fastpref

Make = Callable[..., Any]


def sums(model: Any, batch: dict[str, Any], prefix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Each response's log-prob, and how many tokens it has."""
    scored = batch[f"{prefix}completion_mask"].bool()
    labels = batch[f"{prefix}input_ids"].masked_fill(~scored, -100)
    inputs = {"input_ids": batch[f"{prefix}input_ids"], "attention_mask": batch[f"{prefix}attention_mask"]}
    return fastpref.sequence_logps(model(**inputs).logits, labels), scored[:, 1:].sum(1)


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize(("loss", "weights"), [(["sigmoid", "sft"], [1.0, 0.2]), (["sigmoid", "bco_pair"], [0.8, 0.2])])
def test_a_sum_of_losses_is_trls_where_the_chosen_responses_are_of_one_length(
    loss: list[str], weights: list[float], make_trainer: Make
) -> None:
    """TRL's sft is the mean over all chosen tokens of a batch, ours over each response's, then over the pairs."""
    trainer = make_trainer(trl.DPOTrainer, loss_type=loss, loss_weights=weights)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 4, 8, 12)])
    theirs = trainer.compute_loss(trainer.model, batch)
    logps, tokens = sums(trainer.model, batch)
    with torch.no_grad():
        reference, _ = sums(trainer.ref_model, batch)
    ours = fastpref.preference_loss(
        *logps.chunk(2), *reference.chunk(2), loss=loss, loss_weights=weights, beta=0.3, tokens=tokens.chunk(2)
    ).loss  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(trainer.model, ours), gradient(trainer.model, theirs), rtol=1e-4, atol=1e-5)


def test_kto_is_trls(make_trainer: Make, rows: list[dict[str, str]]) -> None:
    unpaired = [
        {"prompt": row["prompt"], "completion": row[("rejected", "chosen")[i % 2]], "label": bool(i % 2)}
        for i, row in enumerate(rows)
    ]
    trainer = make_trainer(trl.KTOTrainer, config=trl.KTOConfig, undesirable_weight=1.5, data=unpaired)
    policy = trainer.model
    torch.manual_seed(3)
    with torch.no_grad():  # a policy that has moved towards all responses alike: a positive estimate
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    theirs = trainer.compute_loss(policy, batch)
    reference = copy.deepcopy(trainer.ref_model)
    logps, mismatched = sums(policy, batch)[0], sums(policy, batch, "KL_")[0]
    with torch.no_grad():
        ref, ref_mismatched = sums(reference, batch)[0], sums(reference, batch, "KL_")[0]
    label = torch.as_tensor(batch["label"]).bool()
    out = fastpref.kto_loss(logps, ref, label, kl=mismatched - ref_mismatched, beta=0.3, undesirable_weight=1.5)
    torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(policy, out.loss), gradient(policy, theirs), rtol=1e-4, atol=1e-5)
