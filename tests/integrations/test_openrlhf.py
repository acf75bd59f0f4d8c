"""OpenRLHF's functions, against a statement of what they compute."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations.openrlhf import DPOLoss, _get_batch_logps, log_probs_from_logits


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(*shape, 31, generator=generator)).to(dtype)
    return logits, torch.randint(31, shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(3, 7), (1, 12), (5,), (2, 3, 4)], ids=str)
def test_log_probs_and_gradients_are_those_of_the_tempered_logits_unshifted(
    shape: tuple[int, ...], temperature: float, dtype: torch.dtype
) -> None:
    logits, labels = rows(*shape, dtype=dtype)
    before = logits.clone()
    ours, theirs = logits.requires_grad_(), logits.detach().double().requires_grad_()
    values = log_probs_from_logits(ours, labels, temperature)
    x = theirs / temperature
    truth = x.gather(-1, labels[..., None])[..., 0] - x.exp().sum(-1).log()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), truth, rtol=1e-6, atol=2e-6)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(values, ours, upstream)
    (true_grad,) = torch.autograd.grad(truth, theirs, upstream.double())
    torch.testing.assert_close(grad.double(), true_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(logits, before), "the original divides its logits in place, ours keep their values"


def test_an_ignored_label_gives_0_and_takes_no_gradient() -> None:
    logits, labels = rows(2, 4)
    labels[1, 2] = -100
    logits[1, 2] = torch.nan
    logits.requires_grad_()
    values = log_probs_from_logits(logits, labels)
    values.sum().backward()
    assert values[1, 2] == 0
    assert (logits.grad[1, 2] == 0).all()
    assert torch.isfinite(values).all()
    assert torch.isfinite(logits.grad).all()


def test_sums_and_means_are_over_the_response_alone() -> None:
    logps = -torch.arange(1.0, 25.0).view(4, 6).requires_grad_()  # of the labels 1 ... 6
    attention = torch.ones(4, 7, dtype=torch.int64)
    attention[1, 5:] = 0
    attention[3, 3:] = 0
    prompts = [2, 4, 1, 5]  # row 3: a prompt longer than what is there
    sums, means = _get_batch_logps(logps, attention, prompts)
    wanted = [(logps[0, 1:]), (logps[1, 3:4]), (logps[2]), (logps[3, :0])]
    torch.testing.assert_close(sums, torch.stack([x.sum() for x in wanted]), rtol=0, atol=0)
    torch.testing.assert_close(means[:3], torch.stack([x.mean() for x in wanted[:3]]), rtol=1e-6, atol=0)
    assert means[3] == 0, "the original's mean of an empty row is NaN, ours is 0"
    torch.testing.assert_close(_get_batch_logps(logps, attention, torch.tensor(prompts)), (sums, means))


def test_a_nan_in_a_prompt_reaches_neither_value_nor_gradient() -> None:
    logps = torch.full((1, 3), -1.0)
    logps[0, 0] = torch.nan
    logps.requires_grad_()
    sums, means = _get_batch_logps(logps, torch.ones(1, 4), [2])
    (sums + means).sum().backward()
    assert (sums.item(), means.item()) == (-2.0, -1.0)
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 1.5, 1.5]]))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"ipo": True}], ids=str)
def test_the_loss_is_the_mean_of_the_pairs(options: dict[str, Any]) -> None:
    pc, pr, rc, rr = (10 * torch.randn(4, 5, generator=torch.Generator().manual_seed(1))).double()
    margin = (pc - pr) - (rc - rr)
    smoothing = options.get("label_smoothing", 0.0)
    truth = -(1 - smoothing) * (0.3 * margin).sigmoid().log() - smoothing * (-0.3 * margin).sigmoid().log()
    if options.get("ipo"):
        truth = (margin - 1 / 0.6).square()
    loss, chosen, rejected = DPOLoss(0.3, **options)(pc, pr, rc, rr)
    torch.testing.assert_close(loss, truth.mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(chosen, 0.3 * (pc - rc), rtol=1e-10, atol=0)
    torch.testing.assert_close(rejected, 0.3 * (pr - rr), rtol=1e-10, atol=0)


def test_arguments_stand_where_the_original_has_them() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(log_probs_from_logits) == ["logits", "labels", "temperature"]
    assert names(_get_batch_logps)[:3] == ["per_token_logps", "attention_mask", "prompt_id_lens"]
    assert names(DPOLoss) == ["beta", "label_smoothing", "ipo"]


def test_bad_input_is_named() -> None:
    logits, labels = rows(2, 4)
    with pytest.raises(ValueError, match="temperature must be"):
        log_probs_from_logits(logits, labels, 0.0)
    with pytest.raises(ValueError, match="labels must have the shape"):
        log_probs_from_logits(logits, labels[:1])
    logps, mask = torch.zeros(2, 3), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"per_token_logps \(B, T - 1\), without the first token, got"):
        _get_batch_logps(torch.zeros(2, 4), mask, [1, 1])
    with pytest.raises(ValueError, match=r"prompt_id_lens must be 2 integers.*got \[1\]"):
        _get_batch_logps(logps, mask, [1])
    with pytest.raises(ValueError, match="average_log_prob must be False, got True: the means are the second result"):
        _get_batch_logps(logps, mask, [1, 1], True)
    with pytest.raises(ValueError, match="ipo=True has no label_smoothing"):
        DPOLoss(0.1, 0.1, True)(*[torch.zeros(2)] * 4)
