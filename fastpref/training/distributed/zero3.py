"""DeepSpeed ZeRO-3 as the loop uses it: how its engine steps and gives out whole states.

DeepSpeed's engine owns backward, clipping and step. Its shards come from and go back to whole tensors by name, so that
a checkpoint has the same form as without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from fastpref.options import UsageError
from fastpref.training.config import TrainConfig
from fastpref.training.precision import autocasts


def in_use(accelerator: Any) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check(accelerator: Any) -> None:
    """Refuse what a DeepSpeed configuration may ask for and the loop does otherwise."""
    plugin = accelerator.deepspeed_plugin
    settings = plugin.deepspeed_config
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise UsageError(f"of DeepSpeed ZeRO stage 3 is supported, got stage {stage}: set zero_stage: 3, or take DDP")
    for name in ("bf16", "fp16"):
        if settings.get(name, {}).get("enabled") is True:
            raise UsageError(
                f"leave {name} out of the DeepSpeed configuration: the weights stay in float32, and --precision bf16 "
                "computes in bfloat16 by autocast"
            )
    for name in ("optimizer", "scheduler"):
        if name in settings:
            raise UsageError(f"leave {name} out of the DeepSpeed configuration: it is made by the run's own options")
    _build_whole(plugin)


def _build_whole(plugin: Any) -> None:
    """Transformers would shard a model as it is built, while a weak reference to this object lives."""
    plugin.dschf = None


def wrap(accelerator: Any, model: Any, optimizer: Any, config: TrainConfig) -> tuple[Any, Any]:
    """DeepSpeed's engine around the model, and the optimiser whose step is the engine's."""
    settings = accelerator.deepspeed_plugin.deepspeed_config
    # The loop cuts its batches itself and says when a step's last one comes: these are formalities.
    settings["train_micro_batch_size_per_gpu"] = settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = config.max_grad_norm
    if autocasts(config, accelerator.device):
        # The engine ends an autocast that it did not begin. No module is listed: gradients travel in float32.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    engine, _ = accelerator.prepare(model, optimizer)
    _build_whole(accelerator.deepspeed_plugin)
    return engine, _EngineOptimizer(engine)


class _EngineOptimizer:
    """The optimiser's part of the engine, under the names by which the loop calls an optimiser."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """After a step there is nothing left to do; a step that is skipped leaves its gradients, which go here."""
        self.engine.optimizer.zero_grad()


def gradient_norm(engine: Any) -> Tensor:
    """The norm of the whole gradient before it is clipped, which DeepSpeed does in its step."""
    norms = torch.stack([torch.as_tensor(norm).float() for norm in engine.optimizer._get_norm_groups()])
    norm = torch.linalg.vector_norm(norms)
    # DeepSpeed says -1 of a group that is not finite.
    return torch.where((norms < 0).any(), math.inf, norm)


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As in distributed.py: every process holds each of them while it looks at it."""
    from deepspeed.zero import GatheredParameters

    for name, tensor in model.state_dict(keep_vars=True).items():
        with GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
            yield name, tensor.detach()


@torch.no_grad()
def load_model_state(accelerator: Any, engine: Any, state: dict[str, Tensor]) -> None:
    from deepspeed.utils import safe_set_local_fp32_param
    from deepspeed.zero import GatheredParameters

    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        value = state[name].to(accelerator.device)
        if not hasattr(tensor, "ds_id"):
            tensor.copy_(value)
            continue
        with GatheredParameters([tensor], modifier_rank=0):
            if accelerator.is_main_process:
                tensor.copy_(value)
        if tensor.requires_grad:  # the optimiser steps on a copy of its own
            safe_set_local_fp32_param(tensor, _shard(tensor, value))


def optimizer_state(accelerator: Any, engine: Any) -> dict[str, Any]:
    """AdamW's moments by the parameters' names, and its groups with the number of steps."""
    from deepspeed.utils import safe_get_full_optimizer_state

    moments = {}
    for name, parameter in _trained(engine.module):
        whole = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        if accelerator.is_main_process:
            moments[name] = {key: value.cpu() for key, value in whole.items()}
    if not accelerator.is_main_process:
        return {}
    steps = [float(flat["step"]) for flat in engine.optimizer.optimizer.state.values()]
    groups = [{key: value for key, value in g.items() if key != "params"} for g in engine.optimizer.param_groups]
    return {"state": moments, "step": steps[0], "param_groups": groups}


@torch.no_grad()
def load_optimizer_state(accelerator: Any, engine: Any, state: dict[str, Any]) -> None:
    from deepspeed.utils import safe_set_local_optimizer_state

    for name, parameter in _trained(engine.module):
        for key, value in state["state"][name].items():
            safe_set_local_optimizer_state(parameter, _shard(parameter, value.to(accelerator.device)), key)
    for flat in engine.optimizer.optimizer.state.values():
        flat["step"] = torch.full_like(torch.as_tensor(flat["step"]), state["step"])
    for group, saved in zip(engine.optimizer.param_groups, state["param_groups"], strict=True):
        group.update(saved)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _shard(parameter: Any, whole: Tensor) -> Tensor:
    """This process's part of the values, as DeepSpeed cuts them: flat, in equal parts, the last one padded."""
    size, group = parameter.ds_tensor.ds_numel, parameter.ds_process_group
    padded = whole.new_zeros(size * torch.distributed.get_world_size(group))
    padded[: whole.numel()] = whole.flatten()
    return padded.narrow(0, size * torch.distributed.get_rank(group), size)
