"""What is measured: shapes of real models, how much of a batch is scored, and how large it may be on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DEVICE_CLASSES = ("cpu", "gpu", "tiny")
VOCABS = {"gpt2": 50257, "llama3": 128256, "qwen3": 151936, "gemma": 262144}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class LogpsCase:
    """Logits (batch, length, vocab) with `share` of their rows scored, the last ones of each sequence."""

    name: str
    batch: int
    length: int
    vocab: int
    share: float
    dtype: str = "bf16"
    rounds: int = 5
    # torch.compile takes many seconds a shape.
    compiled: bool = True

    @property
    def scored_rows(self) -> int:
        return self.batch * self.scored_per_sequence

    @property
    def scored_per_sequence(self) -> int:
        return round(self.share * (self.length - 1))

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        return self.batch * self.length * self.vocab * self.itemsize

    @property
    def bytes_that_must_move(self) -> int:
        """Forward reads scored rows; backward reads and writes them, and writes zeros elsewhere."""
        row = self.vocab * self.itemsize
        return row * (2 * self.scored_rows + self.batch * self.length)


@dataclass(frozen=True)
class LossCase:
    """Per-sequence log-probs of `pairs` pairs, float32."""

    name: str
    loss: str  # "dpo" or "dpop"
    pairs: int
    rounds: int = 20

    @property
    def bytes_that_must_move(self) -> int:
        """Reads four numbers a pair; writes the loss, two rewards and two gradients."""
        return self.pairs * 9 * 4


@dataclass(frozen=True)
class LinearCase:
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
    beside: str = "all"  # a key of providers_linear.BESIDE: what stands beside fastpref
    rounds: int = 5
    # torch.compile, where a provider uses it, takes many seconds a shape.
    compiled: bool = True

    @property
    def batch(self) -> int:
        return 2 * self.pairs

    @property
    def scored_per_sequence(self) -> int:
        return round(self.share * (self.length - 1))

    @property
    def scored_rows(self) -> int:
        return self.batch * self.scored_per_sequence

    @property
    def unit_operations(self) -> int:
        """Floating-point operations of one product of the scored rows with the head."""
        return 2 * self.scored_rows * self.hidden * self.vocab


# The numbers that the project promises on a CPU are those of this case.
HEADLINE = LogpsCase("headline", 2, 512, VOCABS["qwen3"], 0.5)


def logps_cases(device_class: str, *, memory: int) -> list[LogpsCase]:
    """The set of a device class; `memory` is the device's, in bytes, and sizes the GPU's."""
    if device_class == "tiny":
        return [
            LogpsCase("tiny-odd", 2, 9, 507, 0.5, "fp32", rounds=2, compiled=False),
            LogpsCase("tiny-bf16", 3, 5, 255, 0.9, rounds=2, compiled=False),
        ]
    if device_class == "cpu":
        return [
            HEADLINE,
            LogpsCase("gpt2", 2, 256, VOCABS["gpt2"], 0.5, compiled=False),
            LogpsCase("gpt2-quarter", 2, 256, VOCABS["gpt2"], 0.25, compiled=False),
            LogpsCase("gpt2-most", 2, 256, VOCABS["gpt2"], 0.9, compiled=False),
            LogpsCase("gpt2-fp32", 2, 256, VOCABS["gpt2"], 0.5, "fp32", compiled=False),
            LogpsCase("llama3", 2, 128, VOCABS["llama3"], 0.5, compiled=False),
            LogpsCase("gemma", 2, 128, VOCABS["gemma"], 0.5, compiled=False),
        ]
    cases = [_fit(name, 0.5, memory) for name in VOCABS]
    cases += [replace(_fit("qwen3", 0.25, memory), name="qwen3-quarter", compiled=False)]
    cases += [replace(_fit("qwen3", 0.9, memory), name="qwen3-most", compiled=False)]
    cases += [replace(_fit("gpt2", 0.5, memory, dtype="fp16"), name="gpt2-fp16", compiled=False)]
    cases += [replace(_fit("gpt2", 0.5, memory, dtype="fp32"), name="gpt2-fp32", compiled=False)]
    # The promised CPU shape, to compare machines; small for a GPU.
    return [*cases, HEADLINE]


def _fit(name: str, share: float, memory: int, *, dtype: str = "bf16") -> LogpsCase:
    """A batch of four whose logits are 4 GiB, or what the plain path, which takes nine times that, leaves room for."""
    budget = min(4 * 2**30, memory // 16)
    length = budget // (4 * VOCABS[name] * DTYPES[dtype].itemsize)
    length = max(128, min(8192, length // 128 * 128))
    return LogpsCase(name, 4, length, VOCABS[name], share, dtype, rounds=15)


def loss_cases(device_class: str) -> list[LossCase]:
    sizes = {"tiny": (7,), "cpu": (64, 2**16), "gpu": (64, 2**16, 2**22)}[device_class]
    rounds = 3 if device_class == "tiny" else 30
    return [LossCase(f"{loss}-{pairs}", loss, pairs, rounds) for loss in ("dpo", "dpop") for pairs in sizes]


def linear_cases(device_class: str) -> list[LinearCase]:
    """Shapes of a 0.6B model's head on a CPU, of an 8B model's on a GPU; `linear-half` is the headline of both."""
    if device_class == "tiny":
        tiny = LinearCase("linear-tiny", 9, 24, 507, 0.5, "fp32", pairs=2, rounds=2, compiled=False)
        return [
            tiny,
            replace(tiny, name="linear-tiny-bf16", length=14, share=0.9, dtype="bf16", budget="64MiB"),
            replace(tiny, name="linear-tiny-frozen", frozen=True),
        ]
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
        return [half, quarter, most, replace(half, name="linear-frozen", frozen=True, beside="plain"), *small, *growth]
    # 4096 scored rows a sequence, 8192 in all.
    half = LinearCase("linear-half", 8193, 4096, VOCABS["llama3"], 0.5, rounds=15)
    frozen = replace(half, name="linear-frozen", frozen=True, beside="plain")
    return [half, frozen, replace(half, name="linear-long", length=32769, share=1.0, beside="none", rounds=3)]


def make_logits(case: LogpsCase, device: str, seed: int) -> Tensor:  # (B, T, V), a leaf
    """Normal logits of standard deviation 3: a few rows drawn, the others those rows turned, which is much faster."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(case.batch, case.length, case.vocab, dtype=DTYPES[case.dtype], device=device)
    drawn = torch.randn(16, case.vocab, generator=generator, device=device).mul_(3).to(logits.dtype)
    for turn, rows in enumerate(logits.view(-1, case.vocab).split(16)):
        rows.copy_(drawn[: len(rows)].roll(turn * 1009, -1))
    return logits.requires_grad_()


