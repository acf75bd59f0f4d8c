"""Whole training runs, as each project's users start them: from a folder of weights and rows to the steps' losses.

A provider's `call` takes Inputs, trains, and gives the loss of every step. All start from the same weights, take the
same pairs in the same order and the same AdamW (linear schedule, no decay, clipping at 1); what else they do is theirs.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..inputs_step import checkpoint_layers
from ..inputs_training import RESPONSES, SEED, Inputs
from .base import BETA, Provider
from .plain import plain_logps

CLIP = 1.0


def _fastpref(inputs: Inputs, **options: Any) -> list[float]:
    from fastpref.training import TrainConfig, train

    case = inputs.case
    with tempfile.TemporaryDirectory(prefix="fastpref-training-") as folder:
        config = TrainConfig(
            model=inputs.initial,
            output_dir=folder,
            max_length=case.max_length,
            batch_size=case.per_step,
            max_steps=case.steps,
            beta=BETA,
            learning_rate=case.learning_rate,
            max_grad_norm=CLIP,
            precision=case.precision,  # type: ignore[arg-type]  # one of its two strings
            gradient_checkpointing=case.checkpointing,
            group_by_length=False,  # the order is everybody's
            logging_every=1,
            save_every=0,
            seed=SEED,
            progress=False,
            **options,
        )
        return [record["loss"] for record in train(config, train_dataset=inputs.rows).history]


def _padded_batch(pairs: Sequence[Any], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, labels (2P, T), chosen first."""
    responses = [pair[name] for name in RESPONSES for pair in pairs]
    width = max(len(response["ids"]) for response in responses)
    input_ids = torch.zeros(len(responses), width, dtype=torch.long)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for place, response in enumerate(responses):
        start, end = response["start"], len(response["ids"])
        input_ids[place, :end] = torch.tensor(response["ids"])
        mask[place, :end] = 1
        labels[place, start:end] = input_ids[place, start:end]
    return input_ids.to(device), mask.to(device), labels.to(device)


def _plain(inputs: Inputs, *, cached: bool = False) -> list[float]:
    """What people write: policy and frozen reference, log_softmax over all logits, gather, AdamW."""
    from transformers import AutoModelForCausalLM, get_scheduler

    case, device = inputs.case, inputs.device
    model: Any = AutoModelForCausalLM.from_pretrained(inputs.initial, dtype=torch.float32)
    model = model.to(device).train()
    reference = None if cached else copy.deepcopy(model).eval().requires_grad_(False)
    if case.checkpointing:
        checkpoint_layers(model)

    def logps(network: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        input_ids, mask, labels = batch
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=case.precision == "bf16"):
            logits = network(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return plain_logps(logits, labels)

    known = _known_references(inputs, model, logps) if reference is None else []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=case.learning_rate, weight_decay=0.0, fused=device.startswith("cuda")
    )
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=case.steps)
    losses = []
    for step, pairs in enumerate(inputs.steps):
        batch = _padded_batch(pairs, device)
        policy = logps(model, batch)
        if reference is None:
            ref = known[step]
        else:
            with torch.no_grad():
                ref = logps(reference, batch)
        chosen, rejected = (policy - ref).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _known_references(inputs: Inputs, model: Any, logps: Any) -> list[Tensor]:
    """Of each step, (2P,): from the rows, or by a pass over them."""
    if inputs.case.references:
        columns = [[pair["references"][k] for k in (0, 1) for pair in pairs] for pairs in inputs.steps]
        return [torch.tensor(column, device=inputs.device) for column in columns]
    with torch.no_grad():
        return [logps(model, _padded_batch(pairs, inputs.device)) for pairs in inputs.steps]


def _trl(inputs: Inputs, trainer_class: Any = None, **options: Any) -> list[float]:
    """DPOTrainer.train() from the folder, as its documentation starts it; a frozen reference is its own affair."""
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    trainer_class = trainer_class or DPOTrainer

    case = inputs.case
    if case.checkpointing:
        options["gradient_checkpointing"] = True
    with tempfile.TemporaryDirectory(prefix="fastpref-trl-") as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=BETA,
            max_length=case.max_length,
            per_device_train_batch_size=case.per_step,
            max_steps=case.steps,
            learning_rate=case.learning_rate,
            lr_scheduler_type="linear",
            max_grad_norm=CLIP,
            bf16=case.precision == "bf16",
            use_cpu=inputs.device == "cpu",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
            **options,
        )
        wanted = [pair for pairs in inputs.steps for pair in pairs]
        rows = [{name: inputs.rows[pair["row"]][name] for name in ("prompt", *RESPONSES)} for pair in wanted]
        trainer = trainer_class(
            model=inputs.initial,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(inputs.initial),
        )
        check_same_tokens(trainer.train_dataset, wanted, case.max_length)
        trainer.train()
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def check_same_tokens(dataset: Sequence[Any], pairs: Sequence[Any], max_length: int) -> None:
    """ValueError unless TRL's tokenised dataset holds the pairs of fastpref, token for token, in their order."""
    if len(dataset) != len(pairs):
        raise ValueError(f"TRL kept {len(dataset)} rows, fastpref {len(pairs)} pairs: their runs cannot be compared")
    for row, pair in zip(dataset, pairs, strict=True):
        for name in RESPONSES:
            response = pair[name]
            ids = [*row["prompt_ids"], *row[f"{name}_ids"]][:max_length]
            if ids != response["ids"] or len(row["prompt_ids"]) != response["start"]:
                raise ValueError(
                    f"row {pair['row']}: TRL's tokens of the {name} response are not fastpref's ({len(ids)} of them, "
                    f"scored from {len(row['prompt_ids'])}, against {len(response['ids'])} from {response['start']}): "
                    "their runs cannot be compared"
                )


def _trl_fastpref(inputs: Inputs) -> list[float]:
    from fastpref.integrations.trl import FastPrefDPOTrainer

    return _trl(inputs, FastPrefDPOTrainer)


_BASE = {"transformers": "transformers", "accelerate": "accelerate"}
_TRL = {**_BASE, "trl": "trl", "datasets": "datasets"}

_ours = partial(Provider, family="fastpref", modules=_BASE)
_trls = partial(Provider, family="trl", rival=True, modules=_TRL)
_before = partial(_trl, precompute_ref_log_probs=True)

# In the order of a run, most wanted first: time may run out.
TRAINING = (
    _ours("fastpref", _fastpref),
    _trls("trl", _trl),
    _ours("trl_fastpref", _trl_fastpref, modules=_TRL),
    Provider("plain", _plain, "plain", modules=_BASE),
    Provider("plain_cached", partial(_plain, cached=True), "plain", modules=_BASE),
    _ours("fastpref_packed", partial(_fastpref, layout="packed")),
    _ours("fastpref_padded", partial(_fastpref, layout="padded")),
    _ours("fastpref_logits", partial(_fastpref, layout="padded", logps="logits")),
    _trls("trl_fastest", partial(_before, gradient_checkpointing=False)),
    _trls("trl_precomputed", _before),
    _trls(
        "trl_liger",
        partial(_before, use_liger_kernel=True),
        gpu_only=True,
        modules={**_TRL, "liger_kernel": "liger-kernel"},
    ),
)
