"""minimind's functions, against a statement of what they compute."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from fastpref.integrations.minimind import dpo_loss, logits_to_log_probs, summed_dpo_loss

BETA = 0.4


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of policy and reference (6, 8, 31), labels and the mask of responses of 1 to 6 tokens and of none."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (2 * torch.randn(2, 6, 8, 31, generator=generator)).to(dtype)
    labels = torch.randint(31, (6, 8), generator=generator)
    places = torch.arange(8)
    mask = ((places >= 2) & (places < torch.tensor([8, 5, 3, 7, 2, 6])[:, None])).long()
    return policy, reference, labels, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_and_gradients_are_those_of_the_labels_unshifted(dtype: torch.dtype) -> None:
    logits, _, labels, mask = batch(dtype)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    values = logits_to_log_probs(ours, labels)
    truth = (theirs.softmax(2) * torch.nn.functional.one_hot(labels, 31)).sum(2).log()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), truth, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(values, ours, mask.float())
    (true_grad,) = torch.autograd.grad(truth, theirs, mask.double())
    torch.testing.assert_close(grad.double(), true_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("normalised", [True, False], ids=["up to 24 March 2026", "since minimind-3"])
def test_the_loss_and_its_gradient_are_the_original_s(normalised: bool) -> None:
    policy, reference, labels, mask = batch()
    ours, theirs = policy.clone().requires_grad_(), policy.double().requires_grad_()
    loss = (dpo_loss if normalised else summed_dpo_loss)(
        logits_to_log_probs(reference, labels), logits_to_log_probs(ours, labels), mask, BETA
    )

    def sequence(logits: Tensor, row: int) -> Tensor:
        found = [logits[row, t].log_softmax(0)[labels[row, t]] for t in range(8) if mask[row, t]]
        total = torch.stack(found).sum() if found else logits.sum() * 0
        return total / max(len(found), 1) if normalised else total

    wide = reference.double()
    truth = torch.zeros((), dtype=torch.float64)
    for chosen, rejected in ((0, 3), (1, 4), (2, 5)):
        margin = sequence(theirs, chosen) - sequence(wide, chosen) - sequence(theirs, rejected)
        truth = truth + (1 + (-BETA * (margin + sequence(wide, rejected))).exp()).log() / 3
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    loss.backward()
    truth.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)


def test_both_losses_are_ln_2_where_policy_and_reference_are_equal_and_they_differ_elsewhere() -> None:
    policy, reference, labels, mask = batch()
    a, b = logits_to_log_probs(policy, labels), logits_to_log_probs(reference, labels)
    for loss in (dpo_loss, summed_dpo_loss):
        assert loss(a, a, mask, BETA).item() == pytest.approx(0.6931472, rel=1e-6)
    assert abs(dpo_loss(b, a, mask, BETA) - summed_dpo_loss(b, a, mask, BETA)) > 0.01


def test_a_nan_outside_the_mask_reaches_neither_loss_nor_gradient() -> None:
    policy, reference, labels, mask = batch()
    a, b = logits_to_log_probs(policy, labels), logits_to_log_probs(reference, labels)
    clean = dpo_loss(b, a, mask, BETA)
    a = torch.where(mask == 0, torch.nan, a).requires_grad_()
    loss = dpo_loss(b, a, mask, BETA)
    loss.backward()
    assert torch.equal(loss, clean)
    assert (a.grad[mask == 0] == 0).all()


def test_arguments_stand_where_the_original_has_them() -> None:
    assert list(inspect.signature(logits_to_log_probs).parameters) == ["logits", "labels"]
    for loss in (dpo_loss, summed_dpo_loss):
        assert list(inspect.signature(loss).parameters) == ["ref_log_probs", "policy_log_probs", "mask", "beta"]


def test_bad_input_is_named() -> None:
    logps, mask = torch.zeros(4, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="all chosen, then as many rejected, got 3 of them"):
        dpo_loss(logps[:3], logps[:3], mask[:3], BETA)
    with pytest.raises(ValueError, match=r"policy_log_probs must be \(2P, T\) with the shape \(4, 3\) of mask"):
        dpo_loss(logps, logps.sum(1), mask, BETA)
    with pytest.raises(ValueError, match="beta must be"):
        summed_dpo_loss(logps, logps, mask, -1.0)
    with pytest.raises(ValueError, match="labels must have the shape"):
        logits_to_log_probs(torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.int64))
