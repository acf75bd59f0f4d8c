"""How things are measured: time, memory, error against float64, and the bandwidth of a copy on the same machine.

Time on a GPU is between two CUDA events, behind a short sleep that lets the host run ahead, as it does in a training
step; on a CPU it is the wall clock. Memory on a GPU is the allocator's peak beyond what was allocated before; on a CPU
memory_worker.py measures it in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

# About half a millisecond: longer than Python takes to enqueue a forward and a backward.
SLEEP_CYCLES = 1_000_000
# Inputs rotate until together they are larger than any last-level cache, but no more than this often.
CACHE_BYTES = 256 * 2**20
MAX_COPIES = 4


def is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def copies_needed(input_bytes: int) -> int:
    return max(1, min(MAX_COPIES, -(-CACHE_BYTES // max(1, input_bytes))))


class Timer:
    """Times single calls: `before` right before one, `run` the call itself, `seconds` what all of them took."""

    def __init__(self, device: str) -> None:
        self.gpu = is_gpu(device)
        self.events: list[tuple[Any, Any]] = []
        self.wall: list[float] = []

    def before(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)

    def run(self, call: Callable[[], Any]) -> None:
        if not self.gpu:
            start = perf_counter()
            call()
            self.wall.append(perf_counter() - start)
            return
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        self.events.append((start_event, end_event))

    def seconds(self) -> list[float]:
        return [a.elapsed_time(b) / 1e3 for a, b in self.events] if self.gpu else self.wall


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and minimum in milliseconds, and every sample."""
    times = [1e3 * s for s in seconds]
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    return {
        "median_ms": median(times),
        "q1_ms": low,
        "q3_ms": high,
        "min_ms": min(times),
        "rounds": len(times),
        "times_ms": [round(t, 5) for t in times],
    }


def cpu_times(stat: Path = Path("/proc/stat")) -> tuple[int, int] | None:
    """Ticks of all processors since the start, and those that a hypervisor gave to others; None where unknown."""
    if not stat.exists():
        return None
    ticks = [int(word) for word in stat.read_text().partition("\n")[0].split()[1:]]
    return sum(ticks[:8]), ticks[7]


def stolen_share(before: tuple[int, int] | None) -> float | None:
    """Of the processors' time since `before`: what other machines on the same host took."""
    now = cpu_times()
    if before is None or now is None:
        return None
    return (now[1] - before[1]) / max(1, now[0] - before[0])


def copy_bandwidth(device: str, size: int) -> float:
    """GB/s of a copy within the device's memory, counting bytes read and bytes written; median of 10."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timer = Timer(device)
    target.copy_(source)
    for _ in range(10):
        timer.before()
        timer.run(lambda: target.copy_(source))
    return 2 * size / median(timer.seconds()) / 1e9


def peak_on_gpu(call: Callable[[], Sequence[Tensor]], inputs: Sequence[Any]) -> dict[str, int]:
    """The allocator's peak beyond what is there before the call, and the gradients' part of it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    fresh = gradient_bytes(gradients, inputs)
    return {"peak_bytes": peak, "gradient_bytes": fresh, "peak_beyond_gradient_bytes": peak - fresh}


def tensors_of(inputs: Sequence[Any]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor)]


def gradient_bytes(gradients: Sequence[Tensor], inputs: Sequence[Any]) -> int:
    """Bytes of gradients that have memory of their own; one written over its input has none."""
    taken = {x.data_ptr() for x in tensors_of(inputs)}
    return sum(g.numel() * g.element_size() for g in gradients if g.data_ptr() not in taken)


class MemoryWorker:
    """Asks memory_worker.py, started at the first question, what a call takes on the CPU."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, suite: str, case: Any, provider: str, mode: str, *, warm: bool = True) -> dict[str, int]:
        """`warm=False` weighs the first call on these inputs: for one that takes long and compiles nothing."""
        if self.process is None:
            command = [sys.executable, str(Path(__file__).with_name("memory_worker.py"))]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        question = {"suite": suite, "case": asdict(case), "provider": provider, "mode": mode, "warm": warm}
        to_worker, from_worker = self.process.stdin, self.process.stdout
        if to_worker is None or from_worker is None:
            raise RuntimeError("memory_worker.py was started without pipes")
        print(json.dumps(question), file=to_worker, flush=True)
        line = from_worker.readline()
        if not line:
            code, self.process = self.process.wait(), None
            raise MemoryError(f"the process that measures memory ended with code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"while its memory was measured: {answer['error']}")
        return answer

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(timeout=60)
            self.process = None


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of the truth."""
    return float((got.double() - wanted).norm() / wanted.norm())
