"""Everything before the first step: options, data, tokenizer and model checked and brought together."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from fastpref.console import Console
from fastpref.folders import Claim, try_folder
from fastpref.losses import LossSpec, get_loss
from fastpref.options import UsageError
from fastpref.training.adapters import adapters_wanted
from fastpref.training.build import (
    build_model,
    build_tokenizer,
    check_causal,
    check_vocabulary,
    loading,
    padding_id,
    silence_router,
)
from fastpref.training.checkpoints.load import save_dtype
from fastpref.training.checkpoints.run_folder import claim_folder
from fastpref.training.checkpoints.save import ResumeError, find_checkpoint, load_state
from fastpref.training.config import (
    LEARNING_RATE,
    LORA_LEARNING_RATE,
    MAX_LENGTH,
    SCRATCH_LEARNING_RATE,
    TRIAL_MAX_LENGTH,
    TRIAL_PAIRS,
    TrainConfig,
)
from fastpref.training.data.batches import BatchPlan
from fastpref.training.data.collate import settle_layout
from fastpref.training.data.formats import is_conversational
from fastpref.training.data.sources import Rows, read_rows
from fastpref.training.data.tokens import Pair, tokenize_rows
from fastpref.training.data.unpaired import fit_rows, with_labels
from fastpref.training.distributed.processes import is_sharded, make_accelerator, place
from fastpref.training.memory.auto_batch import check_auto_batch
from fastpref.training.memory.meta import build_on_meta
from fastpref.training.memory.offload import check_offload
from fastpref.training.memory.plan import check_budget
from fastpref.training.monitoring.metrics import check_best
from fastpref.training.monitoring.trackers import tracker_names
from fastpref.training.precision import autocasts
from fastpref.training.run import Run


def prepare(
    config: TrainConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> Run:
    """Check and load everything that `fastpref.train` needs; what is wrong with its input is raised here."""
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
    given = {"model": model, "tokenizer": tokenizer, "dataset": train_dataset, "eval_dataset": eval_dataset}
    config = _with_names(config, given)
    accelerator = make_accelerator()
    out = sys.stdout if config.dry_run else sys.stderr  # there the lines are what was asked for
    console = Console(main=accelerator.is_main_process, progress=config.progress, out=out)
    check_offload(config, accelerator.device)
    if config.precision == "bf16" and not autocasts(config, accelerator.device):
        console.say("precision=bf16 would be slower on this CPU, which only emulates it: the run is in float32")
    if (config.load_in_4bit or config.load_in_8bit) and is_sharded(accelerator):
        raise UsageError(
            "load_in_4bit and load_in_8bit: quantised weights cannot be sharded here: take DDP, or neither"
        )
    _check_cache(config)
    spec = _check_loss(config, accelerator.num_processes)
    check_auto_batch(config, spec, accelerator.distributed_type.name)
    trackers = tracker_names(config, say=console.say)
    torch.manual_seed(config.seed)
    folder, claim = claim_folder(config, accelerator)  # before anything is loaded
    config = dataclasses.replace(config, output_dir=str(folder))
    with ExitStack() as undo:  # what a refusal gives back
        if claim is not None:
            undo.callback(claim.release)
        checkpoint = None
        if config.resume is not None:
            checkpoint = find_checkpoint(config.resume, folder, accelerator, say=console.say)
        run = _load(config, accelerator, console, spec, claim, given)
        undo.callback(run.release)
        check_budget(run)
        if checkpoint is not None:
            run = _with_checkpoint(run, checkpoint)
        run = dataclasses.replace(run, trackers=trackers)
        undo.pop_all()
        return run


def _load(
    config: TrainConfig, accelerator: Any, console: Console, spec: LossSpec, claim: Claim | None, given: dict[str, Any]
) -> Run:
    """Data, tokenizer, model and the order of the batches, from the options or from the objects `given`."""
    model, tokenizer, train_dataset, eval_dataset = (_unless_named(value) for value in given.values())
    rows = read_rows(config, train_dataset, "dataset", "train_dataset")
    if rows is None:
        raise ValueError("there is no data: set dataset to a JSONL file or a dataset's name, or pass train_dataset")
    eval_rows = read_rows(config, eval_dataset, "eval_dataset", "eval_dataset")
    if eval_dataset is not None and config.eval_fraction > 0:
        raise ValueError("give eval_dataset or eval_fraction, not both")
    rows = fit_rows(rows, spec, "dataset", seed=config.seed, say=console.say)
    if eval_rows is not None:
        eval_rows = fit_rows(eval_rows, spec, "eval_dataset", seed=config.seed, say=console.say)
    tokenizer = build_tokenizer(config, tokenizer, conversational=is_conversational(rows), say=console.say)
    config = _with_defaults(config, spec, model, accelerator.num_processes, console)
    max_length, learning_rate = cast(int, config.max_length), cast(float, config.learning_rate)
    accumulation = cast(int, config.gradient_accumulation_steps)
    pairs = _pairs(rows, tokenizer, max_length, "dataset", console)
    eval_pairs = [] if eval_rows is None else _pairs(eval_rows, tokenizer, max_length, "eval_dataset", console)
    if config.eval_fraction > 0:
        pairs, eval_pairs = _split(pairs, config.eval_fraction, config.seed)
        console.say(f"held out {len(eval_pairs)} pairs, {len(pairs)} are left to train on")
    if not eval_pairs and (config.eval_every is not None or config.sample_prompts):
        raise ValueError("eval_every and sample_prompts need held-out pairs: set eval_dataset or eval_fraction")
    check_best(config.best_metric, spec, save_best=config.save_best, eval_pairs=len(eval_pairs))

    build = build_on_meta if config.dry_run else build_model
    model = build(config, model, tokenizer, max_length=max_length, say=console.say)
    check_vocabulary(model, tokenizer, [*pairs, *eval_pairs])
    model = model if config.dry_run else place(accelerator, model)
    check_causal(model)
    routers = silence_router(model)
    if routers:
        console.say(
            "the router's auxiliary loss is no part of a preference loss: output_router_logits is set to False until "
            "the model is saved"
        )
    own_attention = model.config._attn_implementation
    layout = settle_layout(
        config,
        model,
        pad_id=padding_id(model, tokenizer),
        max_length=max_length,
        device=accelerator.device,
        say=console.say,
        unpaired=spec.unpaired,
    )
    plan = BatchPlan(
        pairs=len(pairs),
        per_step=config.batch_size * accumulation * accelerator.num_processes,
        batch_size=config.batch_size,
        seed=config.seed,
        sizes=layout.sizes(pairs),
        batch_tokens=config.batch_tokens,
        grouped=layout.name == "padded" if config.group_by_length is None else config.group_by_length,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    return Run(
        config=config,
        max_length=max_length,
        learning_rate=learning_rate,
        spec=spec,
        accelerator=accelerator,
        console=console,
        tokenizer=tokenizer,
        model=model,
        pairs=pairs,
        eval_pairs=eval_pairs,
        plan=plan,
        steps=config.max_steps or math.ceil(round(config.epochs * plan.steps_per_epoch, 6)),
        layout=layout,
        own_attention=own_attention,
        routers=routers,
        save_dtype=save_dtype(config, model),
        shape=_shape(model),
        output_dir=Path(cast(str, config.output_dir)),
        claim=claim,
        checkpoint=None,
        state=None,
    )


def _with_names(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The config with the arguments that are names or paths, as if its options of that name had been set."""
    names: dict[str, Any] = {name: value for name, value in given.items() if _unless_named(value) is not value}
    for name, value in names.items():
        if getattr(config, name) is not None:
            raise ValueError(f"{name} was given twice, as {value!r} and as config.{name}={getattr(config, name)!r}")
    return dataclasses.replace(config, **names)


