"""Sizes of tiles: times of forward and backward for each, and the share of the limit or the products they reach.

    python -m fastpref.benchmarks.sweep [--linear] [--tiny] [--json FILE]

Of the logits path, on a GPU: block sizes and warps of the kernels in kernels/logps*.py, each kernel alone, as shares of
a copy's bandwidth; on a CPU the elements that a thread's tile holds in fastpref/tiled.py, through the public function.
With --linear, of the linear path: tiles and plans, which justify what fastpref/linear/plan.py knows of a machine: the
tile of CPU and GPU, and `balance`, by which the planner weighs a kept tile against a product.

Sizes take turns, so that a machine that slows down slows all of them. `--tiny` proves the script where nothing is to be
learnt; with TRITON_INTERPRET=1 it runs the kernels' part without a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import fastpref
from fastpref import tiled
from fastpref.linear import plan as planner
from fastpref.linear import tokens
from fastpref.options import Parser
from fastpref.tables import print_table
from fastpref.tiled import Transform

from . import results
from .arguments import fail
from .cases import VOCABS, LogpsCase, logps_cases
from .inputs import make_labels, make_logits, make_upstream
from .measure import Timer, head_of, is_gpu, spread

WARPS = (2, 4, 8)
# Elements a thread holds: fewer leave loads narrow, more spill.
ELEMENTS = range(8, 33)
FORWARD = [
    {"width": width, "depth": depth, "num_warps": warps}
    for width in (512, 1024, 2048)
    for depth in (1, 2, 4, 8)
    for warps in WARPS
    if width * depth // (32 * warps) in ELEMENTS
]
BACKWARD = [
    {"block": block, "num_warps": warps}
    for block in (1024, 2048, 4096, 8192)
    for warps in WARPS
    if block // (32 * warps) in ELEMENTS
]
# Of a CPU thread's tile, in elements of float32.
TILE_ELEMENTS = tuple(2**power for power in range(16, 23))
BUDGET = 2**36
PRODUCTS = {"keep": 3, "recompute": 4, "frozen": 2}  # by plan of the linear path
BEST = 8  # sizes that are shown of each part

Key = TypeVar("Key", bound=Hashable)
Sizes = tuple[str, tuple[tuple[str, int], ...]]  # the part, and its sizes


def in_turn(calls: Mapping[Key, Callable[[], Any]], device: str, rounds: int) -> dict[Key, dict[str, Any]]:
    """The times of each call, after a first one that compiles and sets up."""
    timers = {key: Timer(device) for key in calls}
    for round_ in range(rounds + 1):
        for key, call in calls.items():
            if round_ == 0:
                call()
                continue
            timers[key].before()
            timers[key].run(call)
    return {key: spread(timer.seconds()) for key, timer in timers.items()}


def kernel_calls(case: LogpsCase, device: str) -> dict[Sizes, Callable[[], Any]]:
    """Each kernel alone, on a GPU or through Triton's interpreter."""
    from fastpref.kernels import logps, logps_backward

    logits = make_logits(case, device, 0).detach()
    labels = make_labels(case, device, 0)
    grad = torch.ones(labels.shape, device=device)
    inputs = (logits, labels, None)
    saved = (grad, *inputs, *logps.token_logps_forward(*inputs, 1, -100)[1:], 1, -100)
    forward, backward = partial(logps.token_logps_forward, *inputs, 1, -100), logps_backward.token_logps_backward
    calls: dict[Sizes, Callable[[], Any]] = {}
    calls |= {("forward", tuple(sizes.items())): partial(forward, **sizes) for sizes in FORWARD}
    return calls | {("backward", tuple(sizes.items())): partial(backward, *saved, **sizes) for sizes in BACKWARD}


def tile_calls(case: LogpsCase, device: str) -> dict[Sizes, Callable[[], Any]]:
    """Forward and backward of the public function on a CPU, under each size of its tiles."""
    logits, labels, upstream = make_logits(case, device, 0), make_labels(case, device, 0), make_upstream(case, device)

    def call(elements: int) -> Any:
        chosen = tiled.TILE_ELEMENTS_PER_THREAD
        tiled.TILE_ELEMENTS_PER_THREAD = elements
        try:
            return torch.autograd.grad(fastpref.sequence_logps(logits, labels), logits, upstream)
        finally:
            tiled.TILE_ELEMENTS_PER_THREAD = chosen

    return {("train", (("tile_elements", size),)): partial(call, size) for size in TILE_ELEMENTS}


