"""One whole training run in a process of its own; see training.py.

Reads a line of JSON (provider, case, folder, device, within) and answers with one: `{"fits": true, ...}`, `{"fits":
false, "why": text}` where memory was refused, or `{"error": text}`.

On a CPU the peak is the high-water mark of the whole process, imports included; `base_bytes` is what it had before the
model. `within` limits the process's private memory so that the whole of it, code that it shares with others apart,
stays below (RLIMIT_DATA); on a GPU both are the caching allocator's.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def main() -> int:
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)  # this file's folder, which is no place to import from
    # Libraries print; the answer keeps a pipe of its own.
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.platform.startswith("linux"):
        # Whoever asked may be killed by a time limit; nobody would wait for this process then.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    question = json.loads(sys.stdin.readline())
    from fastpref.benchmarks.memory_worker import give_memory_back_at_once

    limited = question["within"] is not None
    if limited and question["device"] == "cpu":
        give_memory_back_at_once()  # it takes time; what the allocator keeps would count
    from fastpref.benchmarks.longest_worker import refusal

    try:
        answer = train(**question)
    except Exception as error:
        answer = refusal(error)
    print(json.dumps(answer), file=answer_to, flush=True)
    return 0


def train(provider: str, case: dict[str, Any], folder: str, device: str, within: int | None) -> dict[str, Any]:
    import torch

    from fastpref.benchmarks.cases_training import TrainingCase
    from fastpref.benchmarks.inputs_training import Inputs
    from fastpref.benchmarks.measure import cpu_times, stolen_share
    from fastpref.benchmarks.providers import providers_of
    from fastpref.benchmarks.training_clock import Clock

    chosen = next(p for p in providers_of("training") if p.name == provider)
    inputs = Inputs(TrainingCase(**case), Path(folder), device)
    memory = Memory(device)
    clock = Clock(device, memory.look)
    _warm(list(chosen.modules), device)
    memory.begin(within)
    before = cpu_times()
    with clock.running():
        losses = chosen.call(inputs)
    if len(losses) != len(clock.seconds) or len(losses) != inputs.case.steps:
        raise RuntimeError(f"{inputs.case.steps} steps, {len(clock.seconds)} of them timed, {len(losses)} losses")
    return {
        "fits": True,
        "seconds": clock.seconds,
        "reference_seconds": clock.reference_seconds,
        "phases": clock.phases,
        "losses": losses,
        "tokens": inputs.tokens,
        "peak_bytes": memory.peak,
        "base_bytes": memory.base,
        "threads": torch.get_num_threads(),
        "stolen_share": stolen_share(before),
    }


def _warm(modules: list[str], device: str) -> None:
    """Imports, threads and their stacks: what every process of this contestant has, whatever it trains."""
    import torch

    for name in (*modules, "fastpref.training", "torch.optim.lr_scheduler"):
        importlib.import_module(name)
    if "trl" in modules:
        importlib.import_module("trl.trainer.dpo_trainer")  # trl itself imports late
    weight = torch.randn(256, 256, device=device, requires_grad=True)
    (weight @ weight).square().sum().backward()


class Memory:
    """The peak up to the last step that ended: saving what was trained is no part of it."""

    def __init__(self, device: str) -> None:
        self.gpu = device.startswith("cuda")
        self.base = self.peak = 0

    def begin(self, within: int | None) -> None:
        import torch

        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            if within is not None:
                torch.cuda.set_per_process_memory_fraction(within / torch.cuda.get_device_properties(0).total_memory)
            return
        from fastpref.benchmarks.memory_worker import status_bytes

        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        self.base = status_bytes("VmRSS")
        if within is not None:
            import resource

            limit = status_bytes("VmData") + within - self.base
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def look(self) -> None:
        import torch

        if self.gpu:
            self.peak = torch.cuda.max_memory_allocated()
            return
        from fastpref.benchmarks.memory_worker import status_bytes

        self.peak = status_bytes("VmHWM")


if __name__ == "__main__":
    sys.exit(main())
