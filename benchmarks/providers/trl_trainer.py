"""TRL's DPOTrainer around a model that is there already, without a download: what `trl` is in the step suite.

TRL wants a tokenizer and a dataset. It gets a few words and one pair; the benchmark's batches go to `compute_loss`.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any
from unittest import mock

from ..inputs_training import word_tokenizer
from .base import BETA


def build_trainer(model: Any, *, liger: bool) -> Any:
    """The trainer, with the reference's log-probs computed beforehand, as its documentation recommends."""
    import datasets
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer

    folder = tempfile.TemporaryDirectory(prefix="fastpref-trl-")
    # The hash of all weights names a cache that nobody opens; on a large model it takes most of a minute.
    no_hash = mock.patch.object(dpo_trainer, "hash_module", return_value=folder.name)
    quiet = mock.patch.dict(os.environ, TQDM_DISABLE="1")
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with no_hash, quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that go in later versions
            config = DPOConfig(
                output_dir=folder.name,
                beta=BETA,
                precompute_ref_log_probs=True,
                use_liger_kernel=liger,
                use_cpu=model.device.type == "cpu",
                bf16=False,  # no autocast: where a case says bfloat16, the weights are
                gradient_checkpointing=False,  # where a case wants it, it is on in the model
                report_to="none",
                disable_tqdm=True,
            )
            pair = datasets.Dataset.from_list([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}])
            trainer: Any = DPOTrainer(model=model, args=config, train_dataset=pair, processing_class=word_tokenizer())
    finally:
        if bars:
            datasets.enable_progress_bars()
    trainer.benchmark_folder = folder  # removed with the trainer
    return trainer
