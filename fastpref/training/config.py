"""What a training run is: one flat dataclass, whose fields are the options of `fastpref train`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastpref.checks import check_bool, check_choice, check_number, describe, parse_budget
from fastpref.training.data.formats import COLUMNS

# Those of transformers.get_scheduler that need nothing but the number of steps and of warm-up steps.
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
)
# What a trained model bears; random weights would not move at that rate.
LEARNING_RATE = 1e-6
SCRATCH_LEARNING_RATE = 3e-4
LORA_LEARNING_RATE = 1e-5  # adapters start from nothing, and bear some ten times what whole weights do
MAX_LENGTH = 1024
TRIAL_MAX_LENGTH = 256
TRIAL_PAIRS = 16
ALL_LINEAR = "all-linear"
POSITIVE: dict[str, Any] = {"minimum": 0, "open_minimum": True}
SHARE: dict[str, Any] = {"minimum": 0, "maximum": 1, "open_maximum": True}


def _option(default: Any, text: str, *, parser: Mapping[str, Any] | None = None, **bounds: Any) -> Any:
    """A field with the help text that `fastpref train --help` shows, what argparse is told besides, and its bounds."""
    return field(default=default, metadata={"help": text, "parser": parser or {}, "bounds": bounds})


@dataclass
class TrainConfig:
    """The options of a run; `fastpref.train` and `fastpref train` take the same ones.

    Lengths are in tokens, `batch_size` in pairs. The effective batch of an optimiser step holds `batch_size *
    gradient_accumulation_steps` pairs on each process. Values are checked when the object is made: TypeError
    for a wrong type, ValueError for a wrong value.
    """

    # What is trained
    model: str | None = _option(
        None, "Folder or hub name of a causal language model to start from, or of an adapter (PEFT) on one."
    )
    model_config: dict[str, Any] | str | None = _option(  # noqa: RUF009 - the default is None
        None, "JSON text or a config.json path: a model with random weights, instead of --model."
    )
    tokenizer: str | None = _option(None, "Folder or hub name of the tokenizer; by default that of --model.")
    trust_remote_code: bool = _option(False, "Run the code that a checkpoint brings along: read it first.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "In what --model's weights are held. auto: what is trained in float32, what adapters leave frozen as in the "
        "checkpoint.",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "In what the final and the best model are saved. auto: as the checkpoint of --model was; adapters as trained.",
    )
    load_in_4bit: bool = _option(
        False, "Quantise the frozen weights to 4 bits (NF4, bitsandbytes), under adapters: QLoRA."
    )
    load_in_8bit: bool = _option(False, "Quantise the frozen weights to 8 bits (bitsandbytes), under adapters.")
    chat_template: str | None = _option(None, "Jinja chat template, as text or as a path to a file.")

    reference_model: str | None = _option(
        None,
        "Folder or hub name of the reference model, or of an adapter on one; by default the model that training starts "
        "from.",
    )
    reference_cache: str | None = _option(
        None, "Folder that keeps reference log-probs, to share them between runs; by default the run's own."
    )
    adapter: Literal["continue", "merge"] = _option(
        "continue",
        "What is done with an adapter that --model names: go on training it, or merge it into its base and train that, "
        "with --lora_rank by a new adapter on top.",
    )
    lora_rank: int = _option(
        0, "Train LoRA adapters of this rank (PEFT) in place of the weights; 0 trains the weights.", minimum=0
    )
    lora_alpha: float | None = _option(None, "LoRA's alpha; by default twice the rank.", **POSITIVE)
    lora_target_modules: str = _option(
        ALL_LINEAR,
        f"Names of the modules (or stacks of experts) that get an adapter, separated by commas, or {ALL_LINEAR}; head "
        "and routers never do.",
    )
    freeze_head: bool = _option(
        False, "Leave the head (lm_head) as it is, and embeddings tied to it too: one matrix product in three less."
    )

    # Data
    dataset: str | None = _option(
        None,
        "JSON, JSONL, CSV or Parquet files, folders of them, patterns (*.jsonl), datasets.save_to_disk folders or hub "
        "names; several are separated by commas.",
    )
    dataset_split: str | None = _option(
        None, "The split of --dataset, where that is a folder or hub name: train by default."
    )
    dataset_config: str | None = _option(None, "The configuration of a hub dataset that has several.")
    eval_dataset: str | None = _option(None, "Held-out pairs, in the same forms as --dataset.")
    eval_dataset_split: str | None = _option(None, "The split of --eval_dataset; train by default.")
    columns: dict[str, Any] | str | None = _option(  # noqa: RUF009
        None, 'JSON: which columns to read in place of ours, as \'{"prompt": "question"}\'.'
    )
    eval_fraction: float = _option(0.0, "Share of --dataset to hold out, drawn with --seed; 0 holds out none.", **SHARE)
    max_length: int | None = _option(
        None,
        "Tokens a sequence may have; a response is cut at its end to fit. By default "
        f"{MAX_LENGTH}, and {TRIAL_MAX_LENGTH} for the trial model that is built where no model is given.",
        minimum=2,
    )

    # Loss
    loss: list[str] | str = _option(  # noqa: RUF009
        "sigmoid",
        "Name of the preference loss: dpo, dpop, ipo, sft, kl_sft and so on; kto for unpaired data. Several names are "
        "the sum of their losses.",
        parser={"nargs": "+"},
    )
    loss_weights: list[float] | None = _option(  # noqa: RUF009
        None, "The weight of each loss in a sum of several; by default 1.", parser={"nargs": "+"}, **POSITIVE
    )
    beta: float = _option(0.1, "Strength of the pull towards the reference model.", **POSITIVE)
    loss_options: dict[str, Any] | str | None = _option(  # noqa: RUF009
        None, "Options of the loss as JSON, for instance '{\"lam\": 5.0}' for dpop."
    )

    # Optimiser
    learning_rate: float | None = _option(
        None,
        f"Peak learning rate of AdamW; by default {LEARNING_RATE:g}, {LORA_LEARNING_RATE:g} for adapters, and "
        f"{SCRATCH_LEARNING_RATE:g} for a model with random weights.",
        minimum=0,
    )
    schedule: str = _option("linear", "Learning-rate schedule, by its name in transformers.get_scheduler.")
    warmup_steps: int = _option(0, "Steps over which the learning rate rises from 0.", minimum=0)
    warmup_ratio: float = _option(0.0, "The same as a share of all steps; give one of the two.", minimum=0, maximum=1)
    weight_decay: float = _option(0.0, "AdamW weight decay, on matrices only (not on biases and norms).", minimum=0)
    adam_beta1: float = _option(0.9, "AdamW beta1.", **SHARE)
    adam_beta2: float = _option(0.999, "AdamW beta2.", **SHARE)
    adam_epsilon: float = _option(1e-8, "AdamW epsilon.", **POSITIVE)
    max_grad_norm: float = _option(1.0, "Clip the gradient to this norm; 0 turns clipping off.", minimum=0)

    # Size of a step, length of the run
    batch_size: int = _option(4, "Pairs in a micro-batch on each process.", minimum=1)
    gradient_accumulation_steps: int | None = _option(
        None,
        "Micro-batches in an optimiser step. By default 1; for the trial model as many as give "
        f"{TRIAL_PAIRS} pairs a step.",
        minimum=1,
    )
    epochs: float = _option(1.0, "Passes over the data; --max_steps overrides it.", **POSITIVE)
    max_steps: int | None = _option(None, "Optimiser steps; the data repeats as often as that takes.", minimum=1)
    precision: Literal["fp32", "bf16"] = _option("fp32", "bf16: autocast, with float32 weights and losses.")
    logps: Literal["linear", "logits"] = _option(
        "linear",
        "Where log-probs come from: the head's input and weight, so that no logits exist, or the model's logits. The "
        "same numbers up to rounding.",
    )
    memory_budget: str | None = _option(
        None, "Memory that the log-probs may take with --logps linear, as 512MiB; by default 1GiB."
    )
    disable_dropout: bool = _option(True, "Set every dropout probability of the model to 0, and a router's jitter.")
    layout: Literal["shared", "packed", "padded"] = _option(
        "shared",
        "How pairs lie in a micro-batch. shared: one row without padding, a pair's prompt once; packed: one row, every "
        "sequence whole; padded: a row a sequence. A model that the first two cannot serve takes the last, and a line "
        "says why.",
    )
    attention: Literal["sdpa", "flex"] = _option(
        "sdpa", "What computes the attention of shared and packed rows: SDPA, segment by segment, or FlexAttention."
    )
    batch_tokens: int | None = _option(
        None, "Most tokens in a micro-batch: one that would have more is cut, be it below --batch_size.", minimum=1
    )
    group_by_length: bool | None = _option(
        None,
        "Bring pairs of like lengths into a step, for less padding; by default where rows are padded.",
    )
    auto_batch: bool = _option(
        False, "Find the largest micro-batch that fits in memory; the pairs of a step stay as they are."
    )
    gradient_checkpointing: bool = _option(False, "Recompute activations in backward, to save memory.")
    offload_activations: bool = _option(False, "Keep what backward needs in CPU memory, to save a GPU's.")

    # Evaluation, saving, reporting
    eval_every: int | None = _option(
        None, "Evaluate every so many steps; by default only after the last one.", minimum=1
    )
    sample_prompts: int = _option(0, "Held-out prompts to answer (greedily) at each evaluation.", minimum=0)
    max_new_tokens: int = _option(64, "Tokens a sampled answer may have.", minimum=1)
    save_every: int = _option(
        500, "Write a checkpoint every so many steps; 0 writes none (the final model always is).", minimum=0
    )
    keep_checkpoints: int = _option(2, "How many of the newest checkpoints stay on disk.", minimum=1)
    save_best: bool = _option(False, "Keep the model of the best evaluation so far in the folder `best`.")
    best_metric: str = _option(
        "eval_loss",
        "The metric that --save_best looks at; of losses, penalties and all of the rejected, less is better.",
    )
    logging_every: int | None = _option(
        None, "Steps between metric records; by default a hundredth of the run, at least 1 and at most 10.", minimum=1
    )
    report_to: list[str] | str | None = _option(  # noqa: RUF009
        None,
        "Trackers that get the metrics, by Accelerate's names: tensorboard, wandb, trackio and so on, all or none; by "
        "default tensorboard where it is installed.",
        parser={"nargs": "+"},
    )
    seed: int = _option(0, "Seed of random weights, of the order of the data and of dropout.", minimum=0)
    output_dir: str | None = _option(
        None,
        "Folder of the run: metrics, curves, checkpoints, final model. It must be new or empty; by default "
        "runs/fastpref, then runs/fastpref-2 and so on.",
    )
    resume: str | None = _option(
        None,
        "Go on from a checkpoint: its path, or no value for the newest in --output_dir; without --output_dir for the "
        "newest of all default folders. The run goes on in the folder of its checkpoint, unless another is given.",
        parser={"nargs": "?", "const": "latest"},
    )
    on_nonfinite: Literal["stop", "skip"] = _option(
        "stop", "A loss or gradient that is not finite: stop the run, or skip that step's update."
    )
    dry_run: bool = _option(
        False, "Check data, model and memory, print the first pair as the model will see it, and train nothing."
    )
    progress: bool = _option(True, "Show progress bars and a line of metrics at each record.")

    def __post_init__(self) -> None:
        self.model_config = _json_object("model_config", self.model_config)
        self.loss_options = _json_object("loss_options", self.loss_options) or {}
        self.columns = _json_object("columns", self.columns)
        for ours, theirs in (self.columns or {}).items():
            check_choice("columns", ours, COLUMNS)
            if not isinstance(theirs, str):
                raise TypeError(f"columns: {ours!r} must be the name of a column, got {describe(theirs)}")
        self.resume = _resume(self.resume)
        if isinstance(self.loss, (list, tuple)):
            self.loss = list(self.loss) if len(self.loss) != 1 else self.loss[0]
        hints = get_type_hints(TrainConfig)
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, os.PathLike) and str in get_args(hints[option.name]):
                value = os.fspath(value)
                setattr(self, option.name, value)
            _check(option, hints[option.name], value)
        check_choice("schedule", self.schedule, SCHEDULES)
        parse_budget(self.memory_budget)
        if self.memory_budget is not None and self.logps != "linear":
            raise ValueError(f"memory_budget={self.memory_budget!r} goes with logps='linear', got logps={self.logps!r}")
        for name, default in (("lora_alpha", None), ("lora_target_modules", ALL_LINEAR)):
            if self.lora_rank == 0 and getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)!r} goes with lora_rank, which is 0: set it too")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("give load_in_4bit or load_in_8bit, not both")
        if self.model is not None and self.model_config is not None:
            raise ValueError("give model (weights to start from) or model_config (random weights), not both")
        if self.eval_dataset is not None and self.eval_fraction > 0:
            raise ValueError("give eval_dataset or eval_fraction, not both")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")

    @property
    def loss_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `fastpref.preference_loss` beyond the log-probs."""
        return {"loss": self.loss, "loss_weights": self.loss_weights, "beta": self.beta, **self.options_of_loss}

    @property
    def options_of_loss(self) -> dict[str, Any]:
        assert isinstance(self.loss_options, dict)  # __post_init__ made it one
        return self.loss_options


