"""A DPO loss from hidden states and the head: ours beside the plain way, other libraries, and the products alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import LinearCase, linear_cases, make_linear
from linear_truth import LinearTruth
from measure import Timer, is_gpu, peak_on_gpu, spread
from providers_linear import (
    BESIDE,
    FORWARD,
    RIVALS,
    SLOW,
    THOROUGH,
    linear_call,
    missing,
    product_count,
    product_ways,
    products,
    warm_up,
)
from session import RUN, Run
from torch import Tensor

SHAPE = ("batch", "length", "hidden", "vocab", "share", "dtype", "scored_rows", "frozen")

MEMORY = ("peak_bytes", "gradient_bytes", "peak_beyond_gradient_bytes")
ERRORS = ("loss_error", "hidden_error_relative", "weight_error_relative")
SLOW_ROUNDS = {"cpu": 2, "cuda": 5}
TRIAL_VOCAB = 32768


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    run = metafunc.config.stash.get(RUN, None)
    cases = [] if run is None else linear_cases(run.device_class)
    parameters = [
        pytest.param(case, provider, mode, id=f"{case.name}-{provider}-{mode}")
        for case in cases
        for mode in ("train", "forward")
        for provider in BESIDE[case.beside]
        if mode == "train" or (case.beside in THOROUGH and provider in FORWARD)
    ]
    metafunc.parametrize(("case", "provider", "mode"), parameters)


class Inputs:
    """The inputs of the case under way and their truth, kept for its next provider."""

    def __init__(self) -> None:
        self.key: Any = None

    def load(self, case: LinearCase, device: str) -> None:
        if self.key == (case, device):
            return
        self.key, self.tensors = None, []  # frees the last case's memory before this one takes its own
        hidden, weight, labels = make_linear(case, device, 0)
        self.truth = LinearTruth.of(case, hidden, weight, labels)
        self.tensors = [hidden, weight, labels, self.truth.ref_logps]
        self.key = (case, device)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs()


def test_linear(benchmark: Any, run: Run, inputs: Inputs, case: LinearCase, provider: str, mode: str) -> None:
    if (reason := missing(provider)) is not None:
        pytest.skip(reason)
    inputs.load(case, run.device)
    if provider == "products":
        measured = _measure_products(benchmark, run, inputs, case, mode)
    else:
        try:
            measured = _measure(benchmark, run, inputs, case, provider, mode)
        except torch.OutOfMemoryError as error:
            if provider not in SLOW:
                raise
            pytest.skip(f"{provider}: {str(error).partition('.')[0]}")
    floor = _products_of(run, case, mode)
    ratio = None if floor is None else measured["median_ms"] / floor
    row = {
        "suite": "linear",
        "case": case.name,
        "provider": provider,
        "rival": provider in RIVALS,
        "mode": mode,
        **{field: getattr(case, field) for field in SHAPE},
        "budget": case.budget,
        "unit_operations": case.unit_operations,
        "products": product_count(case, mode),
        "tflop_per_s": product_count(case, mode) * case.unit_operations / measured["median_ms"] / 1e9,
        "ratio_to_products": 1.0 if provider == "products" else ratio,
        **measured,
    }
    benchmark.extra_info.update(row)
    run.rows.append(row)


def _measure(benchmark: Any, run: Run, inputs: Inputs, case: LinearCase, provider: str, mode: str) -> dict[str, Any]:
    done: list[tuple[Tensor, list[Tensor]]] = []

    def call() -> None:
        done.append(linear_call(provider, mode, case, *inputs.tensors))

    warm_up(provider, mode, case, run.device)
    slow = not is_gpu(run.device) and (provider in SLOW or case.rounds == 1)
    compiles = provider == "liger" and case.compiled
    if not slow or compiles:
        call()
    rounds = min(case.rounds, SLOW_ROUNDS[run.device]) if provider in SLOW else case.rounds
    times = _time(benchmark, run, call, done.clear, rounds)
    errors = inputs.truth.errors(*done.pop())  # of the last round
    if is_gpu(run.device):
        memory: dict[str, Any] = peak_on_gpu(
            lambda: linear_call(provider, mode, case, *inputs.tensors)[1], inputs.tensors
        )
    elif provider in SLOW and case.beside not in THOROUGH:
        memory = dict.fromkeys(MEMORY)
    else:
        memory = run.worker.ask("linear", case, provider, mode, warm=not slow or compiles)
    return {**times, **memory, **errors}


def _measure_products(benchmark: Any, run: Run, inputs: Inputs, case: LinearCase, mode: str) -> dict[str, Any]:
    """In the way of providers_linear.product_ways that is fastest, on a CPU on a part of the vocabulary."""
    hidden, weight, labels, _ = (x.detach() for x in inputs.tensors)
    rows = hidden[:, :-1][labels[:, 1:] != -100]
    part = case if is_gpu(run.device) else replace(case, vocab=min(case.vocab, TRIAL_VOCAB))
    trials = {}
    for way in product_ways(case, run.device):
        timer = Timer(run.device)
        for _ in range(3):
            timer.before()
            timer.run(partial(products, part, mode, *way, rows, weight[: part.vocab]))
        trials[way] = min(timer.seconds())
    dtype, width = min(trials, key=trials.__getitem__)
    fastest = partial(products, case, mode, dtype, width, rows, weight)
    fastest()
    times = _time(benchmark, run, fastest, lambda: None, case.rounds)
    how = {"products_dtype": str(dtype).removeprefix("torch."), "products_width": width}
    return {**times, **dict.fromkeys((*MEMORY, *ERRORS)), **how}


def _time(
    benchmark: Any, run: Run, call: Callable[[], None], forget: Callable[[], None], rounds: int
) -> dict[str, Any]:
    """`forget` frees what the last round left, outside of the time of the next one."""
    timer = Timer(run.device)

    def before() -> None:
        forget()
        timer.before()

    benchmark.pedantic(lambda: timer.run(call), setup=before, rounds=rounds, iterations=1)
    return spread(timer.seconds()[-rounds:])


def _products_of(run: Run, case: LinearCase, mode: str) -> float | None:
    """The median of the products alone in this run, for the same rows, head and gradients; None where not run."""
    for row in run.rows:
        same = row["provider"] == "products" and row["mode"] == mode
        if same and all(row[field] == getattr(case, field) for field in SHAPE):
            return float(row["median_ms"])
    return None
