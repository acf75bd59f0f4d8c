"""Tiny tokenizers, models and data for the training loop's tests: nothing is downloaded."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')
pytest.importorskip("accelerate", reason='needs pip install "fastpref[train]"')

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fastpref.environment import commit
from fastpref.training import TrainConfig

VERSION, COMMIT = functools.cache(importlib.metadata.version), functools.cache(commit)
CORPUS = ["the sky is blue", "the sky is green today", "what is the colour of the sky?", "User: Assistant: ask again"]


def byte_tokenizer(*, bos: str | None = None, adds: str = "$A", **kwargs: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text goes through it and back) whose EOS is <|end|>; `adds` is its template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    ids = [(token, core.token_to_id(token)) for token in special]
    core.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=adds, special_tokens=ids)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "<|end|>", "bos_token": bos, **kwargs})


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """No BOS, no padding token, and EOS <|end|>."""
    return byte_tokenizer()


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """13 text pairs of different lengths: a prime number, so that every batch size leaves a tail."""
    return [
        {
            "prompt": f"what is the colour of sky {i}?",
            "chosen": " the sky is blue" + " today" * (i % 4),
            "rejected": f" {i}" * (1 + i % 3) + " green",
        }
        for i in range(13)
    ]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny run; the tests of the curves put it back."""
    monkeypatch.setattr("fastpref.training.loop.draw", lambda run, history: None)


@pytest.fixture(autouse=True)
def versions_and_commit_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run notes them: it parses the metadata of ten packages for it, and starts git twice."""
    monkeypatch.setattr(importlib.metadata, "version", VERSION)
    for module in ("fastpref.environment", "fastpref.training.checkpoints.run_folder"):
        monkeypatch.setattr(f"{module}.commit", COMMIT, raising=False)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk matters to a machine that loses power; the tests of kills run in their own process."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def make_model() -> Callable[..., GPT2LMHeadModel]:
    def make(**changes: Any) -> GPT2LMHeadModel:
        torch.manual_seed(11)
        shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 302, **changes}
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape))
        with torch.no_grad():  # initial weights as small as GPT-2's give almost the same logits everywhere
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
        return model

    return make


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        options: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_length": 64,
            "batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "save_every": 0,
            "logging_every": 1,
            "progress": False,
        }
        return TrainConfig(**{**options, **changes})

    return make
