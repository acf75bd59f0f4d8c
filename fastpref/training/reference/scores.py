"""The reference's log-probs: which model gives them, how they are computed once before training, where they are kept.

A pair's reference log-probs come from the dataset's columns, or from the cache, or from the pass, in this order.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer

from fastpref.options import UsageError
from fastpref.training.adapters import (
    active_adapters,
    adapter_active,
    adapters_wanted,
    has_tokenizer,
    reference_adapter,
)
from fastpref.training.build import build_model, check_vocabulary, silence_router
from fastpref.training.checkpoints.save import ResumeError
from fastpref.training.config import ALL_LINEAR, TrainConfig
from fastpref.training.data.batches import cut
from fastpref.training.data.collate import settle_layout
from fastpref.training.data.sources import Rows, read_rows
from fastpref.training.data.tokens import Pair
from fastpref.training.distributed.processes import deal, whole_weights
from fastpref.training.memory.oom import explained
from fastpref.training.precision import autocasts
from fastpref.training.prepare import prepare
from fastpref.training.reference.cache import (
    CHOSEN,
    REJECTED,
    CacheWriter,
    Found,
    Logps,
    Record,
    ReferenceKey,
    model_digest,
    pair_digest,
    read_cache,
    text_digest,
    tokenizer_digest,
)
from fastpref.training.run import Run
from fastpref.training.step import log_probs

# Without backward a batch may be larger than a training micro-batch: so many times the pairs, so many times the tokens.
MORE_PAIRS, MORE_TOKENS = 4, 2
# What a run needs besides its reference, and does to a model to train it.
_WITHOUT_TRAINING: dict[str, Any] = {
    "eval_dataset": None, "eval_fraction": 0.0, "eval_every": None, "sample_prompts": 0, "save_best": False,
    "eval_dataset_split": None, "resume": None, "max_steps": None, "epochs": 1.0, "lora_rank": 0, "lora_alpha": None,
    "lora_target_modules": ALL_LINEAR, "freeze_head": False, "disable_dropout": False, "auto_batch": False,
    "gradient_checkpointing": False, "offload_activations": False,
}  # fmt: skip


class Reference(AbstractContextManager["Reference"]):
    """The run's reference: a model of its own, or the policy as it is, or the policy's adapter that has that name.

    A model of its own is loaded when it is first looked at, and freed on leaving the context.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._own: Any = None
        self._digest: str | None = None
        self._adapter = None if run.config.reference_model is not None else reference_adapter(run.model)

    def __exit__(self, *raised: object) -> None:
        if self._own is not None:
            self._own = None
            gc.collect()  # a model may hold itself in a cycle
            if self._run.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()

    @property
    def is_the_policy(self) -> bool:
        """Whether it is the very function that training starts from."""
        return self._run.config.reference_model is None and self._adapter is None

    def describe(self) -> str | None:
        """A line on which it is; None where it is what the options say anyway."""
        adapters = active_adapters(self._run.model)
        if self._adapter is not None:
            return f"the reference is the model's adapter {self._adapter!r}, the policy its {', '.join(adapters)!r}"
        if self.is_the_policy and adapters and not self._run.config.lora_rank:
            return f"the reference is the model as it came, its adapter ({', '.join(adapters)}) included"
        return None

    def digest(self) -> str:
        """`model_digest` of the reference, computed once; every process calls it."""
        if self._digest is None:
            model = self._model()
            named = model.state_dict().items() if self._own is not None else whole_weights(self._run.accelerator, model)
            with adapter_active(model, self._adapter):
                self._digest = model_digest(model, named, bar=self._run.console.bar)
        return self._digest

    @contextmanager
    def ready(self) -> Iterator[Run]:
        """The run with the reference as its model: on its device, in evaluation mode; then the model is as it was."""
        run, model = self._run, self._model()
        layout = run.layout
        if self._own is not None:
            model.to(run.accelerator.device)
            layout = settle_layout(
                run.config,
                model,
                pad_id=layout.pad_id,
                max_length=run.max_length,
                device=run.accelerator.device,
                say=lambda line: run.console.say(f"reference_model: {line}"),
            )
        training = model.training
        model.eval()
        try:
            with adapter_active(model, self._adapter):
                yield dataclasses.replace(run, model=model, layout=layout)
        finally:
            model.train(training)

    def _model(self) -> Any:
        if self._run.config.reference_model is None:
            return self._run.model
        if self._own is None:
            self._own = _load(self._run)
        return self._own


