"""The two sweeps over the vocabulary that every plan is made of.

`fold_sweep` makes each tile of logits once and folds it into the rows' statistics; on the way it can keep the tiles, or
gather dh as attention gathers its output. `gradient_sweep` makes each tile of dz, from a kept tile or from its logits
once more, and multiplies it into dW and dh. Both run over a span of rows with tiles of the plan's size, so that the
memory beyond results is the scratch of one tile.

dz = onehot − softmax is the derivative of a row's log-prob by its logits; `upstream` is that of a loss by log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.linear.plan import Machine, Plan, accumulator_dtype, kept_dtype, operand_dtype
from fastpref.linear.products import multiply
from fastpref.linear.rows import GATHERED, PIECE, Rows
from fastpref.linear.tiles import fold, gradient_from_kept, gradient_from_logits
from fastpref.tiled import Transform

# Half of float16's range is left for what rounds upwards.
_TOP = 2.0**14


@dataclass(frozen=True)
class Head:
    """The linear layer that makes logits, and what is done to them."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    transform: Transform
    operand: torch.dtype  # in which the products are meant
    machine: Machine

    @property
    def wide(self) -> torch.dtype:
        return accumulator_dtype(self.operand)

    @property
    def narrow(self) -> torch.dtype:
        return operand_dtype(self.machine, self.operand)

    @property
    def slope(self) -> float:
        """The constant factor of dz/dx."""
        return self.transform.logit_scale / self.transform.temperature

    @staticmethod
    def keep_scale(tile: Tensor) -> float:
        """What exp(z − max) is multiplied by in a tile: float16 would lose what is below 6e-8 of a row's maximum."""
        return _TOP if tile.dtype == torch.float16 else 1.0

    def slices(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        vocab = self.weight.shape[0]
        for place, start in enumerate(range(0, vocab, plan.columns)):
            yield place, start, min(start + plan.columns, vocab)

    def bias_slice(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop]


@dataclass(frozen=True)
class Statistics:
    """Of each of N rows, without its label's logit: maximum m and Σ exp(z − m); and that logit, z_y."""

    maximum: Tensor  # (N,)
    total: Tensor  # (N,)
    target: Tensor  # (N,)

    @staticmethod
    def begin(count: int, head: Head) -> Statistics:
        maximum = head.weight.new_full((count,), -torch.inf, dtype=head.wide)
        # A label that no tile has (outside [0, V), unchecked on a GPU) leaves NaN: loud, without a wait.
        return Statistics(maximum, torch.zeros_like(maximum), torch.full_like(maximum, torch.nan))

    def span(self, start: int, stop: int) -> Statistics:
        return Statistics(self.maximum[start:stop], self.total[start:stop], self.target[start:stop])

    def finish(self) -> Finished:
        top = torch.maximum(self.maximum, self.target)
        others = self.total * torch.exp(self.maximum - top)
        norm = others + torch.exp(self.target - top)
        # Where the label leads, log1p keeps what a sum near 1 would round away.
        log_norm = torch.where(self.target >= self.maximum, torch.log1p(others), norm.log())
        return Finished((self.target - top) - log_norm, top, norm, others / norm)


@dataclass(frozen=True)
class Finished:
    logps: Tensor  # (N,)
    maximum: Tensor  # (N,), label included
    norm: Tensor  # (N,), Σ exp(z − maximum)
    rest: Tensor  # (N,), 1 − p of the label

    def span(self, start: int, stop: int) -> Finished:
        parts = (self.logps, self.maximum, self.norm, self.rest)
        return Finished(*(part[start:stop] for part in parts))


@dataclass(frozen=True)
class Kept:
    """Tiles of the first slices of the vocabulary, with each row's maximum when the tile was folded."""

    tiles: Tensor  # (slices, N, columns)
    maxima: Tensor  # (slices, N)

    def first(self, count: int) -> Kept:
        """The places of the first `count` rows."""
        return Kept(self.tiles[:, :count], self.maxima[:, :count])

    @staticmethod
    def empty(count: int, head: Head, plan: Plan) -> Kept | None:
        if plan.kept == 0:
            return None
        tiles = head.weight.new_empty((plan.kept, count, plan.columns), dtype=kept_dtype(head.operand))
        return Kept(tiles, head.weight.new_empty((plan.kept, count), dtype=head.wide))


class _Scratch:
    """One tile's memory, used again and again."""

    def __init__(self, head: Head, plan: Plan, count: int, *, dw: bool = False) -> None:
        self.head = head
        rows, hidden_size = min(plan.row_block, count), head.weight.shape[1]
        columns = min(plan.columns, head.weight.shape[0])
        new = head.weight.new_empty
        self._x = new(rows * columns, dtype=head.wide)
        self._tile = self._x if head.narrow == head.wide else new(rows * columns, dtype=head.narrow)
        self._w = None if head.weight.dtype == head.narrow else new(columns, hidden_size, dtype=head.narrow)
        self._dw = new(columns, hidden_size, dtype=head.wide) if dw else None

    def weight(self, start: int, stop: int) -> Tensor:  # (C, H)
        w = self.head.weight[start:stop]
        return w if self._w is None else self._w[: stop - start].copy_(w)

    def logits(self, h: Tensor, w: Tensor) -> Tensor:  # (R, C)
        x = self._x[: len(h) * len(w)].view(len(h), len(w))
        return multiply(h, w.t(), x)

    def tile(self, rows: int, columns: int) -> Tensor:  # (R, C)
        return self._tile[: rows * columns].view(rows, columns)

    def dw(self, result: Tensor) -> Tensor:  # (C, H)
        """Where a slice of dW gathers: in its own memory, or in wider memory first."""
        return result if self._dw is None else self._dw[: len(result)]


class _Hidden:
    """The rows of the hidden states as an operand: made once where one block holds them all, else block by block."""

    def __init__(self, hidden: Tensor, rows: Rows, head: Head, plan: Plan, start: int, stop: int) -> None:
        self.hidden, self.rows, self.start, self.stop = hidden, rows, start, stop
        self.size = plan.row_block
        count = min(self.size, stop - start)
        # Where rows follow each other in the operand's own dtype they are taken as they are.
        self.buffer = None
        if rows.run is None or hidden.dtype != head.narrow:
            self.buffer = hidden.new_empty(count, hidden.shape[-1], dtype=head.narrow)
        self.only = self._make(0, stop - start) if stop - start <= self.size else None

    def _make(self, low: int, high: int) -> Tensor:
        if self.buffer is None:
            return self.rows.gather(self.hidden, self.start + low, self.start + high)
        block = self.buffer[: high - low]
        for begin in range(0, high - low, PIECE):
            piece = block[begin : begin + PIECE]
            first = self.start + low + begin
            piece.copy_(self.rows.gather(self.hidden, first, first + len(piece)))
        return block

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first, past the last, rows (R, H)), counted from the start of the span."""
        count = self.stop - self.start
        for low in range(0, count, self.size):
            high = min(low + self.size, count)
            yield low, high, self._make(low, high) if self.only is None else self.only


def fold_sweep(
    hidden: Tensor,  # (B, T, H)
    rows: Rows,
    head: Head,
    plan: Plan,
    *,
    start: int = 0,
    stop: int | None = None,
    kept: Kept | None = None,
    dh: Tensor | None = None,  # (n, H), in the accumulator's dtype
) -> tuple[Finished, Tensor]:
    """The statistics of rows start..stop and their labels' z; fills `kept`, and `dh` with each log-prob's gradient."""
    stop = len(rows) if stop is None else stop
    labels = rows.labels[start:stop]
    statistics = Statistics.begin(stop - start, head)
    scratch = _Scratch(head, plan, stop - start)
    size = min(plan.row_block, stop - start)
    all_sums = None if dh is None else hidden.new_empty(size, hidden.shape[-1], dtype=head.wide)
    for low, high, h in _Hidden(hidden, rows, head, plan, start, stop).blocks():
        running = statistics.span(low, high)
        sums = None if all_sums is None else all_sums[: high - low].zero_()
        rescale = None if dh is None else torch.empty_like(running.maximum)
        for place, first, last in head.slices(plan):
            w = scratch.weight(first, last)
            x = scratch.logits(h, w)
            out = None
            if sums is not None:
                out = scratch.tile(high - low, last - first)
            elif kept is not None and place < len(kept.tiles):
                out = kept.tiles[place, low:high, : last - first]
            fold(
                x,
                labels[low:high],
                head.bias_slice(first, last),
                running.maximum,
                running.total,
                running.target,
                start=first,
                transform=head.transform,
                out=out,
                rescale=rescale,
                keep_scale=1.0 if out is None else head.keep_scale(out),
            )
            if sums is not None and out is not None and rescale is not None:
                multiply(out, w, sums.mul_(rescale.unsqueeze(1)), add=True)
            elif out is not None and kept is not None:
                kept.maxima[place, low:high] = running.maximum
        if sums is not None and dh is not None:
            dh[low:high] = _dh_of_logps(sums, running, labels[low:high], head, head.keep_scale(scratch.tile(0, 0)))
    return statistics.finish(), statistics.target


def _dh_of_logps(
    sums: Tensor,  # (R, H), overwritten
    running: Statistics,
    labels: Tensor,  # (R,)
    head: Head,
    keep_scale: float,
) -> Tensor:  # (R, H)
    """slope·((1 − p_y)·W[y] − Σ p_j·W[j]); `sums` holds keep_scale times the sum over the others, by the maximum."""
    done = running.finish()
    others = torch.exp(running.maximum - done.maximum) / (done.norm * keep_scale)
    sums.mul_((-head.slope * others).unsqueeze(1))
    own = head.slope * done.rest * _own_slope(running.target, head.transform)
    index = labels.clamp(0, head.weight.shape[0] - 1)
    for low in range(0, len(labels), GATHERED):
        part = slice(low, low + GATHERED)
        sums[part].addcmul_(head.weight[index[part]].to(sums.dtype), own[part].unsqueeze(1))
    return sums


def _own_slope(target: Tensor, transform: Transform) -> Tensor | float:
    """1 − tanh² at the label's logit, from z = softcap·tanh / temperature."""
    if not transform.softcap:
        return 1.0
    # Near saturation each rounding of the tanh counts many times: float32 would add its own to those of z.
    wide = target if target.device.type == "mps" else target.double()
    return (1.0 - (wide * (transform.temperature / transform.softcap)).square()).to(target.dtype)


