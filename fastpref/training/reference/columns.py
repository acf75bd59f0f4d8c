"""A dataset with the reference's log-probs in it, for trainers that read them from there."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import numpy as np

from fastpref.training.config import ALL_LINEAR, TrainConfig
from fastpref.training.data.sources import Rows, read_rows
from fastpref.training.prepare import prepare
from fastpref.training.reference.cache import CHOSEN, REJECTED
from fastpref.training.reference.scores import add_reference

# What a run needs besides, and does to a model to train it.
_WITHOUT_TRAINING: dict[str, Any] = {
    "eval_dataset": None, "eval_fraction": 0.0, "eval_every": None, "sample_prompts": 0, "save_best": False,
    "eval_dataset_split": None, "resume": None, "max_steps": None, "epochs": 1.0, "lora_rank": 0, "lora_alpha": None,
    "lora_target_modules": ALL_LINEAR, "freeze_head": False, "disable_dropout": False, "auto_batch": False,
    "gradient_checkpointing": False, "offload_activations": False,
}  # fmt: skip


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
