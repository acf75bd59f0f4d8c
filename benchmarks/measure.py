"""How things are measured: time, memory, error against float64, and the bandwidth of a copy on the same machine.

Time on a GPU is between two CUDA events, behind a short sleep that lets the host run ahead, as it does in a training
step; on a CPU it is the wall clock. Memory on a GPU is the allocator's peak beyond what was allocated before; on a CPU
worker.py measures it in a process of its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from . import results

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


def release() -> None:
    """Give back what nobody holds any more (a trainer and its model hold each other): other processes want it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def head_of(device: str, device_class: str, copied: int) -> results.File:
    """The head of a results file, with the bandwidth of a copy of so many bytes."""
    copy = copy_bandwidth(device, copied)
    release()
    return results.environment(device, device_class, copy)


def peak_on_gpu(call: Callable[[], Sequence[Tensor]], inputs: Sequence[Any]) -> dict[str, int]:
    """The allocator's peak beyond what is there before the call, and the gradients' part of it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    own = size_of(fresh(gradients, inputs))
    return {"peak_bytes": peak, "gradient_bytes": own, "peak_beyond_gradient_bytes": peak - own}


def fresh(gradients: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """Those that have memory of their own; one written over its input has none."""
    taken = {x.data_ptr() for x in inputs if isinstance(x, Tensor)}
    return [g for g in gradients if g.data_ptr() not in taken]


def size_of(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of the truth."""
    return float((got.double() - wanted).norm() / wanted.norm())
