"""Runs before any test module: without a GPU the Triton kernels run through the interpreter.

Triton reads `TRITON_INTERPRET` when a kernel is defined, so it has to be set before the first import.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    """Where the tests run: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that takes it runs on the torch path and on the kernels (interpreted where there is no GPU)."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("FASTPREF_BACKEND", request.param)
    return request.param


@pytest.fixture
def no_worse_than_eager() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Asserts that the error against the float64 truth is at most 1.5 times eager float32's (another summation order).

    That holds for the root mean square, and for the largest error unless that is within two units in the last place of
    the largest value, in the result's own precision: so close to the limit, the largest of a few errors is luck.
    Triton's interpreter rounds float32 to bfloat16 towards zero, where a GPU rounds to nearest: there bfloat16 gets
    twice that.
    """

    def check(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
        assert ours.shape == truth.shape
        assert torch.isfinite(truth).all(), "compare special values exactly instead"
        assert torch.isfinite(ours).all()
        if truth.numel() == 0:
            return
        errors, eager_errors = ((x.double() - truth).abs() for x in (ours, eager))
        step = torch.finfo(ours.dtype).eps * truth.abs().max().item()
        factor = 3.0 if INTERPRETED and ours.dtype == torch.bfloat16 else 1.5
        rms, eager_rms = (x.square().mean().sqrt().item() for x in (errors, eager_errors))
        assert rms <= max(factor * eager_rms, step / 4), f"rms {rms:.3e}, eager {eager_rms:.3e}, step {step:.3e}"
        largest, eager_largest = errors.max().item(), eager_errors.max().item()
        limit = max(factor * eager_largest, 2 * step)
        assert largest <= limit, f"error {largest:.3e}, eager {eager_largest:.3e}, step {step:.3e}"

    return check
