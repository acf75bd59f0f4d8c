"""A run: everything that `prepare` brought together, and what a checkpoint must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpref.console import Console
from fastpref.folders import Claim
from fastpref.losses import LossSpec
from fastpref.training.config import TrainConfig
from fastpref.training.data.batches import BatchPlan
from fastpref.training.data.collate import Batch, Layout, Part, collate
from fastpref.training.data.tokens import Pair, data_digest

# Options that shape every step: a run can only be resumed with the same ones. (The length of the run is
# free.)
FIXED_ON_RESUME = (
    "loss", "loss_weights", "beta", "loss_options", "max_length", "learning_rate", "schedule", "warmup_steps",
    "warmup_ratio",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "precision", "logps",
    "disable_dropout", "seed", "adapter", "lora_rank", "lora_alpha", "lora_target_modules", "freeze_head",
    "reference_model",
)  # fmt: skip

Callback = Callable[[int, dict[str, Any]], object]  # gets the step and the record's metrics


@dataclass
class Run:
    """A run that is ready to start."""

    config: TrainConfig
    max_length: int  # the config's, or the default for its model
    learning_rate: float  # likewise
    spec: LossSpec
    accelerator: Any
    console: Console
    tokenizer: Any
    model: Any  # on its device, with the initial weights
    pairs: list[Pair]
    eval_pairs: list[Pair]
    plan: BatchPlan
    steps: int
    layout: Layout
    own_attention: str  # the model's before the layout set it
    routers: list[Any]  # the model's configs whose output_router_logits is off while the run trains
    save_dtype: torch.dtype | None  # of the final model and the best; None for what they are trained in
    shape: str  # of the model, before it was wrapped
    output_dir: Path
    claim: Claim | None  # of that folder, on the main process; None for a dry run
    checkpoint: Path | None  # to resume from
    state: dict[str, Any] | None  # of that checkpoint
    trackers: Sequence[str] = ()  # by their names in Accelerate
    callbacks: Sequence[Callback] = ()
    starts_at_reference: bool = False  # whether its first step has policy and reference the same function

    def collate(self, pairs: Sequence[Pair], part: Part = "both") -> Batch:
        """Pairs as a batch on this process's device, laid out as the run lays them out."""
        return collate(pairs, self.layout, part)

    @property
    def part(self) -> Part:
        """What of each pair a training step's gradient is of."""
        return "chosen" if self.spec.unpaired else "both"

    @contextmanager
    def own_config(self) -> Iterator[None]:
        """With the model's config as it came, to save it."""
        for config in self.routers:
            config.output_router_logits = True
        try:
            yield
        finally:
            for config in self.routers:
                config.output_router_logits = False

    @property
    def log_every(self) -> int:
        """Steps between two metric records."""
        return self.config.logging_every or min(max(self.steps // 100, 1), 10)

    def release(self) -> None:
        """Give the model, which may be the caller's, its own attention and config back, and let the run's folder go."""
        if self.layout.name != "padded":
            self.model.set_attn_implementation(self.own_attention)
        for config in self.routers:
            config.output_router_logits = True
        if self.claim is not None:
            self.claim.release()

    @property
    def kept(self) -> int:
        """Steps whose records the output folder has: those until the checkpoint, if that is this folder's own."""
        here = self.checkpoint is not None and self.checkpoint.resolve().parent == self.output_dir.resolve()
        return self.state["step"] if here and self.state is not None else 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must agree on."""
        fixed = {name: getattr(self.config, name) for name in FIXED_ON_RESUME}
        fixed |= {name: getattr(self.config, name) or None for name in ("load_in_4bit", "load_in_8bit")}
        return {
            **fixed,
            "model": self.shape,
            "layout": self.layout.name,
            "group_by_length": self.plan.grouped,
            "pairs_per_step": self.plan.per_step,
            "data": data_digest(self.pairs),
        }
