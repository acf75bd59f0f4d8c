"""Which products are made, and how large their tiles are: the memory model and the cost model of the linear path.

One product is 2·N·H·V operations. A call needs one for the values, one for dh and one for dW. The gradient of a logit
needs the row's whole logsumexp, so it can be formed only when the vocabulary has been seen once: either the tiles of
the first product were kept (N·V numbers), or they are computed again (one product more), or only dh is wanted, which
accumulates beside the logsumexp and is rescaled when a row's maximum grows. A preference loss whose reference is known
can also stream: a block of rows goes through both sweeps, and dW gathers in a float32 accumulator.

    plan        products   beyond inputs, outputs and gradients
    forward     1          tiles
    frozen      2          tiles, N·H                          dh beside the logsumexp
    keep        3          tiles, N·H, N·V                     every tile kept
    mixed       3 + f      tiles, N·H, (1 − f)·N·V             kept as far as the budget goes
    recompute   4          tiles, N·H                          mixed with f = 1
    two-pass    5          tiles                               dh and dW apart: not even N·H fits
    stream      3          tiles, R·V, V·H (twice for pairs)   R rows at a time
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fastpref.linear.rows import GATHERED, PIECE

MIB = 2**20


@dataclass(frozen=True)
class Machine:
    """What the planner knows of a device. Sizes of tiles are those that a sweep chose; see benchmarks/README.md."""

    name: str
    rows: int  # of a tile, at most
    columns: int  # of a tile, at most
    min_rows: int
    min_columns: int
    balance: float  # operations of a product in the time that a byte takes to memory: what traffic costs
    upcast: bool  # operands of products are widened to float32, slice by slice


CPU = Machine("cpu", rows=1024, columns=2048, min_rows=64, min_columns=256, balance=50.0, upcast=True)
# Not measured yet: 8192 × 4096 float32 is 128 MiB; 700 TFLOP/s against 4.5 TB/s.
GPU = Machine("gpu", rows=8192, columns=4096, min_rows=256, min_columns=512, balance=160.0, upcast=False)


def machine_of(device: torch.device) -> Machine:
    # AMD's torch has no product of 16-bit operands with a float32 result: there they are widened as on a CPU.
    if device.type == "cuda":
        return GPU if torch.version.hip is None else replace(GPU, upcast=True)
    return CPU


@dataclass(frozen=True)
class Problem:
    """What is to be computed. Sizes in elements; `weight` and `hidden`: whether their gradients are wanted."""

    rows: int  # N, scored
    hidden_size: int  # H
    vocab: int  # V
    operand: torch.dtype  # in which the products are meant: bfloat16 under autocast
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    hidden: bool = False
    weight: bool = False
    softcap: bool = False
    largest_pair: int = 0  # scored rows of the largest pair, where pairs may stream; 0 where not
    pairs: int = 0
    sums: bool = False  # more sums a row than its logsumexp, which the torch path makes in a second tile
    entropy: bool = False  # the gradient of the rows' entropies is wanted too: of logits, no kept tile has them
    ranks: int = 1  # that the vocabulary is split over; `vocab` is then the largest part


@dataclass(frozen=True)
class Plan:
    name: str
    row_block: int  # rows of a tile
    columns: int  # columns of a tile
    kept: int  # how many slices of `columns` are kept
    dh_in_forward: bool  # dh beside the logsumexp, unscaled
    two_pass: bool  # dh and dW in sweeps of their own
    products: float
    peak: int  # bytes beyond inputs, outputs and gradients, as modelled
    slices: int

    @property
    def describe(self) -> str:
        return (
            f"{self.name}: {self.products:.2f} products, tiles of {self.row_block} x {self.columns}, "
            f"{self.kept} of {self.slices} slices kept, peak {self.peak / MIB:.1f} MiB"
        )


def accumulator_dtype(operand: torch.dtype) -> torch.dtype:
    return torch.float64 if operand == torch.float64 else torch.float32


def operand_dtype(machine: Machine, operand: torch.dtype) -> torch.dtype:
    """What products are given: the dtype that was asked for, or the accumulator's where that one is too slow."""
    return accumulator_dtype(operand) if machine.upcast else operand


def kept_dtype(operand: torch.dtype) -> torch.dtype:
    """A kept tile holds exp(z − max) in [0, 1] and is rounded once, to the precision of the products."""
    return operand


