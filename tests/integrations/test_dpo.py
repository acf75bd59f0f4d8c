"""The original DPO repository's functions, against a statement of what they compute."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations.dpo import _get_batch_logps, preference_loss


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(4, 9, 31) logits and labels: a prompt and padding in each row, row 3 with nothing to score."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(4, 9, 31, generator=generator)).to(dtype)
    labels = torch.randint(31, (4, 9), generator=generator)
    labels[:, :2] = -100
    labels[1, 6:] = -100
    labels[3] = -100
    return logits, labels


def stated(logits: Tensor, labels: Tensor, average: bool) -> Tensor:
    """Row by row: −cross-entropy of each label under the logits one place before it, summed or averaged."""
    rows = []
    for row_logits, row_labels in zip(logits.double(), labels, strict=True):
        found = [
            -torch.nn.functional.cross_entropy(row_logits[place - 1], row_labels[place])
            for place in range(1, len(row_labels))
            if row_labels[place] != -100
        ]
        total = torch.stack(found).sum() if found else row_logits.sum() * 0
        rows.append(total / max(len(found), 1) if average else total)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_logps_and_gradients_are_the_original_s_in_full_precision(average: bool, dtype: torch.dtype) -> None:
    logits, labels = batch(dtype)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    values, truth = _get_batch_logps(ours, labels, average), stated(theirs, labels, average)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), truth, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(values, ours, upstream)
    (true_grad,) = torch.autograd.grad(truth, theirs, upstream.double())
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), true_grad, rtol=2 * step, atol=1e-7)
    assert values[3] == 0, "the original's average of an empty row is NaN, ours is 0"
    assert (grad[3] == 0).all()


def test_bfloat16_logits_lose_nothing_where_the_original_rounds_each_log_prob() -> None:
    logits, labels = batch(torch.bfloat16)
    logp = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(2)
    rounded = (logp * (labels[:, 1:] != -100)).sum(-1).double()  # what a bfloat16 log-softmax makes
    truth = stated(logits, labels, average=False)
    ours = _get_batch_logps(logits, labels).double()
    assert (ours - truth).abs().max() < 1e-5
    assert (rounded - truth).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2}, {"ipo": True}, {"reference_free": True}, {"ipo": True, "reference_free": True}],
    ids=str,
)
def test_losses_rewards_and_gradients_are_the_original_s(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    logps = (10 * torch.randn(4, 5, generator=generator)).requires_grad_()
    wide = logps.detach().double().requires_grad_()
    pc, pr, rc, rr = wide
    margin = (pc - pr) - (0 if options.get("reference_free") else rc - rr)
    smoothing = options.get("label_smoothing", 0.0)
    u = 0.3 * margin
    truth = (1 - smoothing) * (1 + (-u).exp()).log() + smoothing * (1 + u.exp()).log()
    if options.get("ipo"):
        truth = (margin - 1 / 0.6).square()

    policy_chosen, policy_rejected, *reference = logps
    losses, chosen, rejected = preference_loss(
        policy_chosen, policy_rejected, *(x.detach() for x in reference), 0.3, **options
    )
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chosen.double(), (0.3 * (pc - rc)).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rejected.double(), (0.3 * (pr - rr)).detach(), rtol=1e-5, atol=1e-6)
    assert not chosen.requires_grad
    assert not rejected.requires_grad
    losses.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(logps.grad[:2].double(), wide.grad[:2], rtol=1e-4, atol=1e-6)


def test_arguments_stand_where_the_original_has_them() -> None:
    names = ["policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps"]
    defaults = {"beta": inspect.Parameter.empty, "label_smoothing": 0.0, "ipo": False, "reference_free": False}
    found = inspect.signature(preference_loss).parameters
    assert list(found) == [*names, *defaults]
    assert {name: found[name].default for name in defaults} == defaults
    assert list(inspect.signature(_get_batch_logps).parameters) == ["logits", "labels", "average_log_prob"]


def test_bad_input_is_named() -> None:
    logits, labels = batch()
    with pytest.raises(ValueError, match=r"labels must have the shape \(4, 9\)"):
        _get_batch_logps(logits, labels[:, 1:])
    with pytest.raises(TypeError, match="average_log_prob must be True or False"):
        _get_batch_logps(logits, labels, "mean")  # type: ignore[arg-type]
    labels[0, 5] = 31
    with pytest.raises(ValueError, match="31"):
        _get_batch_logps(logits, labels)
    four = [torch.zeros(2)] * 4
    with pytest.raises(ValueError, match=r"ipo=True has no label_smoothing, got 0\.1: leave it at 0"):
        preference_loss(*four, 0.1, label_smoothing=0.1, ipo=True)
    with pytest.raises(ValueError, match="label_smoothing must be a finite number in"):
        preference_loss(*four, 0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="beta must be"):
        preference_loss(*four, 0.0)
    with pytest.raises(TypeError, match=r"reference_chosen_logps must be a torch\.Tensor"):
        preference_loss(four[0], four[1], None, None, 0.1, reference_free=True)  # type: ignore[arg-type]
