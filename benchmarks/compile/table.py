"""The rows of the compile report as a table in a terminal, and as the committed page COMPILED.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastpref.tables import markdown_table, print_table

from .occupancy import ARCHS

REGENERATE = "python -m fastpref.benchmarks.compile.report --markdown benchmarks/compile/COMPILED.md"
HEAD = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
PAGE_MARK = HEAD.partition("{")[0]  # how every such page begins


class Row(NamedTuple):
    """One compiled kernel: `stack` and `shared` in bytes; `problem` is empty where all is well."""

    module: str
    kernel: str
    note: str
    arch: str
    dtype: str
    num_warps: int
    registers: int  # of a thread; vector registers on AMD
    scalar_registers: int  # of a wavefront, AMD
    stack: int
    spills: int
    shared: int
    loads: Mapping[int, int]  # bytes a thread loads from global memory at once: how many such instructions
    stores: Mapping[int, int]
    matrix: Sequence[str]  # instructions for matrix products and tensor memory
    copies: Sequence[str]  # asynchronous copies
    blocks: int  # resident on one multiprocessor
    resident_warps: int
    limiter: str
    seconds: float
    problem: str


_COLUMNS = "kernel", "dtype", "threads", "registers", "stack / spills", "shared", "loads", "stores", "matrix", "async"


def show(rows: Sequence[Row]) -> None:
    """A table in a terminal, and a line for each problem."""
    header = ("kernel", "arch", "dtype", "warps", "registers", "stack", "spills", "shared", "resident", "")
    cells = []
    for row in rows:
        numbers = (row.num_warps, row.registers, row.stack, row.spills, row.shared, row.resident_warps)
        verdict = "PROBLEM" if row.problem else "ok"
        cells.append([full_name(row), row.arch, row.dtype, *map(str, numbers), verdict])
    print_table("what the kernels compile to", header, cells, words=("kernel", "arch", "dtype", ""))
    failed = [row for row in rows if row.problem]
    for row in failed:
        print(f"{full_name(row)} {row.arch} {row.dtype}: {row.problem}")
    print(f"{len(rows)} compiled kernels, {len(failed)} with a problem")


def format_markdown(rows: Sequence[Row], triton_version: str) -> str:
    """The page, which begins with page.md: a table an architecture, its rows in the order of the report."""
    names = [name for name in ARCHS if any(row.arch == name for row in rows)]
    warps = ", ".join(f"{ARCHS[name].min_warps} ({name})" for name in names)
    parts = [HEAD.format(triton=triton_version, command=REGENERATE, warps=warps)]
    for name in names:
        arch = ARCHS[name]
        header = [*_COLUMNS, f"blocks of {arch.blocks}", f"warps of {arch.warps}", "limit"]
        table = markdown_table(header, [_cells(row) for row in rows if row.arch == name], len(header))
        parts.append(f"## {name}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def full_name(row: Row) -> str:
    return f"{row.kernel} [{row.note}]" if row.note else row.kernel


def _cells(row: Row) -> tuple[str, ...]:
    scalar = f" + {row.scalar_registers}" if row.scalar_registers else ""
    return (
        full_name(row),
        row.dtype,
        str(row.num_warps * ARCHS[row.arch].warp_size),
        f"{row.registers}{scalar}",
        f"{row.stack} / {row.spills}",
        str(row.shared),
        _widths(row.loads),
        _widths(row.stores),
        " ".join(row.matrix) or "none",
        " ".join(row.copies) or "none",
        str(row.blocks),
        str(row.resident_warps),
        row.limiter,
    )


def _widths(accesses: Mapping[int, int]) -> str:
    return " ".join(f"{count}×{width}" for width, count in sorted(accesses.items(), reverse=True)) or "none"
