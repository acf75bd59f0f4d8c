"""What every kernel compiles to, on GPUs that are not here: registers, stack, spills and shared memory.

    python -m fastpref.kernels.compile_report [--module NAME ...] [--kernel NAME ...] [--arch sm_90 ...]
                                              [--dtype bf16 ...] [--jobs 2] [--json FILE]

Triton compiles for a GPU that is not there; `cuobjdump` (in Triton's wheel) reads the numbers from a CUDA
binary, and for AMD the assembly's metadata holds them. A kernel that spills, has a stack, or asks for more
shared memory than the GPU has fails, and the exit code is 1.

The protocol for a kernel's module: next to its launcher stands a list named `COMPILE_CASES`, built from the
**same constants** that the launcher passes, so that what is compiled here is what is launched there:

    from .compile_report import CompileCase

    BLOCK, NUM_WARPS = 4096, 8          # the launcher: _forward[(n,)](..., BLOCK=BLOCK, num_warps=NUM_WARPS)

    COMPILE_CASES = [
        CompileCase(
            kernel=_forward,
            signature={"logits": "*{dtype}:16", "labels": "*i64:16", "logps": "*fp32:16",
                       "stride": "i64", "vocab": "i32", "scale": "fp32"},
            constexprs={"BLOCK": BLOCK, "HAS_CAP": False},
            num_warps=NUM_WARPS,
        ),
    ]

- `kernel` is the `@triton.jit` function. `signature` and `constexprs` together name each argument once.
- `signature` maps the arguments that are not `tl.constexpr` to types in Triton's spelling: `*bf16` a pointer,
  `i32`, `i64`, `fp32`. `{dtype}` stands for the input's dtype; each case is compiled with it as bf16, fp16,
  fp32. Integers below 2**31 are launched as `i32`, whatever the kernel casts them to; `i64` from there on.
- An argument that the launch passes as `None` is a constant to Triton: `constexprs={"bias": None}`.
- `:16` after a type says what the launch tells the compiler: a pointer that is 16-byte aligned (a fresh torch
  tensor is) or an integer that 16 divides. An integer that is 1 at the launch is a constant there: `:1`. Give
  both forms as two cases where they differ: V = 50257 is a stride that 16 does not divide.
- `num_warps` and `num_stages` are the launcher's; `None` leaves them to Triton, as such a launch does.
  `hip_num_warps` is for a launcher that takes another number on AMD, where a warp is 64 threads.
- `dtypes` restricts the case, for a launcher whose constants depend on the dtype (give one case a dtype). A
  kernel without `{dtype}` is compiled once and reported as `-`.
- `note` tells two cases of one kernel apart in the table: `note="stride % 16 == 0"`.

Modules are found by themselves. Each kernel with a grid (`program_id` in its source) that a `kernels/*.py`
defines must be named by a case of that module: one that is not fails. Helpers that kernels call need no case.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

DTYPES = ("bf16", "fp16", "fp32")


class CompileCase(NamedTuple):
    """One kernel as its launcher launches it; the module's docstring explains each field."""

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = {}
    num_warps: int | None = None
    num_stages: int | None = None
    hip_num_warps: int | None = None
    dtypes: tuple[str, ...] = DTYPES
    note: str = ""


class Arch(NamedTuple):
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes of shared memory that one block may have


ARCHS = {
    "sm_80": Arch("cuda", 80, 32, 163 * 1024),
    "sm_90": Arch("cuda", 90, 32, 227 * 1024),
    "sm_100": Arch("cuda", 100, 32, 227 * 1024),
    "gfx942": Arch("hip", "gfx942", 64, 64 * 1024),
}


class Job(NamedTuple):
    """What a worker compiles, in names: a kernel itself cannot be sent to another process."""

    module: str
    position: int  # in the module's COMPILE_CASES
    arch: str
    dtype: str


class Row(NamedTuple):
    """One compiled kernel: `stack` and `shared` in bytes; `problem` is empty where all is well."""

    module: str
    kernel: str
    note: str
    arch: str
    dtype: str
    num_warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    seconds: float
    problem: str


def find_modules() -> list[str]:
    """The modules beside this one."""
    package = __spec__.parent if __spec__ is not None else "fastpref.kernels"
    here = str(Path(__file__).parent)
    return [f"{package}.{m.name}" for m in pkgutil.iter_modules([here]) if m.name != "compile_report"]


def load_cases(module: str) -> list[CompileCase]:
    """The module's cases; ValueError where a kernel with a grid has none or a case does not fit."""
    from triton.runtime.jit import JITFunction

    loaded = importlib.import_module(module)
    cases = list(getattr(loaded, "COMPILE_CASES", []))
    for case in cases:
        _check_case(module, case, JITFunction)
    named = {id(case.kernel) for case in cases}
    for name, value in vars(loaded).items():
        own = isinstance(value, JITFunction) and value.fn.__module__ == loaded.__name__
        if own and "program_id" in inspect.getsource(value.fn) and id(value) not in named:
            raise ValueError(f"{module}.{name} is a kernel, and no case in {module}.COMPILE_CASES names it: add one")
    return cases


