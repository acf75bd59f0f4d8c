"""Every kernel compiles, for GPUs that are not here, without spills and within shared memory.

The compiles run in a process of their own: without a GPU conftest.py turns Triton's interpreter on, and
what is defined under it cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

KERNELS = """
import triton
import triton.language as tl
from fastpref.kernels.compile_report import CompileCase


@triton.jit
def spilling(x, out, rounds, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = tl.load(x + offsets).to(tl.float32)
    for _ in range(rounds):
        held = held * tl.sum(held * held, 0) + 1.0
    tl.store(out + offsets, held.to(out.dtype.element_ty))


@triton.jit
def greedy(x, out, DEPTH: tl.constexpr):
    rows = tl.program_id(0) + tl.arange(0, 64)
    tile = tl.load(x + rows[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :])
    product = tl.dot(tile, tl.trans(tile))
    tl.store(out + rows[:, None] * 64 + tl.arange(0, 64)[None, :], product.to(out.dtype.element_ty))


POINTERS = {"x": "*{dtype}:16", "out": "*{dtype}:16"}
"""

SPILLING_CASES = """
COMPILE_CASES = [
    CompileCase(spilling, {**POINTERS, "rounds": "i32"}, {"BLOCK": 256}, num_warps=1, note="small"),
    CompileCase(spilling, {**POINTERS, "rounds": "i32"}, {"BLOCK": LARGE}, num_warps=1, note="large"),
    CompileCase(greedy, POINTERS, {"DEPTH": 1024}, num_warps=16),
]
"""

# One kernel of two without a case; then a case that forgets an argument and names another that is not there.
NO_CASE = 'COMPILE_CASES = [CompileCase(spilling, {**POINTERS, "rounds": "i32"}, {"BLOCK": 256})]\n'
WRONG_ARGUMENT = 'COMPILE_CASES = [CompileCase(spilling, {**POINTERS, "round": "i32"}, {"BLOCK": 256})]\n'


def run_report(folder: Path, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, what was printed and the rows of the report, run as a user would, in `folder`."""
    rows = folder / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "fastpref.kernels.compile_report", *arguments, "--json", str(rows)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        timeout=500,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout, json.loads(rows.read_text()) if rows.exists() else []


def test_every_kernel_compiles_without_spills_for_every_gpu_and_dtype(tmp_path: Path) -> None:
    code, printed, rows = run_report(tmp_path)
    print(printed)
    assert code == 0, printed
    compiled: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        compiled.setdefault(row["kernel"], set()).add((row["arch"], row["dtype"]))
        assert row["registers"] > 0
        assert (row["stack"], row["spills"], row["problem"]) == (0, 0, ""), row
    assert compiled, "no kernel found"
    for kernel, seen in compiled.items():
        dtypes = ("-",) if ("sm_90", "-") in seen else ("bf16", "fp16", "fp32")
        wanted = {(arch, dtype) for arch in ("sm_80", "sm_90", "sm_100", "gfx942") for dtype in dtypes}
        assert seen == wanted, kernel


def test_a_kernel_that_spills_or_asks_for_too_much_shared_memory_fails(tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text(KERNELS + "LARGE = 8192" + SPILLING_CASES)
    code, printed, rows = run_report(tmp_path, "--module", "bad_kernels", "--arch", "sm_90", "--dtype", "fp32")
    assert code == 1, printed
    small, large, greedy = rows
    assert (small["problem"], small["stack"]) == ("", 0)
    assert large["stack"] > 0
    assert large["problem"].startswith("spills: ")
    assert greedy["shared"] > 227 * 1024
    assert "bytes of shared memory, the GPU has 232448" in greedy["problem"]
    assert "3 compiled kernels, 2 with a problem" in printed


def test_a_spill_on_amd_is_seen(tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text(KERNELS + "LARGE = 16384" + SPILLING_CASES)
    arguments = ("--module", "bad_kernels", "--kernel", "spilling", "--arch", "gfx942", "--dtype", "bf16")
    code, printed, (small, large) = run_report(tmp_path, *arguments)
    assert code == 1, printed
    assert small["problem"] == ""
    assert large["stack"] + large["spills"] > 0


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        (
            NO_CASE,
            "odd_kernels.greedy is a kernel, and no case in odd_kernels.COMPILE_CASES names it: add one",
        ),
        (
            WRONG_ARGUMENT,
            "a case of odd_kernels.spilling must name each argument once: "
            "wanted ['BLOCK', 'out', 'rounds', 'x'], got ['BLOCK', 'out', 'round', 'x']",
        ),
    ],
)
def test_a_kernel_without_a_fitting_case_is_an_error_that_names_it(tmp_path: Path, cases: str, message: str) -> None:
    (tmp_path / "odd_kernels.py").write_text(KERNELS + cases)
    code, printed, _ = run_report(tmp_path, "--module", "odd_kernels")
    assert code == 1
    assert message in printed


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off: there is a GPU")
def test_under_the_interpreter_the_error_says_what_to_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.kernels.compile_report import load_cases

    (tmp_path / "interpreted_kernels.py").write_text(KERNELS + NO_CASE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"no compilable @triton.jit kernel \(under TRITON_INTERPRET=1 none is"):
        load_cases("interpreted_kernels")
