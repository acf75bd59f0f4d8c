"""What every kernel compiles to, on GPUs that are not here: registers, memory, instructions, occupancy.

    python -m fastpref.benchmarks.compile.report [--module NAME ...] [--kernel NAME ...] [--arch sm_90 ...]
                                              [--dtype bf16 ...] [--jobs 2] [--json FILE] [--markdown FILE]

Triton compiles for a GPU that is not there, and machine_code.py reads what came of it. A kernel fails, and the exit
code is 1, if it spills or has a stack, asks for more shared memory than the GPU has, leaves a multiprocessor fewer
warps than occupancy.py demands, or has narrow accesses where its case promises wide ones. `--markdown` writes the page
COMPILED.md, from all kernels, GPUs and dtypes.

The cases stand in kernels/compile_cases.py, in a list named `COMPILE_CASES`, built from the **same constants** that the
launchers pass, so that what is compiled here is what is launched there:

    CompileCase(
        kernel=forward_kernel,  # its launcher: forward_kernel[(n,)](..., BLOCK=BLOCK, num_warps=NUM_WARPS)
        signature={"logits": "*{dtype}:16", "labels": "*i64:16", "logps": "*fp32:16",
                   "stride": "i64", "vocab": "i32", "scale": "fp32"},
        constexprs={"BLOCK": BLOCK, "HAS_CAP": False},
        num_warps=NUM_WARPS,
    )

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
- A case with a size or a stride that 16 divides (an integer with `:16`) promises that each load and store of a tile
  moves 16 bytes a thread.
- `note` tells two cases of one kernel apart in the table: `note="stride % 16 == 0"`.

Each kernel with a grid (`program_id` in its source) that a module of the list's package defines must be named by a
case: one that is not fails. Helpers that kernels call need no case.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fastpref.folders import FolderError, check_file
from fastpref.kernels.compile_cases import DTYPES, CompileCase

from .machine_code import MachineCode, read_amdgcn, read_cubin
from .occupancy import ARCHS, Arch, Occupancy, occupancy
from .table import PAGE_MARK, Row, format_markdown, show

CASES = "fastpref.kernels.compile_cases"
WIDE = 16  # bytes: the most that one thread moves at once before sm_100
NO_CODE = MachineCode(0, 0, 0, 0, {}, {}, [], [])


class Job(NamedTuple):
    """What a worker compiles, in names: a kernel itself cannot be sent to another process."""

    module: str
    position: int  # in the module's COMPILE_CASES
    arch: str
    dtype: str


@functools.cache
def load_cases(module: str) -> list[CompileCase]:
    """The module's cases; ValueError where a kernel with a grid has none or a case does not fit."""
    from triton.runtime.jit import JITFunction

    loaded = importlib.import_module(module)
    cases = list(loaded.COMPILE_CASES)
    for case in cases:
        _check_case(module, case, JITFunction)
    named = {id(case.kernel) for case in cases}
    for neighbour in _neighbours(loaded):
        for name, value in vars(neighbour).items():
            own = isinstance(value, JITFunction) and value.fn.__module__ == neighbour.__name__
            if own and "program_id" in inspect.getsource(value.fn) and id(value) not in named:
                place = f"{neighbour.__name__}.{name}"
                raise ValueError(f"{place} is a kernel, and no case in {module}.COMPILE_CASES names it: add one")
    return cases


def _neighbours(module: ModuleType) -> list[ModuleType]:
    """The modules of its package, itself among them; itself where it is in none."""
    if not module.__package__:
        return [module]
    package = importlib.import_module(module.__package__)
    return [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]


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
    warps = num_warps or 4  # Triton's own choice
    code, resident, shared, problem = NO_CODE, Occupancy(0, 0, "-"), 0, ""
    start = time.perf_counter()
    try:
        compiled = triton.compile(
            ASTSource(case.kernel, signature, constants, attributes),
            target=GPUTarget(arch.backend, arch.name, arch.warp_size),
            options={name: value for name, value in options.items() if value is not None},
        )
    except Exception as error:
        problem = f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    else:
        shared = compiled.metadata.shared
        code = (read_cubin if arch.backend == "cuda" else read_amdgcn)(compiled.asm)
        resident = occupancy(
            arch, warps=warps, registers=code.registers, scalar_registers=code.scalar_registers, shared=shared
        )
        problem = "; ".join(_problems(case, arch, code, shared, resident, compiled.asm["ttir"]))
    return Row(
        case.kernel.fn.__module__,
        case.kernel.__name__,
        case.note,
        job.arch,
        job.dtype,
        warps,
        shared=shared,
        **code._asdict(),
        blocks=resident.blocks,
        resident_warps=resident.warps,
        limiter=resident.limiter,
        seconds=round(time.perf_counter() - start, 2),
        problem=problem,
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


def _problems(
    case: CompileCase, arch: Arch, code: MachineCode, shared: int, resident: Occupancy, ttir: str
) -> Iterator[str]:
    if code.stack or code.spills:
        yield f"spills: {code.stack} bytes of stack, {code.spills} registers spilled"
    if shared > arch.block_shared:
        yield f"needs {shared} bytes of shared memory, the GPU has {arch.block_shared}"
    elif resident.warps < arch.min_warps:
        yield f"a multiprocessor holds {resident.warps} warps (limit: {resident.limiter}), wanted {arch.min_warps}"
    if any(not kind.startswith("*") and kind.endswith(":16") for kind in case.signature.values()):
        for verb, widths in (("load", code.loads), ("store", code.stores)):
            # A single value is `tt.load %p : !tt.ptr<f32>`, a tile `tt.load %p : tensor<4x!tt.ptr<f32>>`.
            single = len(re.findall(rf"\btt\.{verb}\b.*: !tt\.ptr<", ttir))
            narrow = sum(count for width, count in widths.items() if width < WIDE)
            if narrow > single:
                yield f"16 divides its sizes, and {narrow} {verb}s are below {WIDE} bytes, {single} of single values"


def compile_all(jobs: Sequence[Job], *, processes: int = 1) -> list[Row]:
    if processes == 1:
        return [compile_job(job) for job in jobs]
    # Spawned, not forked: Triton and torch hold threads, and a forked child of theirs may hang.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_job, jobs, chunksize=4))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpref.benchmarks.compile.report", description="What each kernel compiles to."
    )
    parser.add_argument(
        "--module", nargs="+", default=[CASES], help="modules with COMPILE_CASES (default: %(default)s)"
    )
    parser.add_argument("--kernel", nargs="+", default=[], help="only these kernels")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), choices=list(ARCHS))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--markdown", type=Path, help="write the page COMPILED.md here: all kernels, GPUs and dtypes")
    options = parser.parse_args(argv)
    chosen = [name for name in ("module", "kernel", "arch", "dtype") if vars(options)[name] != parser.get_default(name)]
    if options.markdown is not None and chosen:
        parser.error(f"--markdown writes the page of all kernels, got --{' --'.join(chosen)} as well: leave that out")
    try:  # before minutes of compiling
        if options.json is not None:
            check_file(options.json, mark='"kernel": ', option="--json")
        if options.markdown is not None:
            check_file(options.markdown, mark=PAGE_MARK, option="--markdown")
    except FolderError as error:
        parser.error(str(error))
    jobs = list_jobs(options.module, archs=options.arch, dtypes=options.dtype, kernels=options.kernel)
    rows = compile_all(jobs, processes=max(1, options.jobs))
    show(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    if options.markdown is not None:
        import triton

        options.markdown.write_text(format_markdown(rows, triton.__version__), encoding="utf-8")
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