def _check_case(module: str, case: CompileCase, jit_function: Any) -> None:
    if not isinstance(case.kernel, jit_function):
        raise ValueError(
            f"{module}.COMPILE_CASES names {case.kernel!r}, which is no compilable @triton.jit kernel (under "
            "TRITON_INTERPRET=1 none is: unset it)"
        )
    place = f"a case of {module}.{case.kernel.__name__}"
    wanted, got = sorted(case.kernel.arg_names), sorted([*case.signature, *case.constexprs])
    if wanted != got:
        raise ValueError(f"{place} must name each argument once: wanted {wanted}, got {got}")
    if unknown := set(case.dtypes) - set(DTYPES):
        raise ValueError(f"{place} names the dtypes {sorted(unknown)}, not of {DTYPES}")


def list_jobs(
    modules: Iterable[str], *, archs: Sequence[str], dtypes: Sequence[str], kernels: Sequence[str] = ()
) -> list[Job]:
    jobs = []
    for module in modules:
        for position, case in enumerate(load_cases(module)):
            if kernels and case.kernel.__name__ not in kernels:
                continue
            typed = any("{dtype}" in kind for kind in case.signature.values())
            for dtype in [d for d in case.dtypes if d in dtypes] if typed else ["-"]:
                jobs += [Job(module, position, arch, dtype) for arch in archs]
    return jobs


def compile_job(job: Job) -> Row:
    """Compile one kernel and read what it takes; a compiler error is the row's problem, not the run's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = load_cases(job.module)[job.position]
    arch = ARCHS[job.arch]
    signature, constants, attributes = _specialise(case, job.dtype)
    num_warps = case.num_warps
    if arch.backend == "hip" and case.hip_num_warps is not None:
        num_warps = case.hip_num_warps
    options = {"num_warps": num_warps, "num_stages": case.num_stages}
    registers = stack = spills = shared = 0
    start, problem = time.perf_counter(), ""
    try:
        compiled = triton.compile(
            ASTSource(case.kernel, signature, constants, attributes),
            target=GPUTarget(arch.backend, arch.arch, arch.warp_size),
            options={name: value for name, value in options.items() if value is not None},
        )
    except Exception as error:
        problem = f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    else:
        shared = compiled.metadata.shared
        read = _read_cubin if arch.backend == "cuda" else _read_amdgcn
        registers, stack, spills = read(compiled.asm)
        problem = _judge(stack, spills, shared, arch.shared_limit)
    seconds = time.perf_counter() - start
    return Row(
        job.module,
        case.kernel.__name__,
        case.note,
        job.arch,
        job.dtype,
        num_warps or 4,
        registers,
        stack,
        spills,
        shared,
        round(seconds, 2),
        problem,
    )


def _specialise(case: CompileCase, dtype: str) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """The case in ASTSource's terms: types of all arguments, values of the constant ones, what 16 divides."""
    signature, constants, attributes = {}, dict(case.constexprs), {}
    for position, name in enumerate(case.kernel.arg_names):
        kind, _, hint = case.signature.get(name, "constexpr").format(dtype=dtype).partition(":")
        if hint == "16":
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif hint == "1":
            kind, constants[name] = "constexpr", 1
        elif hint:
            raise ValueError(f"{case.kernel.__name__}: {name} has the hint {hint!r}, wanted 16, 1 or none")
        signature[name] = kind
    return signature, constants, attributes


def _judge(stack: int, spills: int, shared: int, shared_limit: int) -> str:
    problems = []
    if stack or spills:
        problems.append(f"spills: {stack} bytes of stack, {spills} registers spilled")
    if shared > shared_limit:
        problems.append(f"needs {shared} bytes of shared memory, the GPU has {shared_limit}")
    return "; ".join(problems)


def _read_cubin(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """Registers, stack bytes and spills (local memory outside the stack, 0 in practice) of a CUDA binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"{tool} printed no resource usage: {printed!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def _read_amdgcn(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """Vector registers, scratch bytes and spilled vector registers, from the metadata at the assembly's end.

    Scalar registers that the compiler parks in lanes of a vector register never touch memory, and do not count.
    """
    numbers = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", asm["amdgcn"], re.MULTILINE)}
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"], numbers["vgpr_spill_count"]


def compile_all(jobs: Sequence[Job], *, processes: int = 1) -> list[Row]:
    if processes == 1:
        return [compile_job(job) for job in jobs]
    # Spawned, not forked: Triton and torch hold threads, and a forked child of theirs may hang.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_job, jobs, chunksize=4))


def format_table(rows: Sequence[Row]) -> str:
    header = ("kernel", "arch", "dtype", "warps", "registers", "stack", "spills", "shared", "verdict")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        name = f"{row.kernel} [{row.note}]" if row.note else row.kernel
        numbers = (row.num_warps, row.registers, row.stack, row.spills, row.shared)
        lines.append((name, row.arch, row.dtype, *map(str, numbers), row.problem or "ok"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    return "\n".join("  ".join([*map(str.ljust, line, widths), line[-1]]) for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpref.kernels.compile_report", description="What each kernel compiles to."
    )
    parser.add_argument("--module", nargs="+", help="modules with COMPILE_CASES (default: those of fastpref.kernels)")
    parser.add_argument("--kernel", nargs="+", default=[], help="only these kernels")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), choices=list(ARCHS))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args(argv)
    jobs = list_jobs(options.module or find_modules(), archs=options.arch, dtypes=options.dtype, kernels=options.kernel)
    rows = compile_all(jobs, processes=max(1, options.jobs))
    print(format_table(rows))
    failed = sum(bool(row.problem) for row in rows)
    print(f"{len(rows)} compiled kernels, {failed} with a problem")
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
