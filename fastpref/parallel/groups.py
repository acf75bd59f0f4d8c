"""A process group, and what its ranks must agree on before any of them communicates.

A collective that one rank does not reach, or reaches with another shape, hangs or gives a wrong number. So every call
begins with one exchange of a few integers: whether a rank's arguments were refused, and what must be equal everywhere.
After it either all ranks go on or all of them raise.

What no exchange can find is a rank that is not in it: one that passes another group (or none) leaves the others waiting
until the timeout of theirs, as in any collective. Make groups on every process, with the same list of ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.checks import describe, refuse_capture

_FACTS = 20  # integers of an exchange, whatever the call: ranks in different calls still send as many


class Members(NamedTuple):
    group: dist.ProcessGroup
    rank: int  # of this process in the group
    size: int


def members(name: str, group: Any) -> Members:
    """Checks a process group argument; `name` is what it is called. ValueError or TypeError."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{name} needs torch.distributed.init_process_group first")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"this process (rank {dist.get_rank()}) is not in {name}: only its members may call")
    if not isinstance(group, dist.ProcessGroup):
        hint = "; of a DeviceMesh pass mesh.get_group(dim)" if hasattr(group, "get_group") else ""
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup, got {describe(group)}{hint}")
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name} does not go through torch.compile: call outside of compiled code")
    refuse_capture(f"the ranks of {name} agree by what they read on the host", "call outside of the graph")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"this process (rank {dist.get_rank()}) is not in {name}: only its members may call")
    return Members(group, rank, dist.get_world_size(group))


def agree(
    name: str,  # of the group's argument, for messages
    call: str,  # of the function: ranks must make the same call
    among: Members,
    facts: Callable[[], Mapping[str, int]],
    *,
    differ: tuple[str, ...] = (),
) -> list[dict[str, int]]:
    """Every rank's facts, in rank order; raises on every rank where one of them raises, or where facts are not equal.

    `facts` checks this rank's arguments and says what the others must know; the names in `differ` may differ between
    ranks. A rank whose `facts` raised raises its own exception again, the others a ValueError that names that rank.
    """
    names: list[str] = []
    values: list[int] = []
    error: Exception | None = None
    try:
        found = facts()
        names, values = list(found), [_as_int64(key, value) for key, value in found.items()]
        if len(names) > _FACTS - 2:
            raise AssertionError(f"{call} exchanges {len(names)} facts, more than {_FACTS - 2}")
    except Exception as refusal:  # raised again below, once the others know
        error, values = refusal, []
    row = [int(error is not None), zlib.crc32(call.encode()), *values]
    mine = torch.tensor(row + [0] * (_FACTS - len(row)), dtype=torch.int64, device=_device_of(among.group))
    rows = gather(mine, among).tolist()
    if error is not None:
        raise error
    refused = [rank for rank, given in enumerate(rows) if given[0]]
    if refused:
        raise ValueError(
            f"rank {', '.join(map(str, refused))} of {name} refused its arguments (its own error says why), so no rank "
            "of the group goes on"
        )
    if len({given[1] for given in rows}) > 1:
        raise ValueError(f"the ranks of {name} are in different calls, this one in {call}: all must make the same one")
    told = [dict(zip(names, given[2:], strict=False)) for given in rows]
    for key in names:
        each = [one[key] for one in told]
        if key not in differ and len(set(each)) > 1:
            raise ValueError(f"{key} must be equal on all ranks of {name}, got {each} on ranks 0 to {among.size - 1}")
    return told


def _as_int64(name: str, value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}")
    return int(value)


def checksum(values: Tensor | None) -> int:
    """A number that hangs on every element of an integer tensor and on its place. Makes a GPU wait.

    Value and place are mixed (int64 wraps) before they are added: a sum of value times place would not tell
    [1, 2, 2, 1] from [2, 1, 1, 2].
    """
    if values is None:
        return -1
    mixed = values.flatten().long() * 0x2545F4914F6CDD1D
    mixed += torch.arange(1, len(mixed) + 1, device=mixed.device) * 0x5851F42D4C957F2D
    for _ in range(2):
        mixed ^= mixed >> 32
        mixed *= 0x5851F42D4C957F2D
    return int((mixed ^ (mixed >> 32)).sum().item())


def gather(values: Tensor, among: Members) -> Tensor:  # (ranks, *shape), in rank order: the same bits on every rank
    values = values.contiguous()
    every = [torch.empty_like(values) for _ in range(among.size)]
    dist.all_gather(every, values, group=among.group)
    return torch.stack(every)


def sum_over(values: Tensor, among: Members) -> Tensor:
    """The sum over the ranks, in `values`' own memory."""
    dist.all_reduce(values, group=among.group)
    return values


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where a tensor of the exchange must lie: NCCL takes none on the CPU."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
