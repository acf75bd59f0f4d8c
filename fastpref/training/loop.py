"""The training loop: batch, model, log-probs, loss, gradient, step. What surrounds it stands elsewhere."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from fastpref.losses import preference_loss
from fastpref.training.advice import falling_chosen_reward
from fastpref.training.checkpoints import (
    checkpoint_folders,
    load_rng,
    load_weights,
    save_checkpoint,
    save_final_model,
)
from fastpref.training.config import TrainConfig
from fastpref.training.distributed import wrap
from fastpref.training.evaluate import evaluate, prepare_samples, write_samples
from fastpref.training.forward import batch_logps, reference_logps
from fastpref.training.initial import add_reference
from fastpref.training.metrics import MetricLog, Window, means, pair_sums, peak_memory
from fastpref.training.nonfinite import FiniteGuard, NonFiniteError
from fastpref.training.plots import draw
from fastpref.training.prepare import Run, prepare


@dataclass
class TrainResult:
    """What `fastpref.train` gives back: the model in evaluation mode; `history` holds the records of metrics.jsonl."""

    output_dir: Path
    model: Any
    step: int
    history: list[dict[str, Any]]


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> TrainResult:
    """Train a causal language model on preference pairs.

    Args:
        config: the options of the run.
        model: a transformers causal LM, trained in place, instead of `config.model` or `config.model_config`.
        tokenizer: a transformers tokenizer, instead of `config.tokenizer`.
        train_dataset, eval_dataset: lists of dicts or `datasets.Dataset`s with prompt, chosen and rejected (strings,
            or message lists; the prompt may be implicit), instead of `config.dataset` and `config.eval_dataset`. The
            reference's log-probs are taken from the columns ref_chosen_logps and ref_rejected_logps where they exist.

    The run folder holds metrics.jsonl, curves.png, TensorBoard events, samples.jsonl, the checkpoints and, at
    the end, the trained model in `model`.

    Raises:
        ValueError, TypeError, FileNotFoundError: options or data that do not fit, before anything is trained.
        NonFiniteError: a loss or gradient is not finite (with `on_nonfinite="stop"`); the checkpoints stay.
    """
    run = prepare(config, model=model, tokenizer=tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)
    return train_run(run)


def train_run(run: Run) -> TrainResult:
    """Train a run that `prepare` has made ready."""
    return _Loop(run).train()


class _Loop:
    """The state that changes from step to step, and what is done with it."""

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.device = run, run.config, run.accelerator.device
        # Before anything changes the model: the reference is the initial one.
        self.initial_weights = add_reference(run)
        optimizer = _optimizer(run, self.device)
        self.model, self.optimizer = wrap(run.accelerator, run.model, optimizer)
        self.schedule = _schedule(optimizer, run.config, run.steps)
        self.window = Window(self.device)
        self.guard = FiniteGuard(run.accelerator)
        self.start, self.tokens, self.advised = 0, 0, False
        if run.checkpoint is not None and run.state is not None:
            self.restore(run.checkpoint, run.state)

    def train(self) -> TrainResult:
        run, config = self.run, self.config
        log_every = config.logging_every or min(max(run.steps // 100, 1), 10)
        run.model.train()
        with (
            MetricLog(run.output_dir, run.console, start=self.start) as log,
            run.console.bar("train", run.steps, done=self.start) as bar,
        ):
            prepare_samples(run, self.start)
            for step in range(self.start + 1, run.steps + 1):
                last = step == run.steps
                logging = last or step == 1 or step % log_every == 0
                evaluating = last or (config.eval_every is not None and step % config.eval_every == 0)
                saving = config.save_every > 0 and step % config.save_every == 0

                sums, grad_norm = self.gradient(step)
                learning_rate = self.schedule.get_last_lr()[0]
                self.update(sums, look=logging or evaluating or saving)

                if logging:
                    self.log(log, step, float(grad_norm), learning_rate)
                bar.advance(note=_rate(log.history))
                with self.window.paused():
                    if evaluating and run.eval_pairs:
                        log.add({"step": step, **evaluate(run)})
                        run.console.say_progress(_line(log.history[-1], run.steps, prefix="eval_"))
                        if run.accelerator.is_main_process:
                            write_samples(run, step)
                            draw(run, log.history)
                    if saving:
                        self.save(step)
            if run.accelerator.is_main_process:
                save_final_model(run.output_dir, run.model, run.tokenizer)
                draw(run, log.history)
            run.accelerator.wait_for_everyone()
            return TrainResult(run.output_dir, run.model.eval(), run.steps, log.history)

    def gradient(self, step: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of one step, counted from 1: this process's sums over its pairs, and the norm.

        The loss is the mean over all pairs of the step, over every micro-batch and process, so that k
        micro-batches make the same step as one batch, uneven tails included.
        """
        run, config, accelerator = self.run, self.config, self.run.accelerator
        self.guard.begin(step)
        sums = torch.zeros_like(self.window.sums)
        pairs = run.plan.step(step - 1)
        micro_batches = run.plan.micro_batches(pairs)
        for place, indices in enumerate(micro_batches):
            # A process whose share is a pair short runs one of the others with weight 0, to keep in step.
            weight = 1.0 if indices else 0.0
            chunk = [run.pairs[index] for index in indices or pairs[:1]]
            batch = run.collate(chunk)
            with nullcontext() if place == len(micro_batches) - 1 else accelerator.no_sync(self.model):
                policy = batch_logps(self.model, batch, config, reduction=run.spec.reduction)
                output = preference_loss(*policy, *reference_logps(batch, run.spec), **config.loss_arguments)
                # DDP averages gradients over the processes; the factor num_processes makes that a sum.
                scale = weight * accelerator.num_processes / len(pairs)
                (output.losses.sum() * scale).backward()
            sums += weight * pair_sums(output, *policy, batch.tokens)
            self.guard.see_batch(batch.rows, output.losses, *policy)
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm or math.inf)
        self.guard.see_gradient(grad_norm)
        return sums, grad_norm

    def update(self, sums: Tensor, *, look: bool) -> None:
        """The optimiser's step, unless the gradient is not finite.

        On a GPU looking at a value makes the host wait: it looks where it must wait anyway, before anything
        is saved.
        """
        trouble = None
        if look or self.device.type == "cpu" or self.config.on_nonfinite == "skip":
            trouble = self.guard.look()
        if trouble is None:
            self.optimizer.step()
            self.schedule.step()
            self.window.sums += sums
        elif self.config.on_nonfinite == "skip":
            self.run.console.say(f"skipped the update. {trouble}")
        else:
            raise NonFiniteError(f"{trouble}. {_what_is_left(self.run)}")
        self.optimizer.zero_grad()

    def log(self, log: MetricLog, step: int, grad_norm: float, learning_rate: float) -> None:
        run = self.run
        totals, seconds = self.window.close(run.accelerator)
        if totals[-2] == 0:  # every step since the last record was skipped
            return
        self.tokens += int(totals[-1])
        record = {
            "step": step,
            "epoch": run.plan.epoch(step),
            **means(totals, loss_name=run.spec.name, has_penalty=run.spec.penalty is not None),
            **({"grad_norm": grad_norm} if math.isfinite(grad_norm) else {}),  # it is not, in a skipped step
            "learning_rate": learning_rate,
            "num_tokens": self.tokens,
            "tokens_per_second": totals[-1] / seconds,
            "peak_memory": peak_memory(self.device),
        }
        log.add(record)
        run.console.say_progress(_line(record, run.steps))
        advice = None if self.advised else falling_chosen_reward(log.history, run.spec)
        if advice is not None:
            self.advised = True
            run.console.say(advice)

    def save(self, step: int) -> None:
        state = {
            "step": step,
            "settings": self.run.settings,
            "initial_weights": self.initial_weights,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "window": self.window.state(self.run.accelerator),
            "tokens": self.tokens,
            "advised": self.advised,
        }
        save_checkpoint(self.run, step, state)

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        load_weights(self.run.model, checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.window.load_state(state["window"], self.run.accelerator)
        self.start, self.tokens, self.advised = state["step"], state["tokens"], state["advised"]
        load_rng(checkpoint, self.run.accelerator)


def _optimizer(run: Run, device: torch.device) -> torch.optim.AdamW:
    config = run.config
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
        fused=True if device.type == "cuda" else None,
    )


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def _what_is_left(run: Run) -> str:
    folders = checkpoint_folders(run.output_dir)
    kept = f"The newest checkpoint is {folders[-1]}" if folders else "No checkpoint had been written"
    return f"{kept}. Look at these rows, lower learning_rate, or set on_nonfinite=skip"


def _line(record: dict[str, Any], steps: int, prefix: str = "") -> str:
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
    values = "  ".join(f"{prefix}{name} {record[prefix + name]:.4f}" for name in names)
    rate = f"  {record['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in record else ""
    return f"step {record['step']}/{steps}  {values}{rate}"


def _rate(history: list[dict[str, Any]]) -> str | None:
    rates = [record["tokens_per_second"] for record in history[-2:] if "tokens_per_second" in record]
    return f"{rates[-1]:,.0f} tokens/s" if rates else None
