"""DPO and DPOP from per-sequence log-probs: fused beside the plain formula, forward and backward."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from cases import LossCase, loss_cases, make_pairs
from measure import MAX_COPIES, Timer, bandwidth, is_gpu, peak_on_gpu, spread
from providers import BETA, LAMBDA, LOSS_PROVIDERS
from session import RUN, Run
from suites import loss_call
from torch import Tensor
from torch.nn import functional


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    run = metafunc.config.stash.get(RUN, None)
    cases = [] if run is None else loss_cases(run.device_class)
    providers = LOSS_PROVIDERS if run is not None and run.device_class != "tiny" else ("fastpref", "plain")
    parameters = [pytest.param(case, name, id=f"{case.name}-{name}") for case in cases for name in providers]
    metafunc.parametrize(("case", "provider"), parameters)


def _truth(case: LossCase, pairs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both gradients in float64; DPOP as Pal et al. 2024 correct it, the penalty inside the sigmoid."""
    win, lose, ref_win, ref_lose = (x.detach().double() for x in pairs)
    win.requires_grad_()
    lose.requires_grad_()
    penalty = (LAMBDA if case.loss == "dpop" else 0.0) * (ref_win - win).clamp(min=0)
    loss = -functional.logsigmoid(BETA * ((win - ref_win) - (lose - ref_lose) - penalty)).mean()
    win_gradient, lose_gradient = torch.autograd.grad(loss, (win, lose))
    return loss.detach(), win_gradient, lose_gradient


def test_loss(benchmark: Any, run: Run, case: LossCase, provider: str) -> None:
    sets = [make_pairs(case, run.device, seed) for seed in range(MAX_COPIES)]

    def call(pairs: list[Tensor]) -> tuple[Tensor, Any]:
        return loss_call(provider, case.loss, "train", pairs)

    value, gradients = call(sets[0])
    true_value, *true_gradients = _truth(case, sets[0])
    difference = torch.cat(gradients).double() - torch.cat(true_gradients)
    if is_gpu(run.device):
        memory: dict[str, Any] = peak_on_gpu(lambda: call(sets[0])[1], sets[0])
    else:
        memory = run.worker.ask("losses", case, provider, "train")

    timer, turn = Timer(run.device), count()

    def before() -> tuple[tuple[list[Tensor]], dict[str, Any]]:
        timer.before()
        return (sets[next(turn) % len(sets)],), {}

    benchmark.pedantic(lambda pairs: timer.run(lambda: call(pairs)), setup=before, rounds=case.rounds, iterations=1)
    times = spread(timer.seconds()[-case.rounds :])
    row = {
        "suite": "losses",
        "case": case.name,
        "provider": provider,
        "mode": "train",
        "loss": case.loss,
        "pairs": case.pairs,
        "bytes_that_must_move": case.bytes_that_must_move,
        **times,
        **bandwidth(case.bytes_that_must_move, times["median_ms"], run.copy_gb_per_s),
        **memory,
        "value_error_per_token": abs(float(value) - float(true_value)),
        "gradient_error_relative": float(difference.norm() / torch.cat(true_gradients).norm()),
        "gradient_error_largest": float(difference.abs().max()),
    }
    benchmark.extra_info.update(row)
    run.rows.append(row)
