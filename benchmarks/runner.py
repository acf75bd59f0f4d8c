"""A run: which rows are wanted, and how one is measured. pytest (test_suites.py) and `fastpref bench` both run it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from . import results
from .arguments import check_names
from .cases import DEVICE_CLASSES
from .measure import Timer, cpu_times, head_of, is_gpu, peak_on_gpu, release, spread, stolen_share
from .process import Ended, Process
from .providers.base import Provider
from .suites import SUITES
from .suites.base import Inputs, Output, Suite

MEMORY = ("peak_bytes", "gradient_bytes", "peak_beyond_gradient_bytes")
# Rounds of a provider that is slow on a CPU, its first call among them.
SLOW_ROUNDS = 2

# Makes `rounds` calls, `before` in front of each, outside of its time; pytest-benchmark's pedantic mode or a loop.
Clock = Callable[[Callable[[], None], Callable[[], None], int], None]


class Entry(NamedTuple):
    suite: Suite
    case: Any
    provider: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.suite.name} {self.case.name} {self.provider} {self.mode}"


class Run(results.Store):
    """One run on one device; `device_class` is "auto" or one of cases.DEVICE_CLASSES."""

    def __init__(self, device_class: str, path: Path | None = None) -> None:
        gpu = torch.cuda.is_available()
        self.device_class = ("gpu" if gpu else "cpu") if device_class == "auto" else device_class
        if self.device_class not in DEVICE_CLASSES:
            raise ValueError(f"unknown device class {device_class!r}; known are auto, {', '.join(DEVICE_CLASSES)}")
        if self.device_class == "gpu" and not gpu:
            raise ValueError("device class gpu, but torch finds no GPU here: take cpu, quick or tiny")
        self.device = "cuda" if gpu and self.device_class != "cpu" else "cpu"
        self.memory = torch.cuda.get_device_properties(0).total_memory if is_gpu(self.device) else 0
        self.worker: Process | None = None  # where memory on a CPU is measured, from the first question on
        sizes = {"tiny": 2**24, "quick": 2**26, "cpu": 2**28, "gpu": max(2**28, min(2**32, self.memory // 16))}
        super().__init__(path, head_of(self.device, self.device_class, sizes[self.device_class]))
        self._inputs: tuple[Any, Inputs | None] = (None, None)

    def entries(self) -> list[Entry]:
        """All that the device class has, in the order of the run."""
        found = [
            Entry(suite, case, provider, mode)
            for suite in SUITES.values()
            for case in suite.cases(self.device_class, memory=self.memory)
            for provider, mode in suite.entries(case, self.device_class)
        ]
        if is_gpu(self.device):
            # A fault on a GPU takes the process with it, and time there is short: others' code, and what has to be
            # compiled for half a minute, goes last within its suite.
            order = list(SUITES)
            found.sort(key=lambda e: (order.index(e.suite.name), _is_late(e.suite.providers[e.provider])))
        return found

    def inputs(self, suite: Suite, case: Any) -> Inputs:
        """Of the case under way, kept for its next provider: making them takes longer than using them."""
        key, held = self._inputs
        if held is None or key != (suite.name, case):
            held = None
            torch._dynamo.reset()  # its cache of compiled shapes is bounded, and every case has its own
            self.forget_inputs()  # the last case's memory, before this one takes its own
            held = suite.load(case, self.device, truth=True)
            self._inputs = ((suite.name, case), held)
        return held

    def forget_inputs(self) -> None:
        self._inputs = (None, None)
        for suite in SUITES.values():
            suite.forget()
        release()

    def close(self) -> None:
        self.forget_inputs()
        if self.worker is not None:
            self.worker.close()

    def weigh(self, entry: Entry, *, warm: bool) -> dict[str, Any]:
        """`warm=False` weighs the first call on these inputs: for one that takes long and compiles nothing."""
        if self.worker is None:
            self.worker = Process("cpu", exact=True)
        what: dict[str, Any] = {
            "suite": entry.suite.name,
            "case": asdict(entry.case),
            "provider": entry.provider,
            "mode": entry.mode,
        }
        try:
            return self.worker.ask("weigh", warm=warm, **what)
        except Ended as ended:
            self.worker = None
            raise MemoryError(f"while its memory was measured, {ended}") from None


def _is_late(provider: Provider) -> bool:
    return provider.compiles or provider.family not in ("fastpref", "limit", "plain", "torch")


def select(
    entries: Sequence[Entry], *, suites: Sequence[str] = (), cases: Sequence[str] = (), providers: Sequence[str] = ()
) -> list[Entry]:
    """The entries that are named; nothing named is all. ValueError, listing the known ones, at an unknown name."""
    wanted = {"suite": suites, "case": cases, "provider": providers}
    known = {
        "suite": list(SUITES),
        "case": list(dict.fromkeys(entry.case.name for entry in entries)),
        "provider": list(dict.fromkeys(entry.provider for entry in entries)),
    }
    for kind, names in wanted.items():
        check_names(kind, names, known[kind])
    chosen = [
        entry
        for entry in entries
        if (not suites or entry.suite.name in suites)
        and (not cases or entry.case.name in cases)
        and (not providers or entry.provider in providers)
    ]
    if not chosen:
        named = "; ".join(f"{kind} {', '.join(names)}" for kind, names in wanted.items() if names)
        raise ValueError(f"no row has all of these together: {named}")
    return chosen


def loop(call: Callable[[], None], before: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        before()
        call()


def measure(run: Run, entry: Entry, clock: Clock = loop) -> results.Row | None:
    """Measure one row and keep it in the run; None, and a line in `run.skipped`, where the provider cannot."""
    suite, case, name, mode = entry
    provider = suite.providers[name]
    reason = provider.why_not(case, run.device)
    if reason is None:
        try:
            return _measure(run, entry, clock)
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = f"out of memory: {str(error).partition('.')[0]}"
        except Exception as error:
            if provider.family in ("fastpref", "limit"):
                raise
            # Others' code, in versions that nobody here has chosen: a line, and the run goes on.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        run.forget_inputs()
    run.skip(suite.name, case.name, mode, name, reason)
    return None


def _measure(run: Run, entry: Entry, clock: Clock) -> results.Row | None:
    suite, case, name, mode = entry
    provider = suite.providers[name]
    limit_row = _limit_row(run, entry)
    inputs = run.inputs(suite, case)
    suite.prepare(case, name, mode, inputs, run.device)

    timer, turn, slow = Timer(run.device), count(), provider.slow and not is_gpu(run.device)
    outputs: list[Output] = []

    def call() -> None:
        sets = inputs.sets
        timer.run(lambda: outputs.append(suite.call(case, name, mode, sets[next(turn) % len(sets)])))

    def before() -> None:
        outputs.clear()  # frees what the last call left, outside of the next one's time
        timer.before()

    start, ticks = perf_counter(), cpu_times()
    loop(call, before, 1)
    first_ms = 1e3 * (perf_counter() - start)
    errors = suite.errors(case, inputs.truth, outputs.pop())
    if not all(math.isfinite(x) for x in (errors.get("value_error", 0.0), *errors.get("gradient_errors", {}).values())):
        raise ArithmeticError("what it computes is not finite")
    # A slow provider's first call counts: all that it could have set up is set up in `prepare`.
    counted = slow and not provider.compiles
    rounds = min(case.rounds, SLOW_ROUNDS) if slow else case.rounds
    clock(call, before, max(1, rounds - counted))
    outputs.clear()
    stolen = stolen_share(ticks)
    times = spread(timer.seconds()[0 if counted else 1 :])

    work = suite.work(case, mode)
    limit_ms = _limit_ms(run, entry, work, limit_row, times["median_ms"])
    gradients = errors.get("gradient_errors")
    row = {
        "suite": suite.name,
        "case": case.name,
        "mode": mode,
        **provider.fields(),
        **{field: getattr(case, field) for field in suite.shape},
        "series": case.series,
        **times,
        "first_ms": first_ms,
        "stolen_share": stolen,
        "work": work,
        "work_unit": suite.work_unit,
        "rate": work / times["median_ms"] / (1e6 if suite.work_unit == "B" else 1e9),
        "rate_unit": "GB/s" if suite.work_unit == "B" else "TFLOP/s",
        "limit": suite.limit,
        "limit_ms": limit_ms,
        "ratio_to_limit": None if limit_ms is None else limit_ms / times["median_ms"],
        **_memory(run, entry, inputs, warm=not counted),
        **suite.extra,
        "value_error": None,
        **errors,
        "gradient_error": max(gradients.values()) if gradients else None,
        "gradient_errors": gradients,
        **suite.facts(case, name, mode, times["median_ms"]),
    }
    if provider.spoils:
        run.forget_inputs()
    run.add(row)
    return row


def _memory(run: Run, entry: Entry, inputs: Inputs, *, warm: bool) -> dict[str, int | None]:
    suite, case, name, mode = entry
    if not suite.weighs(case, name, run.device):
        return dict.fromkeys(MEMORY)
    if is_gpu(run.device):
        return {**peak_on_gpu(lambda: suite.call(case, name, mode, inputs.sets[0]).gradients, inputs.sets[0])}
    return run.weigh(entry, warm=warm)


def _limit_row(run: Run, entry: Entry) -> results.Row | None:
    """The row of the limit for this shape; measured now where the run has none yet and the case wants one."""
    suite, case, name, mode = entry
    limit = suite.limit_provider
    if limit is None or name == limit:
        return None
    for row in run.rows:
        same = (row["suite"], row["provider"], row["mode"]) == (suite.name, limit, mode)
        if same and all(row[field] == getattr(case, field) for field in suite.limit_shape):
            return row
    wanted = (limit, mode) in suite.entries(case, run.device_class)
    return measure(run, Entry(suite, case, limit, mode)) if wanted else None


def _limit_ms(run: Run, entry: Entry, work: int, row: results.Row | None, median_ms: float) -> float | None:
    if entry.suite.limit_provider is None:
        return work / run.head["copy_gb_per_s"] / 1e6
    if entry.provider == entry.suite.limit_provider:
        return median_ms
    return None if row is None else float(row["median_ms"])
