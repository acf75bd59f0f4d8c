"""What is measured: shapes of real models, how much of a batch is scored, and how large it may be on a device.

A set does not cross all axes with each other: it has a centre (half of the rows scored, head trained), and varies one
axis at a time from there: model, share, frozen head, memory budget, length. Cases that differ in length alone share a
`series`, and are drawn against it. `beside` names what stands beside fastpref; the suites know the lists.

The sets stand in cases.json. Its heads (vocabulary by hidden size) are those of GPT-2 (50257, 768), Llama-3 8B (128256,
4096), Qwen3 0.6B (151936, 1024) and 8B (151936, 4096), and Gemma 2 2B (262144, 2304). What is promised of the logits
path on a CPU is promised of `headline`, which a GPU measures too, to compare machines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

# "quick" is what anyone can run in a minute; "tiny" proves that everything runs, and its times mean nothing.
DEVICE_CLASSES = ("cpu", "gpu", "quick", "tiny")
VOCABS = {"gpt2": 50257, "llama3": 128256, "qwen3": 151936, "gemma": 262144}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Scored:
    """Sequences whose last `share` of positions is scored."""

    batch: int
    length: int
    share: float

    @property
    def scored_per_sequence(self) -> int:
        return round(self.share * (self.length - 1))

    @property
    def scored_rows(self) -> int:
        return self.batch * self.scored_per_sequence


class ScoredPairs(Scored):
    """`pairs` pairs of sequences."""

    pairs: int

    @property
    def batch(self) -> int:  # type: ignore[override]  # nobody writes it
        return 2 * self.pairs


@dataclass(frozen=True)
class LogpsCase(Scored):
    """Logits (batch, length, vocab) with `share` of their rows scored, the last ones of each sequence."""

    name: str
    batch: int
    length: int
    vocab: int
    share: float
    dtype: str = "bf16"
    rounds: int = 5
    beside: str = "most"
    series: str | None = None

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        return self.batch * self.length * self.vocab * self.itemsize

    def bytes_that_must_move(self, mode: str) -> int:
        """Forward reads scored rows; backward reads and writes them, and writes zeros elsewhere."""
        row = self.vocab * self.itemsize
        return row * (self.scored_rows if mode == "forward" else 2 * self.scored_rows + self.batch * self.length)


@dataclass(frozen=True)
class LossCase:
    """Per-sequence log-probs of `pairs` pairs, float32."""

    name: str
    loss: str  # "dpo" or "dpop"
    pairs: int
    rounds: int = 20
    beside: str = "all"
    series: str | None = None

    @property
    def bytes_that_must_move(self) -> int:
        """Reads four numbers a pair; writes the loss, two rewards and two gradients."""
        return self.pairs * 9 * 4


@dataclass(frozen=True)
class LinearCase(ScoredPairs):
    """Hidden states (2·pairs, length, hidden) under a head (vocab, hidden), the last rows of each sequence scored."""

    name: str
    length: int
    hidden: int
    vocab: int
    share: float
    dtype: str = "bf16"
    pairs: int = 1
    frozen: bool = False  # the head: only the gradient of the hidden states is wanted
    budget: str | None = None  # memory_budget; None is fastpref's own default
    beside: str = "all"
    rounds: int = 5
    # torch.compile, where a provider uses it, takes many seconds a shape.
    compiled: bool = True
    series: str | None = None

    @property
    def unit_operations(self) -> int:
        """Floating-point operations of one product of the scored rows with the head."""
        return 2 * self.scored_rows * self.hidden * self.vocab

    def products(self, mode: str) -> int:
        return 1 if mode == "forward" else 2 if self.frozen else 3


CaseT = TypeVar("CaseT")


def table(suite: str) -> Any:
    """A suite's cases in cases.json, as their fields beside the defaults: by device class, or a list."""
    return json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))[suite]


def cases_of(kind: type[CaseT], suite: str, device_class: str) -> list[CaseT]:
    """The set of a device class; a row with several lengths is a series, and gives a case for each."""
    found = []
    for row in table(suite)[device_class]:
        if isinstance(row["length"], list):
            name = row["name"]
            found += [kind(**{**row, "name": f"{name}-{n}", "length": n, "series": name}) for n in row["length"]]
        else:
            found.append(kind(**row))
    return found


def logps_cases(device_class: str, *, memory: int) -> list[LogpsCase]:
    """The set of a device class; `memory` is the device's, in bytes, and sizes the cases of length 0, the GPU's."""
    cases = cases_of(LogpsCase, "logps", device_class)
    return [case if case.length else replace(case, length=_fitting(case, memory)) for case in cases]


def _fitting(case: LogpsCase, memory: int) -> int:
    """The length at which logits are 4 GiB, or what the plain path, which takes nine times that, leaves room for."""
    budget = min(4 * 2**30, memory // 16)
    length = budget // (case.batch * case.vocab * case.itemsize)
    return max(128, min(8192, length // 128 * 128))


def loss_cases(device_class: str) -> list[LossCase]:
    sizes = {"tiny": (7,), "quick": (64,), "cpu": (64, 2**16), "gpu": (64, 2**16, 2**22)}[device_class]
    rounds = 3 if device_class == "tiny" else 30
    beside = "eager" if device_class in ("tiny", "quick") else "all"
    return [LossCase(f"{loss}-{pairs}", loss, pairs, rounds, beside) for loss in ("dpo", "dpop") for pairs in sizes]


def linear_cases(device_class: str) -> list[LinearCase]:
    """Shapes of a 0.6B model's head on a CPU, of an 8B model's on a GPU; `linear-half` is the headline of both.

    On a GPU it has 4096 scored rows a sequence, 8192 in all.
    """
    return cases_of(LinearCase, "linear", device_class)
