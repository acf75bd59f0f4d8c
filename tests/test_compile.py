"""Every kernel compiles, for GPUs that are not here, to what COMPILED.md says: no spills, wide accesses, room.

For an H100 in bf16 by default; for every GPU and dtype, and the whole page, with the tests marked `slow`. The compiles
run in a process of their own: without a GPU conftest.py turns Triton's interpreter on, and what is defined under it
cannot be compiled.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from fastpref.benchmarks.compile.machine_code import read_amdgcn  # noqa: E402
from fastpref.benchmarks.compile.occupancy import ARCHS, occupancy  # noqa: E402
from fastpref.benchmarks.compile.report import load_cases, main  # noqa: E402
from fastpref.benchmarks.compile.table import REGENERATE, Row, format_markdown  # noqa: E402

PAGE = Path(__file__).parents[1] / "benchmarks" / "compile" / "COMPILED.md"

AMD_METADATA = ("vgpr_count", "sgpr_count", "private_segment_fixed_size", "vgpr_spill_count")

KERNELS = """
import triton
import triton.language as tl
from fastpref.kernels.compile_cases import CompileCase


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


@triton.jit
def strided(x, out, size, STEP: tl.constexpr):
    offsets = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tile = tl.load(x + offsets, mask=offsets < size)
    tl.store(out + offsets * STEP, tile, mask=offsets < size)


@triton.jit
def product(x, out, depth, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    step = tl.arange(0, 64)
    total = tl.zeros([SIZE, SIZE], tl.float32) + tl.program_id(0)
    for first in range(0, depth, 64):
        tile = tl.load(x + row[:, None] * depth + first + step[None, :])
        total = tl.dot(tile, tl.trans(tile), total)
    tl.store(out + row[:, None] * SIZE + row[None, :], total.to(out.dtype.element_ty))


@triton.jit
def described(x, out, rows, SIZE: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, SIZE], [SIZE, 1], [64, SIZE])
    target = tl.make_tensor_descriptor(out, [rows, SIZE], [SIZE, 1], [64, SIZE])
    first = tl.program_id(0) * 64
    target.store([first, 0], source.load([first, 0]))


POINTERS = {"x": "*{dtype}:16", "out": "*{dtype}:16"}
"""

SPILLING_CASES = """
COMPILE_CASES = [
    CompileCase(spilling, {**POINTERS, "rounds": "i32"}, {"BLOCK": 256}, num_warps=1, note="small"),
    CompileCase(spilling, {**POINTERS, "rounds": "i32"}, {"BLOCK": 4096}, num_warps=1, note="starving"),
    CompileCase(spilling, {**POINTERS, "rounds": "i32"}, {"BLOCK": LARGE}, num_warps=1, note="large"),
    CompileCase(greedy, POINTERS, {"DEPTH": 1024}, num_warps=16),
    CompileCase(strided, {**POINTERS, "size": "i32:16"}, {"STEP": 1}, note="step 1"),
    CompileCase(strided, {**POINTERS, "size": "i32:16"}, {"STEP": 3}, note="step 3"),
    CompileCase(strided, {**POINTERS, "size": "i32"}, {"STEP": 1}, note="no promise"),
    CompileCase(product, {**POINTERS, "depth": "i32:16"}, {"SIZE": 128}, num_stages=3, dtypes=("bf16",)),
    CompileCase(described, {**POINTERS, "rows": "i32"}, {"SIZE": 64}, dtypes=("bf16",)),
]
"""

# A few kernels compile sooner in one process than others start.
BAD = ("--module", "bad_kernels", "--jobs", "1")

# One kernel of two without a case; then a case that forgets an argument and names another that is not there.
NO_CASE = 'COMPILE_CASES = [CompileCase(spilling, {**POINTERS, "rounds": "i32"}, {"BLOCK": 256})]\n'
WRONG_ARGUMENT = 'COMPILE_CASES = [CompileCase(spilling, {**POINTERS, "round": "i32"}, {"BLOCK": 256})]\n'


def compiling(folder: Path) -> dict[str, str]:
    """The environment in which kernels, those of modules in `folder` too, can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**environment, "PYTHONPATH": path}


