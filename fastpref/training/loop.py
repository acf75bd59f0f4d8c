"""The training loop: batch, model, log-probs, loss, gradient, step. What surrounds it stands elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from fastpref.checks import describe
from fastpref.training.adapters import say_how_to_merge
from fastpref.training.checkpoints.durable import SaveError, full_disk_noticed, writing
from fastpref.training.checkpoints.run_folder import describe_run, write_listing
from fastpref.training.checkpoints.save import (
    checkpoint_folders,
    keep_best,
    load_checkpoint,
    save_checkpoint,
    save_merged_base,
    save_trained_model,
)
from fastpref.training.config import TrainConfig
from fastpref.training.distributed.processes import clip_gradient, wrap
from fastpref.training.memory.auto_batch import auto_batch
from fastpref.training.memory.dry_run import DryRun, dry_run
from fastpref.training.memory.oom import MemoryLimitError, explained
from fastpref.training.monitoring.advice import Advice, Adviser, said
from fastpref.training.monitoring.evaluate import evaluate, prepare_samples, write_samples
from fastpref.training.monitoring.metrics import MetricLog, Window, means, peak_memory, progress_note, sums_of
from fastpref.training.monitoring.nonfinite import FiniteGuard, NonFiniteError
from fastpref.training.monitoring.plots import Clock, draw
from fastpref.training.monitoring.stopping import Stopped, StopSignals
from fastpref.training.monitoring.trackers import tracking
from fastpref.training.noise import check_start, restore_config
from fastpref.training.prepare import prepare
from fastpref.training.reference.scores import add_reference
from fastpref.training.run import Callback, Run
from fastpref.training.step import add_gradient, kl_estimate


@dataclass
class TrainResult:
    """What `fastpref.train` gives back: the model in evaluation mode; `history` holds the records of metrics.jsonl.

    `stopped` is None for a run that made all its steps; else the signal, "SIGTERM" or "SIGINT", that stopped it after
    `step` steps. Then a checkpoint holds them, and there is no final model. `dry_run` is None but for a dry run, which
    has made 0 steps: what it found, beside a model without numbers (on the meta device). `advice` holds what the loop
    has advised, at most a line of each kind. Its text leaves out the model and the lists.
    """

    output_dir: Path
    model: Any = field(repr=False)
    step: int
    history: list[dict[str, Any]] = field(repr=False)
    stopped: str | None = None
    dry_run: DryRun | None = field(default=None, repr=False)
    advice: list[Advice] = field(default_factory=list, repr=False)


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a causal language model on preference pairs.

    Args:
        config: the options of the run.
        model: a transformers causal LM, trained in place, instead of `config.model` or `config.model_config`.
        tokenizer: a transformers tokenizer, instead of `config.tokenizer`.
        train_dataset, eval_dataset: lists of dicts, `datasets.Dataset`s or pandas DataFrames with prompt, chosen and
            rejected (strings, or message lists; the prompt may be implicit), instead of `config.dataset` and
            `config.eval_dataset`. The reference's log-probs are taken from the columns ref_chosen_logps and
            ref_rejected_logps where they exist.
        callbacks: functions that are called with the step and a dict of metrics, by every process, when a record is
            written: of training (see `logging_every`), and with eval_ before the names of an evaluation.

    A name or path in place of an object (`model="folder"`) sets the config's option of that name.

    The run folder holds metrics.jsonl, curves.png, TensorBoard events (see `report_to`), samples.jsonl, the checkpoints
    and, at the end, the trained model in `model`. Where the chosen reward falls below zero with the loss, or gradients
    explode, a line says so once, with the rows and what to change: in `TrainResult.advice` and advice.jsonl too.

    SIGTERM or Ctrl-C stops the run after the step it is at, with a checkpoint: see `TrainResult.stopped`. A second one
    acts as always. (In the main thread, that is; signals do not reach another.)

    Raises:
        ValueError, TypeError, FileNotFoundError: options or data that do not fit, before anything is trained.
        FolderError: output_dir cannot be used, be it that it holds what this run did not write; nothing is changed.
        NonFiniteError: a loss or gradient is not finite (with `on_nonfinite="stop"`); the checkpoints stay.
        MemoryLimitError: memory did not suffice; the message has sizes and remedies, and the checkpoints stay.
        SaveError: a file could not be written, be the disk full; the checkpoints stay.
    """
    if not isinstance(callbacks, (list, tuple)) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks must be a list of functions of step and metrics, got {describe(callbacks)}")
    run = prepare(config, model=model, tokenizer=tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)
    run.callbacks = callbacks
    return train_run(run)


