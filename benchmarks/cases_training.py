"""Which whole training runs are measured: model, pairs, length of the run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .cases_step import MODELS, ModelShape

# Real pairs, and the tokenizer that they are read with; --data names the folder that holds both.
PAIRS_FILE, TOKENIZER_FOLDER = "dpo_en.jsonl", "gpt2-tokenizer"


@dataclass(frozen=True)
class TrainingCase:
    """`steps` optimiser steps of `per_step` pairs: the first of dpo_en.jsonl, or made ones of `length` tokens."""

    name: str
    model: str  # a key of MODELS
    precision: str  # "fp32", or "bf16": autocast over float32 weights
    steps: int = 12
    per_step: int = 2
    max_length: int = 1024
    length: int | None = None  # tokens of each sequence of a made pair; None: real pairs
    ragged: bool = False  # made pairs differ in length, `length` being the longest
    checkpointing: bool = False
    references: bool = False  # made pairs bring reference log-probs along: no pass computes them
    learning_rate: float = 1e-5
    providers: tuple[str, ...] = ()  # who takes part; nobody named: everybody

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model]

    @property
    def pairs(self) -> int:
        return self.steps * self.per_step

    def fields(self) -> dict[str, object]:
        """What a row of results says of its case."""
        return {
            "model": self.model,
            "pairs": self.per_step,
            "steps": self.steps,
            "layers": self.shape.layers,
            "hidden": self.shape.hidden,
            "vocab": self.shape.vocab,
            "dtype": self.precision,
            "length": self.length,
            "max_length": self.max_length,
            "data": PAIRS_FILE if self.length is None else "made",
            "checkpointing": self.checkpointing,
        }


_REAL = TrainingCase("training-bf16", "gpt2-head", "bf16")
_SHARE = TrainingCase("training-share", "gpt2-wide", "fp32", steps=6, providers=("fastpref",))
_TINY = TrainingCase(
    "training-tiny", "tiny", "fp32", steps=3, length=40, max_length=36, ragged=True, learning_rate=1e-3
)
_GPU = TrainingCase("", "qwen3-0.6b", "bf16", steps=5, per_step=1)

CASES = {
    case.name: case
    for case in (
        _REAL,
        replace(_REAL, name="training-fp32", precision="fp32"),
        replace(_REAL, name="training-quick", precision="fp32", model="quick"),
        _SHARE,
        replace(_SHARE, name="training-share-bf16", precision="bf16"),
        _TINY,
        replace(_GPU, name="training-2k", length=2048, max_length=2048, per_step=4),
        replace(_GPU, name="training-8k", length=8192, max_length=8192),
        replace(_GPU, name="training-32k", length=32768, max_length=32768, checkpointing=True),
    )
}
# What `--class` runs, the most wanted first: time may run out.
CLASSES = {
    "cpu": ("training-bf16", "training-fp32", "training-share"),
    "gpu": ("training-8k", "training-2k", "training-32k"),
    "tiny": ("training-tiny",),
}


def longest_case(model: str, precision: str, length: int) -> TrainingCase:
    """One pair of two sequences of `length` tokens: two steps, as the optimiser's moments come with the first one."""
    return TrainingCase(
        "longest-training",
        model,
        precision,
        steps=2,
        per_step=1,
        max_length=length,
        length=length,
        checkpointing=True,
        references=True,
    )