def _check(option: Field[Any], hint: Any, value: Any) -> None:
    """ValueError or TypeError for a value that is not of the option's type, or not within its bounds."""
    name, kinds, bounds = option.name, get_args(hint) or (hint,), option.metadata["bounds"]
    if (value is None and type(None) in kinds) or name == "memory_budget":  # which may be bytes, or text
        return
    if get_origin(hint) is Literal:
        check_choice(name, value, kinds)
    elif bool in kinds:
        check_bool(name, value)
    elif float in kinds:
        check_number(name, value, **bounds)
    elif int in kinds:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {describe(value)}")
        if value < bounds["minimum"]:
            raise ValueError(f"{name} must be at least {bounds['minimum']}, got {value}")
    elif list[str] in kinds and isinstance(value, (list, tuple)):
        if not value or not all(isinstance(part, str) and part.strip() for part in value):
            raise TypeError(f"{name} must be a name or a list of names, got {describe(value)}")
    elif list[float] in kinds:
        if not isinstance(value, (list, tuple)) or not value:
            raise TypeError(f"{name} must be a list of numbers, got {describe(value)}")
        for part in value:
            check_number(name, part, **bounds)
    elif dict[str, Any] not in kinds and not (isinstance(value, str) and value.strip()):
        raise TypeError(
            f"{name} must be a non-empty string{' or None' * (option.default is None)}, got {describe(value)}"
        )


def _json_object(name: str, value: Any) -> dict[str, Any] | None:
    """A dict as it is; JSON text or the path of a JSON file, read."""
    if value is None or isinstance(value, dict):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a dict, JSON text or a path, got {describe(value)}")
    text = value = os.fspath(value)
    if not value.lstrip().startswith("{"):
        path = Path(value)
        if not path.is_file():
            raise ValueError(f"{name} must be a JSON object or the path of a JSON file, got {value!r}")
        text = path.read_text(encoding="utf-8")
    try:
        decoded = read_json(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({error}): {value!r}") from error
    if not isinstance(decoded, dict):
        raise ValueError(f"{name} must hold a JSON object, got {describe(decoded)}")
    return decoded


def read_json(text: str) -> Any:
    """What `json.loads` makes of it; ValueError for a key given twice, of which it would silently take the second."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{repeated!r} is given {names.count(repeated)} times: give it once")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _resume(value: Any) -> str | None:
    """True and 'true' stand for 'latest', as a config file writes it; False and 'false' for no resuming."""
    if value in (None, False, "false"):
        return None
    if value in (True, "true"):
        return "latest"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not (isinstance(value, str) and value):
        raise TypeError(f"resume must be True, False or the path of a checkpoint, got {describe(value)}")
    return value
