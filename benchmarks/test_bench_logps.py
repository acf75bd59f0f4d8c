"""Log-probs from logits: ours beside what people write, forward and backward, and forward alone."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from cases import LogpsCase, logps_cases, make_labels, make_logits, make_upstream
from measure import LogpsTruth, Timer, bandwidth, copies_needed, is_gpu, peak_on_gpu, spread
from providers import LOGPS_PROVIDERS
from session import RUN, Run
from suites import MODES, logps_call
from torch import Tensor

# Forward alone is timed where it is cheap to, or of interest: the headline and every case of a GPU.
FORWARD_PROVIDERS = ("fastpref", "plain", "cross_entropy")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    run = metafunc.config.stash.get(RUN, None)
    cases = [] if run is None else logps_cases(run.device_class, memory=run.memory)
    parameters = [
        pytest.param(case, provider, mode, id=f"{case.name}-{provider}-{mode}")
        for case in cases
        for mode in MODES
        for provider in LOGPS_PROVIDERS
        if _wanted(case, provider, mode, run.device_class if run else "")
    ]
    metafunc.parametrize(("case", "provider", "mode"), parameters)


def _wanted(case: LogpsCase, provider: str, mode: str, device_class: str) -> bool:
    if provider == "compiled" and not case.compiled:
        return False
    forward_too = provider in FORWARD_PROVIDERS and (device_class != "cpu" or case.name == "headline")
    return mode == "train" or forward_too


class Inputs:
    """The inputs of the case under way, kept for its next provider: making them takes longer than using them."""

    def __init__(self) -> None:
        self.key: Any = None

    def load(self, case: LogpsCase, device: str) -> None:
        if self.key == (case, device):
            return
        self.key, self.logits = None, []  # frees the last case's memory before this one takes its own
        self.logits = [make_logits(case, device, seed) for seed in range(copies_needed(case.logits_bytes))]
        self.labels = make_labels(case, device, 0)
        self.upstream = make_upstream(case, device)
        self.truth = LogpsTruth.of(case, self.logits[0], self.labels, self.upstream)
        self.key = (case, device)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs()


def test_logps(benchmark: Any, run: Run, inputs: Inputs, case: LogpsCase, provider: str, mode: str) -> None:
    inputs.load(case, run.device)
    labels, upstream = inputs.labels, inputs.upstream

    def call(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return logps_call(provider, mode, logits, labels, upstream)

    errors = inputs.truth.errors(*call(inputs.logits[0]))  # also the first call, which compiles
    if is_gpu(run.device):
        one = inputs.logits[0]
        memory: dict[str, Any] = peak_on_gpu(lambda: [g for g in call(one)[1:] if g is not None], inputs.logits)
    else:
        memory = run.worker.ask("logps", case, provider, mode)

    timer, turn = Timer(run.device), count()

    def before() -> tuple[tuple[Tensor], dict[str, Any]]:
        timer.before()
        return (inputs.logits[next(turn) % len(inputs.logits)],), {}

    benchmark.pedantic(lambda logits: timer.run(lambda: call(logits)), setup=before, rounds=case.rounds, iterations=1)
    if provider == "inplace":
        inputs.key = None  # the logits now hold gradients
    times = spread(timer.seconds()[-case.rounds :])
    moved = case.bytes_that_must_move if mode == "train" else case.scored_rows * case.vocab * case.itemsize
    row = {
        "suite": "logps",
        "case": case.name,
        "provider": provider,
        "mode": mode,
        **{field: getattr(case, field) for field in ("batch", "length", "vocab", "share", "dtype", "scored_rows")},
        "bytes_that_must_move": moved,
        **times,
        **bandwidth(moved, times["median_ms"], run.copy_gb_per_s),
        **memory,
        **errors,
    }
    benchmark.extra_info.update(row)
    run.rows.append(row)