def _tile_bytes(problem: Problem, machine: Machine, row_block: int, columns: int, *, backward: bool) -> int:
    """Scratch of a sweep: the logits, their copy as operand, the widened operands, a slice of dW."""
    wide = accumulator_dtype(problem.operand).itemsize
    operand = operand_dtype(machine, problem.operand)
    H = problem.hidden_size
    total = row_block * columns * wide * (1 + problem.softcap + (problem.sums or problem.entropy))
    if operand.itemsize != wide:
        total += row_block * columns * operand.itemsize
    if problem.weight_dtype != operand:
        total += columns * H * operand.itemsize
    total += row_block * H * operand.itemsize  # gathered, or widened
    total += min(row_block, PIECE) * H * problem.hidden_dtype.itemsize  # on the way there
    # A slice of dW apart from dW: float16 is scaled, and scaled back before it meets what was there.
    scaled = problem.operand == torch.float16 and not machine.upcast
    if backward and problem.weight and (problem.weight_dtype.itemsize != wide or scaled):
        total += columns * H * wide
    if problem.hidden and not problem.weight:  # dh takes the labels' rows of the head, a few at a time
        total += min(row_block, GATHERED) * H * (problem.weight_dtype.itemsize + wide)
    # Statistics, labels and weights of all rows, and small temporaries of a block.
    more = 32 * (problem.sums + problem.entropy)
    if problem.ranks > 1:  # all ranks' statistics, and what becomes of them
        more += wide * problem.ranks * (14 if problem.sums else 8)
    return total + problem.rows * (64 + more) + row_block * 32