# The hidden states repeat after so many rows, each time with other labels: their truth is then quick to compute.
DISTINCT_ROWS = 256


def make_linear(case: LinearCase, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (B, T, H), a leaf; weight (V, H), a leaf where it is trained; labels (B, T). Logits have deviation 1."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    drawn = torch.randn(DISTINCT_ROWS, case.hidden, generator=generator, device=device).to(dtype)
    some = torch.randn(4096, case.hidden, generator=generator, device=device).div_(case.hidden**0.5).to(dtype)
    weight = torch.empty(case.vocab, case.hidden, dtype=dtype, device=device)
    for turn, rows in enumerate(weight.split(len(some))):  # as make_logits does, and for its reason
        rows.copy_(some[: len(rows)].roll(turn, -1))
    hidden = drawn[row_of(case, device)].view(case.batch, case.length, case.hidden)
    return hidden.requires_grad_(), weight.requires_grad_(not case.frozen), make_labels(case, device, seed)


def row_of(case: LinearCase, device: str) -> Tensor:  # (B·T,) int64
    """Which of the distinct rows each position holds."""
    return torch.arange(case.batch * case.length, device=device) % DISTINCT_ROWS


def make_labels(case: LogpsCase | LinearCase, device: str, seed: int) -> Tensor:  # (B, T) int64, unshifted
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(case.vocab, (case.batch, case.length), generator=generator)
    labels[:, : case.length - case.scored_per_sequence] = -100
    return labels.to(device)


def make_upstream(case: LogpsCase, device: str) -> Tensor:  # (B,)
    """The gradient of a sum of losses would be ones; a preference loss sends both signs, and unequal ones."""
    return torch.linspace(-1.5, 2.0, case.batch, device=device)


def make_pairs(case: LossCase, device: str, seed: int) -> list[Tensor]:  # four (P,): policy, then reference
    generator = torch.Generator(device).manual_seed(seed)
    reference = [torch.randn(case.pairs, generator=generator, device=device) * 30 - 300 for _ in range(2)]
    policy = [r + 5 * torch.randn(case.pairs, generator=generator, device=device) for r in reference]
    return [*(p.requires_grad_() for p in policy), *reference]
