"""The model of a dry run: shapes on the meta device, and a look at its weights' files instead of loading them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.options import UsageError
from fastpref.training.build import build_model, loading
from fastpref.training.config import TrainConfig

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"


def build_on_meta(
    config: TrainConfig, given: Any, tokenizer: Any, *, max_length: int, say: Callable[[str], None]
) -> Any:
    """What `build_model` makes, checked in the same way, without a single number in it; `given` stays as it is."""
    if config.reference_model is not None:
        try:
            AutoConfig.from_pretrained(config.reference_model)
            say(f"reference_model: {check_weights(config.reference_model)}")
        except (ValueError, OSError) as error:
            raise UsageError(f"reference_model={config.reference_model!r}: {error}") from error
    if given is not None and isinstance(given, nn.Module):
        given = on_meta(given)
    elif config.model is not None:
        # By name before anything else: a config may load where its weights will not.
        with loading("model", config.model):
            whole = AutoConfig.from_pretrained(config.model)
        say(check_weights(config.model))
        with torch.device("meta"):
            given = AutoModelForCausalLM.from_config(whole, dtype=torch.float32)
        config = replace(config, model=None)
    with torch.device("meta"):
        return build_model(config, given, tokenizer, max_length=max_length, say=say)


def on_meta(model: nn.Module) -> Any:
    """A copy of the model on the meta device: shapes, dtypes, what is trained, and no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def check_weights(source: str) -> str:
    """A line that says where the weights are; FileNotFoundError or ValueError where a file is missing or cut short.

    Only names, sizes and headers are read, of a folder or of the hub's local cache.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return _in_cache(source)
    for name in (SAFETENSORS, TORCH):
        if (folder / name).is_file():
            files = [folder / name]
        elif (folder / f"{name}{INDEX}").is_file():
            index = json.loads((folder / f"{name}{INDEX}").read_text(encoding="utf-8"))
            files = [folder / part for part in sorted(set(index["weight_map"].values()))]
        else:
            continue
        for file in files:
            _check_file(file)
        return f"weights: {len(files)} file{'s' if len(files) > 1 else ''} in {folder}, of the sizes they should have"
    raise FileNotFoundError(
        f"model: {source!r} has a config and no weights: {SAFETENSORS} or {TORCH} (or an index of parts) is needed; "
        "model_config trains random ones"
    )


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"model: the weights' index names {file.name}, which is not in {file.parent}")
    if file.suffix != ".safetensors":
        if not file.stat().st_size:
            raise ValueError(f"model: {file} is empty")
        return
    try:
        with safe_open(file, "pt"):  # reads the header, and holds the file's size against it
            pass
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(f"model: {file} ({size} bytes) is damaged or cut short, copy it again: {error}") from error


def _in_cache(source: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    for name in (SAFETENSORS, TORCH):
        for ending in ("", INDEX):
            if isinstance(try_to_load_from_cache(source, f"{name}{ending}"), str):
                return f"weights: {source} is in the hub's local cache"
    return f"weights: {source} is not in the hub's local cache; the run will download it"