def logits_cases(device: str, *, tiny: bool) -> list[LogpsCase]:
    if tiny:
        return logps_cases("tiny", memory=0)
    if not is_gpu(device):
        headline = logps_cases("cpu", memory=0)[0]
        return [headline, LogpsCase("gpt2", 2, 512, VOCABS["gpt2"], 0.5), LogpsCase("v32000", 2, 512, 32000, 0.5)]
    memory = torch.cuda.get_device_properties(0).total_memory
    wanted = {"gpt2", "qwen3", "gpt2-fp32"}  # V odd, V divisible by 16, and the other element size
    return [case for case in logps_cases("gpu", memory=memory) if case.name in wanted]


def sweep_logits(device: str, copy: float, *, tiny: bool) -> Iterator[list[results.Row]]:
    """The rows of each case."""
    kernels_run = is_gpu(device) or os.environ.get("TRITON_INTERPRET") == "1"
    for case in logits_cases(device, tiny=tiny):
        calls = kernel_calls(case, device) if kernels_run else tile_calls(case, device)
        if tiny:  # one size of each part
            calls = dict({key[0]: (key, call) for key, call in calls.items()}.values())
        read = case.bytes_that_must_move("forward")
        train = case.bytes_that_must_move("train")
        moved = {"forward": read, "backward": train - read, "train": train}
        rows = []
        for (part, sizes), times in in_turn(calls, device, case.rounds).items():
            rate = moved[part] / times["median_ms"] / 1e6
            shape = {"suite": "sweep", "case": case.name, "vocab": case.vocab, "dtype": case.dtype, "part": part}
            rows.append({**shape, "sizes": dict(sizes), **times, "gb_per_s": rate, "ratio_to_limit": rate / copy})
        yield rows


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


def plan_call(
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


def sweep_linear(device: str, *, tiny: bool) -> Iterator[list[results.Row]]:
    """The rows of each shape."""
    base = planner.machine_of(torch.device(device))
    for shape in shapes(device, tiny=tiny):
        calls = {
            (plan, tile): plan_call(shape, plan, replace(base, rows=tile[0], columns=tile[1]), device)
            for plan in PRODUCTS
            for tile in tiles(device, tiny=tiny)
        }
        count, size, vocab, dtype = shape
        rows = []
        for (plan, tile), times in in_turn(calls, device, 2 if tiny else 5).items():
            rate = PRODUCTS[plan] * 2 * count * size * vocab / times["median_ms"] / 1e9
            row = {"suite": "tiles", "rows": count, "hidden": size, "vocab": vocab, "dtype": str(dtype), "plan": plan}
            rows.append({**row, "tile": list(tile), "tflop_per_s": rate, **times})
        yield rows


def show(rows: Sequence[results.Row], *, linear: bool) -> None:
    """The fastest sizes of each part and case, or of each plan and width."""
    groups: dict[tuple[str, str], list[results.Row]] = {}
    for row in rows:
        key = (f"H={row['hidden']}", row["plan"]) if linear else (row["case"], row["part"])
        groups.setdefault(key, []).append(row)
    cells = []
    for (case, part), found in groups.items():
        for row in sorted(found, key=lambda row: row["median_ms"])[:BEST]:
            sizes = row["tile"] if linear else row["sizes"].values()
            reached = f"{row['tflop_per_s']:.3g} TFLOP/s" if linear else f"{row['ratio_to_limit']:.0%} of a copy"
            cells.append([case, part, "x".join(map(str, sizes)), f"{row['median_ms']:.3g}", reached])
    print_table("sizes, the fastest first", ["case", "part", "sizes", "ms", "reached"], cells, words=("case", "part"))


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 2 bad input."""
    parser = Parser(prog="sweep", description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--linear", action="store_true", help="tiles and plans of the linear path")
    parser.add_argument("--tiny", action="store_true", help="proves the script")
    parser.add_argument("--json", type=Path, help="rewritten after each case")
    try:
        options = parser.parse_args(argv)
        results.check_json(options.json)
    except (ValueError, OSError) as error:
        return fail("sweep", error)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copied = 2**24 if options.tiny else 2**28
    if is_gpu(device) and not options.tiny:
        copied = min(2**32, torch.cuda.get_device_properties(0).total_memory // 16)
    device_class = "tiny" if options.tiny else "gpu" if is_gpu(device) else "cpu"
    store = results.Store(options.json, head_of(device, device_class, copied))
    if options.linear:
        parts = sweep_linear(device, tiny=options.tiny)
    else:
        parts = sweep_logits(device, store.head["copy_gb_per_s"], tiny=options.tiny)
    for rows in parts:
        store.rows += rows
        store.save()
        print(f"{len(store.rows)} rows", file=sys.stderr)
    store.save(complete=True)
    show(store.rows, linear=options.linear)
    return 0


if __name__ == "__main__":
    sys.exit(main())
