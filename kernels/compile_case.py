"""How a launcher launches its kernel, for `fastpref.benchmarks.compile.report`, which explains the fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

DTYPES = ("bf16", "fp16", "fp32")


class CompileCase(NamedTuple):
    """One kernel as its launcher launches it; `fastpref.benchmarks.compile.report` explains each field."""

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = {}
    num_warps: int | None = None
    num_stages: int | None = None
    hip_num_warps: int | None = None
    dtypes: tuple[str, ...] = DTYPES
    note: str = ""
