"""How much memory there is, and how much a piece of work takes: on a GPU, or in a process's resident memory.

By psutil, but for what it does not know: the peak of resident memory on Linux and how it is reset, and the limits of
control groups, which are a container's. Sizes are in bytes.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path

import psutil
import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what /proc/self/clear_refs is told, to set VmHWM back to what is resident now
POLLED = 0.002  # seconds between two looks where the system keeps no peak that can be reset


class Meter:
    """Bytes that pieces of work take at their peak, beyond what was held when the meter was made.

    Args:
        device: a CUDA device, or a CPU.
        processes: how many processes share a CPU's memory, each with an equal part of what is left.
    """

    def __init__(self, device: torch.device, *, processes: int = 1) -> None:
        if device.type not in ("cuda", "cpu"):
            raise ValueError(f"the memory of a {device.type} device cannot be measured here: set batch_size yourself")
        self._device, self._processes = device, processes
        self._poll: _Poll | None = None
        self.end()
        self._held = self._now()

    def room(self) -> int:
        """Bytes that are left for this process."""
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return available() // self._processes

    def begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif not reset_peak():
            self._poll = _Poll()

    def taken(self) -> int:
        """The peak since `begin`. (CUDA's allocator counts when it is asked, so no kernel need have run.)"""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) - self._held
        highest = peak() if self._poll is None else self._poll.stop()
        return max(highest - self._held, 0)

    def end(self) -> None:
        """Give back what caches hold."""
        if self._poll is not None:
            self._poll.stop()
            self._poll = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            _trim()

    def _now(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device)
        return resident()


class _Poll:
    """The peak of resident memory, by looking often; from a thread, which runs while torch computes."""

    def __init__(self) -> None:
        self._stopping, self._peak = threading.Event(), resident()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(POLLED):
            self._peak = max(self._peak, resident())

    def stop(self) -> int:
        self._stopping.set()
        self._thread.join()
        return self._peak


def resident() -> int:
    """What this process has in main memory now."""
    return psutil.Process().memory_info().rss


def private() -> int:
    """What this process may write and shares with no other, its stack included: what RLIMIT_DATA limits; Linux only."""
    return psutil.Process().memory_info().data


def reset_peak() -> bool:
    """Have `peak` start again from what is resident now; False where the system does not allow it."""
    if _high_water_mark() is None:
        return False
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # a container that does not allow it
        return False
    return True


def peak() -> int:
    """The most that this process has had in main memory since `reset_peak`, or since its start."""
    marked = _high_water_mark()
    if marked is not None:
        return marked
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    # On Linux the last choice: there a process's ru_maxrss begins with that of the process which started it.
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def _high_water_mark() -> int | None:
    """Linux's peak of resident memory, which starts anew with the process; None where there is none."""
    if not STATUS.is_file():
        return None
    marks = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(marks[0].split()[1]) * 1024 if marks else None


def _trim() -> None:
    """Have the C library give back what was freed: pages that it kept would be filled again unseen."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)


def available() -> int:
    """What this process may still take: of the machine's memory, its control groups' and its own limit."""
    limits = [psutil.virtual_memory().available, *_group_limits(Path("/"))]
    if sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            limits.append(limit - psutil.Process().memory_info().vms)
    return max(min(limits), 0)


def _group_limits(root: Path) -> list[int]:
    """What is left of the limit of every control group (v1 or v2) that this process is in, and of those above it."""
    listed = root / "proc/self/cgroup"
    if not listed.is_file():
        return []
    found = []
    for line in listed.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            mount, limit_file, usage_file, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, cache = "sys/fs/cgroup/memory", "total_inactive_file"
            limit_file, usage_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        top = root / mount
        folder = top / name.lstrip("/")
        # In a container the name may be the host's, and the group is what is mounted at the top.
        for group in {folder, *(parent for parent in folder.parents if parent.is_relative_to(top)), top}:
            limit = _number(group / limit_file)
            if limit is not None:
                used = (_number(group / usage_file) or 0) - _statistic(group / "memory.stat", cache)
                found.append(limit - max(used, 0))
    return found


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None  # "max" is no limit


def _statistic(path: Path, name: str) -> int:
    """A line of memory.stat: the page cache that the system would give up counts as used otherwise."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
