"""Which weights of the model are trained: all of them, LoRA adapters in their place, or all but the head's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastpref.training.config import ALL_LINEAR, TrainConfig


def is_adapted(model: Any) -> bool:
    """Whether the model is one of PEFT's; without importing PEFT, which such a model has done."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapters_wanted(config: TrainConfig, given: Any) -> bool:
    """Whether the run trains adapters: its own, or those of the model object it was given."""
    return config.lora_rank > 0 or is_adapted(given)


def choose_trained(model: Any, config: TrainConfig) -> tuple[Any, list[str]]:
    """The model with what the options leave untrained frozen, and lines that say what a user may not expect.

    A PeftModel is taken as it is: its adapters say what is trained.
    """
    lines: list[str] = []
    if config.lora_rank and is_adapted(model):
        raise ValueError(
            f"the model has PEFT adapters already, and lora_rank={config.lora_rank} asks for others: give one of the "
            "two (lora_rank=0 trains those it has)"
        )
    if config.lora_rank:
        model = add_lora(model, config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        lines.append(f"LoRA of rank {config.lora_rank}: {trained:,} weights are trained, {frozen:,} stay as they are")
    if config.freeze_head:
        lines += freeze_head(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        hint = "load the adapter with is_trainable=True" if is_adapted(model) else "requires_grad_(True) undoes that"
        raise ValueError(f"no weight of the model is trained, all are frozen: {hint}")
    return model, lines


def add_lora(model: Any, config: TrainConfig) -> Any:
    """The model with LoRA layers (PEFT) on the target modules; everything else is frozen."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('lora_rank needs PEFT, which is not installed: pip install "fastpref[train]"') from error
    from transformers.pytorch_utils import Conv1D

    targets = _targets(model, config.lora_target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,  # type: ignore[arg-type]
        target_modules=sorted(targets),
        # GPT-2's layers keep their weights the other way round; PEFT would find that out and warn.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
    )
    return get_peft_model(model, lora)


def _targets(model: nn.Module, names: str) -> dict[str, nn.Module]:
    """The modules that get an adapter, by their full names; the head never does.

    The linear path reads the head's weight, where an adapter beside it would not be seen.
    """
    from transformers.pytorch_utils import Conv1D

    modules = {name: module for name, module in model.named_modules() if name}
    head = output_head(model)
    if names.strip() == ALL_LINEAR:
        return {name: m for name, m in modules.items() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    found: dict[str, nn.Module] = {}
    for wanted in (part.strip() for part in names.split(",")):
        matching = {name: m for name, m in modules.items() if wanted and f".{name}".endswith(f".{wanted}")}
        if not matching:
            raise ValueError(
                f"lora_target_modules: {wanted!r} matches no module of {type(model).__name__}; its linear layers are "
                f"{', '.join(_leaf_names(model))}"
            )
        for name, module in matching.items():
            if head is not None and getattr(module, "weight", None) is head.weight:
                tied = "" if module is head else ", as does what is tied to it"
                raise ValueError(
                    f"lora_target_modules: {wanted!r} is the head ({name}), which stays without an adapter{tied}: "
                    "leave it out"
                )
        found |= matching
    return found


def _leaf_names(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    head = output_head(model)
    linear = (name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def output_head(model: Any) -> Any:
    """The model's output embeddings, None where it has none."""
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def freeze_head(model: Any) -> list[str]:
    """Freeze the output embeddings, and with them input embeddings that share the weight; lines for the user."""
    head = output_head(model)
    if not isinstance(head, nn.Module):
        raise ValueError(f"freeze_head: {type(model).__name__} has no output embeddings to freeze")
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
        raise ValueError(
            "freeze_head: the model's adapter trains the head (modules_to_save): leave freeze_head out, or the head "
            "out of modules_to_save"
        )
    head.requires_grad_(False)
    inputs = model.get_input_embeddings()
    if getattr(inputs, "weight", None) is not getattr(head, "weight", head):
        return []
    return ["freeze_head: the input embeddings are tied to the head, so they are frozen too"]


def say_how_to_merge(model: Any, folder: Path, *, say: Callable[[str], None]) -> None:
    """A line on the adapter saved in `folder`; none for a model that was saved whole."""
    if not is_adapted(model):
        return
    base = model.active_peft_config.base_model_name_or_path
    if base:
        whose, load = f"that of {base}", f'AutoPeftModelForCausalLM.from_pretrained("{folder}")'
    else:
        whose, load = "without its base", f'PeftModel.from_pretrained(base, "{folder}")'
    say(
        f"{folder} holds the adapter alone, {whose}; to merge it (with PEFT): "
        f'{load}.merge_and_unload().save_pretrained("merged")'
    )
