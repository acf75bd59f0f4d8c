"""What is in a compiled kernel: its registers, its stack, and which instructions it consists of.

A CUDA binary is read by `cuobjdump` and `nvdisasm` (what `cuobjdump --dump-sass` calls), which are in Triton's wheel;
AMD's assembly is text that holds everything.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class MachineCode(NamedTuple):
    """Registers of a thread (vector registers on AMD) and of a wavefront (scalar), stack in bytes, instructions."""

    registers: int
    scalar_registers: int
    stack: int
    spills: int
    loads: dict[int, int]  # bytes that a thread loads from global memory at once: how many such instructions
    stores: dict[int, int]
    matrix: list[str]  # instructions that multiply matrices, or move their operands in tensor memory
    copies: list[str]  # asynchronous copies between global and shared memory


# The names of SASS and of AMD's assembly, as far as their first dot. Tensor memory (sm_100) counts as matrix: nothing
# else uses it. HFMA2.MMA, an ordinary multiplication of two halves, has HFMA2 before its dot.
_MATRIX = re.compile(r"[BDFHIQO]G?MMA$|UTC\w+|LDTM$|STTM$|WARPGROUP$|v_s?mfma\w+")
_COPY = re.compile(r"LDGSTS|UTMA\w+|UBLK\w+|(global|buffer)_load_lds_\w+")
_GLOBAL = re.compile(r"(?P<load>LDG?|(global|buffer|flat)_load)|STG?|(global|buffer|flat)_store")
# The parts of a name that say how wide an access is; one that says nothing is of 32 bits in SASS.
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD_WIDTHS = {
    **dict.fromkeys(("ubyte", "sbyte", "byte", "u8", "i8", "b8"), 1),
    **dict.fromkeys(("ushort", "sshort", "short", "u16", "i16", "b16"), 2),
    **{"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16},
}


def read_cubin(asm: Mapping[str, Any]) -> MachineCode:
    cubin = asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
        registers, stack, local = map(int, found.groups())
        names = _sass_names(cubin, file.name)
    # Local memory outside the stack is what spills, 0 in practice.
    return MachineCode(registers, 0, stack, local, *_sort(names))


def read_amdgcn(asm: Mapping[str, Any]) -> MachineCode:
    """From the assembly and the metadata at its end.

    Scalar registers that the compiler parks in lanes of a vector register never touch memory, and are no spills.
    """
    text = asm["amdgcn"]
    numbers = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    names = Counter(re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE))
    for width in re.findall(r"^\tbuffer_load_(\w+) .*\blds\b", text, re.MULTILINE):
        names[f"buffer_load_{width}"] -= 1
        names[f"buffer_load_lds_{width}"] += 1
    return MachineCode(
        numbers["vgpr_count"],
        numbers["sgpr_count"],
        numbers["private_segment_fixed_size"],
        numbers["vgpr_spill_count"],
        *_sort(names),
    )


def _run(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def _sass_names(cubin: bytes, path: str) -> Mapping[str, int]:
    """How often each instruction of the binary occurs; half a second to find out, so Triton's cache keeps it."""
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(b"instructions of " + cubin).hexdigest())
    if (known := cache.get_file("instructions.json")) is not None:
        return json.loads(Path(known).read_text())
    # One line an instruction: its address, a predicate or none, its name.
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*(?:\.\w+)*)", re.MULTILINE)
    names = Counter(line.findall(_run("nvdisasm", "--print-code", "--no-dataflow", path)))
    if "EXIT" not in names:
        raise RuntimeError(f"nvdisasm printed no program that ends: {dict(names)}")
    cache.put(json.dumps(names), "instructions.json", binary=False)
    return names


def _sort(names: Mapping[str, int]) -> tuple[dict[int, int], dict[int, int], list[str], list[str]]:
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    present = {name: count for name, count in names.items() if count > 0}
    for name, count in present.items():
        copies = _COPY.match(name)
        found = None if copies else _GLOBAL.match(name)
        if found and (width := _width(name, found.group(), name[found.end() :])):
            (loads if found["load"] else stores)[width] += count
    return dict(loads), dict(stores), _families(present, _MATRIX), _families(present, _COPY)


def _width(name: str, kind: str, rest: str) -> int:
    """Bytes that one thread moves; 0 where the name only begins like a load (LDGSTS, LDGDEPBAR)."""
    if kind.isupper():
        if rest and not rest.startswith("."):
            return 0
        return next((_SASS_WIDTHS[part] for part in rest.split(".") if part in _SASS_WIDTHS), 4)
    for part in rest.split("_"):
        if part in _AMD_WIDTHS:
            return _AMD_WIDTHS[part]
    raise ValueError(f"the width of the instruction {name} is not known: add it to _AMD_WIDTHS")


def _families(names: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    return sorted({name.split(".")[0] for name in names if pattern.match(name.split(".")[0])})