def _unless_named(value: Any) -> Any:
    """An object as it is, None for a name or path."""
    return None if isinstance(value, (str, os.PathLike)) else value


def _check_cache(config: TrainConfig) -> None:
    """ValueError where the cache's folder cannot be made: before a model is loaded."""
    value = config.reference_cache
    if value is None or Path(value).is_dir():
        return
    if value.startswith("~"):
        raise ValueError(
            f"reference_cache={value!r} begins with '~', which only a shell replaces by a home folder: write that out"
        )
    path = Path(value).absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        kind = "a file" if existing.exists() else "a link to nothing"
        raise ValueError(f"reference_cache must be a folder, or the name of a new one; {str(existing)!r} is {kind}")
    try:
        try_folder(existing)
    except OSError as error:
        raise ValueError(f"reference_cache={value!r} cannot be made ({error.strerror}): give another folder") from error


def _check_loss(config: TrainConfig, world: int) -> LossSpec:
    spec = get_loss(config.loss, config.loss_weights)
    spec.check_options(config.options_of_loss)
    if config.reference_model is not None and not spec.needs_reference:
        raise ValueError(f"loss {spec.name!r} has no reference: leave out reference_model={config.reference_model!r}")
    if not spec.separable and (config.gradient_accumulation_steps or 1) * world > 1:
        raise ValueError(
            f"loss {spec.name!r} compares the pairs of a batch with each other, so micro-batches do not "
            "add up to a batch: set gradient_accumulation_steps=1 and run one process, with a larger batch_size "
            f"(got {config.gradient_accumulation_steps or 1} and {world})"
        )
    if not spec.separable and config.batch_tokens is not None:
        raise ValueError(
            f"loss {spec.name!r} compares the pairs of a batch with each other, so batch_tokens="
            f"{config.batch_tokens} must not cut a batch: leave it out"
        )
    return spec


