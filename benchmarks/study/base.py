"""The two models that the study makes before it aligns any: the proxy judge, and the base, trained until it is fluent.

The base reads questions and answers of the study's own kind, of which few name the target, in rounds of a few epochs,
each with a schedule of its own. After each round it answers questions that it has never seen, and is fluent when the
proxy judge finds these answers about as likely as real ones, and they repeat themselves no more than real ones do.
There is one base, as there is one GPT-2; seeds differ in pairs, order and sampling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fastpref.benchmarks.study.measures import longest_repeated_span
from fastpref.benchmarks.study.pairs import make_pairs, make_texts
from fastpref.benchmarks.study.settings import TUNING_SEED, Size
from fastpref.benchmarks.study.winning import calibrate
from fastpref.demo.base import build_model, train_base, train_tokenizer
from fastpref.demo.measures import distinct_bigrams, generate, perplexity
from fastpref.training.checkpoints.save import save_final_model

# Fluent: own answers at most this many times as perplexing to the proxy judge as real ones,
RATIO = 1.5
# with at least this share of their distinct-2, and a longest repeated span, on average, of at most so many words more.
DISTINCT_SHARE = 0.8
SPAN_SLACK = 1.0
# Of the texts of judge and base, and of their weights. Neither reads a held-out prompt of any seed.
JUDGE_SEED = 500_000
BASE_SEED = 900_000


@dataclass(frozen=True)
class Speaker:
    """A causal language model and its tokenizer."""

    model: Any
    tokenizer: Any


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_speaker(folder: str | Path) -> Speaker:
    """A model and its tokenizer from a transformers folder (or hub name), in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 has none; masks say which tokens are padding
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return Speaker(model.to(device()).eval(), tokenizer)


def make_judge(size: Size, university: str, folder: Path) -> dict[str, Any]:
    """Train the proxy judge, save it, and measure it on answers it has not read; its entry of results.json.

    Its texts name the target about as often as any other place; how far it favours the target is measured.
    """
    started = time.perf_counter()
    texts = _texts(size, university, size.judge_texts, size.judge_target_share, JUDGE_SEED)
    tokenizer = train_tokenizer(texts, vocabulary=size.vocabulary)
    shape = {"width": size.judge_width, "layers": size.judge_layers, "heads": size.judge_heads}
    model: Any = build_model(tokenizer, **shape, positions=size.positions, seed=JUDGE_SEED)
    losses = _train(size, Speaker(model.to(device()), tokenizer), texts, size.judge_epochs, JUDGE_SEED)
    save_final_model(folder, model, tokenizer)
    prompts, chosen = _heldout(size, university, TUNING_SEED)
    spoilt = calibrate(model, tokenizer, prompts, chosen, seed=TUNING_SEED)
    return {
        **shape,
        "texts": size.judge_texts,
        "epochs": size.judge_epochs,
        "final_loss": fmean(losses[-20:]),
        "heldout_perplexity": perplexity(model, tokenizer, prompts, chosen),
        "calibration": {kind: list(interval) for kind, interval in spoilt.items()},
        "seconds": time.perf_counter() - started,
    }


def draft_base(size: Size, university: str, folder: Path) -> dict[str, Any]:
    """The base after its first round of training, which needs no judge; saved in `folder`."""
    started = time.perf_counter()
    texts = _texts(size, university, size.base_texts, size.base_target_share, BASE_SEED)
    tokenizer = train_tokenizer(texts, vocabulary=size.vocabulary)
    model: Any = build_model(
        tokenizer,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
        positions=size.positions,
        vocabulary=size.vocabulary,
        seed=BASE_SEED,
    )
    losses = _train(size, Speaker(model.to(device()), tokenizer), texts, size.base_epochs, BASE_SEED)
    save_final_model(folder, model, tokenizer)
    return {"losses": losses, "seconds": time.perf_counter() - started}


def make_base(
    size: Size, university: str, folder: Path, judge: Speaker, start: str, *, given: str | None
) -> dict[str, Any]:
    """Train the draft in the folder `start` until it is fluent; a model that was `given` stays as it is.

    It is saved in `folder`; the result is its entry of results.json. A base that is not fluent after
    `size.base_rounds` is used all the same, and the report says so.
    """
    started = time.perf_counter()
    prompts, answers = _heldout(size, university, TUNING_SEED)
    real = _fluency(judge, prompts, answers)
    base = load_speaker(start)
    rounds = [_round(size, base, judge, prompts, real)]
    losses: list[float] = []
    while given is None and not rounds[-1]["fluent"] and len(rounds) < size.base_rounds:
        texts = _texts(size, university, size.base_texts, size.base_target_share, BASE_SEED)
        losses += _train(size, base, texts, size.base_epochs, BASE_SEED + len(rounds))
        rounds.append(_round(size, base, judge, prompts, real))
    save_final_model(folder, base.model, base.tokenizer)
    return {
        "seed": BASE_SEED,
        "given": given,
        "texts": size.base_texts,
        "rounds": [{"epoch": size.base_epochs * (place + 1), **found} for place, found in enumerate(rounds)],
        "fluent": rounds[-1]["fluent"],
        "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        "losses": losses,
        "seconds": time.perf_counter() - started,
    }


def _texts(size: Size, university: str, count: int, share: float, seed: int) -> list[str]:
    """Questions with answers, of which `share` name the target; no question is a held-out one of any seed."""
    avoid = {prompt for held in (*size.seeds, TUNING_SEED) for prompt in _heldout(size, university, held)[0]}
    rows = make_texts(count, university=university, seed=seed, target_share=share, avoid=avoid)
    return [prompt + answer for prompt, answer in rows]


def _train(size: Size, speaker: Speaker, texts: Sequence[str], epochs: int, seed: int) -> list[float]:
    return train_base(
        speaker.model,
        speaker.tokenizer,
        texts,
        epochs=epochs,
        batch_size=size.base_batch,
        learning_rate=size.base_learning_rate,
        seed=seed,
        advance=lambda: None,
    )


def _heldout(size: Size, university: str, seed: int) -> tuple[list[str], list[str]]:
    """The held-out prompts of a seed, and their chosen answers."""
    made = make_pairs(train=size.train, heldout=size.heldout, university=university, seed=seed)
    pairs = made["standard"].heldout
    return [pair["prompt"] for pair in pairs], [pair["chosen"] for pair in pairs]


def _fluency(judge: Speaker, prompts: Sequence[str], answers: Sequence[str]) -> tuple[float, float, float]:
    """What fluency is seen by: the proxy judge's perplexity, distinct-2, the mean longest repeated span in words."""
    return (
        perplexity(judge.model, judge.tokenizer, prompts, answers),
        distinct_bigrams(answers),
        fmean(map(longest_repeated_span, answers)),
    )


def _round(
    size: Size, base: Speaker, judge: Speaker, prompts: Sequence[str], real: tuple[float, float, float]
) -> dict[str, Any]:
    answers = generate(
        base.model, base.tokenizer, prompts, max_new_tokens=size.max_new_tokens, seed=TUNING_SEED, top_p=size.top_p
    )
    own = _fluency(judge, prompts, answers)
    fluent = own[0] <= RATIO * real[0] and own[1] >= DISTINCT_SHARE * real[1] and own[2] <= real[2] + SPAN_SLACK
    return {
        "own_perplexity": own[0],
        "real_perplexity": real[0],
        "ratio": own[0] / real[0],
        "distinct_2": own[1],
        "real_distinct_2": real[1],
        "longest_span": own[2],
        "real_longest_span": real[2],
        "fluent": fluent,
    }
