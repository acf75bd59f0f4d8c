"""The training loop: `train(TrainConfig(...))`; what it needs comes with `pip install "fastpref[train]"`."""

from __future__ import annotations

try:
    import accelerate  # noqa: F401
    import psutil  # noqa: F401
    import rich  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'the training loop needs {error.name}, which is not installed: pip install "fastpref[train]"'
    ) from error

from fastpref.training.advice import Advice
from fastpref.training.checkpoints import ResumeError
from fastpref.training.config import TrainConfig
from fastpref.training.durable import SaveError
from fastpref.training.loop import train
from fastpref.training.nonfinite import NonFiniteError
from fastpref.training.oom import MemoryLimitError
from fastpref.training.reference_columns import with_reference
from fastpref.training.result import TrainResult

__all__ = [
    "Advice",
    "MemoryLimitError",
    "NonFiniteError",
    "ResumeError",
    "SaveError",
    "TrainConfig",
    "TrainResult",
    "train",
    "with_reference",
]
