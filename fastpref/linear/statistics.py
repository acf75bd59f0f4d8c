"""What a sweep learns of a row: running sums without the row's label, and what they come to with it.

z are the transformed logits, m their running maximum. The label's z is apart from all sums until the end, so that 1 − p
(and the entropy of a confident row) is a sum of what is left, never the difference of two numbers near 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.extras import TokenExtras
from fastpref.parallel.groups import Members
from fastpref.parallel.vocab import RowStatistics, combine

# Which sum each of the extras needs; is_top1 needs none.
_SUMS = {"entropy": "weighted", "mean_logits": "sum_z", "log_sum_sq_probs": "squares"}
_NONE = TokenExtras()


class Statistics(RowStatistics):
    """Of each of N rows, without its label's logit; and that logit, z_y. Sums that nobody asked for are None."""

    __slots__ = ()

    @staticmethod
    def begin(count: int, like: Tensor, dtype: torch.dtype, extras: tuple[str, ...] = ()) -> Statistics:
        maximum = like.new_full((count,), -torch.inf, dtype=dtype)
        sums = {_SUMS[name]: torch.zeros_like(maximum) for name in extras if name in _SUMS}
        # A label that no tile has (outside [0, V), unchecked on a GPU) leaves NaN: loud, without a wait.
        return Statistics(maximum, torch.zeros_like(maximum), torch.full_like(maximum, torch.nan), **sums)

    @property
    def sums(self) -> dict[str, Tensor | None]:
        return {"weighted": self.weighted, "squares": self.squares, "sum_z": self.sum_z}

    def span(self, start: int, stop: int) -> Statistics:
        return Statistics(*(None if part is None else part[start:stop] for part in self))  # type: ignore[arg-type]

    def over(self, among: Members, owner: Tensor) -> Statistics:
        """These of one part of the vocabulary together with those of the others; `owner` (N,) has each row's label."""
        if len(owner) == 0:
            return self
        return Statistics(*combine(self, owner, among))

    def finish(self, vocab: int, extras: tuple[str, ...] = ()) -> Finished:
        top = torch.maximum(self.maximum, self.target)
        shrink, own = torch.exp(self.maximum - top), torch.exp(self.target - top)
        others = self.total * shrink
        norm = others + own
        # Where the label leads, log1p keeps what a sum near 1 would round away.
        leads = self.target >= self.maximum
        log_norm = torch.where(leads, torch.log1p(others), norm.log())
        found = {}
        if self.weighted is not None:
            weighted = _times(shrink, self.weighted + self.total * (self.maximum - top))
            found["entropy"] = log_norm - (weighted + _times(own, self.target - top)) / norm
        if self.sum_z is not None:
            found["mean_logits"] = (self.sum_z + self.target) / vocab
        if "is_top1" in extras:
            found["is_top1"] = leads & ~norm.isnan()
        if self.squares is not None:
            squares = self.squares * shrink.square()
            log_squares = torch.where(leads, torch.log1p(squares), (squares + own.square()).log())
            found["log_sum_sq_probs"] = log_squares - 2 * log_norm
        return Finished((self.target - top) - log_norm, top, norm, others / norm, TokenExtras(**found))


@dataclass(frozen=True)
class Finished:
    logps: Tensor  # (N,)
    maximum: Tensor  # (N,), label included
    norm: Tensor  # (N,), Σ exp(z − maximum)
    rest: Tensor  # (N,), 1 − p of the label
    extras: TokenExtras = _NONE  # each (N,), or None

    def span(self, start: int, stop: int) -> Finished:
        span = slice(start, stop)
        extras = TokenExtras(*(None if part is None else part[span] for part in self.extras))
        return Finished(self.logps[span], self.maximum[span], self.norm[span], self.rest[span], extras)


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """The product, 0 where the factor is 0: there a value may be −inf."""
    return torch.where(factor == 0, 0.0, factor * value)