def _pairs(rows: Rows, tokenizer: Any, max_length: int, name: str, console: Console) -> list[Pair]:
    found = tokenize_rows(rows, tokenizer, max_length=max_length, name=name)
    for line in found.report(name, max_length):
        console.say(line)
    return with_labels(found.pairs, rows)


def _shape(model: Any) -> str:
    """In short: a model without the checkpoint's adapter, or with another number of layers, has other tensors."""
    trained = [parameter.requires_grad for parameter in model.parameters()]
    return f"{len(trained)} weights, {sum(trained)} of them trained"


def _with_defaults(config: TrainConfig, spec: LossSpec, model: Any, world: int, console: Console) -> TrainConfig:
    """The config with what was left open set to what its model bears; a line says so of random weights."""
    scratch = model is None and config.model is None
    trial = scratch and config.model_config is None
    micro_batches = math.ceil(TRIAL_PAIRS / (config.batch_size * world)) if trial and spec.separable else 1
    with loading("model", config.model):
        adapted = adapters_wanted(config, model)
    if adapted and config.learning_rate is None:
        console.say(f"adapters bear more than weights do: learning_rate={LORA_LEARNING_RATE:g} (not {LEARNING_RATE:g})")
    trained: dict[str, Any] = {
        "learning_rate": LORA_LEARNING_RATE if adapted else LEARNING_RATE,
        "max_length": MAX_LENGTH,
        "gradient_accumulation_steps": 1,
    }
    here = dict(trained)
    if scratch:
        here["learning_rate"] = SCRATCH_LEARNING_RATE
    if trial:
        here |= {"max_length": TRIAL_MAX_LENGTH, "gradient_accumulation_steps": micro_batches}
    missing = {name: value for name, value in here.items() if getattr(config, name) is None}
    other = [f"{name}={value:g} (not {trained[name]:g})" for name, value in missing.items() if value != trained[name]]
    if other:
        console.say(f"random weights, so other defaults than for trained ones: {', '.join(other)}")
    return dataclasses.replace(config, **missing)


def _split(pairs: list[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    count = max(1, round(fraction * len(pairs)))
    if count >= len(pairs):
        raise ValueError(f"eval_fraction={fraction} of {len(pairs)} pairs leaves none to train on")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:count])
    return [p for i, p in enumerate(pairs) if i not in held_out], [p for i, p in enumerate(pairs) if i in held_out]


def _with_checkpoint(run: Run, checkpoint: Path) -> Run:
    """The run with the checkpoint that it goes on from, held against it."""
    state = load_state(checkpoint)
    # An option that came later than the checkpoint had its default then.
    then = {option.name: option.default for option in dataclasses.fields(TrainConfig)} | state["settings"]
    differing = [name for name, value in run.settings.items() if then.get(name) != value]
    if differing:
        changes = ", ".join(
            "the data" if name == "data" else f"{name} (was {then.get(name)!r}, is {run.settings[name]!r})"
            for name in differing
        )
        raise ResumeError(f"{checkpoint} cannot be resumed with other settings than its own: {changes}")
    if state["step"] > run.steps:
        raise ResumeError(f"{checkpoint} has made {state['step']} steps already, more than the {run.steps} asked for")
    run.console.say(f"resuming {checkpoint} after step {state['step']}")
    return dataclasses.replace(run, checkpoint=checkpoint, state=state)
