"""Block sizes and warps of the log-prob kernels: GB/s of forward and backward for each, as shares of the copy's.

    python benchmarks/sweep.py [--tiny] [--json FILE]

The rows justify the sizes in kernels/logps.py. `--tiny` runs a case that Triton's interpreter can, to prove
the script where there is no GPU (with TRITON_INTERPRET=1); its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import results
import torch
from cases import LogpsCase, logps_cases, make_labels, make_logits
from measure import Timer, bandwidth, copy_bandwidth, is_gpu, spread

from fastpref.kernels import logps as kernels

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


def time_call(call: Callable[[], Any], device: str, rounds: int) -> dict[str, Any]:
    call()
    timer = Timer(device)
    for _ in range(rounds):
        timer.before()
        timer.run(call)
    return spread(timer.seconds())


def sweep_case(case: LogpsCase, device: str, copy: float, *, first_only: bool) -> list[dict[str, Any]]:
    logits = make_logits(case, device, 0).detach()
    labels = make_labels(case, device, 0)
    grad = torch.ones(labels.shape, device=device)
    read = case.scored_rows * case.vocab * case.itemsize
    inputs = (logits, labels, None)
    saved = (grad, *inputs, *kernels.token_logps_forward(*inputs, 1, -100)[1:], 1, -100)

    def forward(**sizes: int) -> Any:
        return kernels.token_logps_forward(*inputs, 1, -100, **sizes)

    def backward(**sizes: int) -> Any:
        return kernels.token_logps_backward(*saved, **sizes)

    rows = []
    for name, kernel, moved, configurations in (
        ("forward", forward, read, FORWARD),
        ("backward", backward, case.bytes_that_must_move - read, BACKWARD),
    ):
        for sizes in configurations[:1] if first_only else configurations:
            times = time_call(partial(kernel, **sizes), device, case.rounds)
            shape = {"case": case.name, "vocab": case.vocab, "dtype": case.dtype}
            rows.append(
                {**shape, "kernel": name, "sizes": sizes, **times, **bandwidth(moved, times["median_ms"], copy)}
            )
    return rows


def format_sweep(rows: Sequence[dict[str, Any]]) -> str:
    """A line a kernel and case: the share of the copy's bandwidth for each size, as width x depth x warps or so."""
    lines = []
    for case, kernel in dict.fromkeys((row["case"], row["kernel"]) for row in rows):
        found = [row for row in rows if (row["case"], row["kernel"]) == (case, kernel)]
        found.sort(key=lambda row: -row["ratio_to_copy"])
        cells = [f"{'x'.join(map(str, row['sizes'].values()))}:{row['ratio_to_copy']:.0%}" for row in found]
        names = " x ".join(found[0]["sizes"])
        lines.append(f"{case} {kernel}: best {cells[0]} ({names}); then {' '.join(cells[1:8])}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sweep.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not is_gpu(device) and not options.tiny:
        parser.error("no GPU here; --tiny with TRITON_INTERPRET=1 proves the script without one")
    if options.tiny:
        cases, copy_bytes = logps_cases("tiny", memory=0), 2**24
    else:
        memory = torch.cuda.get_device_properties(0).total_memory
        wanted = {"gpt2", "qwen3", "gpt2-fp32"}  # V odd, V divisible by 16, and the other element size
        cases = [case for case in logps_cases("gpu", memory=memory) if case.name in wanted]
        copy_bytes = min(2**32, memory // 16)
    copy = copy_bandwidth(device, copy_bytes)
    rows = [row for case in cases for row in sweep_case(case, device, copy, first_only=options.tiny)]
    print(format_sweep(rows))
    if options.json is not None:
        results.write(options.json, results.environment(device, "tiny" if options.tiny else "gpu", copy), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