def _load(run: Run) -> Any:
    """`config.reference_model` on the CPU, an adapter on its base, checked against tokenizer and max_length."""
    name = cast(str, run.config.reference_model)
    changes: dict[str, Any] = {"lora_rank": 0, "lora_alpha": None, "lora_target_modules": ALL_LINEAR}
    changes |= {"model_config": None, "adapter": "continue", "freeze_head": False, "gradient_checkpointing": False}
    if run.config.model is not None and adapters_wanted(run.config, None) and run.config.dtype == "auto":
        # As the policy's frozen weights: the two are to be alike at step 1.
        changes["dtype"] = str(run.model.dtype).removeprefix("torch.")
    options = dataclasses.replace(run.config, model=name, **changes)
    try:
        with torch.random.fork_rng(devices=[]):  # the run's random numbers are the policy's
            model = build_model(
                options, None, run.tokenizer, max_length=run.max_length, say=run.console.say, trained=False
            )
            silence_router(model)
        check_vocabulary(model, run.tokenizer, [*run.pairs, *run.eval_pairs])
        _check_tokenizer(name, run.tokenizer, trust=run.config.trust_remote_code)
    except (ValueError, OSError) as error:
        raise UsageError(f"reference_model={name!r}: {error}") from error
    return model


def _check_tokenizer(name: str, tokenizer: Any, *, trust: bool) -> None:
    """Ids mean the same to the reference, if it brings a tokenizer that tells."""
    if not has_tokenizer(name):
        return
    theirs, ours = AutoTokenizer.from_pretrained(name, trust_remote_code=trust).get_vocab(), tokenizer.get_vocab()
    other = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    if other or not ours.keys() & theirs.keys():
        example = (
            f"{other[0]!r} is {ours[other[0]]} here and {theirs[other[0]]} there" if other else "no token is in both"
        )
        raise ValueError(f"it has another vocabulary than the run's tokenizer ({example}): take one of the same family")


def add_reference(run: Run) -> str | None:
    """Give every pair that the run uses its reference log-probs, if the loss needs them.

    The reference is `config.reference_model`, or the policy with the weights and adapters that it has now, which must
    be the initial ones, or the policy's adapter of the name "reference" or "ref". A run that resumes uses what it
    stored, from its folder or from its checkpoint's. What is gone from there is computed again if the reference is
    still the one that the run started from.

    Returns:
        The digest of the reference, for a checkpoint; None where no pair needed it.

    Raises:
        ResumeError: log-probs are missing, and the reference is another than the run's.
    """
    config, spec = run.config, run.spec
    if not spec.needs_reference:
        return None
    used = [run.pairs[index] for index in run.plan.used(run.steps)]  # a short run need not wait for all the data
    without = [pair for pair in (*used, *run.eval_pairs) if pair.ref_chosen_logp is None]
    if len(without) < len(used) + len(run.eval_pairs):
        run.console.say(
            f"reference log-probs are taken from the dataset's columns; they must be the {spec.reduction} over a "
            f"response's tokens, as loss {spec.name!r} means it"
        )
    if not without:
        if config.reference_model is not None:
            raise UsageError(
                f"reference_model={config.reference_model!r} would not be used: the dataset has the columns {CHOSEN} "
                f"and {REJECTED}. Leave out one of the two"
            )
        return None
    digests = {id(pair): pair_digest(pair) for pair in without}
    wanted = {digests[id(pair)]: pair for pair in reversed(without)}  # rows that are the same are computed once

    with Reference(run) as reference:
        line = reference.describe()
        if line is not None:
            run.console.say(line)
        weights = run.state["initial_weights"] if run.state is not None else reference.digest()
        key = _key(run, weights)
        logps = _stored(run, key, wanted)
        missing = {digest: pair for digest, pair in wanted.items() if digest not in logps}
        if missing:
            if reference.digest() != weights:
                raise ResumeError(
                    f"the reference log-probs of this run are not in {_folder(run)} any more, and the model given is "
                    "not the one it started from: give the initial model, to compute them again"
                )
            with reference.ready() as ready:
                logps |= compute_reference(ready, missing, key=key)
        run.starts_at_reference = reference.is_the_policy and any(pair.ref_chosen_logp is None for pair in used)

    def complete(pair: Pair) -> Pair:
        if id(pair) not in digests:
            return pair
        chosen, rejected = logps[digests[id(pair)]]
        return dataclasses.replace(pair, ref_chosen_logp=chosen, ref_rejected_logp=rejected)

    run.pairs, run.eval_pairs = [complete(pair) for pair in run.pairs], [complete(pair) for pair in run.eval_pairs]
    return weights


