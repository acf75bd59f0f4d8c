"""Which model the reference is: one of its own that lives as long as the pass, or the policy without its adapter."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from transformers import AutoTokenizer
from transformers.utils import has_file

from fastpref.options import UsageError
from fastpref.training.build import build_model, silence_router
from fastpref.training.data.collate import settle_layout
from fastpref.training.distributed.processes import whole_weights
from fastpref.training.reference.key import model_digest
from fastpref.training.run import Run

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Reference(AbstractContextManager["Reference"]):
    """The run's reference, loaded when it is first looked at; on leaving the context a model of its own is freed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._own: Any = None
        self._digest: str | None = None

    def __exit__(self, *raised: object) -> None:
        if self._own is not None:
            self._own = None
            gc.collect()  # a model may hold itself in a cycle
            if self._run.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()

    def digest(self) -> str:
        """`model_digest` of the reference, computed once; every process calls it."""
        if self._digest is None:
            model = self._model()
            named = model.state_dict().items() if self._own is not None else whole_weights(self._run.accelerator, model)
            self._digest = model_digest(model, named, bar=self._run.console.bar)
        return self._digest

    @contextmanager
    def ready(self) -> Iterator[Run]:
        """The run with the reference as its model: on its device, in evaluation mode, adapters off; then as it was."""
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
        training, required = model.training, [(p, p.requires_grad) for p in model.parameters()]
        model.eval()
        try:
            with _without_adapters(model):
                yield dataclasses.replace(run, model=model, layout=layout)
        finally:
            model.train(training)
            for parameter, value in required:  # PEFT sets them anew when it switches adapters on
                parameter.requires_grad_(value)

    def _model(self) -> Any:
        if self._run.config.reference_model is None:
            return self._run.model
        if self._own is None:
            self._own = _load(self._run)
        return self._own


def _load(run: Run) -> Any:
    """`config.reference_model` on the CPU, checked against tokenizer and max_length as the policy is."""
    name = cast(str, run.config.reference_model)
    options = dataclasses.replace(
        run.config, model=name, model_config=None, lora_rank=0, freeze_head=False, gradient_checkpointing=False
    )
    if run.config.lora_rank and run.config.model is not None and run.config.dtype == "auto":
        # As the policy's frozen weights: the two are to be alike at step 1.
        held: Any = str(run.model.dtype).removeprefix("torch.")
        options = dataclasses.replace(options, dtype=held)
    try:
        with torch.random.fork_rng(devices=[]):  # the run's random numbers are the policy's
            model = build_model(
                options, None, run.tokenizer, max_length=run.max_length, say=run.console.say, trained=False
            )
            silence_router(model)
        _check_tokenizer(name, run.tokenizer)
    except (ValueError, OSError) as error:
        raise UsageError(f"reference_model={name!r}: {error}") from error
    return model


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    """Ids mean the same to the reference, if it brings a tokenizer that tells."""
    if not any(has_file(name, file) for file in TOKENIZER_FILES):
        return
    theirs, ours = AutoTokenizer.from_pretrained(name).get_vocab(), tokenizer.get_vocab()
    other = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    if other or not ours.keys() & theirs.keys():
        example = (
            f"{other[0]!r} is {ours[other[0]]} here and {theirs[other[0]]} there" if other else "no token is in both"
        )
        raise ValueError(f"it has another vocabulary than the run's tokenizer ({example}): take one of the same family")


@contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """The model with its adapters off: PEFT's own model, or one that transformers' `add_adapter` has put them in."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    elif getattr(model, "_hf_peft_config_loaded", False):
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()
    else:
        yield
