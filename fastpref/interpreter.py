"""Whether Triton's interpreter works here: it runs the kernels on a CPU, for their tests (`TRITON_INTERPRET=1`).

It holds every scalar in a NumPy array of one entry, and some versions of it convert that in a way that newer NumPy
refuses (Triton 3.6 with NumPy 2.4). Compiled kernels, and so a GPU, are not concerned.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def _count(out: Any, rounds: Any) -> None:
    total = 0
    for _ in range(rounds):  # the bound of a loop is what has to be converted
        total += 1
    tl.store(out, total)


@functools.cache
def interpreter_problem() -> str | None:
    """Runs a kernel of one loop: why that failed, in one line, or None. `TRITON_INTERPRET` need not be set."""
    out = torch.zeros(1, dtype=torch.int32)
    try:
        InterpretedFunction(_count)[(1,)](out, 3)
    except Exception as error:  # whatever the interpreter throws is the answer
        return (
            f"Triton {triton.__version__} cannot interpret kernels with NumPy {numpy.__version__}: "
            f"{error.__cause__ or error}"
        )
    return None
