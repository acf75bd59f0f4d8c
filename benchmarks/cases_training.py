"""Which whole training runs are measured: model, pairs, length of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cases import table
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
    providers: Sequence[str] = ()  # who takes part; nobody named: everybody

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


CASES = {row["name"]: TrainingCase(**row) for row in table("training")}
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
