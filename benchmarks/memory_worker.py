"""Peak memory of a call on the CPU, measured in a process of its own; Linux only.

The C library keeps freed memory and gives it to the next call, which would hide what that call needs. Here every block
of 64 KiB or more comes from the system and goes back at once (mallopt), so the growth of the resident set's high-water
mark over a second call, after a first one has loaded and compiled everything, is what the call takes. Reads questions
as lines of JSON, answers each with a line of JSON: `peak_bytes` beyond the inputs, `gradient_bytes` as the tensor
reports them, and `peak_beyond_gradient_bytes`, from which only the gradients that are in memory are taken off: pages of
zeros that nobody has touched are not.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def give_memory_back_at_once() -> None:
    libc = ctypes.CDLL(None)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        if libc.mallopt(parameter, 65536) != 1:
            raise RuntimeError("mallopt failed: the peak would miss memory that was kept")


def status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024


def resident_bytes(address: int, size: int) -> int:
    """How much of a block is in memory, from the page map: bit 63 of a page's entry."""
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = address // page, (address + size - 1) // page
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(first * 8)
        entries = file.read((last - first + 1) * 8)
    return page * sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", entries))


def main() -> int:
    give_memory_back_at_once()
    # Run by its path, so that mallopt comes before torch; then the folder of this file is no place to import from.
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)
    from fastpref.benchmarks.suites import SUITES

    held: tuple[str, Any] = ("", None)  # the last inputs, which the next question often asks about too
    for line in sys.stdin:
        question = json.loads(line)
        provider, mode, warm = (question[name] for name in ("provider", "mode", "warm"))
        suite = SUITES[question["suite"]]
        key = json.dumps([question["suite"], question["case"]])
        case = suite.case_type(**question["case"])
        if held[0] != key:
            held = ("", None)
            held = (key, suite.load(case, "cpu", truth=False))
        try:
            answer: dict[str, Any] = weigh(suite, case, provider, mode, held[1], warm=warm)
        except Exception as error:  # of the provider: the next question may be about another
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if suite.providers[provider].spoils:
            held = ("", None)
        print(json.dumps(answer), flush=True)
    return 0


def weigh(suite: Any, case: Any, provider: str, mode: str, inputs: Any, *, warm: bool) -> dict[str, int]:
    from fastpref.benchmarks.measure import gradient_bytes, tensors_of

    one = inputs.sets[0]
    suite.prepare(case, provider, mode, inputs, "cpu")
    if warm:
        suite.call(case, provider, mode, one)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = status_bytes("VmRSS")
    gradients = suite.call(case, provider, mode, one).gradients
    peak = status_bytes("VmHWM") - before
    taken = {x.data_ptr() for x in tensors_of(one)}
    resident = sum(
        resident_bytes(g.data_ptr(), g.numel() * g.element_size()) for g in gradients if g.data_ptr() not in taken
    )
    return {
        "peak_bytes": peak,
        "gradient_bytes": gradient_bytes(gradients, one),
        "peak_beyond_gradient_bytes": peak - resident,
    }


if __name__ == "__main__":
    sys.exit(main())