def compute_reference(run: Run, pairs: Mapping[str, Pair], *, key: ReferenceKey) -> dict[str, Logps]:
    """Log-probs of the pairs, by digest, under `run.model` as it is; the processes share the work and its keeping.

    Longest first: little padding, and a batch that does not fit in memory fails at once.
    """
    accelerator = run.accelerator
    digests = sorted(pairs, key=lambda digest: -pairs[digest].length)
    ordered = [pairs[digest] for digest in digests]
    batches = _batches(run, ordered)
    values = torch.zeros(len(ordered), 2, device=accelerator.device)
    writer = CacheWriter(_folder(run), key, process=accelerator.process_index)
    with torch.no_grad(), run.console.bar("reference log-probs", len(ordered), unit="pair") as bar:
        for mine, counts in deal(batches, accelerator):
            chunk = [ordered[index] for index in mine]
            with explained(run, "the reference pass", chunk):
                batch, both = log_probs(run, run.model, chunk)
            found = torch.stack(both, dim=1)  # (P, 2)
            if counts:
                values[mine[0] : mine[-1] + 1] = found
                logps: list[Logps] = [(chosen, rejected) for chosen, rejected in found.tolist()]
                writer.append(map(Record, (digests[index] for index in mine), batch.rows, logps))
            # The other processes do about as much.
            bar.advance(len(chunk) * accelerator.num_processes, tokens=batch.tokens * accelerator.num_processes)
    # Every pair is zero on all processes but the one that computed it.
    reduced = accelerator.reduce(values, "sum").tolist()
    return {digest: (chosen, rejected) for digest, (chosen, rejected) in zip(digests, reduced, strict=True)}


def _batches(run: Run, pairs: Sequence[Pair]) -> list[list[int]]:
    """The pairs, longest first, in batches of MORE_PAIRS and MORE_TOKENS times what the largest micro-batch has."""
    indices, sizes, config = range(len(pairs)), run.layout.sizes(pairs), run.config
    trained = cut(indices, sizes, batch_size=config.batch_size, batch_tokens=config.batch_tokens)
    room = MORE_TOKENS * max(map(sizes.of, trained))
    return cut(indices, sizes, batch_size=MORE_PAIRS * config.batch_size, batch_tokens=room)


def _folder(run: Run) -> Path:
    return Path(run.config.reference_cache or run.output_dir)


def _key(run: Run, weights: str) -> ReferenceKey:
    halved = autocasts(run.config, run.accelerator.device)
    return ReferenceKey(
        weights=weights,
        precision="bf16" if halved else "fp32",
        logps=run.config.logps,
        reduction=run.spec.reduction,
        tokenizer=tokenizer_digest(run.tokenizer),
        template=text_digest(run.tokenizer.chat_template),
        max_length=run.max_length,
    )


