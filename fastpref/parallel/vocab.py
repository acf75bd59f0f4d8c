"""A vocabulary that is split over the ranks of a process group: who holds which entries, and rows over all of them.

Rank r holds the entries offset_r ... offset_r + size_r of logits (..., V_r) or of the head's weight (V_r, H), in rank
order; sizes may differ, and a rank may hold none. Each rank makes its rows' statistics over its own part; one gather of
a few numbers a row makes them those of the whole vocabulary, the same bits on every rank (after Megatron-LM's
vocabulary-parallel cross-entropy, Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.parallel.groups import Members, gather


class VocabShards(NamedTuple):
    """Who holds what. Every rank has the same labels, with entries of the whole vocabulary."""

    among: Members
    sizes: tuple[int, ...]  # of each rank's part

    @property
    def vocab(self) -> int:
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """The first entry of this rank's part."""
        return sum(self.sizes[: self.among.rank])

    @property
    def size(self) -> int:
        return self.sizes[self.among.rank]

    def owner(self, labels: Tensor) -> Tensor:  # the shape of labels, int64
        """The rank that holds each label, −1 for one outside [0, V)."""
        # Compared with numbers: a tensor of the parts' ends would be copied from the host, which waits for the device.
        rank = torch.zeros_like(labels, dtype=torch.int64)
        for end in accumulate(self.sizes):
            rank += labels >= end
        return torch.where((labels >= 0) & (labels < self.vocab), rank, -1)


class RowStatistics(NamedTuple):
    """Of each of N rows over a part of the vocabulary, perhaps without the row's label.

    Where a part is empty, or all its z are −inf, the maximum is −inf and the total 0. A total of NaN tells of a NaN
    among the z, which the maximum need not show.
    """

    maximum: Tensor  # (N,), m, the largest z
    total: Tensor  # (N,), Σ exp(z − m)
    target: Tensor  # (N,), the label's z, where this part has the label; anything elsewhere
    weighted: Tensor | None = None  # (N,), Σ exp(z − m)·(z − m)
    squares: Tensor | None = None  # (N,), Σ exp(2·(z − m))
    sum_z: Tensor | None = None  # (N,), Σ z


def combine(
    mine: RowStatistics,
    owner: Tensor,  # (N,), the rank that holds each row's label; −1: none, and the target is NaN
    among: Members,
) -> RowStatistics:
    """The statistics over all parts, the same bits on every rank. One gather."""
    present = {name: value for name, value in mine._asdict().items() if value is not None}
    every = gather(torch.stack(list(present.values())), among)  # (ranks, K, N)
    parts: dict[str, Any] = dict(zip(present, every.unbind(1), strict=True))  # each (ranks, N)
    maximum = parts["maximum"].amax(0)
    base = torch.where(maximum == -torch.inf, 0.0, maximum)  # where every part is empty or −inf
    shift = parts["maximum"] - base  # (ranks, N), −inf for an empty part
    factor = shift.exp()
    picked = parts["target"].gather(0, owner.clamp(min=0)[None])[0]

    def add(terms: Tensor) -> Tensor:  # (ranks, N) -> (N,)
        # A part without a weight adds nothing (0 times a −inf would be NaN), except a NaN of its own.
        return torch.where((factor == 0) & ~parts["total"].isnan(), 0.0, terms).sum(0)

    weighted, squares = parts.get("weighted"), parts.get("squares")
    return RowStatistics(
        maximum,
        add(factor * parts["total"]),
        torch.where(owner < 0, torch.nan, picked),
        # (z − M) = (z − m) + (m − M)
        None if weighted is None else add(factor * (weighted + shift * parts["total"])),
        None if squares is None else add(factor.square() * squares),
        None if "sum_z" not in parts else parts["sum_z"].sum(0),
    )
