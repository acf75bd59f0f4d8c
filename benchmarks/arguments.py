"""What the measuring commands ask of their options alike; bad input is a UsageError that names what is known."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from importlib.util import find_spec

from fastpref.checks import parse_budget
from fastpref.options import UsageError


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"unknown {kind} {', '.join(map(repr, unknown))}; known here are {', '.join(known)}")


def check_seconds(seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds must be above 0 and finite, got {seconds:g}")


def pick_device(device: str | None) -> str:
    """`device`, or cuda where torch finds one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch finds no GPU here: take --device cpu")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def need(extra: str, *modules: str) -> None:
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UsageError(f'{", ".join(missing)} is not installed: pip install "fastpref[{extra}]"')


def size(text: str) -> int:
    """An argparse type: bytes, or text as 6GiB."""
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory_budget ")) from None


def fail(program: str, error: Exception) -> int:
    """One line on stderr; the exit code of bad input."""
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
