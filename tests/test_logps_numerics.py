"""Extreme and special values: confident rows, ±1e4, infinities, NaN where nothing is scored."""

from __future__ import annotations

import math

import pytest
import torch
from acceptance import no_worse_than_eager
from helpers import slow_interpreted

import fastpref
from fastpref import reference

pytestmark = pytest.mark.numeric
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(function, logits, labels, **options):
    x = logits.detach().clone().requires_grad_()
    value = function(x, labels, shift=False, **options)
    value.sum().backward()
    return value.detach(), x.grad


def truth(logits, labels, **options):
    return run(reference.token_logps, logits.double(), labels, dtype=torch.float64, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
@slow_interpreted
def test_confident_rows_keep_their_gradient(p, dtype, backend, device):
    """p − 1 is formed in float32: rounding p to bfloat16 first would make 1 − 0.999 zero."""

    def draw(seed):
        rows = torch.randn(50, 300, generator=torch.Generator().manual_seed(seed))
        rows[:, 7] = math.log(p / (1 - p)) + torch.cat([rows[:, :7], rows[:, 8:]], 1).logsumexp(1)
        logits, labels = rows.unsqueeze(0).to(dtype).to(device), torch.full((1, 50), 7, device=device)
        value, grad = run(fastpref.token_logps, logits, labels)
        exact, dexact = truth(logits, labels)
        eager, deager = run(reference.token_logps, logits, labels)
        torch.testing.assert_close(grad[..., 7].double(), dexact[..., 7], rtol=0.008, atol=0)
        return (value, eager, exact), (grad[..., 7], deager[..., 7], dexact[..., 7])

    no_worse_than_eager(draw, draws=2)


@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
def test_a_common_offset_costs_no_accuracy(offset, backend, device):
    """x[y] − lse would lose 1e-5 a token at logits near 100."""

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(1, 40, 1000, generator=generator) * 3 + offset).to(device)
        labels = torch.arange(40, device=device).unsqueeze(0)
        value, grad = run(fastpref.token_logps, logits, labels)
        exact, dexact = truth(logits, labels)
        eager, deager = run(reference.token_logps, logits, labels)
        assert ((value - exact).abs() <= 1e-5 * exact.abs()).all()
        return (value, eager, exact), (grad, deager, dexact)

    no_worse_than_eager(draw, draws=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(dtype, backend, device):
    """±1e4: the winner takes all, without overflow."""
    logits = torch.tensor([[[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]]], dtype=dtype, device=device)
    labels = torch.tensor([[0, 1, 2]], device=device)
    value, grad = run(fastpref.token_logps, logits, labels)
    exact, dexact = truth(logits, labels)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), dexact, rtol=4 * torch.finfo(dtype).eps, atol=1e-30)
    lost, _ = run(fastpref.token_logps, logits, torch.tensor([[1, 2, 0]], device=device))
    torch.testing.assert_close(lost[0, 0].item(), -float(logits[0, 0, 0] - logits[0, 0, 1].double()), rtol=1e-6, atol=0)


def test_rows_of_equal_logits(backend, device):
    for vocab in (1, 2, 5000):
        logits = torch.full((1, 1, vocab), -3.25, device=device)
        value, grad = run(fastpref.token_logps, logits, torch.zeros(1, 1, dtype=torch.long, device=device))
        assert value.item() == pytest.approx(-math.log(vocab), rel=1e-6, abs=0)
        assert grad[0, 0, 0].item() == pytest.approx(1 - 1 / vocab, rel=1e-6, abs=0)


def test_minus_infinity_among_the_logits(backend, device):
    """A masked vocabulary entry has probability 0 and gradient 0; whole tiles of them make no NaN."""
    logits = torch.randn(1, 2, 9000, generator=torch.Generator().manual_seed(3)).to(device)
    logits[..., 100:] = -math.inf
    labels = torch.tensor([[5, 99]], device=device)
    value, grad = run(fastpref.token_logps, logits, labels)
    exact, dexact = truth(logits, labels)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), dexact, rtol=1e-5, atol=1e-8)
    assert (grad[..., 100:] == 0).all()


def test_infinities_and_nan_do_as_the_truth_does(backend, device):
    """A label at −inf scores −inf with a finite gradient; a row of −inf, a +inf and a NaN give NaN."""
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    rows[0, 2] = -math.inf
    rows[1, :] = -math.inf
    rows[2, 3] = math.inf
    rows[3, 3] = math.nan
    rows[4, 2] = math.inf
    logits, labels = rows.unsqueeze(0).to(device), torch.full((1, 5), 2, device=device)
    value, grad = run(fastpref.token_logps, logits, labels)
    exact, dexact = truth(logits, labels)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(grad.double(), dexact, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert value[0, 0] == -math.inf
    assert torch.isfinite(grad[0, 0]).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_not_scored_is_not_read(poison, inplace, backend, device):
    """NaN or infinity in an ignored, masked or last row reaches neither the value nor the gradient."""
    logits = torch.randn(2, 6, 77, generator=torch.Generator().manual_seed(5)).to(device)
    labels = torch.randint(77, (2, 6), generator=torch.Generator().manual_seed(6)).to(device)
    labels[0, 2] = -100
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[1, 4] = False
    clean = logits.clone().requires_grad_()
    fastpref.sequence_logps(clean, labels, mask=mask).sum().backward()
    poisoned = logits.clone()
    for b, t in ((0, 1), (1, 3), (0, 5), (1, 5)):  # each predicts the label after it; the last predicts none
        poisoned[b, t] = poison
    poisoned.requires_grad_()
    value = fastpref.sequence_logps(poisoned * 1.0, labels, mask=mask, inplace_backward=inplace)
    gradient = torch.autograd.grad(value.sum(), poisoned)[0]
    assert torch.isfinite(value).all()
    assert torch.equal(gradient, clean.grad)
    assert (gradient[0, 1] == 0).all()


@slow_interpreted
def test_a_long_sum_is_as_good_as_float64(backend, device):
    """2,000 tokens (fewer where a kernel is interpreted): relative error of the sum below 1e-6."""
    length = 200 if backend == "triton" and device == "cpu" else 2000
    logits = (torch.randn(1, length, 64, generator=torch.Generator().manual_seed(7)) * 5).to(torch.bfloat16).to(device)
    labels = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(8)).to(device)
    value = fastpref.sequence_logps(logits, labels, shift=False)
    exact = reference.sequence_logps(logits, labels, shift=False, dtype=torch.float64)
    assert abs(value.item() / exact.item() - 1) < 1e-6
