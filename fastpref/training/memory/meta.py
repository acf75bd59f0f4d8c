"""The model of a dry run: shapes on the meta device, and the headers of its weights' files instead of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastpref.options import UsageError
from fastpref.training.adapters import adapter_base
from fastpref.training.build import build_model
from fastpref.training.checkpoints.load import load_model, no_bars, tensor_names
from fastpref.training.config import TrainConfig


def build_on_meta(
    config: TrainConfig, given: Any, tokenizer: Any, *, max_length: int, say: Callable[[str], None]
) -> Any:
    """What `build_model` makes, checked in the same way, without a single number in it; `given` stays as it is."""
    if config.reference_model is not None:
        try:
            _load(replace(config, model=config.reference_model), say=lambda line: say(f"reference_model: {line}"))
        except (ValueError, OSError) as error:
            raise UsageError(f"reference_model={config.reference_model!r}: {error}") from error
    if given is not None and isinstance(given, nn.Module):
        given = on_meta(given)
    load = partial(_load, say=say)
    with torch.device("meta"):
        return build_model(config, given, tokenizer, max_length=max_length, say=say, load=load)


def _load(config: TrainConfig, *, say: Callable[[str], None]) -> Any:
    """`config.model` on the meta device, and where its weights are; of files that are here the headers are read."""
    source = adapter_base(cast(str, config.model)) or cast(str, config.model)
    here = Path(source).expanduser().is_dir() or bool(tensor_names(source))
    with no_bars():
        model = load_model(config, device="meta", weights=here)
    say(f"weights: {source}" + ("" if here else " is not in the hub's local cache; the run will download it"))
    return model


def on_meta(model: nn.Module) -> Any:
    """A copy of the model on the meta device: shapes, dtypes, what is trained, and no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)
