"""One alignment run by one method: ours through `fastpref.train`, TRL's through its DPOTrainer, on the same batches."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastpref
from fastpref.benchmarks.study.base import Speaker
from fastpref.benchmarks.study.settings import Settings, Size
from fastpref.demo.pairs import Pair, PairSet
from fastpref.training.data.batches import BatchPlan, Sizes
from fastpref.training.monitoring.advice import ADVICE
from fastpref.training.monitoring.nonfinite import NonFiniteError

LOGGING_STEPS = 5
# In our loop's schedule and in TRL's alike, where TRL does not run at its defaults.
WARMUP_SHARE = 0.125
# A record's entries that say nothing of what was learnt.
NOT_KEPT = ("tokens_per_second", "peak_memory", "num_tokens", "entropy", "mean_token_accuracy")
SPEEDS = ("eval_runtime", "eval_samples", "eval_steps")
DIGITS = 6


@dataclass
class Aligned:
    """A model after alignment; `history` has the records of training and of evaluation (eval_*), by step."""

    model: Any
    history: list[dict[str, Any]]
    advice: list[dict[str, Any]]
    seconds: float
    steps: int


class DivergedError(RuntimeError):
    """A run of our loop came to a value that is not finite; `advice` is what it had said."""

    def __init__(self, message: str, advice: list[dict[str, Any]]) -> None:
        super().__init__(message, advice)  # both, since it is made anew from them on its way out of a worker
        self.advice = advice

    def __str__(self) -> str:
        return str(self.args[0])


class Interrupted(RuntimeError):
    """A signal stopped a run before its last step, so that its model is of no use."""


def align(
    size: Size,
    settings: Settings,
    base: Speaker,
    data: PairSet,
    *,
    seed: int,
    folder: Path,
    reference_cache: Path | None = None,
    default_trl: bool = False,
) -> Aligned:
    """Align a copy of the base on `data.train`, measuring `data.heldout` as it goes.

    The reference's log-probs are kept in the folder `reference_cache`, for other runs of our loop on the same pairs.
    With `default_trl`, TRL's trainer runs at its defaults; else it gets the settings, the schedule and the very batches
    of our own loop.
    """
    started = time.perf_counter()
    if settings.trainer == "trl":
        found = _with_trl(size, settings, base, data, seed, folder, default=default_trl)
    else:
        found = _with_fastpref(size, settings, base, data, seed, folder, reference_cache)
    model, history, advice, steps = found
    kept = [{name: _short(value) for name, value in record.items() if _worth(name)} for record in history]
    return Aligned(model.eval(), kept, advice, time.perf_counter() - started, steps)


def order(pairs: int, per_step: int, *, steps: int, seed: int) -> list[int]:
    """Rows in the order in which our loop takes them in so many steps: `per_step` after `per_step`."""
    nothing = Sizes((0,) * pairs, (0,) * pairs, None)  # what a batch takes matters to nobody but a grouped plan
    plan = BatchPlan(pairs=pairs, per_step=per_step, batch_size=per_step, seed=seed, sizes=nothing)
    return [row for step in range(steps) for row in plan.step(step)]


def _with_fastpref(
    size: Size, settings: Settings, base: Speaker, data: PairSet, seed: int, folder: Path, cache: Path | None
) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]], int]:
    steps = size.steps(settings)
    config = fastpref.TrainConfig(
        loss=settings.loss,
        beta=settings.beta,
        loss_options=dict(settings.options) or None,
        learning_rate=settings.learning_rate,
        warmup_steps=_warmup(steps),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        max_length=base.model.config.max_position_embeddings,
        group_by_length=False,  # the order is the seed's alone, so that TRL's trainer can be given the same
        precision=size.precision,
        eval_every=_evaluation_steps(size, steps),
        logging_every=LOGGING_STEPS,
        save_every=0,
        seed=seed,
        output_dir=str(folder),
        reference_cache=None if cache is None else str(cache),
        progress=False,
    )
    try:
        result = fastpref.train(
            config,
            model=copy.deepcopy(base.model),
            tokenizer=base.tokenizer,
            train_dataset=data.train,
            eval_dataset=data.heldout,
        )
    except NonFiniteError as error:
        said = folder / ADVICE
        lines = said.read_text(encoding="utf-8").splitlines() if said.exists() else []
        raise DivergedError(str(error), [json.loads(line) for line in lines]) from error
    if result.stopped is not None:
        raise Interrupted(f"stopped by {result.stopped} after step {result.step} of {steps}")
    return result.model, result.history, [advice._asdict() for advice in result.advice], result.step


def _with_trl(
    size: Size, settings: Settings, base: Speaker, data: PairSet, seed: int, folder: Path, *, default: bool
) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]], int]:
    from trl import DPOConfig, DPOTrainer

    steps, on_cpu = size.steps(settings), base.model.device.type == "cpu"
    rows = data.train
    given: dict[str, Any] = {}
    positions = base.model.config.max_position_embeddings
    if default:
        if on_cpu:
            given["bf16"] = False  # a GPU's default
        if positions < DPOConfig.max_length:
            given["max_length"] = positions  # beyond which there is no embedding
    else:
        rows = [data.train[row] for row in order(len(data.train), settings.batch_size, steps=steps, seed=seed)]
        given = {
            "beta": settings.beta,
            "learning_rate": settings.learning_rate,
            "num_train_epochs": 1,
            "per_device_train_batch_size": settings.batch_size,
            "warmup_steps": _warmup(steps),
            "max_length": positions,
            "train_sampling_strategy": "sequential",
            "bf16": size.precision == "bf16" and not on_cpu,
        }
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that go in later versions
        arguments = DPOConfig(
            output_dir=str(folder),
            seed=seed,
            use_cpu=on_cpu,
            eval_strategy="steps",
            eval_steps=_evaluation_steps(size, steps),
            logging_steps=LOGGING_STEPS,
            logging_first_step=True,  # as ours does
            save_strategy="no",
            gradient_checkpointing=False,  # on by default: the same numbers, a third more work
            precompute_ref_log_probs=True,  # the same numbers too; by default in every epoch and evaluation anew
            report_to="none",
            disable_tqdm=True,
            **given,
        )
        trainer: Any = DPOTrainer(
            model=copy.deepcopy(base.model),
            args=arguments,
            train_dataset=_dataset(rows),
            eval_dataset=_dataset(data.heldout),
            processing_class=copy.deepcopy(base.tokenizer),
        )
        trainer.train()
    if trainer.state.global_step != steps:
        raise RuntimeError(f"TRL's trainer made {trainer.state.global_step} steps of {steps}")
    history = [record for record in trainer.state.log_history if "loss" in record or "eval_loss" in record]
    return trainer.model, history, [], steps


def _dataset(rows: list[Pair]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in rows])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TRL's trainer prints its records to stdout, and datasets draws bars: both would tear the study's own bar."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def _warmup(steps: int) -> int:
    return int(WARMUP_SHARE * steps)


def _evaluation_steps(size: Size, steps: int) -> int:
    return max(1, steps // size.evaluations)


def _worth(name: str) -> bool:
    return not (name.endswith(NOT_KEPT) or name.startswith(SPEEDS) or "logits/" in name)


def _short(value: Any) -> Any:
    """A number in so many digits; one that is not finite as None, which JSON has."""
    if not isinstance(value, float):
        return value.item() if isinstance(value, torch.Tensor) else value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