def _shrink(
    problem: Problem, machine: Machine, room: int, *, backward: bool, per_row: int = 0
) -> tuple[int, int] | None:
    """The largest tile that fits into `room` bytes, or None: columns shrink first, rows feed the products.

    `per_row`: bytes besides that each row of the tile takes.
    """
    row_block = min(machine.rows, _round_up(max(problem.rows, 1), 8))
    columns = min(machine.columns, _round_up(problem.vocab, 16))
    while _tile_bytes(problem, machine, row_block, columns, backward=backward) + row_block * per_row > room:
        if columns > machine.min_columns and columns >= row_block:
            columns = max(machine.min_columns, columns // 2)
        elif row_block > machine.min_rows:
            row_block = max(machine.min_rows, row_block // 2)
        elif columns > machine.min_columns:
            columns = max(machine.min_columns, columns // 2)
        else:
            return None
    return row_block, columns


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def minimum_budget(problem: Problem, machine: Machine) -> int:
    """The least that any plan needs: one smallest tile and what a sweep keeps a row."""
    row_block = min(machine.min_rows, _round_up(max(problem.rows, 1), 8))
    columns = min(machine.min_columns, _round_up(problem.vocab, 16))
    tile = _tile_bytes(problem, machine, row_block, columns, backward=problem.hidden or problem.weight)
    return tile + (row_block * problem.hidden_size * accumulator_dtype(problem.operand).itemsize)


def plan_tokens(problem: Problem, machine: Machine, budget: int, *, force: str | None = None) -> Plan:
    """The plan for values of any use, whose upstream gradient is known only in the backward.

    `force` names a plan of the table above, for tests and measurements. ValueError for a budget below one tile.
    """
    gradients = problem.hidden or problem.weight
    wide = accumulator_dtype(problem.operand).itemsize
    low = minimum_budget(problem, machine)
    if budget < low:
        raise ValueError(
            f"memory_budget of {budget} bytes is smaller than one tile for {problem.rows} scored rows, "
            f"H={problem.hidden_size}, V={problem.vocab}: give at least {low} bytes ({math.ceil(low / MIB)} MiB)"
        )
    row_sums = problem.rows * problem.hidden_size * wide  # dh while it accumulates
    if not gradients:
        return _made("forward", problem, machine, _tile(problem, machine, budget, backward=False), products=1)
    if problem.entropy and force in ("frozen", "keep", "mixed"):
        raise ValueError(f"the {force} plan has no gradient of entropies, which needs the logits again")
    if not problem.weight and not problem.entropy and force in (None, "frozen"):
        tile = _shrink(problem, machine, budget - row_sums, backward=False)
        if tile is not None:
            return _made("frozen", problem, machine, tile, products=2, extra=row_sums, dh_in_forward=True)
        if force == "frozen":
            raise ValueError("the frozen plan does not fit the budget")
    products = 1 + problem.hidden + problem.weight
    two_pass = force == "two-pass"
    tile = None if two_pass else _shrink(problem, machine, budget - problem.hidden * row_sums, backward=True)
    if tile is None:  # not even N·H fits: dh block by block, in a sweep of its own
        per_row = problem.hidden_size * wide
        row_block, columns = _tile(problem, machine, budget, backward=True, per_row=per_row)
        extra = row_block * per_row
        again = problem.hidden + problem.weight
        return _made(
            "two-pass", problem, machine, (row_block, columns), products=products + again, extra=extra, two_pass=True
        )
    sums = problem.hidden * row_sums
    plan = _made("recompute", problem, machine, tile, products=products + 1, extra=sums)
    if force == "recompute" or problem.entropy or (force is None and not keeping_pays(problem, machine)):
        return plan
    a_slice = _slice_bytes(problem, plan.columns)
    kept = plan.slices if problem.rows == 0 else min(plan.slices, (budget - plan.peak) // a_slice)
    if force == "keep" and kept < plan.slices:
        raise ValueError(f"keeping every tile needs {plan.peak + plan.slices * a_slice} bytes, the budget is {budget}")
    if kept == 0:
        return plan
    return replace(
        plan,
        name="keep" if kept == plan.slices else "mixed",
        kept=kept,
        products=products + 1 - kept / plan.slices,
        peak=plan.peak + kept * a_slice,
    )


def plan_preference(problem: Problem, machine: Machine, budget: int, *, force: str | None = None) -> Plan:
    """The plan for a preference loss with a known reference: that of `plan_tokens`, or streaming if it is cheaper."""
    if force == "stream" and not (problem.weight and problem.largest_pair):
        raise ValueError("the stream plan needs a trainable head and a loss of one argument, a margin loss")
    plan = None if force == "stream" else plan_tokens(problem, machine, budget, force=force)
    if force not in (None, "stream") or not (problem.weight and problem.largest_pair):
        assert plan is not None
        return plan
    stream = _stream(problem, machine, budget)
    if stream is None:
        if plan is None:
            raise ValueError(
                f"the stream plan does not fit memory_budget={budget}: it holds a float32 copy of the head"
            )
        return plan
    if plan is None:
        return stream
    return min(plan, stream, key=lambda one: cost_in_products(one, problem, machine))


def _stream(problem: Problem, machine: Machine, budget: int) -> Plan | None:
    wide = accumulator_dtype(problem.operand).itemsize
    sums = problem.vocab * problem.hidden_size * wide * (2 if problem.pairs > 1 else 1)
    row_block = min(machine.rows, _round_up(problem.largest_pair, 8))
    columns = min(machine.columns, _round_up(problem.vocab, 16))
    while True:
        slices = -(-problem.vocab // columns)
        block = replace(problem, rows=row_block)
        extra = sums + slices * _slice_bytes(block, columns) + row_block * problem.hidden_size * wide
        peak = extra + _tile_bytes(problem, machine, row_block, columns, backward=True)
        if peak <= budget:
            made = _made("stream", problem, machine, (row_block, columns), products=3, extra=extra)
            return replace(made, kept=slices)
        if row_block <= machine.min_rows:
            return None
        row_block = max(machine.min_rows, row_block // 2)


def cost_in_products(plan: Plan, problem: Problem, machine: Machine) -> float:
    """In products: the traffic that a plan adds counts as the operations that could be done meanwhile."""
    product = 2 * max(problem.rows, 1) * problem.hidden_size * problem.vocab
    moved = 2.0 * plan.kept / plan.slices * problem.rows * problem.vocab * kept_dtype(problem.operand).itemsize
    if plan.name == "stream":
        wide = accumulator_dtype(problem.operand).itemsize
        blocks = max(2 * problem.pairs, problem.rows / plan.row_block)
        moved += (
            2.0 * problem.vocab * problem.hidden_size * wide * (blocks + (problem.pairs if problem.pairs > 1 else 0))
        )
    return plan.products + moved * machine.balance / product


def keeping_pays(problem: Problem, machine: Machine) -> bool:
    """Writing and reading a kept tile must cost less than the product that it saves."""
    return 2 * kept_dtype(problem.operand).itemsize * machine.balance < 2 * problem.hidden_size


def _slice_bytes(problem: Problem, columns: int) -> int:
    """A kept slice: its tile and each row's maximum at that point."""
    return problem.rows * (columns * kept_dtype(problem.operand).itemsize + 4)


def _tile(problem: Problem, machine: Machine, room: int, *, backward: bool, per_row: int = 0) -> tuple[int, int]:
    smallest = (
        min(machine.min_rows, _round_up(max(problem.rows, 1), 8)),
        min(machine.min_columns, _round_up(problem.vocab, 16)),
    )
    return _shrink(problem, machine, room, backward=backward, per_row=per_row) or smallest


def _made(
    name: str,
    problem: Problem,
    machine: Machine,
    tile: tuple[int, int],
    *,
    products: float,
    extra: int = 0,
    dh_in_forward: bool = False,
    two_pass: bool = False,
) -> Plan:
    row_block, columns = tile
    backward = problem.weight or (problem.hidden and not dh_in_forward)
    return Plan(
        name=name,
        row_block=row_block,
        columns=columns,
        kept=0,
        dh_in_forward=dh_in_forward,
        two_pass=two_pass,
        products=products,
        peak=extra + _tile_bytes(problem, machine, row_block, columns, backward=backward),
        slices=-(-problem.vocab // columns),
    )
