"""A head whose vocabulary is split over the ranks of a process group: what the ranks agree on before they begin.

Each rank has its rows of weight and bias, and the same hidden states and labels. All of them check their arguments
before any goes on, and what is done afterwards hangs on agreed facts alone: the plan is made for the largest part and
the least budget, so that all ranks make the same products, reductions and errors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.checks import describe
from fastpref.linear.tokens import Request
from fastpref.parallel.groups import agree, checksum, members
from fastpref.parallel.vocab import VocabShards


class Call(NamedTuple):
    """The arguments of a call, checked and in one form."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H), or (V_r, H)
    bias: Tensor | None
    labels: Tensor  # (B, T)
    mask: Tensor | None  # (B, T) bool
    request: Request


def local_part(name: str, x: Any, vocab_group: Any) -> Any:
    """This rank's part of a DTensor that is sharded over the group, as a tensor with a history; others as they are."""
    if vocab_group is None or not hasattr(x, "full_tensor"):
        return x
    mesh, placements = x.device_mesh, tuple(x.placements)
    same = mesh.ndim == 1 and dist.get_process_group_ranks(mesh.get_group()) == dist.get_process_group_ranks(
        vocab_group
    )
    if not same or len(placements) != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{name} is a DTensor with placements {placements} over {mesh}; with vocab_group it must be sharded on V, "
            "(Shard(dim=0),), over exactly the ranks of the group and in their order: redistribute it, or pass its "
            "local part"
        )
    return x.to_local()


def agreed(
    name: str,  # of the function
    vocab_group: Any,
    check: Callable[[], Call],  # raises for bad arguments
    also: Callable[[], Mapping[str, int]],  # what else must be equal on all ranks; called after `check`
) -> Call:
    """`check()`, once all ranks' arguments are known to be good and to fit together; else an error on every rank."""
    if vocab_group is None:
        return check()
    among = members("vocab_group", vocab_group)
    done: list[Call] = []

    def facts() -> Mapping[str, int]:
        done.append(check())
        return {**_facts(done[0]), **also()}

    told = agree("vocab_group", name, among, facts, differ=("V", "memory_budget"))
    call = done[0]
    shards = VocabShards(among, tuple(one["V"] for one in told))
    if shards.vocab == 0:
        raise ValueError(f"weight must have at least one entry on one rank of vocab_group, got {describe(call.weight)}")
    budget = min(one["memory_budget"] for one in told)
    return call._replace(request=call.request._replace(shards=shards, budget=budget))


def _facts(call: Call) -> Mapping[str, int]:
    request, grad = call.request, torch.is_grad_enabled()
    heads = (call.weight, call.bias)
    dtypes = (call.hidden.dtype, *(None if x is None else x.dtype for x in heads), request.operand)
    options = (request.shift, request.ignore_index, request.transform.values, request.extras, request.entropy_grad)
    batch, length, hidden_size = call.hidden.shape
    return {
        "V": call.weight.shape[0],
        "memory_budget": request.budget,
        "the number of sequences": batch,
        "the number of positions": length,
        "H": hidden_size,
        "labels (checksum)": checksum(call.labels),
        "mask (checksum; with shift also of cu_seqlens)": checksum(call.mask),
        "dtypes (checksum)": text_checksum(dtypes),
        "options (checksum of shift, ignore_index, transforms, extras and entropy_grad)": text_checksum(options),
        "hidden.requires_grad": grad and call.hidden.requires_grad,
        "weight.requires_grad": grad and call.weight.requires_grad,
        "bias.requires_grad": -1 if call.bias is None else grad and call.bias.requires_grad,
    }


def refuse_compiled(shards: VocabShards | None) -> None:
    """The operators of compiled code know of no other rank; a function that raises is left uncompiled."""
    if shards is not None:
        raise RuntimeError("vocab_group does not go through torch.compile: call outside of compiled code")


def text_checksum(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def bits_checksum(values: Tensor | None) -> int:
    """Of floating-point numbers, by their bits."""
    return checksum(None if values is None else values.detach().double().view(torch.int64))
