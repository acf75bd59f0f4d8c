"""What the products of a sweep are made of: slices of the head, rows of hidden states, a tile's memory, kept tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.linear.plan import Machine, Plan, accumulator_dtype, kept_dtype, operand_dtype
from fastpref.linear.products import multiply
from fastpref.linear.rows import PIECE, Rows
from fastpref.parallel.vocab import VocabShards
from fastpref.tiled import Transform

# Half of float16's range is left for what rounds upwards.
TOP = 2.0**14


@dataclass(frozen=True)
class Head:
    """The linear layer that makes logits, and what is done to them."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    transform: Transform
    operand: torch.dtype  # in which the products are meant
    machine: Machine
    shards: VocabShards | None = None  # where weight and bias are this rank's part of them

    @property
    def offset(self) -> int:
        """The first entry of weight and bias in the whole vocabulary."""
        return 0 if self.shards is None else self.shards.offset

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
        return TOP if tile.dtype == torch.float16 else 1.0

    def slices(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        vocab = self.weight.shape[0]
        for place, start in enumerate(range(0, vocab, plan.columns)):
            yield place, start, min(start + plan.columns, vocab)

    def bias_slice(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop]


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


class Scratch:
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


class HiddenRows:
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
