"""Runs before any test module: without a GPU the Triton kernels run through the interpreter.

Triton reads `TRITON_INTERPRET` when a kernel is defined, so it has to be set before the first import.
"""

from __future__ import annotations

import os
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: a second thread in each would only wait for the other's core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "ATEN_CPU_CAPABILITY" in os.environ:  # Inductor's cache does not tell levels apart, and runs what crashes there
    level = os.environ["ATEN_CPU_CAPABILITY"]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{level}")

from fastpref.backend import interpreting

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    """Where the tests run: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels_run() -> None:
    """Skips a test of the kernels where they cannot run: without Triton, or where its interpreter fails."""
    interpreter = pytest.importorskip("fastpref.interpreter", reason="Triton is not installed")
    if interpreting() and (problem := interpreter.interpreter_problem()) is not None:
        pytest.skip(problem)


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that takes it runs on the torch path and on the kernels (interpreted where there is no GPU)."""
    if request.param == "triton":
        request.getfixturevalue("kernels_run")
    monkeypatch.setenv("FASTPREF_BACKEND", request.param)
    return request.param
