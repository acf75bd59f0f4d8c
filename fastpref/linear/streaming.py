"""Preference gradients of sequences of any length, three products: a block of rows goes through both sweeps at once.

For a loss of one argument, f(scale·(c − r − λ·max(0, −c))), the derivatives by the log-probs of a pair's two responses
have a ratio that is known when the chosen response is done. So the pair's dW gathers with the rows of the chosen
response weighted 1 and those of the rejected one weighted by that ratio, and one factor at the pair's end scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref.linear.entropy import Upstream
from fastpref.linear.operands import Head, Kept
from fastpref.linear.plan import Plan
from fastpref.linear.rows import Rows
from fastpref.linear.sweeps import fold_sweep, gradient_sweep
from fastpref.linear.tokens import gradient_dtype, zero_gradient
from fastpref.losses.margin import rejected_per_chosen
from fastpref.losses.spec import MarginForm, common_dtype
from fastpref.ops import sequence_reduce_op

Found = tuple[Tensor | None, Tensor | None, Tensor | None]


def stream(
    hidden: Tensor,  # (B, T, H)
    rows: Rows,
    head: Head,
    plan: Plan,
    form: MarginForm,
    coefficients: Callable[[Tensor, Tensor | None], Tensor],
    ref_logps: Tensor | None,  # (2P,)
    *,
    mean: bool,
    want: tuple[bool, bool, bool],
    half: torch.dtype,
) -> tuple[Tensor, Found]:
    """Sequence log-probs (2P,), and the gradients of the mean loss.

    `coefficients(logps (2,), ref (2,))` are the derivatives of one pair's loss; gradients of float16 tensors come back
    in the dtype `half`.
    """
    assert ref_logps is not None  # losses of one argument have a reference
    pairs = len(rows.counts) // 2
    state = _Gradients(hidden, rows, head, plan, want, pairs, half)
    starts = [0]
    for count in rows.counts:
        starts.append(starts[-1] + count)
    logps = torch.zeros(2 * pairs, dtype=head.wide, device=hidden.device)
    for pair in range(pairs):
        weight = torch.ones((), dtype=head.wide, device=hidden.device)
        for sequence in (pair, pair + pairs):
            count = rows.counts[sequence]
            logps[sequence] = state.run(starts[sequence], count, weight / count if mean and count else weight, mean)
            if sequence == pair:
                # In the dtype in which the loss will compute the same difference: at 0 a rounding decides its sign.
                dtype = common_dtype(logps, ref_logps)
                c = logps[sequence].to(dtype) - ref_logps[sequence].to(dtype)
                weight = rejected_per_chosen(c, form).to(head.wide)
        # A view: a list of two numbers as an index would make a GPU wait.
        slopes = coefficients(logps[pair::pairs], ref_logps[pair::pairs]) / pairs
        state.finish_pair(slopes[0], [(starts[s], rows.counts[s]) for s in (pair, pair + pairs)])
    return logps, state.results()


class _Gradients:
    """The gradients while they gather: those of the pair under way, unscaled, and those of the pairs before it."""

    def __init__(
        self,
        hidden: Tensor,
        rows: Rows,
        head: Head,
        plan: Plan,
        want: tuple[bool, bool, bool],
        pairs: int,
        half: torch.dtype,
    ) -> None:
        self.hidden, self.rows, self.head, self.plan, self.half = hidden, rows, head, plan, half
        self.dh = zero_gradient(hidden, half) if want[0] else None
        new: dict[str, Any] = {"dtype": head.wide, "device": hidden.device}
        vocab, hidden_size = head.weight.shape
        self.pair_dw = torch.empty(vocab, hidden_size, **new) if want[1] else None
        self.pair_db = torch.empty(vocab, **new) if want[2] else None
        several = pairs > 1
        self.dw = torch.zeros(vocab, hidden_size, **new) if want[1] and several else self.pair_dw
        self.db = torch.zeros(vocab, **new) if want[2] and several else self.pair_db
        self.several, self.begun = several, False
        block = min(plan.row_block, max(rows.counts, default=0))
        self.kept = Kept.empty(block, head, plan)

    def run(self, start: int, count: int, weight: Tensor, mean: bool) -> Tensor:
        """One sequence through both sweeps, a block at a time; its log-prob."""
        parts = []
        for low in range(start, start + count, self.plan.row_block):
            high = min(low + self.plan.row_block, start + count)
            span: dict[str, Any] = {"start": low, "stop": high}
            kept = None if self.kept is None else self.kept.first(high - low)
            done, target = fold_sweep(self.hidden, self.rows, self.head, self.plan, kept=kept, **span)
            sums = None
            if self.dh is not None:
                size = (high - low, self.hidden.shape[-1])
                sums = torch.zeros(size, dtype=self.head.wide, device=self.hidden.device)
            upstream = Upstream(weight.expand(high - low))
            gradient_sweep(
                self.hidden, self.rows, self.head, self.plan, done, target, upstream,
                kept=kept, dh=sums, dw=self.pair_dw, db=self.pair_db, add=self.begun, **span,
            )  # fmt: skip
            self.begun = True
            if sums is not None and self.dh is not None:
                self.rows.scatter(sums, self.dh, start=low)
            parts.append(done.logps)
        if not parts:
            return torch.zeros((), dtype=self.head.wide, device=self.hidden.device)
        logps = torch.cat(parts).unsqueeze(0)
        value, _ = sequence_reduce_op(logps, torch.zeros_like(logps, dtype=torch.long), None, None, 0, -1, mean)
        return value[0]

    def finish_pair(self, slope: Tensor, spans: list[tuple[int, int]]) -> None:
        """Scales what the pair has gathered by its coefficient, and adds it to what was there."""
        if not self.begun:  # nothing to score in either response
            return
        self.begun = False
        if self.dh is not None:
            for start, count in spans:
                for low in range(start, start + count, self.plan.row_block):
                    high = min(low + self.plan.row_block, start + count)
                    part = self.rows.gather(self.dh, low, high).to(self.head.wide)
                    self.rows.scatter(part * slope, self.dh, start=low)
        for total, one in ((self.dw, self.pair_dw), (self.db, self.pair_db)):
            if total is not None and one is not None:
                if self.several:
                    total.addcmul_(one, slope)
                else:
                    total.mul_(slope)

    def results(self) -> Found:
        weight, bias = self.head.weight, self.head.bias
        empty = not any(self.rows.counts)
        if empty:
            for total in (self.dw, self.db):
                if total is not None:
                    total.zero_()
        self.pair_dw = self.pair_db = self.kept = None
        return self.dh, _rounded(self.dw, weight, self.half), _rounded(self.db, bias, self.half)


def _rounded(total: Tensor | None, like: Tensor | None, half: torch.dtype) -> Tensor | None:
    return None if total is None or like is None else total.to(gradient_dtype(like, half))