def run_report(folder: Path, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, what was printed and the rows of the report, run as a user would, in `folder`."""
    rows = folder / "rows.json"
    command = [sys.executable, "-m", "fastpref.benchmarks.compile.report", *arguments, "--json", str(rows)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=compiling(folder),
        text=True,
        timeout=500,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout, json.loads(rows.read_text()) if rows.exists() else []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, list[dict[str, Any]], str]:
    """Exit code, output and rows of the whole report, and the page it writes: compiled once for all tests."""
    folder = tmp_path_factory.mktemp("report")
    code, printed, rows = run_report(folder, "--markdown", str(folder / "page.md"))
    return code, printed, rows, (folder / "page.md").read_text("utf-8")


@pytest.fixture(scope="module")
def one_gpu(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, output and rows of the report for sm_90 and bf16: a part of the whole one, where that is made too."""
    if any("report" in getattr(item, "fixturenames", ()) for item in request.session.items):
        code, printed, rows, _ = request.getfixturevalue("report")
        return code, printed, [row for row in rows if row["arch"] == "sm_90" and row["dtype"] in ("bf16", "-")]
    return run_report(tmp_path_factory.mktemp("one_gpu"), "--arch", "sm_90", "--dtype", "bf16")


def check_rows(code: int, printed: str, rows: list[dict[str, Any]], archs: set[str], dtypes: set[str]) -> None:
    """The exit code 0 says that accesses are wide and warps enough; no spills, and every kernel in each dtype."""
    assert code == 0, printed
    compiled: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        compiled.setdefault(row["kernel"], set()).add((row["arch"], row["dtype"]))
        assert row["registers"] > 0
        assert (row["stack"], row["spills"], row["problem"]) == (0, 0, ""), row
        # The products are cuBLAS's, as the page says: a kernel that starts to multiply changes this and that sentence.
        assert (row["matrix"], row["copies"]) == ([], []), row
    assert len(compiled) >= 8, compiled
    for kernel, seen in compiled.items():
        typed = {"-"} if {dtype for _, dtype in seen} == {"-"} else dtypes
        assert seen == {(arch, dtype) for arch in archs for dtype in typed}, kernel


def test_every_kernel_compiles_without_spills_for_an_h100(one_gpu: Any) -> None:
    check_rows(*one_gpu, {"sm_90"}, {"bf16"})


@pytest.mark.slow
def test_every_kernel_compiles_without_spills_for_every_gpu_and_dtype(report: Any) -> None:
    check_rows(*report[:3], {"sm_80", "sm_90", "sm_100", "gfx942"}, {"bf16", "fp16", "fp32"})


def lines_of_page(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(("| ", "## "))]


def names(lines: list[str]) -> list[list[str]]:
    """Kernel, case and dtype."""
    return [line.split(" | ")[:2] for line in lines]


def skip_unless_the_pages_triton() -> None:
    version = re.search(r"^Triton (\S+);", PAGE.read_text("utf-8"), re.MULTILINE)
    assert version is not None, f"no version of Triton in the page, write it again: {REGENERATE}"
    if version[1] != triton.__version__:
        pytest.skip(f"the page is of Triton {version[1]}, here is {triton.__version__}, which compiles otherwise")


def here_and_committed(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The page's lines for sm_90 and bf16: as these rows give them, and as they are committed."""
    numbered = [{**row, **{k: {int(w): n for w, n in row[k].items()} for k in ("loads", "stores")}} for row in rows]
    ours = lines_of_page(format_markdown([Row(**row) for row in numbered], triton.__version__))
    section = PAGE.read_text("utf-8").partition("## sm_90")[2].partition("\n## ")[0]
    committed = ["## sm_90", *lines_of_page(section)]
    return ours, [line for line in committed if " | fp16 | " not in line and " | fp32 | " not in line]


def test_the_committed_page_lists_the_kernels_that_there_are(one_gpu: Any) -> None:
    """Whatever the version of Triton, each kernel and case has its row."""
    ours, committed = here_and_committed(one_gpu[2])
    assert names(committed) == names(ours), f"write the page again: {REGENERATE}"


def test_the_committed_numbers_are_what_compiling_for_an_h100_gives(one_gpu: Any) -> None:
    skip_unless_the_pages_triton()
    ours, committed = here_and_committed(one_gpu[2])
    assert committed == ours, f"write the page again: {REGENERATE}"


@pytest.mark.slow
def test_the_committed_page_lists_every_gpu_and_dtype(report: Any) -> None:
    committed, ours = (names(lines_of_page(page)) for page in (PAGE.read_text("utf-8"), report[3]))
    assert committed == ours, f"write the page again: {REGENERATE}"


@pytest.mark.slow
def test_the_committed_page_is_what_compiling_gives(report: Any) -> None:
    """Registers, memory, instructions and occupancy to the last figure."""
    skip_unless_the_pages_triton()
    assert PAGE.read_text("utf-8").splitlines() == report[3].splitlines(), f"write the page again: {REGENERATE}"


FIRST_CALL = """
import importlib, pkgutil, sys
import torch
import fastpref, fastpref.kernels
logits = torch.randn(1, 3, 17)
fastpref.token_logps(logits, torch.tensor([[1, 2, 3]]))
assert "fastpref.kernels.logps" in sys.modules
for module in pkgutil.iter_modules(fastpref.kernels.__path__):
    if module.name != "compile_cases":
        importlib.import_module(f"fastpref.kernels.{module.name}")
found = [name for name in sys.modules if name.startswith(("fastpref.benchmarks", "fastpref.kernels.compile_cases"))]
assert found == [], found
"""


@pytest.mark.slow
def test_a_users_first_call_imports_the_kernels_and_nothing_of_the_compile_report() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTPREF_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_import_torch_triton_numpy_and_each_other() -> None:
    """No argparse, no process pools, nothing of fastpref: what a kernel's file says is its own story."""
    folder = Path(importlib.import_module("fastpref.kernels").__file__ or "").parent
    files = [path for path in folder.glob("*.py") if path.stem != "compile_cases"]
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.level, node.module != "compile_cases") == (1, True), path.name
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                wanted = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    wanted = [node.module or ""]
                known = {"__future__", "contextlib", "collections", "typing", "numpy", "torch", "triton"}
                assert {name.partition(".")[0] for name in wanted} <= known, (path.name, wanted)


def test_the_page_is_of_all_kernels_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--arch", "sm_90", "--markdown", str(tmp_path / "page.md")])
    assert "--arch" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_a_file_of_others_is_refused_before_anything_is_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = "# Mine\n\nThe page is from python -m fastpref.benchmarks.compile.report.\n"
    (tmp_path / "notes.md").write_text(mine)
    with pytest.raises(SystemExit, match="2"):
        main(["--markdown", str(tmp_path / "notes.md")])
    assert f"--markdown {str(tmp_path / 'notes.md')!r} is there already" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.md", mine)]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, dict[tuple[str, str], dict[str, Any]]]:
    """Exit code, output and, by kernel and note, the rows of kernels made to break each guard, on sm_90."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad_kernels.py").write_text(KERNELS + "LARGE = 8192" + SPILLING_CASES)
    kernels = ("spilling", "greedy", "strided")
    arguments = (*BAD, "--kernel", *kernels, "--arch", "sm_90", "--dtype", "fp32")
    code, printed, rows = run_report(folder, *arguments)
    return code, printed, {(row["kernel"], row["note"]): row for row in rows}


def test_a_kernel_that_spills_or_asks_for_too_much_shared_memory_fails(bad: Any) -> None:
    code, printed, rows = bad
    assert code == 1, printed
    small, large, greedy = (rows[key] for key in (("spilling", "small"), ("spilling", "large"), ("greedy", "")))
    assert (small["problem"], small["stack"]) == ("", 0)
    assert large["stack"] > 0
    assert large["problem"].startswith("spills: ")
    assert greedy["shared"] > 227 * 1024
    assert "bytes of shared memory, the GPU has 232448" in greedy["problem"]
    assert greedy["blocks"] == 0
    assert "7 compiled kernels, 4 with a problem" in printed


def test_a_kernel_that_leaves_too_few_warps_fails(bad: Any) -> None:
    """It neither spills nor has a stack: its registers alone keep other blocks out."""
    row = bad[2]["spilling", "starving"]
    assert (row["stack"], row["spills"], row["limiter"]) == (0, 0, "registers")
    assert row["resident_warps"] == 65536 // (-(-row["registers"] // 8) * 8 * 32) // 4 * 4 < 16
    assert row["problem"] == f"a multiprocessor holds {row['resident_warps']} warps (limit: registers), wanted 16"


def test_a_kernel_with_narrow_accesses_fails_where_16_divides_its_sizes_and_only_there(bad: Any) -> None:
    wide, narrow, free = (bad[2]["strided", note] for note in ("step 1", "step 3", "no promise"))
    assert (wide["loads"], wide["stores"], wide["problem"]) == ({"16": 2}, {"16": 2}, "")
    assert (narrow["loads"], narrow["stores"]) == ({"16": 2}, {"4": 8})
    assert narrow["problem"] == "16 divides its sizes, and 8 stores are below 16 bytes, 0 of single values"
    assert (free["loads"], free["stores"], free["problem"]) == ({"4": 8}, {"4": 8}, "")


@pytest.mark.slow
def test_matrix_and_copy_instructions_are_seen_where_there_are_any(tmp_path: Path) -> None:
    """What "none" in the page is worth: wgmma, tensor memory, cp.async, TMA and MFMA show in kernels that have them."""
    (tmp_path / "bad_kernels.py").write_text(KERNELS + "LARGE = 8192" + SPILLING_CASES)
    _, printed, rows = run_report(tmp_path, *BAD, "--kernel", "product", "described", "--dtype", "bf16")
    found = {(row["kernel"], row["arch"]): (row["matrix"], row["copies"]) for row in rows}
    assert "does not compile" not in printed, printed
    assert found["product", "sm_80"] == (["HMMA"], ["LDGSTS"])
    assert found["product", "sm_90"] == (["HGMMA", "WARPGROUP"], ["LDGSTS"])
    assert {"UTCHMMA", "LDTM"} <= set(found["product", "sm_100"][0])
    assert found["product", "sm_100"][1] == ["LDGSTS"]
    assert [name[:7] for name in found["product", "gfx942"][0]] == ["v_mfma_"]
    for arch in ("sm_90", "sm_100"):
        assert {"UTMALDG", "UTMASTG"} <= set(found["described", arch][1])
    assert found["described", "sm_80"] == ([], [])


@pytest.mark.slow
def test_a_spill_on_amd_is_seen(tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text(KERNELS + "LARGE = 16384" + SPILLING_CASES)
    arguments = (*BAD, "--kernel", "spilling", "--arch", "gfx942", "--dtype", "bf16")
    code, printed, (small, _, large) = run_report(tmp_path, *arguments)
    assert code == 1, printed
    assert small["problem"] == ""
    assert large["stack"] + large["spills"] > 0


# The numbers of the first two are NVIDIA's own example ("CUDA C++ Best Practices Guide", occupancy: 37 registers on
# compute capability 7.0, whose registers and warps are those of 8.0); the rest is worked out by hand.
@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "wanted"),
    [
        ("sm_80", 4, 37, 0, (12, 48, "registers")),
        ("sm_80", 10, 37, 0, (4, 40, "registers")),
        ("sm_90", 4, 33, 0, (12, 48, "registers")),  # 40 a thread: 12 warps in each of four parts
        ("sm_90", 4, 32, 0, (16, 64, "threads")),
        ("sm_90", 1, 32, 0, (32, 32, "blocks")),
        ("sm_90", 1, 64, 0, (32, 32, "registers and blocks")),
        ("sm_90", 4, 32, 56 * 1024, (4, 16, "shared memory")),  # 228 KiB less 1 KiB for each of the four
        ("sm_90", 4, 32, 56 * 1024 + 1, (3, 12, "shared memory")),
        ("sm_80", 4, 32, 40 * 1024, (4, 16, "shared memory")),
        ("sm_80", 4, 32, 40 * 1024 + 1, (3, 12, "shared memory")),
        ("sm_100", 4, 255, 227 * 1024, (1, 4, "shared memory")),
        ("sm_100", 16, 255, 0, (0, 0, "registers")),  # such a launch fails
        ("gfx942", 1, 64, 0, (32, 32, "threads")),  # one wavefront needs no barrier
        ("gfx942", 2, 64, 512, (16, 32, "threads")),
        ("gfx942", 8, 64, 32 * 1024 + 1, (1, 8, "shared memory")),
    ],
)
def test_occupancy_is_what_the_documented_limits_give(
    arch: str, warps: int, registers: int, shared: int, wanted: tuple[int, int, str]
) -> None:
    assert occupancy(ARCHS[arch], warps=warps, registers=registers, shared=shared) == wanted


@pytest.mark.parametrize(
    ("registers", "scalar", "wavefronts"),
    [
        (64, 80, 8),
        (63, 84, 7),
        (64, 98, 6),
        (72, 72, 7),
        (80, 98, 6),
        (84, 72, 5),
        (89, 106, 5),
        (98, 106, 4),
        (117, 106, 4),
    ],
)
def test_occupancy_on_amd_is_what_llvm_prints(registers: int, scalar: int, wavefronts: int) -> None:
    """`; Occupancy:` (wavefronts a SIMD) beside `TotalNumVgprs` and `TotalNumSgprs` in what Triton 3.9 compiled."""
    found = occupancy(ARCHS["gfx942"], warps=1, registers=registers, shared=0, scalar_registers=scalar)
    assert found.warps == 4 * wavefronts


def test_amd_loads_into_shared_memory_count_as_copies_and_unknown_widths_are_errors() -> None:
    metadata = "".join(f"    .{name}: 1\n" for name in AMD_METADATA)
    copying = "\tbuffer_load_dword v1, s[0:3], 0 offen lds\n\tbuffer_load_dwordx4 v[2:5], v1, s[0:3], 0\n"
    code = read_amdgcn({"amdgcn": copying + metadata})
    assert (code.loads, code.copies) == ({16: 1}, ["buffer_load_lds_dword"])
    with pytest.raises(ValueError, match="width of the instruction global_load_tr_b6 is not known"):
        read_amdgcn({"amdgcn": "\tglobal_load_tr_b6 v1, v2, off\n" + metadata})


LOADING = """
from fastpref.benchmarks.compile.report import load_cases
for name in ("no_case", "wrong_argument"):
    try:
        load_cases(name)
    except ValueError as error:
        print(error)
"""


def test_a_kernel_without_a_fitting_case_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "no_case.py").write_text(KERNELS + NO_CASE)
    (tmp_path / "wrong_argument.py").write_text(KERNELS + WRONG_ARGUMENT)
    done = subprocess.run(
        [sys.executable, "-c", LOADING], env=compiling(tmp_path), cwd=tmp_path, capture_output=True, text=True
    )
    no_case, wrong = done.stdout.splitlines()
    assert "no_case.greedy is a kernel" in no_case
    assert "wrong_argument.spilling must name each argument once" in wrong
    assert "['BLOCK', 'out', 'rounds', 'x'], got ['BLOCK', 'out', 'round', 'x']" in wrong


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off: there is a GPU")
def test_under_the_interpreter_the_error_says_what_to_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "interpreted_kernels.py").write_text(KERNELS + NO_CASE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"no compilable @triton.jit kernel \(under TRITON_INTERPRET=1 none is"):
        load_cases("interpreted_kernels")
