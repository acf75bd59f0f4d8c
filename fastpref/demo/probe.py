"""Seconds and peak memory of `fastpref.sequence_logps` beside the plain path, each in a process of its own.

In a fresh process, because the peak of a process only ever rises: what this one used before would hide it.
`python -m fastpref.demo.probe fast|plain B T V SECONDS` measures one path and prints a line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpref

PATHS = ("fast", "plain")


class Shape(NamedTuple):
    sequences: int
    positions: int
    vocabulary: int


def measure(path: str, shape: Shape, *, budget: float, folder: Path) -> dict[str, Any]:
    """Run this file for one path and read what it printed; `folder` is any that holds no Python files."""
    arguments = [path, *map(str, shape), str(budget)]
    # In a folder of its own: `python -m` puts the working directory on the path, and its modules before ours.
    done = subprocess.run(
        [sys.executable, "-m", "fastpref.demo.probe", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the {path} log-prob path failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(path: str, shape: Shape, *, budget: float) -> dict[str, Any]:
    """Forward and backward of per-sequence log-probs from bf16 logits, the second half of each sequence scored.

    The first call gives the peak; then it runs again and again for `budget` seconds, at least once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = torch.empty(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for row in logits.flatten(0, 1).split(64):  # in pieces, so that making them is not the peak
        row.normal_(generator=generator)
    labels = torch.randint(shape.vocabulary, shape[:2], generator=generator, device=device)
    labels[:, : shape.positions // 2] = -100
    logits.requires_grad_()
    logps: Callable[[Tensor, Tensor], Any] = (
        fastpref.sequence_logps if path == "fast" else fastpref.reference.sequence_logps
    )

    # What the first call of all imports and sets up is no cost of a training step: a tiny one takes it.
    tiny = torch.zeros(1, 4, 8, dtype=logits.dtype, device=device, requires_grad=True)
    _forward_backward(logps, tiny, labels.new_zeros(1, 4))
    before = _current_memory(device)
    _forward_backward(logps, logits, labels)
    peak = _peak_memory(device)
    seconds: list[float] = []
    while not seconds or sum(seconds) < budget:
        logits.grad = None
        started = time.perf_counter()
        _forward_backward(logps, logits, labels)
        seconds.append(time.perf_counter() - started)
    return {
        # The best one: what else runs on the machine can only add to it.
        "seconds": min(seconds),
        "peak_beyond_inputs": None if before is None or peak is None else peak - before,
        "logits_bytes": logits.numel() * logits.element_size(),
        "device": str(device),
        "how": "torch.cuda.max_memory_allocated"
        if device.type == "cuda"
        else "VmHWM of a fresh process minus its VmRSS before the first call (pages never written do not count)",
    }


def _forward_backward(logps: Callable[[Tensor, Tensor], Any], logits: Tensor, labels: Tensor) -> None:
    logps(logits, labels).sum().backward()
    if logits.is_cuda:
        torch.cuda.synchronize()


def _current_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _proc_status("VmRSS")


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _proc_status("VmHWM")


def _proc_status(name: str) -> int | None:
    """Bytes, or None on a system without /proc.

    Not getrusage: on Linux a process inherits ru_maxrss from the one that started it, which has trained models by then.
    """
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    values = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(values[name].split()[0]) * 1024 if name in values else None


if __name__ == "__main__":
    kind, *sizes, seconds = sys.argv[1:]
    print(json.dumps(run(kind, Shape(*map(int, sizes)), budget=float(seconds))))
