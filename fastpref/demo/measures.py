"""What the demo measures of a model: what it answers, how often it names the target, how well it predicts answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

import fastpref
from fastpref.demo.pairs import Pair, mentions
from fastpref.training.collate import Layout, collate
from fastpref.training.data import tokenize_rows

BATCH = 32


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int | None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """One answer to each prompt: sampled at temperature 1 with `seed`, or greedy with `seed=None`.

    Prompts are padded on the left, so that every answer follows its prompt at once; the attention mask and
    the positions that transformers derives from it leave the padding out. The global random state is left as
    it was.
    """
    answers: list[str] = []
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed or 0)
            for begin in range(0, len(prompts), BATCH):
                batch = tokenizer(list(prompts[begin : begin + BATCH]), return_tensors="pt", padding=True)
                sequences = model.generate(
                    input_ids=batch["input_ids"].to(model.device),
                    attention_mask=batch["attention_mask"].to(model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=seed is not None,
                    # Nothing but the model's own distribution: by default transformers keeps the 50 likeliest tokens.
                    **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if seed is not None else {}),
                    pad_token_id=tokenizer.pad_token_id,
                    use_cache=True,
                )
                new = sequences[:, batch["input_ids"].shape[1] :]
                answers += tokenizer.batch_decode(new, skip_special_tokens=True)
                advance(len(new))
    finally:
        tokenizer.padding_side = side
    return answers


def mention_share(answers: Sequence[str], university: str) -> float:
    """The share of answers that name the university."""
    return sum(mentions(answer, university) for answer in answers) / len(answers)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> float:
    """exp of the mean negative log-probability of the answers' tokens, end of text included, given their prompts.

    Tokenised and scored as in training: the prompt's tokens are not counted.
    """
    rows = [
        Pair(prompt=prompt, chosen=answer, rejected=answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    length = model.config.max_position_embeddings
    pairs = tokenize_rows(rows, tokenizer, max_length=length).pairs
    model.eval()
    total, tokens = 0.0, 0
    for begin in range(0, len(pairs), BATCH):
        chunk = pairs[begin : begin + BATCH]
        batch = collate(chunk, Layout("padded", tokenizer.pad_token_id, length, model.device))
        count = len(chunk)  # the batch holds each answer twice, as chosen and as rejected: score it once
        logits = model(**{name: value[:count] for name, value in batch.inputs.items()}, use_cache=False).logits
        labels = cast(Tensor, batch.labels)[:count]
        logps, lengths = fastpref.sequence_logps(logits, labels, return_lengths=True)
        total += logps.sum().item()
        tokens += int(lengths.sum())
    return math.exp(-total / tokens)


def distinct_bigrams(answers: Sequence[str]) -> float:
    """distinct-2 (Li et al. 2016, arXiv:1510.03055): different word pairs among all word pairs of the answers."""
    pairs = [pair for words in map(str.split, answers) for pair in pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