def _stored(run: Run, key: ReferenceKey, wanted: Mapping[str, Pair]) -> dict[str, Logps]:
    """What the cache has of the wanted pairs, as the main process sees it; a line says what it has not, and why."""
    values = torch.full((len(wanted), 2), torch.nan)
    if run.accelerator.is_main_process:
        folder, say = _folder(run).resolve(), run.console.say
        found = read_cache(folder, key, wanted, say=say)
        if run.checkpoint is not None and len(found.logps) < len(wanted):
            # A run that goes on in another folder takes with it what it needs.
            source = run.checkpoint.resolve().parent
            more = read_cache(source, key, wanted.keys() - found.logps.keys(), say=say) if source != folder else Found()
            CacheWriter(folder, key, process=0).append(
                Record(digest, wanted[digest].row, logps) for digest, logps in more.logps.items()
            )
            found.logps |= more.logps
            found.same_key += more.same_key
            found.damage += more.damage
        _report(run, key, found, len(wanted))
        values = torch.tensor([found.logps.get(digest, (torch.nan, torch.nan)) for digest in wanted])
    if run.accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        values = broadcast(values.to(run.accelerator.device)).cpu()
    stored = zip(wanted, values.tolist(), strict=True)
    return {digest: (chosen, rejected) for digest, (chosen, rejected) in stored if chosen == chosen}


def _report(run: Run, key: ReferenceKey, found: Found, wanted: int) -> None:
    known, why = len(found.logps), ", ".join(found.differences(key))
    if known == wanted:
        return  # what is damaged or stale is of no matter then
    for line in found.damage:
        run.console.say(line)
    if known:
        also = f"; it was written with {why}" if why else ""
        run.console.say(
            f"reference log-probs: {known} of {wanted} pairs are in the cache, {wanted - known} to compute{also}"
        )
    elif why:
        run.console.say(f"reference log-probs are computed: those in {_folder(run)} are of another run, with {why}")


def with_reference(config: TrainConfig, *, model: Any = None, tokenizer: Any = None, train_dataset: Any = None) -> Rows:
    """The dataset with the columns `ref_chosen_logps` and `ref_rejected_logps`: those that `train` would use.

    For a trainer that reads these columns, and for a dataset that is to be kept with them. What the cache of this
    config holds (its `reference_cache`, or else its `output_dir`, if one is set) is taken from there, so that it is
    quick after a run; the rest is computed and added to it. Rows that training would leave out (`max_length`) are left
    out.

    TRL (1.16) adds such columns itself where `precompute_ref_log_probs` is set, and stops at a dataset that has them.
    With the option left off it takes those that are there, if told so after the trainer is made:

        trainer = DPOTrainer(model, args=args, train_dataset=with_reference(config), ...)
        trainer.precompute_ref_logps, trainer.ref_model = True, None

    Args:
        config: the options of the run; its held-out data are not looked at.
        model, tokenizer, train_dataset: as `train` takes them; a model that is given stays as it is.

    Returns:
        A `datasets.Dataset` where the data is one, else a list of dicts.
    """
    rows: Any = read_rows(config, train_dataset, "dataset", "train_dataset")
    with tempfile.TemporaryDirectory() as empty:  # it may have been trained already
        alone = dataclasses.replace(
            config,
            **_WITHOUT_TRAINING,
            dataset=None,
            dataset_split=None,
            columns=None,
            reference_cache=config.reference_cache or config.output_dir,
            output_dir=empty,
        )
        run = prepare(alone, model=model, tokenizer=tokenizer, train_dataset=rows)
        try:
            if not run.spec.needs_reference:
                raise ValueError(f"loss {run.spec.name!r} needs no reference: there are no log-probs to add")
            add_reference(run)
        finally:
            run.release()
    columns = {
        CHOSEN: [pair.ref_chosen_logp for pair in run.pairs],
        REJECTED: [pair.ref_rejected_logp for pair in run.pairs],
    }
    kept = [pair.row for pair in run.pairs]
    if not hasattr(rows, "add_column"):
        return [
            {**rows[row], CHOSEN: chosen, REJECTED: rejected}
            for row, chosen, rejected in zip(kept, columns[CHOSEN], columns[REJECTED], strict=True)
        ]
    dataset = rows.remove_columns([name for name in columns if name in rows.column_names]).select(kept)
    for name, values in columns.items():
        dataset = dataset.add_column(name, np.array(values, dtype=np.float32))
    return dataset
