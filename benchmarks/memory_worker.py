"""Peak memory of a call on the CPU, measured in a process of its own; Linux only.

The C library keeps freed memory and gives it to the next call, which would hide what that call needs. Here every block
of 64 KiB or more comes from the system and goes back at once (mallopt), so the growth of the resident set's high-water
mark over a second call, after a first one has loaded and compiled everything, is what the call takes. Reads questions
as lines of JSON, answers each with a line of JSON: `peak_bytes` beyond the inputs, `gradient_bytes` as the tensor
reports them, and `gradient_resident_bytes` that are in memory: pages of zeros that nobody has touched are not, so only
the latter may be taken off the peak.
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
    sys.path.insert(0, str(Path(__file__).parent))
    import suites  # after mallopt: torch allocates at import
    from measure import gradient_bytes

    held: tuple[str, list] = ("", [])  # the last inputs, which the next question often asks about too
    for line in sys.stdin:
        question = json.loads(line)
        case = json.dumps(question["case"])
        inputs = held[1] if held[0] == case else suites.prepare_inputs(question["suite"], question["case"])
        held = (case, inputs)
        warm = question.pop("warm")
        call = suites.prepare_call(**question, inputs=inputs)
        if warm:
            call()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
        before = status_bytes("VmRSS")
        gradients = call()
        peak = status_bytes("VmHWM") - before
        taken = {x.data_ptr() for x in inputs}
        resident = sum(
            resident_bytes(g.data_ptr(), g.numel() * g.element_size()) for g in gradients if g.data_ptr() not in taken
        )
        answer = {
            "peak_bytes": peak,
            "gradient_bytes": gradient_bytes(gradients, inputs),
            "gradient_resident_bytes": resident,
            "peak_beyond_gradient_bytes": peak - resident,
        }
        del call, gradients
        if question["provider"] == "inplace":
            held = ("", [])
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
