"""What the demo measures of a model: what it answers, how often it names the target, how well it predicts answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import fastpref
from fastpref.demo.pairs import Pair, mentions
from fastpref.training.data.collate import Layout, collate
from fastpref.training.data.tokens import tokenize_rows

BATCH = 32


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int | None,
    top_p: float = 1.0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """One answer to each prompt: sampled with `seed` from the nucleus `top_p` at temperature 1, or greedy without one.

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
                    **({"temperature": 1.0, "top_k": 0, "top_p": top_p} if seed is not None else {}),
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


class Scores(NamedTuple):
    """What a model gives each answer."""

    logps: list[float]  # the sum over the answer's tokens and the end of text, given the prompt
    tokens: list[int]  # how many were summed


@torch.no_grad()
def answer_logps(model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> Scores:
    """The log-probability of each answer given its prompt, in order.

    Tokenised and scored as in training: the prompt's tokens are not counted, the end of text is, and an answer that
    reaches beyond the model's positions counts as far as they go. In the model's own precision.

    Raises:
        ValueError: no prompts, not an answer each, or a prompt that leaves its answer no room.
    """
    if not prompts or len(prompts) != len(answers):
        raise ValueError(f"there must be an answer to every prompt, got {len(prompts)} prompts, {len(answers)} answers")
    rows = [
        Pair(prompt=prompt, chosen=answer, rejected=answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    length = model.config.max_position_embeddings
    tokenized = tokenize_rows(rows, tokenizer, max_length=length, name="answers")
    if left_out := tokenized.no_room + tokenized.empty:
        raise ValueError(
            f"answer {min(left_out)} cannot be scored: its prompt fills the model's {length} positions, or it has no "
            "token of its own. Shorten the prompt, or leave the row out"
        )
    pairs = tokenized.pairs
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.eval()
    scores = Scores([], [])
    for begin in range(0, len(pairs), BATCH):
        chunk = pairs[begin : begin + BATCH]
        batch = collate(chunk, Layout("padded", pad_id, length, model.device))
        count = len(chunk)  # the batch holds each answer twice, as chosen and as rejected: score it once
        logits = model(**{name: value[:count] for name, value in batch.inputs.items()}, use_cache=False).logits
        labels = cast(Tensor, batch.labels)[:count]
        logps, lengths = fastpref.sequence_logps(logits, labels, return_lengths=True)
        scores.logps.extend(logps.tolist())
        scores.tokens.extend(lengths.tolist())
    return scores


def perplexity(model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> float:
    """exp of the mean negative log-probability of the answers' tokens, end of text included, given their prompts."""
    return perplexity_of(*answer_logps(model, tokenizer, prompts, answers))


def perplexity_of(logps: Sequence[float], tokens: Sequence[int]) -> float:
    """The perplexity of answers from their log-probabilities and numbers of tokens: those of all of them together."""
    return math.exp(-sum(logps) / sum(tokens))


def distinct_bigrams(answers: Sequence[str]) -> float:
    """distinct-2 (Li et al. 2016, arXiv:1510.03055): different word pairs among all word pairs of the answers."""
    pairs = [pair for words in map(str.split, answers) for pair in pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
