"""What is measured: shapes of real models, how much of a batch is scored, and how large it may be on a device.

A set does not cross all axes with each other: it has a centre (half of the rows scored, head trained), and varies one
axis at a time from there: model, share, frozen head, memory budget, length. Cases that differ in length alone share a
`series`, and are drawn against it. `beside` names what stands beside fastpref; the suites know the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

# "quick" is what anyone can run in a minute; "tiny" proves that everything runs, and its times mean nothing.
DEVICE_CLASSES = ("cpu", "gpu", "quick", "tiny")
VOCABS = {"gpt2": 50257, "llama3": 128256, "qwen3": 151936, "gemma": 262144}
# Heads as (vocabulary, hidden size): GPT-2, Llama-3 8B, Qwen3 0.6B and 8B, Gemma 2 2B.
HEADS = {
    "gpt2": (50257, 768),
    "llama3": (128256, 4096),
    "qwen3": (151936, 1024),
    "qwen3-8b": (151936, 4096),
    "gemma": (262144, 2304),
}
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
class LinearCase(Scored):
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
    def batch(self) -> int:  # type: ignore[override]  # nobody writes it
        return 2 * self.pairs

    @property
    def unit_operations(self) -> int:
        """Floating-point operations of one product of the scored rows with the head."""
        return 2 * self.scored_rows * self.hidden * self.vocab

    def products(self, mode: str) -> int:
        return 1 if mode == "forward" else 2 if self.frozen else 3


# The numbers that the project promises of the logits path on a CPU are those of this case.
HEADLINE = LogpsCase("headline", 2, 512, VOCABS["qwen3"], 0.5, beside="all")


def logps_cases(device_class: str, *, memory: int) -> list[LogpsCase]:
    """The set of a device class; `memory` is the device's, in bytes, and sizes the GPU's."""
    if device_class == "tiny":
        return [
            LogpsCase("tiny-odd", 2, 9, 507, 0.5, "fp32", rounds=2),
            LogpsCase("tiny-bf16", 3, 5, 255, 0.9, rounds=2, series="tiny-length"),
        ]
    if device_class == "quick":
        quick = LogpsCase("quick-logits", 2, 128, VOCABS["gpt2"], 0.5, rounds=3, beside="lengths")
        return _series("gpt2-length", quick, (64, 128, 256))
    gpt2 = LogpsCase("gpt2", 2, 256, VOCABS["gpt2"], 0.5)
    if device_class == "cpu":
        return [
            HEADLINE,
            gpt2,
            replace(gpt2, name="gpt2-quarter", share=0.25),
            replace(gpt2, name="gpt2-most", share=0.9),
            replace(gpt2, name="gpt2-fp32", dtype="fp32"),
            LogpsCase("llama3", 2, 128, VOCABS["llama3"], 0.5),
            LogpsCase("gemma", 2, 128, VOCABS["gemma"], 0.5),
            *_series("gpt2-length", replace(gpt2, rounds=3, beside="lengths"), (256, 1024, 4096)),
        ]
    cases = [_fit(name, 0.5, memory, beside="all") for name in VOCABS]
    cases += [replace(_fit("qwen3", 0.25, memory), name="qwen3-quarter")]
    cases += [replace(_fit("qwen3", 0.9, memory), name="qwen3-most")]
    cases += [replace(_fit("gpt2", 0.5, memory, dtype="fp16"), name="gpt2-fp16")]
    cases += [replace(_fit("gpt2", 0.5, memory, dtype="fp32"), name="gpt2-fp32")]
    lengths = (1024, 4096, 16384, 65536)
    long = LogpsCase("", 2, 0, VOCABS["gpt2"], 0.5, rounds=5, beside="lengths")
    # The promised CPU shape, to compare machines; small for a GPU.
    return [*cases, *_series("gpt2-length", long, lengths), HEADLINE]


def _fit(name: str, share: float, memory: int, *, dtype: str = "bf16", beside: str = "most") -> LogpsCase:
    """A batch of four whose logits are 4 GiB, or what the plain path, which takes nine times that, leaves room for."""
    budget = min(4 * 2**30, memory // 16)
    length = budget // (4 * VOCABS[name] * DTYPES[dtype].itemsize)
    length = max(128, min(8192, length // 128 * 128))
    return LogpsCase(name, 4, length, VOCABS[name], share, dtype, rounds=15, beside=beside)


def loss_cases(device_class: str) -> list[LossCase]:
    sizes = {"tiny": (7,), "quick": (64,), "cpu": (64, 2**16), "gpu": (64, 2**16, 2**22)}[device_class]
    rounds = 3 if device_class == "tiny" else 30
    beside = "eager" if device_class in ("tiny", "quick") else "all"
    return [LossCase(f"{loss}-{pairs}", loss, pairs, rounds, beside) for loss in ("dpo", "dpop") for pairs in sizes]


def linear_cases(device_class: str) -> list[LinearCase]:
    """Shapes of a 0.6B model's head on a CPU, of an 8B model's on a GPU; `linear-half` is the headline of both."""
    if device_class == "tiny":
        tiny = LinearCase("linear-tiny", 9, 24, 507, 0.5, "fp32", pairs=2, rounds=2, compiled=False)
        return [
            tiny,
            replace(tiny, name="linear-tiny-bf16", length=14, share=0.9, dtype="bf16", budget="64MiB"),
            replace(tiny, name="linear-tiny-frozen", frozen=True, series="linear-tiny-length"),
        ]
    if device_class == "quick":
        quick = LinearCase("", 0, 128, VOCABS["gpt2"], 0.5, beside="fastest", rounds=3, compiled=False)
        return _series("linear-length", quick, (128, 256, 512))
    if device_class == "cpu":
        half = LinearCase("linear-half", 512, 1024, VOCABS["qwen3"], 0.5, beside="most")
        quarter = replace(half, name="linear-quarter", share=0.25, beside="fastest")
        most = replace(half, name="linear-most", share=0.9, beside="fastest")
        small = [
            replace(case, name=f"{case.name}-64MiB", budget="64MiB", beside="none") for case in (quarter, half, most)
        ]
        growth = [
            replace(small[1], name=f"linear-growth-{length // 512}k-64MiB", length=length, rounds=rounds)
            for length, rounds in ((2048, 2), (8192, 1))
        ]
        frozen = replace(half, name="linear-frozen", frozen=True, beside="plain")
        heads = [
            LinearCase(f"linear-{name}", 128, size, vocab, 0.5, beside="fastest", rounds=3)
            for name, (vocab, size) in HEADS.items()
            if name != "qwen3"  # the head of linear-half
        ]
        vocab, size = HEADS["gpt2"]
        series = LinearCase("", 0, size, vocab, 0.5, beside="lengths", rounds=3, compiled=False)
        return [half, quarter, most, frozen, *small, *growth, *heads, *_series("linear-length", series, LENGTHS)]
    # 4096 scored rows a sequence, 8192 in all.
    half = LinearCase("linear-half", 8193, 4096, VOCABS["llama3"], 0.5, rounds=15)
    frozen = replace(half, name="linear-frozen", frozen=True, beside="fastest")
    shares = [
        replace(half, name=f"linear-{name}", share=share, beside="fastest", rounds=7)
        for name, share in (("quarter", 0.25), ("most", 0.9))
    ]
    heads = [
        LinearCase(f"linear-{name}", 4097, size, vocab, 0.5, beside="fastest", rounds=7)
        for name, (vocab, size) in HEADS.items()
        if name != "llama3"
    ]
    long = replace(half, name="linear-long", length=32769, share=1.0, beside="none", rounds=3)
    vocab, size = HEADS["qwen3"]
    series = LinearCase("", 0, size, vocab, 0.5, beside="lengths", rounds=3)
    return [half, frozen, *shares, *heads, long, *_series("linear-length", series, GPU_LENGTHS)]


LENGTHS = (256, 512, 1024, 2048)
GPU_LENGTHS = (1024, 4096, 16384, 65536)


CaseT = TypeVar("CaseT", LogpsCase, LinearCase)


def _series(name: str, case: CaseT, lengths: Sequence[int]) -> list[CaseT]:
    return [replace(case, name=f"{name}-{length}", length=length, series=name) for length in lengths]
