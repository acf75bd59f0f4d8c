"""Model and optimiser over several processes: wrapped by Accelerate, and their whole state gathered and put back."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def wrap(accelerator: Any, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """The model and its optimiser as Accelerate makes them for this launch: alone, DDP, FSDP2, DeepSpeed."""
    return accelerator.prepare(model, optimizer)


def model_state(accelerator: Any, model: Any) -> dict[str, Tensor]:
    """The whole state of a wrapped model by the names of the unwrapped one; called by every process."""
    return accelerator.unwrap_model(model).state_dict()


def load_model_state(accelerator: Any, model: Any, state: dict[str, Tensor]) -> None:
    accelerator.unwrap_model(model).load_state_dict(state)


def optimizer_state(accelerator: Any, model: Any, optimizer: Any) -> dict[str, Any]:
    """The whole state of a wrapped optimiser; called by every process."""
    return optimizer.state_dict()


def load_optimizer_state(accelerator: Any, model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
