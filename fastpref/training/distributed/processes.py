"""Model and optimiser over several processes: who holds which part of them, and how the whole comes together.

`accelerate launch` (or torchrun) decides: one process; DDP, where each holds everything; FSDP2 and DeepSpeed ZeRO-3,
which shard weights, gradients and optimiser state, and gather a layer's weights while it computes.

What sharding asks of everybody else:

- Every forward is a collective: all processes make as many of them (`deal` gives out the pairs accordingly).
- Log-probs are made in the head's own forward, where its weight is whole; their backward has it gathered again.
- Evaluation and reference pass may leave the root's weights gathered, unchanged until the next backward.
- After `wrap` the parameters of `run.model` may be shards: whole ones come from `model_state` and `whole_weights`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    broadcast_object_list,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastpref.options import UsageError
from fastpref.training.config import TrainConfig
from fastpref.training.distributed import zero3

T = TypeVar("T")


def make_accelerator() -> Accelerator:
    """Accelerate as this process was launched; a way of sharding that the loop cannot do is refused here."""
    # No mixed precision of Accelerate's: step.py enters autocast itself, and says why.
    accelerator = Accelerator(mixed_precision="no")
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        _shard_on_cpu(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError(
            "this launch asks for FSDP 1, which is not supported: set fsdp_version: 2 in its configuration"
        )
    if zero3.in_use(accelerator):
        zero3.check(accelerator)
    # Every process builds its models whole, to look at them before they are sharded. Transformers would leave the
    # weights to the main process (FSDP), or shard them at once (DeepSpeed).
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return accelerator


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """FSDP2 on processes without a GPU: torch does it over gloo, Accelerate passes its options over there."""
    state: Any = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # Without a mesh torch takes the machine's accelerator, be it not in use.
    state.parallelism_config = ParallelismConfig(dp_shard_size=accelerator.num_processes)
    state.device_mesh = state.parallelism_config.get_device_mesh("cpu")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds only its part of the weights."""
    return accelerator.is_fsdp2 or zero3.in_use(accelerator)


def on_main(accelerator: Any, work: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
    """What `work` gives on the main process, on every process; also a barrier.

    Each of `errors` that it raises there is raised on every process, so that none waits for ever.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [work()]
        except errors as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def place(accelerator: Accelerator, model: Any) -> Any:
    """The model on this process's device; one to be sharded stays where it is, and goes there a layer at a time."""
    return model if is_sharded(accelerator) else model.to(accelerator.device)


def wrap(accelerator: Any, model: Any, optimizer: Any, config: TrainConfig) -> tuple[Any, Any]:
    """The model and its optimiser as Accelerate makes them for this launch: alone, DDP, FSDP2, DeepSpeed.

    A sharded model is changed in place: `model` itself runs on all processes from here on, for the reference too.
    """
    if zero3.in_use(accelerator):
        return zero3.wrap(accelerator, model, optimizer, config)
    if accelerator.is_fsdp2:
        # Accelerate wants every class of the list in the model; LLaVA's has those of other vision towers too.
        base, there = getattr(model, "get_base_model", lambda: model)(), {type(m).__name__ for m in model.modules()}
        base._no_split_modules = sorted(there & set(base._no_split_modules or ()))
    return accelerator.prepare(model, optimizer)


def micro_batch(accelerator: Any, model: Any, *, last: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of a micro-batch: gradients are added up over the processes with a step's last."""
    if zero3.in_use(accelerator):
        model.set_gradient_accumulation_boundary(last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)


def backward(accelerator: Any, model: Any, loss: Tensor) -> None:
    """The gradient of this process's share; it ends up as the mean over the processes, however they are launched."""
    if zero3.in_use(accelerator):
        model.backward(loss, scale_wrt_gas=False)
    else:
        loss.backward()


def clip_gradient(accelerator: Any, model: Any, max_norm: float) -> Tensor:
    """The norm of the whole gradient, on every process; clipped to `max_norm` (DeepSpeed does that in its step)."""
    if zero3.in_use(accelerator):
        return zero3.gradient_norm(model)
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def deal(batches: Sequence[list[T]], accelerator: Any) -> Iterator[tuple[list[T], bool]]:
    """This process's share of the batches, as many on every process.

    One without a batch left gets the last one once more and False: it has to run, and not to count.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    for begin in range(0, len(batches), world):
        mine = begin + rank < len(batches)
        yield batches[begin + rank if mine else -1], mine


def _reshard(model: Any) -> None:
    """Put back the shards as the model's parameters: an evaluation leaves the head's gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(accelerator: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight and buffer by the names of the unwrapped model, gathered one at a time; called by every process."""
    model = accelerator.unwrap_model(model)
    if zero3.in_use(accelerator):
        yield from zero3.whole_weights(model)
    else:
        for name, tensor in model.state_dict().items():
            yield name, _whole(tensor, accelerator)


def _whole(tensor: Tensor, accelerator: Any) -> Tensor:
    # FSDP2 may keep its shards in CPU memory, where a network of GPUs does not reach.
    return cast(DTensor, tensor.to(accelerator.device)).full_tensor() if isinstance(tensor, DTensor) else tensor


def model_state(accelerator: Any, model: Any) -> dict[str, Tensor]:
    """The whole state of a wrapped model by the names of the unwrapped one; called by every process.

    Of a sharded model it is on the CPU, and on the main process alone: the others get an empty dict.
    """
    if not is_sharded(accelerator):
        return accelerator.unwrap_model(model).state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in whole_weights(accelerator, model):
        if accelerator.is_main_process:
            state[name] = tensor.to("cpu", copy=True)  # DeepSpeed takes the memory back
    names: dict[int, str] = {}
    for name, tensor in accelerator.unwrap_model(model).state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if accelerator.is_main_process:
            state[name] = state[first]  # tied weights are one tensor, and saved once
    return state


def load_model_state(accelerator: Any, model: Any, state: dict[str, Tensor]) -> None:
    """Put back what `model_state` gave; every process calls it with the whole state."""
    if accelerator.is_fsdp2:
        _reshard(model)
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    elif zero3.in_use(accelerator):
        zero3.load_model_state(accelerator, model, state)
    else:
        accelerator.unwrap_model(model).load_state_dict(state)


def optimizer_state(accelerator: Any, model: Any, optimizer: Any) -> dict[str, Any]:
    """The whole state of a wrapped optimiser; called by every process.

    Of a sharded one it goes by the names of the parameters, on the CPU, and on the main process alone.
    """
    if zero3.in_use(accelerator):
        return zero3.optimizer_state(accelerator, model)
    if not accelerator.is_fsdp2:
        return optimizer.state_dict()
    _reshard(model)
    sharded: Any = get_optimizer_state_dict(model, optimizer.optimizer)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, values in sharded["state"].items():
        whole = {key: _whole(value, accelerator) for key, value in values.items()}
        if accelerator.is_main_process:
            moments[name] = {key: value.cpu() for key, value in whole.items()}
    return {**sharded, "state": moments} if accelerator.is_main_process else {}


def load_optimizer_state(accelerator: Any, model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Put back what `optimizer_state` gave; every process calls it with the whole state."""
    if accelerator.is_fsdp2:
        _reshard(model)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer.optimizer, state, options=options)
    elif zero3.in_use(accelerator):
        zero3.load_optimizer_state(accelerator, model, state)
    else:
        optimizer.load_state_dict(state)
