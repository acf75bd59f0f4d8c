"""One provider's training steps under a memory limit, in a process of its own, which may die of it; see longest.py.

Started with the device as its argument, and as early as one likes: it imports, then waits. The first line that it reads
names provider, case and limit, every further one a length. Each is answered by a line: `{"fits": true, "peak_bytes":
n}`, `{"fits": false, "why": text}`, or `{"error": text}` where something else than memory is the reason.

On a CPU the limit is the kernel's: what the process may have of private memory beyond what it had when a tiny step had
imported everything (RLIMIT_DATA). An allocation beyond fails, and the machine never swaps. On a GPU it is the caching
allocator's, so that CUDA's own context is not counted. Either way weights and optimiser count.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from typing import Any

# What libraries say where the system refuses memory.
REFUSALS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "could not create a primitive")


def main() -> int:
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)  # this file's folder, which is no place to import from
    # Libraries print; answers keep a pipe of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device = sys.argv[1]

    from fastpref.benchmarks.memory_worker import give_memory_back_at_once

    if device == "cpu":
        give_memory_back_at_once()
    import transformers  # noqa: F401 (what takes longest to import, before the first line is there)

    import fastpref.benchmarks.suites.step  # noqa: F401

    steps: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any] = {"fits": True}
        try:
            if steps is None:
                steps = Steps(device, **question)
            else:
                answer["peak_bytes"] = steps.peak(question["length"])
        except Exception as error:
            answer = refusal(error)
        if not answer.get("fits") and steps is not None:
            steps.forget()
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def refusal(error: Exception) -> dict[str, Any]:
    """The answer to a question that this error ended: whether memory was the reason."""
    import torch

    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    refused = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in REFUSALS)
    return {"fits": False, "why": text} if refused else {"error": text}


class Steps:
    """The provider's model and optimiser, under the limit."""

    def __init__(self, device: str, provider: str, case: dict[str, Any], within: int) -> None:
        from fastpref.benchmarks.cases_step import StepCase
        from fastpref.benchmarks.inputs_step import make_step_batch
        from fastpref.benchmarks.suites import SUITES
        from fastpref.benchmarks.suites.step import Stepper

        self.device, self.case, self.provider = device, StepCase(**case), SUITES["step"].providers[provider]
        # Long enough for every thread to start: their stacks are no part of a step either.
        tiny = replace(self.case, model="tiny", length=257, compiled=False)
        if self.provider.serves(tiny) is None:
            warm = Stepper(tiny, self.provider, device)
            warm.step(make_step_batch(tiny, device, 0))
            warm.close()
            del warm
        gc.collect()
        self.resident = 0
        self._limit(within)
        self.stepper = Stepper(self.case, self.provider, device)

    def _limit(self, within: int) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(within / torch.cuda.get_device_properties(0).total_memory)
            return
        import resource

        from fastpref.benchmarks.memory_worker import status_bytes

        self.resident = status_bytes("VmRSS")
        limit = status_bytes("VmData") + within
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def peak(self, length: int) -> int:
        """Bytes, beyond the process without a model, of one whole step."""
        import torch

        from fastpref.benchmarks.inputs_step import make_step_batch

        if self.provider.compiles:
            torch._dynamo.reset()  # it gives up after some shapes, and the step would no longer be a compiled one
        batch = make_step_batch(replace(self.case, length=length), self.device, 0)
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self.stepper.step(batch)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        from pathlib import Path

        from fastpref.benchmarks.memory_worker import status_bytes

        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        self.stepper.step(batch)
        return status_bytes("VmHWM") - self.resident

    def forget(self) -> None:
        """What a step that failed has left."""
        import torch

        if hasattr(self, "stepper"):
            self.stepper.forget_gradients()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
