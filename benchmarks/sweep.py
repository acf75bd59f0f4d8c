"""Sizes of the logits path's tiles: times of forward and backward for each, and the share of the limit.

    python -m fastpref.benchmarks.sweep [--tiny] [--json FILE]

On a GPU: block sizes and warps of the kernels in kernels/logps*.py, each kernel alone, as shares of a copy's bandwidth.
On a CPU: the elements that a thread's tile holds in fastpref/tiled.py, through the public function. The rows justify
the sizes that stand there. `--tiny` proves the script where nothing is to be learnt; with TRITON_INTERPRET=1 it runs
the kernels' part without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastpref
from fastpref import tiled

from . import results
from .cases import HEADLINE, VOCABS, LogpsCase, logps_cases
from .inputs import make_labels, make_logits, make_upstream
from .measure import Timer, copy_bandwidth, is_gpu, spread

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

Calls = dict[tuple[str, tuple[tuple[str, int], ...]], tuple[Callable[[], Any], int]]  # (part, sizes): call, bytes


def kernel_calls(case: LogpsCase, device: str) -> Calls:
    """Each kernel alone, on a GPU or through Triton's interpreter."""
    from fastpref.kernels import logps, logps_backward

    logits = make_logits(case, device, 0).detach()
    labels = make_labels(case, device, 0)
    grad = torch.ones(labels.shape, device=device)
    read = case.bytes_that_must_move("forward")
    inputs = (logits, labels, None)
    saved = (grad, *inputs, *logps.token_logps_forward(*inputs, 1, -100)[1:], 1, -100)
    calls: Calls = {}
    for sizes in FORWARD:
        call = partial(logps.token_logps_forward, *inputs, 1, -100, **sizes)
        calls["forward", tuple(sizes.items())] = (call, read)
    for sizes in BACKWARD:
        call = partial(logps_backward.token_logps_backward, *saved, **sizes)
        calls["backward", tuple(sizes.items())] = (call, case.bytes_that_must_move("train") - read)
    return calls


def tile_calls(case: LogpsCase, device: str) -> Calls:
    """Forward and backward of the public function on a CPU, under each size of its tiles."""
    logits, labels, upstream = (make(case, device, 0) for make in (make_logits, make_labels, _upstream))

    def call(elements: int) -> Any:
        chosen = tiled.TILE_ELEMENTS_PER_THREAD
        tiled.TILE_ELEMENTS_PER_THREAD = elements
        try:
            return torch.autograd.grad(fastpref.sequence_logps(logits, labels), logits, upstream)
        finally:
            tiled.TILE_ELEMENTS_PER_THREAD = chosen

    moved = case.bytes_that_must_move("train")
    return {("train", (("tile_elements", size),)): (partial(call, size), moved) for size in TILE_ELEMENTS}


def _upstream(case: LogpsCase, device: str, seed: int) -> torch.Tensor:
    return make_upstream(case, device)


def sweep_case(case: LogpsCase, calls: Calls, device: str, copy: float) -> list[results.Row]:
    """Sizes take turns, so that a machine that slows down slows all of them."""
    timers = {key: Timer(device) for key in calls}
    for round_ in range(case.rounds + 1):
        for key, (call, _) in calls.items():
            if round_ == 0:
                call()  # the first call compiles
                continue
            timers[key].before()
            timers[key].run(call)
    rows = []
    for (part, sizes), (_, moved) in calls.items():
        times = spread(timers[part, sizes].seconds())
        rate = moved / times["median_ms"] / 1e6
        shape = {"suite": "sweep", "case": case.name, "vocab": case.vocab, "dtype": case.dtype, "part": part}
        rows.append({**shape, "sizes": dict(sizes), **times, "gb_per_s": rate, "ratio_to_limit": rate / copy})
    return rows


def format_sweep(rows: Sequence[results.Row]) -> str:
    """A line a part and case: the share of the copy's bandwidth for each size, as width x depth x warps or so."""
    lines = []
    for case, part in dict.fromkeys((row["case"], row["part"]) for row in rows):
        found = [row for row in rows if (row["case"], row["part"]) == (case, part)]
        found.sort(key=lambda row: -row["ratio_to_limit"])
        cells = [f"{'x'.join(map(str, row['sizes'].values()))}:{row['ratio_to_limit']:.0%}" for row in found]
        names = " x ".join(found[0]["sizes"])
        lines.append(f"{case} {part}: best {cells[0]} ({names}); then {' '.join(cells[1:8])}")
    return "\n".join(lines)


def _cases(device: str, *, tiny: bool) -> list[LogpsCase]:
    if tiny:
        return logps_cases("tiny", memory=0)
    if not is_gpu(device):
        return [HEADLINE, LogpsCase("gpt2", 2, 512, VOCABS["gpt2"], 0.5), LogpsCase("v32000", 2, 512, 32000, 0.5)]
    memory = torch.cuda.get_device_properties(0).total_memory
    wanted = {"gpt2", "qwen3", "gpt2-fp32"}  # V odd, V divisible by 16, and the other element size
    return [case for case in logps_cases("gpu", memory=memory) if case.name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, help="rewritten after each case")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels_run = is_gpu(device) or os.environ.get("TRITON_INTERPRET") == "1"
    copy_bytes = 2**24 if options.tiny else 2**28
    if is_gpu(device) and not options.tiny:
        copy_bytes = min(2**32, torch.cuda.get_device_properties(0).total_memory // 16)
    copy = copy_bandwidth(device, copy_bytes)
    device_class = "tiny" if options.tiny else "gpu" if is_gpu(device) else "cpu"
    head = results.environment(device, device_class, copy)
    rows: list[results.Row] = []
    cases = _cases(device, tiny=options.tiny)
    for place, case in enumerate(cases, 1):
        print(f"case {place} of {len(cases)}: {case.name}", file=sys.stderr)
        calls = kernel_calls(case, device) if kernels_run else tile_calls(case, device)
        if options.tiny:  # one size of each part
            calls = dict({key[0]: (key, call) for key, call in calls.items()}.values())
        rows += sweep_case(case, calls, device, copy)
        if options.json is not None:
            results.write(options.json, {**head, "complete": place == len(cases)}, rows)
    print(format_sweep(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
