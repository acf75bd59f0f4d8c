"""Which numbers a case is measured on: made from a seed, cheap to make, with a float64 truth that is cheap to have."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import DTYPES, LinearCase, LogpsCase, LossCase


def make_logits(case: LogpsCase, device: str, seed: int) -> Tensor:  # (B, T, V), a leaf
    """Normal logits of standard deviation 3: a few rows drawn, the others those rows turned, which is much faster."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(case.batch, case.length, case.vocab, dtype=DTYPES[case.dtype], device=device)
    drawn = torch.randn(16, case.vocab, generator=generator, device=device).mul_(3).to(logits.dtype)
    for turn, rows in enumerate(logits.view(-1, case.vocab).split(16)):
        rows.copy_(drawn[: len(rows)].roll(turn * 1009, -1))
    return logits.requires_grad_()


# The hidden states repeat after so many rows, each time with other labels: their truth is then quick to compute.
DISTINCT_ROWS = 256


def make_linear(case: LinearCase, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (B, T, H), a leaf; weight (V, H), a leaf where it is trained; labels (B, T). Logits have deviation 1."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    drawn = torch.randn(DISTINCT_ROWS, case.hidden, generator=generator, device=device).to(dtype)
    some = torch.randn(4096, case.hidden, generator=generator, device=device).div_(case.hidden**0.5).to(dtype)
    weight = torch.empty(case.vocab, case.hidden, dtype=dtype, device=device)
    for turn, rows in enumerate(weight.split(len(some))):  # as make_logits does, and for its reason
        rows.copy_(some[: len(rows)].roll(turn, -1))
    hidden = drawn[row_of(case, device)].view(case.batch, case.length, case.hidden)
    return hidden.requires_grad_(), weight.requires_grad_(not case.frozen), make_labels(case, device, seed)


def row_of(case: LinearCase, device: str) -> Tensor:  # (B·T,) int64
    """Which of the distinct rows each position holds."""
    return torch.arange(case.batch * case.length, device=device) % DISTINCT_ROWS


def make_labels(case: LogpsCase | LinearCase, device: str, seed: int) -> Tensor:  # (B, T) int64, unshifted
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(case.vocab, (case.batch, case.length), generator=generator)
    labels[:, : case.length - case.scored_per_sequence] = -100
    return labels.to(device)


def make_upstream(case: LogpsCase, device: str) -> Tensor:  # (B,)
    """The gradient of a sum of losses would be ones; a preference loss sends both signs, and unequal ones."""
    return torch.linspace(-1.5, 2.0, case.batch, device=device)


def make_pairs(case: LossCase, device: str, seed: int) -> list[Tensor]:  # four (P,): policy, then reference
    generator = torch.Generator(device).manual_seed(seed)
    reference = [torch.randn(case.pairs, generator=generator, device=device) * 30 - 300 for _ in range(2)]
    policy = [r + 5 * torch.randn(case.pairs, generator=generator, device=device) for r in reference]
    return [*(p.requires_grad_() for p in policy), *reference]
