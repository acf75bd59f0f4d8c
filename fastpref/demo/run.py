"""The demo from its first file to its report: data, base model, the two alignments, what they did."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fastpref
from fastpref.benchmarks.cases import LogpsCase
from fastpref.benchmarks.runner import Entry, Run, measure
from fastpref.benchmarks.suites import SUITES
from fastpref.console import Console
from fastpref.demo.base import (
    base_steps,
    base_texts,
    build_model,
    train_base,
    train_tokenizer,
)
from fastpref.demo.measures import distinct_bigrams, generate, mention_share, perplexity
from fastpref.demo.pairs import PairSet, make_pairs, write_jsonl
from fastpref.demo.report import ends, judge, plot_rewards, print_report
from fastpref.environment import record
from fastpref.training.checkpoints.save import save_final_model
from fastpref.training.monitoring.stopping import exit_code

OUTPUTS = ("train.jsonl", "heldout.jsonl", "base", "dpo", "dpop", "rewards.png", "report.json")
LOSSES = ("dpo", "dpop")
PROVIDERS = {"fast": "fastpref", "plain": "plain"}  # of the log-prob path: by their names in a benchmark
LOGPS = LogpsCase("demo", batch=2, length=512, vocab=50257, share=0.5, rounds=5)
STAGES = 6


@dataclass(frozen=True)
class Scale:
    """How large a demo is. DPO and DPOP share every setting but the loss."""

    train: int = 1300
    heldout: int = 125
    width: int = 128
    layers: int = 2
    base_epochs: int = 5
    base_learning_rate: float = 4e-3
    steps: int = 80
    eval_every: int = 10
    batch_size: int = 16
    learning_rate: float = 2e-4
    beta: float = 0.1
    lam: float = 50.0  # DPOP's own: DPO has no such term
    max_new_tokens: int = 80
    logps: LogpsCase = LOGPS

    @property
    def text(self) -> str:
        return (
            f"β = {self.beta:g}, learning rate {self.learning_rate:g}, {self.steps} steps of {self.batch_size} pairs; "
            f"DPOP: λ = {self.lam:g}"
        )


FULL = Scale()
# What CI runs: the same path in well under a minute. Its models are too raw for the numbers to mean much.
QUICK = Scale(
    train=160,
    heldout=24,
    base_epochs=4,
    steps=12,
    eval_every=4,
    max_new_tokens=32,
    logps=replace(LOGPS, length=128, rounds=3),
)


class Stages:
    """Numbered stages with a progress bar and the time that each one took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Gives the function that moves the bar on; without `total` there is no bar (the loop draws its own)."""
        label = f"{len(self.seconds) + 1}/{STAGES} {title}"
        started = time.perf_counter()
        if total is None:
            self.console.say(f"{label} ...")
            yield lambda count: None
        else:
            with self.console.bar(label, total) as bar:
                yield bar.advance
        self.seconds[title] = time.perf_counter() - started
        self.console.say(f"{label}: {self.seconds[title]:.1f} s")


def run_demo(scale: Scale, *, university: str, seed: int, output_dir: Path, console: Console) -> dict[str, Any]:
    """Run every stage, write `OUTPUTS` into `output_dir`, print the report and return it.

    Raises:
        SystemExit: a signal has ended a training run; with 128 and its number.
    """
    started = time.perf_counter()
    stages = Stages(console)
    data = make_pairs(train=scale.train, heldout=scale.heldout, university=university, seed=seed)
    with stages.stage("preference set", 2) as advance:
        for name, rows in data._asdict().items():
            write_jsonl(output_dir / f"{name}.jsonl", rows)
            advance(1)

    tokenizer, base, base_losses = _make_base(scale, data, seed, output_dir / "base", stages)
    models = {"base": base}
    runs: dict[str, dict[str, Any]] = {}
    for loss in LOSSES:
        title = f"align with {loss.upper()}"
        with stages.stage(title):
            models[loss], history = _align(scale, loss, base, tokenizer, data, seed, output_dir / loss)
        runs[loss] = {"seconds": stages.seconds[title], "heldout": ends(history)._asdict(), "history": history}

    measured, answers = _measure_models(scale, models, tokenizer, data, university, seed, stages)
    measured["base"] |= {"seconds": stages.seconds["base model"], "losses": base_losses}
    report = {
        "university": university,
        "seed": seed,
        "settings": asdict(scale),
        "settings_text": scale.text,
        **record(),
        "models": measured,
        "runs": runs,
        "logps": _measure_logps(scale.logps, stages),
        "verdict": judge(*(ends(run["history"]) for run in runs.values()))._asdict(),
        "samples": [
            {"prompt": pair["prompt"], **{name: answers[name][place] for name in answers}}
            for place, pair in enumerate(data.heldout)
        ],
        "stage_seconds": stages.seconds,
        "seconds": time.perf_counter() - started,
    }
    plot_rewards({loss: run["history"] for loss, run in runs.items()}, output_dir / "rewards.png", settings=scale.text)
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (output_dir / "report.json").write_text(text + "\n", encoding="utf-8")
    print_report(console, report)
    console.say(f"{report['seconds']:.0f} s in all; rewards.png, report.json and the models are in {output_dir}")
    return report


def _make_base(scale: Scale, data: PairSet, seed: int, folder: Path, stages: Stages) -> tuple[Any, Any, list[float]]:
    texts = base_texts(data.train)
    steps = base_steps(len(texts), epochs=scale.base_epochs, batch_size=scale.batch_size)
    with stages.stage("base model", steps) as advance:
        tokenizer = train_tokenizer(
            pair["prompt"] + pair[answer] for pair in data.train for answer in ("chosen", "rejected")
        )
        model: Any = build_model(tokenizer, width=scale.width, layers=scale.layers, seed=seed)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        losses = train_base(
            model,
            tokenizer,
            texts,
            epochs=scale.base_epochs,
            batch_size=scale.batch_size,
            learning_rate=scale.base_learning_rate,
            seed=seed,
            advance=lambda: advance(1),
        )
        save_final_model(folder, model, tokenizer)
    return tokenizer, model, losses


def _align(
    scale: Scale,
    loss: str,
    base: Any,
    tokenizer: Any,
    data: PairSet,
    seed: int,
    folder: Path,
) -> tuple[Any, list[dict[str, Any]]]:
    """The aligned model and the run's records."""
    config = fastpref.TrainConfig(
        loss=loss,
        beta=scale.beta,
        loss_options={"lam": scale.lam} if loss == "dpop" else None,
        learning_rate=scale.learning_rate,
        warmup_steps=scale.steps // 8,
        batch_size=scale.batch_size,
        max_steps=scale.steps,
        max_length=base.config.max_position_embeddings,
        eval_every=scale.eval_every,
        logging_every=max(scale.eval_every // 2, 1),
        save_every=0,
        seed=seed,
        output_dir=str(folder),
        progress=sys.stdout.isatty(),
    )
    result = fastpref.train(
        config,
        model=copy.deepcopy(base),
        tokenizer=tokenizer,
        train_dataset=data.train,
        eval_dataset=data.heldout,
    )
    if result.stopped is not None:
        raise SystemExit(exit_code(result.stopped))  # the loop has said what came
    return result.model, result.history


def _measure_models(
    scale: Scale,
    models: dict[str, Any],
    tokenizer: Any,
    data: PairSet,
    university: str,
    seed: int,
    stages: Stages,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    prompts = [pair["prompt"] for pair in data.heldout]
    chosen = [pair["chosen"] for pair in data.heldout]
    measured, answers = {}, {}
    with stages.stage("answers and perplexity", len(models) * len(prompts)) as advance:
        for name, model in models.items():
            answers[name] = generate(
                model, tokenizer, prompts, max_new_tokens=scale.max_new_tokens, seed=seed, advance=advance
            )
            measured[name] = {
                "mention_share": mention_share(answers[name], university),
                "chosen_perplexity": perplexity(model, tokenizer, prompts, chosen),
                "own_answers_perplexity": perplexity(models["base"], tokenizer, prompts, answers[name]),
                "distinct_bigrams": distinct_bigrams(answers[name]),
            }
    return measured, answers


def _measure_logps(case: LogpsCase, stages: Stages) -> dict[str, Any]:
    """By the name of the path, its row as `fastpref bench` measures it, and the device."""
    with stages.stage("log-prob path", len(PROVIDERS)) as advance:
        bench = Run("quick")
        logps: dict[str, Any] = {"device": bench.device}
        try:
            for path, provider in PROVIDERS.items():
                logps[path] = measure(bench, Entry(SUITES["logps"], case, provider, "train"))
                if logps[path] is None:
                    raise RuntimeError(f"measuring the {path} log-prob path failed: {bench.skipped[-1]['reason']}")
                advance(1)
        finally:
            bench.close()
    return logps
