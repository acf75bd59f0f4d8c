"""The training loop: `train(TrainConfig(...))`; what it needs comes with `pip install "fastpref[train]"`.

Names are imported when they are first used: the options of `fastpref train` must not wait for torch and transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpref.training.checkpoints.durable import SaveError
    from fastpref.training.checkpoints.save import ResumeError
    from fastpref.training.config import TrainConfig
    from fastpref.training.loop import TrainResult, train
    from fastpref.training.memory.oom import MemoryLimitError
    from fastpref.training.monitoring.advice import Advice
    from fastpref.training.monitoring.nonfinite import NonFiniteError
    from fastpref.training.reference.scores import with_reference

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

_HOMES = {
    "Advice": "monitoring.advice",
    "MemoryLimitError": "memory.oom",
    "NonFiniteError": "monitoring.nonfinite",
    "ResumeError": "checkpoints.save",
    "SaveError": "checkpoints.durable",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "train": "loop",
    "with_reference": "reference.scores",
}
NEEDED = ("accelerate", "psutil", "rich", "transformers")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastpref.training' has no attribute {name!r}")
    try:
        for package in NEEDED:
            import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'the training loop needs {error.name}, which is not installed: pip install "fastpref[train]"'
        ) from error
    value = getattr(import_module(f"fastpref.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
