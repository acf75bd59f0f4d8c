"""`fastpref doctor` reports what is there, checks the path that will run, and survives what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import slow_interpreted

import fastpref
from fastpref import doctor


def run_doctor(folder: Path, *, hide: tuple[str, ...] = (), breaks: tuple[str, ...] = ()) -> tuple[int, str]:
    """A fresh process in which `hide` cannot be found and importing `breaks` raises."""
    script = f"""
import importlib.abc, importlib.util, sys

class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {breaks!r}:
            raise ImportError(f"{{name}}: libfoo.so is missing")

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {hide!r} else find_spec(name, package)
from fastpref import doctor
sys.meta_path.insert(0, Broken())
for name in [n for n in sys.modules if n.partition(".")[0] in {hide + breaks!r}]:
    del sys.modules[name]
importlib.util.find_spec = lambda name, package=None: None if name in {hide!r} else (
    object() if name in {breaks!r} else find_spec(name, package))
sys.exit(doctor.main([]))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTPREF_BACKEND")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        text=True,
        timeout=120,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def test_the_report_names_versions_device_path_and_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPREF_BACKEND", "torch")
    assert doctor.main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"fastpref {fastpref.__version__}, Python ")
    assert version("torch") in printed  # torch.__version__ may name a build besides
    assert "CPU: " in printed
    assert "FASTPREF_BACKEND=torch\n" in printed
    assert "path: torch (FASTPREF_BACKEND=torch)" in printed
    assert printed.count("error against float64: value ") == 2
    assert printed.endswith("all is well\n")


@slow_interpreted
def test_it_checks_the_kernels_where_they_will_run(
    backend: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--device", device]) == 0
    printed = capsys.readouterr().out
    assert f"path: {backend} (FASTPREF_BACKEND={backend})" in printed
    assert printed.count(": right\n") == 2


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_a_wrong_value_or_gradient_makes_the_exit_code_1(
    wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fastpref.sequence_logps

    def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = right(logits, labels)
        assert isinstance(out, torch.Tensor)
        if wrong == "value":
            return out + 2e-4
        if wrong == "nan":
            return out * float("nan")
        return out + 1e-2 * (logits - logits.detach()).sum((1, 2)).float()

    monkeypatch.setattr(fastpref, "sequence_logps", broken)
    assert doctor.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert ": WRONG" in printed
    assert printed.endswith("something is wrong: see above\n")


def test_a_backend_that_does_not_exist_is_reported_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPREF_BACKEND", "cuda")
    assert doctor.main([]) == 1
    assert "FASTPREF_BACKEND must be one of auto, torch, triton, got 'cuda'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (None, "trl           not installed: pip install 'fastpref[trl]'\n"),
        ("1.16.3", "trl           1.16.3, in the tested range (1.16.*)\n"),
        ("1.17.0", "trl           1.17.0, outside the tested range: pip install 'trl==1.16.*'\n"),
        ("1.160.0", "trl           1.160.0, outside the tested range: pip install 'trl==1.16.*'\n"),
    ],
    ids=str,
)
def test_a_trl_outside_the_tested_range_is_said_so(
    found: str | None, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: {"trl": found, "verl": "0.9.0"}.get(name))
    assert doctor.main(["--device", "cpu"]) == 0, "a trainer's version does not make the installation wrong"
    printed = capsys.readouterr().out
    assert line in printed
    assert "verl          0.9.0\n" in printed
    assert "openrlhf" not in printed


def test_it_works_without_triton_and_without_the_train_extra(tmp_path: Path) -> None:
    code, printed = run_doctor(tmp_path, hide=("triton", "transformers", "datasets", "accelerate"))
    assert code == 0, printed
    assert "triton        not installed\n" in printed
    assert "datasets      not installed: pip install 'fastpref[train]'" in printed
    assert "path: torch (the tensor is on cpu" in printed


def test_a_broken_triton_is_reported_and_the_torch_path_still_checked(tmp_path: Path) -> None:
    code, printed = run_doctor(tmp_path, breaks=("triton",))
    assert code == 0, printed
    assert "the Triton kernels cannot be imported: ImportError: triton: libfoo.so is missing" in printed
    assert printed.count(": right\n") == 2


def test_an_interpreter_that_fails_is_reported_in_one_line_and_nothing_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = pytest.importorskip("fastpref.interpreter", reason="Triton is not installed")

    class Failing:
        def __init__(self, kernel: Any) -> None:
            pass

        def __getitem__(self, grid: Any) -> Any:
            int(np.array([3, 4]))  # raises TypeError, as Triton 3.6 does under NumPy 2.4

    monkeypatch.setattr(interpreter, "InterpretedFunction", Failing)
    monkeypatch.setattr(interpreter, "interpreter_problem", interpreter.interpreter_problem.__wrapped__)
    monkeypatch.setenv("FASTPREF_BACKEND", "torch")
    assert doctor.main(["--device", "cpu"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cannot interpret" in line]
    assert version("triton") in line
    assert f"NumPy {np.__version__}" in line
    assert "arrays" in line, "what NumPy said"


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_a_kernel_with_a_loop_tells_whether_the_interpreter_works(interpreted: str, tmp_path: Path) -> None:
    """The same answer with and without `TRITON_INTERPRET`: doctor runs without, the tests with it."""
    interpreter = pytest.importorskip("fastpref.interpreter", reason="Triton is not installed")
    code = "from fastpref.interpreter import interpreter_problem; print(interpreter_problem())"
    environment = {**os.environ, "TRITON_INTERPRET": interpreted}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{interpreter.interpreter_problem()}\n", done.stderr