def gradient_sweep(
    hidden: Tensor,  # (B, T, H)
    rows: Rows,
    head: Head,
    plan: Plan,
    done: Finished,  # of the rows of the span
    target: Tensor,  # (n,), z of the labels
    upstream: Tensor,  # (n,)
    *,
    start: int = 0,
    stop: int | None = None,
    kept: Kept | None = None,
    dh: Tensor | None = None,  # (n, H) zeros in the accumulator's dtype
    dw: Tensor | None = None,  # (V, H)
    db: Tensor | None = None,  # (V,)
    add: bool = False,
) -> None:
    """Adds upstream·dz @ W to `dh`; writes, or with `add` adds, (upstream·dz)ᵀ @ hidden to `dw` and its sum to `db`."""
    stop = len(rows) if stop is None else stop
    if start == stop:  # no product will write them
        for result in (dw, db):
            if result is not None and not add:
                result.zero_()
        return
    labels = rows.labels[start:stop]
    # float16 would lose what is small: the largest dz that can be becomes _TOP, and the results are scaled back.
    unit = None
    if head.narrow == torch.float16:
        unit = (upstream.abs().amax() * (head.slope / _TOP)).clamp(min=1e-30)
    upstream = upstream if unit is None else upstream / unit
    scaled = upstream.to(head.wide) * head.slope
    rowscale = -scaled / done.norm
    own = scaled * done.rest * _own_slope(target, head.transform)
    source = _Hidden(hidden, rows, head, plan, start, stop)
    # Not in 16 bits, even where one product makes a whole slice: cuBLAS may round its partial sums then.
    direct = dw is None or dw.dtype == head.wide
    # What was there before must not be scaled back with what comes now.
    direct = direct and (dw is None or not add or unit is None)
    scratch = _Scratch(head, plan, stop - start, dw=not direct)

    for place, first, last in head.slices(plan):
        have = kept is not None and place < len(kept.tiles)
        # A kept tile needs the weight for dh alone.
        w = scratch.weight(first, last) if dh is not None or not have else head.weight[first:last]
        if dw is not None:
            dw_sums = scratch.dw(dw[first:last])
            fresh = not (add and direct)
        db_sums = None if db is None else torch.zeros(last - first, dtype=head.wide, device=db.device)
        for low, high, h in source.blocks():
            block = slice(low, high)
            dz = scratch.tile(high - low, last - first)
            if have and kept is not None:
                tile = kept.tiles[place, block, : last - first]
                factor = torch.exp(kept.maxima[place, block] - done.maximum[block]) / head.keep_scale(tile)
                factor *= rowscale[block]
                gradient_from_kept(tile, labels[block], factor, own[block], dz, start=first)
            else:
                gradient_from_logits(
                    scratch.logits(h, w),
                    labels[block],
                    head.bias_slice(first, last),
                    done.maximum[block],
                    rowscale[block],
                    own[block],
                    dz,
                    start=first,
                    transform=head.transform,
                )
            if dh is not None:
                multiply(dz, w, dh[block], add=True)
            if dw is not None:
                multiply(dz.t(), h, dw_sums, add=not fresh)
                fresh = False
            if db_sums is not None:
                db_sums += dz.sum(0, dtype=head.wide)
        if dw is not None and unit is not None:
            dw_sums.mul_(unit)
        if dw is not None and not direct:
            dw[first:last] = dw[first:last] + dw_sums if add else dw_sums
        if db is not None and db_sums is not None:
            db_sums = db_sums if unit is None else db_sums * unit
            db[first:last] = db[first:last] + db_sums if add else db_sums
    if dh is not None and unit is not None:
        dh.mul_(unit)
