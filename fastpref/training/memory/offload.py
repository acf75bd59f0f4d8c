"""Activations that backward will need, kept in CPU memory from forward to backward.

What is saved before the head is moved, a storage at a time and once, however many layers saved views of it. Weights,
small tensors and what head and loss save stay where they are: backward begins with the last, and would wait for them.

Why not `torch.autograd.graph.save_on_cpu`: it copies every saved tensor as often as it is saved, weights too (a linear
layer saves its own). In the forward of a Llama-shaped model with all parameters trained (4 layers, hidden size 512,
vocabulary 16000, 4 x 256 tokens, 112 MiB of weights) it copies 337 MiB, and this 172; under autocast to bfloat16 213
and 116. With gradient checkpointing it copies 79 MiB, 31 of them weights, and this 12. One copy a view in place of one
a storage would be 222 MiB. The weights' part grows with the model, not with the tokens.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastpref.models.head import unwrap
from fastpref.training.adapters import output_head
from fastpref.training.config import TrainConfig

SMALLEST = 1 << 20  # bytes: below, the saving is not worth the copies' launches
PENDING = 2  # copies out that may be under way: what they read is not free yet
WEIGHT_OPS = 4  # steps of autograd from a parameter to what is saved of it: a cast, a transposition, views


def check_offload(config: TrainConfig, device: torch.device) -> None:
    """ValueError where there is no other memory to move anything from."""
    if config.offload_activations and device.type == "cpu":
        raise ValueError(
            "offload_activations moves what backward needs from an accelerator's memory to the CPU's, and this run is "
            "on the CPU: leave it out (gradient_checkpointing saves memory here)"
        )


def offloading(config: TrainConfig, model: Any, device: torch.device) -> AbstractContextManager[Any]:
    """The context for a forward: it offloads where the options say so, and there will be a backward."""
    wanted = config.offload_activations and torch.is_grad_enabled()
    return ActivationOffload(model, device) if wanted else nullcontext()


class _Moved:
    """A storage's bytes in CPU memory, and on the device again from the first use in backward until the last."""

    def __init__(self, device: torch.device, copy: Tensor, done: Any) -> None:
        self.device, self.copy, self.done = device, copy, done
        self.back: Tensor | None = None

    def fetch(self) -> Tensor:  # (bytes,) uint8
        if self.back is None:
            if self.done is not None:
                torch.cuda.current_stream(self.device).wait_event(self.done)
            # From pinned memory this returns at once; the kernels that read it come later on the same stream.
            self.back = torch.empty_like(self.copy, device=self.device).copy_(self.copy, non_blocking=True)
        return self.back


class ActivationOffload:
    """A context for the forward of a model; the backward may be outside of it.

    Args:
        model: its parameters and buffers stay, by storage, so views of them too; and copies of them that autocast made.
        device: tensors on this device are moved. (On a CPU that is of use to tests alone.)
        smallest: storages of fewer bytes stay.

    Attributes:
        moved_bytes, moved_storages: what has been moved so far.

    On CUDA the copies out run on a stream of their own, into pinned memory. Why that is correct: the stream waits for
    the kernels that were queued before; `record_stream` keeps the memory from being reused before the copy is done;
    nothing may change a saved tensor before backward, on which autograd itself insists; backward waits for the copy's
    event before it reads. And so that the host does not run ahead and need the memory of many pending copies, it waits
    for the oldest when more than two are under way.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, smallest: int = SMALLEST) -> None:
        self.moved_bytes = self.moved_storages = 0
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._model, self._device, self._smallest = model, device, smallest
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        # By the address of a storage: a weak reference to it keeps the address from being used again.
        self._known: dict[int, tuple[StorageWeakRef, int, weakref.ref[_Moved]]] = {}
        self._pending: deque[Any] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._head_hook: Any = None

    def __enter__(self) -> ActivationOffload:
        held = [*self._model.parameters(), *self._model.buffers()]
        self._weights = {_local(tensor).untyped_storage().data_ptr() for tensor in held}
        self._frozen_shapes = {shape for t in held if not t.requires_grad for shape in (t.shape, t.shape[::-1])}
        self._before_head = True
        head = output_head(unwrap(self._model))
        if head is not None:
            self._head_hook = head.register_forward_pre_hook(self._reach_head)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        if self._head_hook is not None:
            self._head_hook.remove()
        if self._stream is not None:
            # Backward may change buffers in place; every copy comes before that.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._pending.clear()
        self._known.clear()

    def _reach_head(self, head: nn.Module, inputs: Any) -> None:
        self._before_head = False

    def _pack(self, tensor: Tensor) -> Tensor | tuple[_Moved, Any]:
        if not (self._before_head and self._is_moved(tensor)):
            return tensor
        layout = (tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())
        storage, version = tensor.untyped_storage(), tensor._version
        address = storage._cdata
        reference, seen, ref = self._known.get(address, (None, -1, None))
        moved = ref() if ref is not None and reference is not None and not reference.expired() else None
        if moved is None or seen != version:  # changed in place since, it is another tensor
            moved = self._move(tensor)
            self._known[address] = (StorageWeakRef(storage), version, weakref.ref(moved))
        return moved, layout

    def _unpack(self, packed: Tensor | tuple[_Moved, Any]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        moved, (dtype, size, stride, offset) = packed
        whole = torch.empty(0, dtype=dtype, device=moved.device)
        return whole.set_(moved.fetch().untyped_storage(), offset, size, stride)

    def _is_moved(self, tensor: Tensor) -> bool:
        if tensor.device != self._device or tensor.layout != torch.strided or type(tensor) is not Tensor:
            return False  # a subclass (a sharded tensor, a quantised one, a Parameter) is more than its storage
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._smallest or storage.data_ptr() in self._weights:
            return False
        return not self._is_weight(tensor)

    def _is_weight(self, tensor: Tensor) -> bool:
        """Whether it was made of one parameter alone: autocast's copy of a weight, FSDP's gathered one."""
        if not tensor.requires_grad:
            return tensor.shape in self._frozen_shapes  # no graph leads to it; an activation would have one
        node: Any = tensor.grad_fn
        for _ in range(WEIGHT_OPS):
            if node is None:  # a leaf that is trained
                return True
            if hasattr(node, "variable"):
                return node.variable.numel() == tensor.numel()
            if len(node.next_functions) != 1:
                return False
            node = node.next_functions[0][0]
        return False

    @torch.no_grad()
    def _move(self, tensor: Tensor) -> _Moved:
        storage = tensor.untyped_storage()
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # (bytes,)
        self.moved_bytes += storage.nbytes()
        self.moved_storages += 1
        if self._stream is None:
            return _Moved(tensor.device, source.to("cpu", copy=True), None)
        copy = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        source.record_stream(self._stream)
        self._pending.append(done)
        if len(self._pending) > PENDING:
            self._pending.popleft().synchronize()
        return _Moved(tensor.device, copy, done)


def _local(tensor: Any) -> Tensor:
    """This process's part of a sharded parameter."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
