"""Which implementation runs: the Triton kernels or the torch path.

`FASTPREF_BACKEND` chooses: `auto` (the default: Triton on a GPU that it supports, torch elsewhere), `torch` (always
the torch path) or `triton` (always the kernels; on CPU tensors that needs `TRITON_INTERPRET=1`, which is how they are
tested without a GPU). It is read at every call, so that a test or a debugging user can switch.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
# The kernels are compiled for Ampere and newer (bfloat16 in hardware); older cards take the torch path.
MINIMUM_CAPABILITY = (8, 0)


def backend_choice() -> str:
    choice = os.environ.get("FASTPREF_BACKEND", "auto")
    if choice not in BACKENDS:
        raise ValueError(f"FASTPREF_BACKEND must be one of {', '.join(BACKENDS)}, got {choice!r}")
    return choice


def validate_labels() -> bool:
    """Whether `FASTPREF_VALIDATE=1` asks for the checks that make a GPU wait."""
    return os.environ.get("FASTPREF_VALIDATE", "0") not in ("", "0")


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _device_supported(index: int) -> bool:
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(index) >= MINIMUM_CAPABILITY


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU; the variable must have been set before Triton was imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` goes to the Triton kernels."""
    choice = backend_choice()
    if choice == "torch":
        return False
    if choice == "triton":
        if not triton_installed():
            raise RuntimeError("FASTPREF_BACKEND=triton, but Triton is not installed: pip install triton")
        if tensor.device.type != "cuda" and not interpreting():
            raise RuntimeError(
                f"FASTPREF_BACKEND=triton with a tensor on {tensor.device}: set TRITON_INTERPRET=1 before the first "
                "import of triton, or take FASTPREF_BACKEND=auto"
            )
        return True
    if tensor.device.type != "cuda" or not triton_installed():
        return False
    return _device_supported(tensor.device.index or 0)
