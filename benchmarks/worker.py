"""Calls, steps and whole runs in a process of its own, which may die of them: for their memory, and apart from others.

    worker.py DEVICE exact|fast [MODULE ...]

A line of JSON names a method of Worker and its arguments, and is answered by one: what the method returns, or
`{"refused": text}` where the system refused memory, or `{"error": text}`.

A limit on a CPU is the kernel's: what the process may have of private memory (RLIMIT_DATA). An allocation beyond fails,
and the machine never swaps. On a GPU it is the caching allocator's, so that CUDA's own context is not counted.

With "exact" every block of 64 KiB or more comes from the system and goes back at once (mallopt). The C library would
keep freed memory and give it to the next call, which would hide what that call needs. It takes time, so that what is
timed goes without.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import struct
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PR_SET_PDEATHSIG = 1
# What libraries say where the system refuses memory.
REFUSALS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "could not create a primitive")


def main() -> int:
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)  # this file's folder, which is no place to import from
    # Libraries print; answers keep a pipe of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device, allocator, *ahead = sys.argv[1:]
    if sys.platform.startswith("linux"):
        # Whoever asked may be killed by a time limit; nobody would wait for this process then.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if allocator == "exact":  # before torch is imported
        give_memory_back_at_once()
    for module in ahead:
        importlib.import_module(module)
    worker = Worker(device)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer: dict[str, Any] = getattr(worker, question.pop("what"))(**question)
        except Exception as error:
            answer = refusal(error)
            worker.forget()
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def give_memory_back_at_once() -> None:
    libc = ctypes.CDLL(None)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        if libc.mallopt(parameter, 65536) != 1:
            raise RuntimeError("mallopt failed: the peak would miss memory that was kept")


def refusal(error: Exception) -> dict[str, str]:
    """The answer to a question that this error ended: whether memory was the reason."""
    import torch

    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    refused = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in REFUSALS)
    return {"refused" if refused else "error": text}


class Worker:
    """What a process of its own can be asked; each method's arguments and result are JSON."""

    def __init__(self, device: str) -> None:
        self.device, self.gpu = device, device != "cpu"
        self.held: tuple[str, Any] = ("", None)  # the last inputs, which the next question often asks about too
        self.stepper: Any = None

    def weigh(self, suite: str, case: dict[str, Any], provider: str, mode: str, warm: bool) -> dict[str, int]:
        """Peak memory of a suite's call on the CPU.

        `peak_bytes` is beyond the inputs: the growth of the resident set's high-water mark, over a second call if
        `warm`, after a first one has loaded and compiled everything. `gradient_bytes` are as the tensors report them.
        `peak_beyond_gradient_bytes` takes only the gradients off that are in memory: pages of zeros that nobody has
        touched are not.
        """
        from fastpref.benchmarks.measure import fresh, size_of
        from fastpref.benchmarks.suites import SUITES
        from fastpref.memory import peak

        of, key = SUITES[suite], json.dumps([suite, case])
        one_case = of.case_type(**case)
        if self.held[0] != key:
            self.held = ("", None)
            self.held = (key, of.load(one_case, "cpu", truth=False))
        inputs = self.held[1]
        of.prepare(one_case, provider, mode, inputs, "cpu")
        if warm:
            of.call(one_case, provider, mode, inputs.sets[0])
        before = start_of_peak()
        gradients = of.call(one_case, provider, mode, inputs.sets[0]).gradients
        grown, own = peak() - before, fresh(gradients, inputs.sets[0])
        if of.providers[provider].spoils:
            self.held = ("", None)
        in_memory = sum(resident_bytes(g.data_ptr(), size_of([g])) for g in own)
        return {
            "peak_bytes": grown,
            "gradient_bytes": size_of(own),
            "peak_beyond_gradient_bytes": grown - in_memory,
        }

    def set_up(self, provider: str, case: dict[str, Any], within: int) -> dict[str, Any]:
        """The model and optimiser of a provider of steps, under a limit beyond what any process has."""
        from fastpref.benchmarks.cases_step import StepCase
        from fastpref.benchmarks.inputs_step import make_step_batch
        from fastpref.benchmarks.suites import SUITES
        from fastpref.benchmarks.suites.step import Stepper
        from fastpref.memory import private, resident

        self.case, self.provider = StepCase(**case), SUITES["step"].providers[provider]
        # Long enough for every thread to start: their stacks are no part of a step either.
        tiny = replace(self.case, model="tiny", length=257, compiled=False)
        if self.provider.serves(tiny) is None:
            warm = Stepper(tiny, self.provider, self.device)
            warm.step(make_step_batch(tiny, self.device, 0))
            warm.close()
            del warm
        gc.collect()
        self.base = 0 if self.gpu else resident()
        self._limit(within if self.gpu else private() + within)
        self.stepper = Stepper(self.case, self.provider, self.device)
        return {}

    def step(self, length: int) -> dict[str, int]:
        """The peak of one whole step, beyond the process without a model."""
        import torch

        from fastpref.benchmarks.inputs_step import make_step_batch
        from fastpref.memory import peak

        if self.provider.compiles:
            torch._dynamo.reset()  # it gives up after some shapes, and the step would no longer be a compiled one
        batch = make_step_batch(replace(self.case, length=length), self.device, 0)
        if not self.gpu:
            start_of_peak()
            self.stepper.step(batch)
            return {"peak_bytes": peak() - self.base}
        torch.cuda.reset_peak_memory_stats()
        self.stepper.step(batch)
        torch.cuda.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated()}

    def train(self, provider: str, case: dict[str, Any], folder: str, within: int | None) -> dict[str, Any]:
        """One whole training run; its limit and its peak, up to the last step that ended, are the whole process's.

        On a GPU both are the caching allocator's. `base_bytes` is what the process had before the model.
        """
        import torch

        from fastpref.benchmarks.cases_training import TrainingCase
        from fastpref.benchmarks.inputs_training import Inputs
        from fastpref.benchmarks.measure import cpu_times, stolen_share
        from fastpref.benchmarks.providers import providers_of
        from fastpref.benchmarks.training_clock import Clock
        from fastpref.memory import peak, private

        chosen = next(p for p in providers_of("training") if p.name == provider)
        inputs = Inputs(TrainingCase(**case), Path(folder), self.device)
        peaks: list[int] = []
        # Saving what was trained is no part of it.
        clock = Clock(self.device, lambda: peaks.append(torch.cuda.max_memory_allocated() if self.gpu else peak()))
        self._warm(chosen.modules)
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        base = 0 if self.gpu else start_of_peak()
        if within is not None:
            # Of the whole process, code that it shares with others apart.
            self._limit(within if self.gpu else private() + within - base)
        before = cpu_times()
        with clock.running():
            losses = chosen.call(inputs)
        if len(losses) != len(clock.seconds) or len(losses) != inputs.case.steps:
            raise RuntimeError(f"{inputs.case.steps} steps, {len(clock.seconds)} of them timed, {len(losses)} losses")
        return {
            "seconds": clock.seconds,
            "reference_seconds": clock.reference_seconds,
            "phases": clock.phases,
            "losses": losses,
            "tokens": inputs.tokens,
            "peak_bytes": peaks[-1],
            "base_bytes": base,
            "stolen_share": stolen_share(before),
        }

    def _warm(self, modules: Iterable[str]) -> None:
        """Imports, threads and their stacks: what every process of this contestant has, whatever it trains."""
        import torch

        for name in (*modules, "fastpref.training", "torch.optim.lr_scheduler"):
            importlib.import_module(name)
        if "trl" in modules:
            importlib.import_module("trl.trainer.dpo_trainer")  # trl itself imports late
        weight = torch.randn(256, 256, device=self.device, requires_grad=True)
        (weight @ weight).square().sum().backward()

    def _limit(self, size: int) -> None:
        """Of the caching allocator, or of this process's private memory."""
        if self.gpu:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
            return
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    def forget(self) -> None:
        """What a call that failed has left."""
        from fastpref.benchmarks.measure import release

        self.held = ("", None)
        if self.stepper is not None:
            self.stepper.forget_gradients()
        release()


def start_of_peak() -> int:
    """What is resident now, from which `fastpref.memory.peak` starts again."""
    from fastpref.memory import reset_peak, resident

    gc.collect()
    if not reset_peak():
        raise RuntimeError("peaks of memory on a CPU need Linux, and to be allowed to write to /proc/self/clear_refs")
    return resident()


def resident_bytes(address: int, size: int) -> int:
    """How much of a block is in memory: bit 63 of a page's entry in the page map.

    Not by psutil, which knows whole maps alone: a tensor's block may be a part of one.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = address // page, (address + size - 1) // page
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(first * 8)
        entries = file.read((last - first + 1) * 8)
    return page * sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", entries))


if __name__ == "__main__":
    sys.exit(main())
