"""Tile sizes and plans of the linear path: forward and backward for each, as multiples of the products alone.

    python -m fastpref.benchmarks.sweep_tiles [--tiny] [--json FILE]

The rows justify what fastpref/linear/plan.py knows of a machine: the tile of CPU and GPU, and `balance`, by which the
planner weighs a kept tile against a product. Configurations take turns, so that a machine that slows down slows all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastpref.linear import plan as planner
from fastpref.linear import tokens
from fastpref.tiled import Transform

from . import results
from .measure import Timer, copy_bandwidth, is_gpu, spread

BUDGET = 2**36
PLANS = ("keep", "recompute", "frozen")


def shapes(device: str, *, tiny: bool) -> list[tuple[int, int, int, torch.dtype]]:  # N, H, V, dtype
    if tiny:
        return [(9, 16, 507, torch.float32)]
    if is_gpu(device):
        return [(8192, size, 128256, torch.bfloat16) for size in (1024, 4096)]
    return [(512, size, 32768, torch.bfloat16) for size in (64, 128, 256, 1024, 2048)]


def tiles(device: str, *, tiny: bool) -> list[tuple[int, int]]:
    if tiny:
        return [(8, 256), (16, 512)]
    if is_gpu(device):
        return [(rows, columns) for rows in (2048, 4096, 8192) for columns in (2048, 4096, 8192)]
    return [(rows, columns) for rows in (256, 512) for columns in (1024, 2048, 4096, 8192)]


def call_of(
    shape: tuple[int, int, int, torch.dtype], plan: str, machine: planner.Machine, device: str
) -> Callable[[], Any]:
    """Forward and backward of the log-probs under one plan and tile."""
    count, size, vocab, dtype = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, count, size, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, size, generator=generator) / size**0.5).to(device, dtype)
    weight.requires_grad_(plan != "frozen")
    labels = torch.randint(vocab, (1, count), generator=generator).to(device)
    upstream = torch.linspace(-1.5, 2.0, count, device=device)[None]
    request = tokens.Request(0, -100, Transform(), dtype, BUDGET, plan)
    wanted = [x for x in (hidden, weight) if x.requires_grad]

    def call() -> Any:
        tokens.machine_of = lambda device: machine
        values = tokens.LinearTokenLogps.apply(hidden, weight, None, labels, None, request)
        return torch.autograd.grad(values, wanted, upstream)

    return call


def sweep(shape: tuple[int, int, int, torch.dtype], device: str, *, tiny: bool, rounds: int) -> list[dict[str, Any]]:
    base = planner.machine_of(torch.device(device))
    calls = {
        (plan, tile): call_of(shape, plan, replace(base, rows=tile[0], columns=tile[1]), device)
        for plan in PLANS
        for tile in tiles(device, tiny=tiny)
    }
    timers = {key: Timer(device) for key in calls}
    for round_ in range(rounds + 1):
        for key, call in calls.items():
            if round_ == 0:
                call()  # the first call pays for what is set up once
                continue
            timers[key].before()
            timers[key].run(call)
    count, size, vocab, dtype = shape
    operations = 2 * count * size * vocab
    rows = []
    for (plan, tile), timer in timers.items():
        times = spread(timer.seconds())
        products = {"keep": 3, "recompute": 4, "frozen": 2}[plan]
        row = {"suite": "tiles", "rows": count, "hidden": size, "vocab": vocab, "dtype": str(dtype), "plan": plan}
        row |= {"tile": list(tile), "tflop_per_s": products * operations / times["median_ms"] / 1e9, **times}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a shape and plan: the median of each tile, fastest first."""
    lines = []
    for hidden, plan in dict.fromkeys((row["hidden"], row["plan"]) for row in rows):
        found = sorted(
            (row for row in rows if (row["hidden"], row["plan"]) == (hidden, plan)), key=lambda row: row["median_ms"]
        )
        cells = [f"{row['tile'][0]}x{row['tile'][1]}:{row['median_ms']:.0f}" for row in found]
        lines.append(f"H={hidden} {plan} ms: {' '.join(cells)}")
    for hidden in dict.fromkeys(row["hidden"] for row in rows):
        best = {
            plan: median(row["median_ms"] for row in rows if (row["hidden"], row["plan"]) == (hidden, plan))
            for plan in PLANS
        }
        lines.append(f"H={hidden}: recompute takes {best['recompute'] / best['keep']:.2f} times as long as keep")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sweep_tiles", description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, help="rewritten after each shape")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    device_class = "tiny" if options.tiny else "gpu" if is_gpu(device) else "cpu"
    head = results.environment(device, device_class, copy_bandwidth(device, 2**24 if options.tiny else 2**28))
    rows: list[results.Row] = []
    wanted = shapes(device, tiny=options.tiny)
    for place, shape in enumerate(wanted, 1):
        print(f"shape {place} of {len(wanted)}: N={shape[0]} H={shape[1]} V={shape[2]}", file=sys.stderr)
        rows += sweep(shape, device, tiny=options.tiny, rounds=2 if options.tiny else 5)
        if options.json is not None:
            results.write(options.json, {**head, "complete": place == len(wanted)}, rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