def train_run(run: Run) -> TrainResult:
    """Train a run that `prepare` has made ready."""
    if run.config.dry_run:
        return TrainResult(run.output_dir, run.model, 0, [], dry_run=dry_run(run))
    with StopSignals(run.accelerator) as signals:
        try:
            with full_disk_noticed(run.output_dir):
                with signals.at_once():  # the reference's log-probs keep themselves
                    loop = _Loop(run)
                return loop.train(signals)
        except Stopped as stopped:
            step = 0 if run.state is None else run.state["step"]
            return TrainResult(run.output_dir, run.model.eval(), step, [], stopped.name, advice=said(run.state))
        except SaveError as error:
            how = "go on with resume" if checkpoint_folders(run.output_dir) else "start again"
            raise SaveError(f"{error}. {_what_is_left(run)}; mend that and {how}") from error
        except MemoryLimitError as error:
            raise MemoryLimitError(f"{error}. {_what_is_left(run)}") from error
        finally:
            restore_config(run.model)
            run.release()


class _Loop:
    """The state that changes from step to step, and what is done with it."""

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.device = run, run.config, run.accelerator.device
        optimizer = make_optimizer(run)
        self.model, self.optimizer = wrap(run.accelerator, run.model, optimizer, run.config)
        # Before anything changes the weights, and sharded as they will be: a process may have no room for all of them.
        with explained(run, "the reference pass"):
            self.initial_weights = add_reference(run)
            check_start(run)
        self.schedule = make_schedule(optimizer, run)
        self.window = Window(run.spec, self.device)
        self.guard, self.adviser = FiniteGuard(run.accelerator), Adviser(run, self.model)
        self.start, self.tokens = 0, 0
        self.evaluated = True  # after step `start`, if that was due
        self.drawing = Clock()
        self.best: dict[str, Any] | None = None
        if run.checkpoint is not None and run.state is not None:
            self.restore(run.checkpoint, run.state)
        run.plan = auto_batch(run, self.model, self.optimizer)

    def train(self, signals: StopSignals) -> TrainResult:
        run, config = self.run, self.config
        describe_run(run)
        save_merged_base(run, self.model)
        run.model.train()
        with (
            tracking(run),
            MetricLog(run, evaluated=self.evaluated) as log,
            run.console.bar("train", run.steps, done=self.start, unit="step") as bar,
        ):
            prepare_samples(run, run.kept, evaluated=self.evaluated)
            self.adviser.write()
            if not self.evaluated:
                with self.window.paused():
                    self.evaluate(log, self.start)
            for step in range(self.start + 1, run.steps + 1):
                last = step == run.steps
                logging = last or step == 1 or step % run.log_every == 0
                evaluating = last or (config.eval_every is not None and step % config.eval_every == 0)
                saving = config.save_every > 0 and step % config.save_every == 0

                sums, grad_norm = self.gradient(step)
                learning_rate = self.schedule.get_last_lr()[0]
                stopped = signals.agreed()
                self.update(sums, look=logging or evaluating or saving or stopped is not None)

                if logging:
                    self.log(log, step, float(grad_norm), learning_rate)
                bar.advance(note=progress_note(log.history))
                with self.window.paused():
                    if self.drawing.due:  # while the run goes on, where that costs little
                        self.draw(log)
                    if stopped is not None:  # there may be seconds left: no evaluation now, but first thing later
                        self.save(log, step, evaluated=not (evaluating and run.eval_pairs))
                        return self.result(log, step, stopped)
                    if evaluating and run.eval_pairs:
                        self.evaluate(log, step)
                    if saving:
                        self.save(log, step)
            save_trained_model(run, self.model)
            if run.claim is not None:
                run.claim.finish()
            say_how_to_merge(run.model, run.output_dir / "model", say=run.console.say)
            self.draw(log)
            write_listing(run, log.history)
            run.accelerator.wait_for_everyone()
            return self.result(log, run.steps)

    def result(self, log: MetricLog, step: int, stopped: str | None = None) -> TrainResult:
        run = self.run
        return TrainResult(run.output_dir, run.model.eval(), step, log.history, stopped, advice=self.adviser.said)

    def gradient(self, step: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of one step, counted from 1: this process's sums over its pairs, and the norm.

        The loss is the mean over all pairs of the step, over every micro-batch and process, so that k
        micro-batches make the same step as one batch, uneven tails included.
        """
        run, config, accelerator = self.run, self.config, self.run.accelerator
        self.guard.begin(step)
        sums = torch.zeros_like(self.window.sums)
        pairs = run.plan.step(step - 1)
        # A process whose share is a pair short runs one of the others with weight 0, to keep in step.
        parts = run.plan.micro_batches(pairs)
        micro_batches = [([run.pairs[index] for index in part or pairs[:1]], bool(part)) for part in parts]
        with explained(run, f"step {step}", micro_batches[0][0]):
            kl = kl_estimate(run, micro_batches)
        for place, (chunk, counts) in enumerate(micro_batches):
            # Gradients are averaged over the processes; the factor num_processes makes that a sum.
            scale, last = counts * accelerator.num_processes / len(pairs), place == len(micro_batches) - 1
            with explained(run, f"step {step}", chunk, work="step"):
                scored = add_gradient(run, self.model, chunk, scale=scale, last=last, kl=kl)
            sums += counts * sums_of(scored)
            self.guard.see_batch(scored)
        grad_norm = clip_gradient(accelerator, self.model, config.max_grad_norm or math.inf)
        self.guard.see_gradient(grad_norm)
        return sums, grad_norm

    def update(self, sums: Tensor, *, look: bool) -> None:
        """The optimiser's step, unless the gradient is not finite.

        On a GPU looking at a value makes the host wait: it looks where it must wait anyway, before anything
        is saved.
        """
        look = look or self.device.type == "cpu" or self.config.on_nonfinite == "skip"
        trouble, seen = self.guard.look() if look else (None, [])
        if trouble is None:
            with explained(self.run, "the optimiser's step", work="update"):
                self.optimizer.step()
            self.schedule.step()
            self.window.sums += sums
        elif self.config.on_nonfinite == "skip":
            self.run.console.say(f"skipped the update. {trouble}")
        else:
            self.adviser.see_steps(seen, measure=False)
            advice = "Look at these rows, lower learning_rate, or set on_nonfinite=skip"
            raise NonFiniteError(f"{trouble}. {_what_is_left(self.run)}. {advice}")
        self.optimizer.zero_grad()
        with self.window.paused():
            self.adviser.see_steps(seen)

    def log(self, log: MetricLog, step: int, grad_norm: float, learning_rate: float) -> None:
        run = self.run
        totals, seconds = self.window.close(run.accelerator)
        if totals[-2] == 0:  # every step since the last record was skipped
            return
        self.tokens += int(totals[-1])
        record = {
            "step": step,
            "epoch": run.plan.epoch(step),
            **means(totals, run.spec),
            **({"grad_norm": grad_norm} if math.isfinite(grad_norm) else {}),  # it is not, in a skipped step
            "learning_rate": learning_rate,
            "num_tokens": self.tokens,
            "tokens_per_second": totals[-1] / seconds,
            "peak_memory": peak_memory(self.device),
        }
        log.add(record)
        run.console.say_progress(_line(record, run.steps) + run.console.eta)
        self.adviser.see_record(record)

    def evaluate(self, log: MetricLog, step: int) -> None:
        run = self.run
        record = {"step": step, **evaluate(run)}
        log.add(record)
        run.console.say_progress(_line(record, run.steps, prefix="eval_"))
        self.best = keep_best(run, self.model, record, self.best)
        write_samples(run, step)

    def draw(self, log: MetricLog) -> None:
        if self.run.accelerator.is_main_process:
            with writing(self.run.output_dir / "curves.png"), self.drawing:
                draw(self.run, log.history)

    def save(self, log: MetricLog, step: int, *, evaluated: bool = True) -> None:
        log.sync()
        state = {
            "step": step,
            "evaluated": evaluated,
            "best": self.best,
            "settings": self.run.settings,
            "micro_batch": (self.run.plan.batch_size, self.run.plan.batch_tokens) if self.config.auto_batch else None,
            "initial_weights": self.initial_weights,
            "schedule": self.schedule.state_dict(),
            "window": self.window.state(self.run.accelerator),
            "tokens": self.tokens,
            "advice": self.adviser.state(),
        }
        save_checkpoint(self.run, self.model, self.optimizer, state)

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        load_checkpoint(self.run, self.model, self.optimizer, checkpoint)
        self.schedule.load_state_dict(state["schedule"])
        self.window.load_state(state["window"], self.run.accelerator)
        self.adviser.load_state(state)
        self.start, self.tokens = state["step"], state["tokens"]
        self.evaluated = state["evaluated"]
        self.best = state["best"] if self.run.kept else None  # else its model is in another folder


def make_optimizer(run: Run) -> torch.optim.AdamW:
    """AdamW over what is trained; matrices alone are decayed."""
    config, device = run.config, run.accelerator.device
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=run.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        # One pass over weights, gradients and moments: on a CPU a sixth of the time.
        fused=True if device.type in ("cuda", "cpu") else None,
    )


def make_schedule(optimizer: Any, run: Run) -> Any:
    config = run.config
    # 0.07 of 100 steps are 7, though the product is a little more.
    warmup = config.warmup_steps or math.ceil(round(config.warmup_ratio * run.steps, 6))
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=run.steps)


def _what_is_left(run: Run) -> str:
    folders = checkpoint_folders(run.output_dir)
    return f"The newest checkpoint is {folders[-1]}" if folders else "No checkpoint had been written"


def _line(record: dict[str, Any], steps: int, prefix: str = "") -> str:
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
    values = "  ".join(f"{prefix}{name} {record[prefix + name]:.4f}" for name in names if prefix + name in record)
    rate = f"  {record['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in record else ""
    return f"step {record['step']}/{steps}  {values}{rate}"
