"""Argument checks that several public functions share.

An error names the argument, what it got, what it wanted and what to do: `ValueError` for values and shapes, `TypeError`
for types. Nothing here reads a tensor's elements, so nothing here can make a GPU wait. torch is imported where a tensor
is at hand: the option parsers use the rest, and `--help` must not wait for torch.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Collection
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEFAULT_BUDGET = 2**30

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def describe(value: Any) -> str:
    """A short description of a value for an error message: a tensor by dtype, shape and device, the rest by repr."""
    torch = sys.modules.get("torch")  # without it there is no tensor
    if torch is not None and isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def did_you_mean(value: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `value`, or nothing where none is near."""
    near = difflib.get_close_matches(value.lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_tensor(name: str, value: Any, *, floating: bool = False) -> torch.Tensor:
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {describe(value)}")
    return value


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    open_minimum: bool = False,
    open_maximum: bool = False,
) -> float:
    """A finite real number in the given interval, as a float. `bool` is refused: it is nearly always a slip."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    number = float(value)
    low = number > minimum if open_minimum else number >= minimum
    high = number < maximum if open_maximum else number <= maximum
    # Not math.isfinite: torch.compile makes options symbolic, and it cannot take those.
    if not (-math.inf < number < math.inf and low and high):
        within = interval_text(minimum, maximum, open_minimum, open_maximum)
        raise ValueError(f"{name} must be a finite number in {within}, got {value!r}")
    return number


def interval_text(minimum: float, maximum: float, open_minimum: bool, open_maximum: bool) -> str:
    """As "[0, 0.5)"; an infinite end is open."""
    left = "(" if open_minimum or minimum == -math.inf else "["
    right = ")" if open_maximum or maximum == math.inf else "]"
    return f"{left}{minimum:g}, {maximum:g}{right}"


def refuse_capture(what: str, advice: str) -> None:
    """Raises while a CUDA graph is captured: it records kernels, and nothing that the host decides by what it reads."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what}, which a CUDA graph cannot record: {advice}")


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {', '.join(sorted(choices))}; got {describe(value)}")
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ValueError(f"{name} must be one of {', '.join(sorted(choices))}; got {value!r}{hint}")
    return value


def parse_budget(value: Any) -> int:
    """Bytes from an int or from text like "512MiB"; None is the default, 1 GiB. ValueError or TypeError."""
    if value is None:
        return DEFAULT_BUDGET
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f'memory_budget must be bytes or text like "512MiB", got {describe(value)}')
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b|b|)\s*", value, re.IGNORECASE)
        if found is None:
            raise ValueError(f'memory_budget must be bytes or text like "512MiB" (B, KiB, MiB, GiB), got {value!r}')
        bytes_ = float(found[1]) * _UNITS[found[2].upper()]
        if not math.isfinite(bytes_):
            raise ValueError(f"memory_budget is too large: {value[:40]!r}")
        value = int(bytes_)
    if value <= 0:
        raise ValueError(f"memory_budget must be positive, got {value}")
    return value
