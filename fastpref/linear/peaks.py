"""What the ways from hidden states to log-probs need, by formula.

M positions of which N are scored, H, V, and e bytes an entry. What counts is the peak of the head's part of a step:
hidden states, `G` = their gradient and the head's, and what comes `beyond` these. A way is followed through its stages;
G is not there before the last product, so a stage before it has G taken off. In bytes, beyond hidden states and G:

    plain     logits of all positions, shifted, .float(), log_softmax, gather
              forward   (e + 8)·M·V: the logits, their float32 copy, the log-softmax
              backward  12·M·V − G: the log-softmax, the gradient of it (gather's zeros), the gradient of the copy
    chunked   the scored rows gathered, 256 at a time under torch.utils.checkpoint; C = min(256, N)
              forward   (e + 4 + [e < 4]·4)·C·V + e·N·H: as above, where a float32 block is its own copy
              backward  e·(2·N − M)·H, the gathered rows and their gradient, before that of the hidden states is there,
                        and the larger of 12·C·V and e·C·V + e·V·H, a block's dW beside the sum of those before;
                        or 2·e·V·H + e·(N + 2·C − M)·H: autograd adds the first two blocks' dW out of place
    sequence_logps    on the logits of all positions
              forward   e·M·V, and on a CPU a tile
              backward  2·e·M·V − G: the logits and their gradient, of which a CPU holds N rows; or the gradient alone
                        (inplace_backward=True, which is not the default, makes it e·M·V)
    linear_*  the plan's peak, plan.py

A softcap leaves its tanh for the backward: e·M·V more (chunked: e·C·V). TRL's function accumulates dW in float32 and
Liger's takes whole pairs: they may need more than `chunked` says.

What a CPU's product of 16-bit operands holds besides depends on the processor, and no flag tells it. oneDNN has a
float32 copy of the result on some (AVX-512 without bfloat16); on others (bfloat16 units, AMX) it copies the operands of
dW, and keeps that memory for the next block; with AVX2 it does neither. So each formula is an upper bound, with all of
these copies, and with `copies=False` a lower bound, with none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fastpref.linear.plan import Machine, Problem, machine_of
from fastpref.tiled import MAX_TILE_ROWS, TILE_ELEMENTS_PER_THREAD

Use = Literal["forward", "frozen", "trainable"]
USES: tuple[Use, ...] = ("forward", "frozen", "trainable")
CHUNK = 256


@dataclass(frozen=True)
class Step:
    """One micro-batch as the head sees it."""

    pairs: int
    length: int  # T
    share: float  # of a sequence's positions that are scored
    hidden_size: int  # H
    vocab: int  # V
    dtype: torch.dtype
    bias: bool = False
    softcap: bool = False
    gpu: bool = False
    streams: bool = True  # the loss has one argument, so that linear_preference_loss may stream

    @property
    def positions(self) -> int:  # M
        return 2 * self.pairs * self.length

    @property
    def scored(self) -> int:
        """Scored positions of one sequence; the last position predicts nothing."""
        return max(1, min(self.length - 1, round(self.share * self.length)))

    @property
    def rows(self) -> int:  # N
        return 2 * self.pairs * self.scored

    @property
    def product(self) -> int:
        """Operations of one product."""
        return 2 * self.rows * self.hidden_size * self.vocab

    @property
    def machine(self) -> Machine:
        return machine_of(torch.device("cuda" if self.gpu else "cpu"))

    def hidden_bytes(self) -> int:
        return self.positions * self.hidden_size * self.dtype.itemsize

    def gradient_bytes(self, use: Use) -> int:  # G
        if use == "forward":
            return 0
        head = self.vocab * (self.hidden_size + self.bias) * self.dtype.itemsize
        return self.hidden_bytes() + (head if use == "trainable" else 0)

    def held_bytes(self, use: Use) -> int:
        return self.hidden_bytes() + self.gradient_bytes(use)

    def problem(self, use: Use) -> Problem:
        return Problem(
            rows=self.rows,
            hidden_size=self.hidden_size,
            vocab=self.vocab,
            operand=self.dtype,
            hidden_dtype=self.dtype,
            weight_dtype=self.dtype,
            hidden=use != "forward",
            weight=use == "trainable",
            softcap=self.softcap,
            largest_pair=2 * self.scored if self.streams else 0,
            pairs=self.pairs,
        )


def plain_peak(step: Step, use: Use, *, copies: bool = True) -> int:
    e, logits = step.dtype.itemsize, step.positions * step.vocab
    if use == "forward":
        return (e + 8) * logits
    widest = (12 + (e if step.softcap else 0)) * logits
    return max(widest - step.gradient_bytes(use), e * logits + _product_copies(step, use, step.positions, copies))


def chunked_peak(step: Step, use: Use, *, copies: bool = True) -> int:
    e, tile = step.dtype.itemsize, min(CHUNK, step.rows) * step.vocab
    gathered = step.rows * step.hidden_size * e
    if use == "forward":
        return (e + (8 if e < 4 else 4)) * tile + gathered
    dh, head = step.hidden_bytes(), step.gradient_bytes(use) - step.hidden_bytes()
    widest = (12 + (e if step.softcap else 0)) * tile
    product = e * tile + _product_copies(step, use, min(CHUNK, step.rows), copies)
    if step.rows <= CHUNK:  # the block's dW is the gradient itself
        return max(2 * gathered - dh + max(widest - head, product), 2 * gathered)
    stay = _operand_copies(step, use, CHUNK, copies)
    first_sum = 2 * head + gathered + 2 * CHUNK * step.hidden_size * e - dh
    return max(2 * gathered - dh + max(widest + stay, product + head), first_sum + stay, 2 * gathered)


def logits_peak(step: Step, use: Use, *, copies: bool = True) -> int:
    e, logits = step.dtype.itemsize, step.positions * step.vocab
    tile = 0 if step.gpu else 4 * _cpu_tile(step.vocab)
    forward = e * logits + max(tile, 4 * logits if copies and _may_copy(step) else 0)
    if use == "forward":
        return forward
    gradient = e * (step.positions if step.gpu else step.rows) * step.vocab
    backward = e * logits * (2 if step.softcap else 1) + gradient + tile * (2 if step.softcap else 1)
    return max(
        max(forward, backward) - step.gradient_bytes(use), gradient + _product_copies(step, use, step.rows, copies)
    )


def _may_copy(step: Step) -> bool:
    return not step.gpu and step.dtype.itemsize < 4


def _operand_copies(step: Step, use: Use, rows: int, copies: bool) -> int:
    """What oneDNN may keep of a 16-bit dW (V, H) over `rows` rows: copies of both operands and of the result."""
    if not (copies and use == "trainable" and _may_copy(step)):
        return 0
    return step.dtype.itemsize * (rows * (step.vocab + step.hidden_size) + step.vocab * step.hidden_size)


def _product_copies(step: Step, use: Use, rows: int, copies: bool) -> int:
    """The same, and a float32 copy of the result while the product runs."""
    kept = _operand_copies(step, use, rows, copies)
    return kept + 4 * step.vocab * step.hidden_size if kept else 0


def _cpu_tile(vocab: int) -> int:
    """Elements of the torch path's tile, at most."""
    return max(vocab, min(MAX_TILE_ROWS * vocab, TILE_ELEMENTS_PER_THREAD * torch.get_num_threads()))
