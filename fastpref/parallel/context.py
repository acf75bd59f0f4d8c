"""Sequences that are split over the ranks of a process group: whose label a part's last row predicts, and the sums.

Rank r holds a part (B, T_r) of each sequence, or N_r rows of one packed row. A row's label may stand with the next
part, so one gather of a label a part brings it there; after that rows and labels are aligned and every rank scores its
own. One gather of sums and counts then makes each sequence's value, the same bits on every rank.

The layouts are those of ring attention (Liu et al. 2023, https://arxiv.org/abs/2310.01889): "contiguous", in rank
order, and "zigzag", which balances causal attention: rank i of n holds chunks i and 2n − 1 − i of 2n equal ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastpref.backend import validate_labels
from fastpref.checks import check_bool, check_choice, check_tensor, describe
from fastpref.inputs import check_batch, check_options, check_reduction_input, refuse_empty
from fastpref.parallel.groups import Members, agree, checksum, gather, members
from fastpref.tiled import check_labels_in_range

LAYOUTS = ("contiguous", "zigzag")


def check_layout(context_group: Any, context_layout: Any) -> None:
    """Without a group there is one layout; with one, `over_context` checks, on all ranks."""
    if context_group is None and check_choice("context_layout", context_layout, LAYOUTS) != "contiguous":
        raise ValueError(f"context_layout={context_layout!r} goes with context_group, which is None")


class ContextCall(NamedTuple):
    """A call whose sequences are split: what it is called, what it asks for."""

    name: str  # of the function, for messages
    context_group: Any
    context_layout: str
    vocab_group: Any
    vocab: int | None  # V, where this rank knows it
    reduction: str
    on_empty: str
    return_lengths: bool
    shift: bool
    ignore_index: int
    extras: Any
    options: tuple[float | None, ...]  # temperature, logit_scale, softcap


def size_of(x: Any, dim: int) -> int | None:
    """A size, before anything is checked: what is no tensor is refused where the other ranks hear of it."""
    return x.shape[dim] if isinstance(x, Tensor) and x.dim() else None


def over_context(
    call: ContextCall,
    score: Callable[[Tensor], Any],  # token log-probs of aligned labels: token_logps(..., shift=False)
    name: str,  # of x: "logits" or "hidden states"
    x: Tensor,  # (B, T_r, W), or (N_r, W) packed
    labels: Tensor,  # (B, T_r), or (N_r,) packed
    mask: Tensor | None,
    cu_seqlens: Tensor | None,  # (S + 1,), offsets into the whole row
) -> Any:  # values (S,) float32, or a tuple of them, lengths and extras
    """What `sequence_logps` returns for whole sequences, on every rank that holds a part of them."""
    among = members("context_group", call.context_group)

    def facts() -> Mapping[str, int]:
        return _facts(call, name, x, labels, mask, cu_seqlens)

    if call.vocab_group is None:
        told = agree("context_group", call.name, among, facts, differ=("T",))
    else:
        # A refusal must reach the ranks of both groups, and through them the whole mesh.
        row = members("vocab_group", call.vocab_group)
        told = agree(
            "context_group", call.name, among, lambda: agree("vocab_group", call.name, row, facts)[0], differ=("T",)
        )
    lengths = [one["T"] for one in told]
    _check_lengths(call.context_layout, lengths, cu_seqlens)
    rank = among.rank
    before = sum(lengths[:rank])
    offsets = None if cu_seqlens is None else (cu_seqlens.long() - before).clamp(0, lengths[rank])

    own = labels.long() if mask is None else torch.where(mask != 0, labels.long(), call.ignore_index)
    own = own if labels.dim() == 2 else own.unsqueeze(0)
    aligned = own
    if call.shift:
        own = _without_starts(own, before, cu_seqlens, call)
        aligned = _aligned(own, lengths, among, call)
    found: list[Any] = []

    def work() -> Mapping[str, int]:
        if _checks_labels(call, own):
            check_labels_in_range(own, own != call.ignore_index, 0, cast(int, call.vocab))
        found.append(score(aligned.reshape(labels.shape)))
        return {}

    # What only the work finds (a label outside V, a budget that is too small) must not leave the others waiting.
    agree("context_group", f"{call.name}, scoring", among, work)
    tokens, extras = found[0] if isinstance(found[0], tuple) else (found[0], None)
    scored = aligned != call.ignore_index
    sums, counts = _sums(tokens.view(aligned.shape), scored, offsets)
    both = gather(torch.stack([sums.detach(), counts.to(sums.dtype)]), among).sum(0)  # in rank order
    counts = both[1].long()
    values = _Total.apply(sums, both[0])
    if call.reduction == "mean":
        values = values / counts.clamp(min=1)
    if call.on_empty == "raise":
        refuse_empty(counts)
    parts = [values.float()]
    if call.return_lengths:
        parts.append(counts)
    if extras is not None:
        parts.append(extras)
    return tuple(parts) if len(parts) > 1 else parts[0]


class _Total(torch.autograd.Function):
    """This rank's sums replaced by everybody's; the gradient of its own goes through as it is."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _facts(
    call: ContextCall, name: str, x: Tensor, labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Mapping[str, int]:
    """Checks this rank's arguments; what the others must know of them."""
    check_choice("context_layout", call.context_layout, LAYOUTS)
    check_choice("reduction", call.reduction, ("sum", "mean"))
    check_choice("on_empty", call.on_empty, ("zero", "raise"))
    check_bool("return_lengths", call.return_lengths)
    check_options(1.0, 1.0, None, call.ignore_index, call.shift)
    check_batch(name, "V" if name == "logits" else "H", x, labels, mask, None, False)
    check_reduction_input(name, x, cu_seqlens)
    if call.extras and call.shift:
        raise ValueError(
            f"extras={call.extras!r} with context_group need shift=False: with shift=True the value of a part's "
            "first label is made on the rank before. Align the labels before they are split, or leave extras out"
        )
    if cu_seqlens is not None:
        _check_offsets(call, x, cu_seqlens)
    return {
        "the number of sequences": labels.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1,
        "T": labels.shape[-1],
        "cu_seqlens (checksum)": checksum(cu_seqlens),
        "shift": call.shift,
        "ignore_index": call.ignore_index,
        'reduction="mean"': call.reduction == "mean",
        'on_empty="raise"': call.on_empty == "raise",
        'context_layout="zigzag"': call.context_layout == "zigzag",
        "temperature, logit_scale and softcap (checksum)": zlib.crc32(repr(call.options).encode()),
    }


def _check_offsets(call: ContextCall, x: Tensor, cu_seqlens: Tensor) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    if x.dim() == 3:
        raise ValueError(f"cu_seqlens goes with packed rows (N_r, ...), got {describe(x)}; drop it, or pack the batch")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be (S + 1,) on {x.device}, got {describe(cu_seqlens)}")
    if call.context_layout == "zigzag":
        raise ValueError(
            'context_layout="zigzag" does not go with packed rows: split them with context_layout="contiguous", or '
            "pass padded sequences"
        )
    if cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must begin with 0 and never decrease, got {cu_seqlens.tolist()[:20]}")


def _check_lengths(layout: str, lengths: list[int], cu_seqlens: Tensor | None) -> None:
    """What the parts must be to each other: every rank knows all lengths, so all raise or none."""
    if layout == "zigzag" and (len(set(lengths)) > 1 or lengths[0] % 2):
        raise ValueError(
            'context_layout="zigzag" needs two chunks of one size on every rank: got T_r = '
            f"{lengths}; pad the sequences to a multiple of {2 * len(lengths)}"
        )
    if cu_seqlens is not None and cu_seqlens[-1] != sum(lengths):
        raise ValueError(
            f"cu_seqlens must be offsets into the whole row, which ends at {sum(lengths)} (the ranks of context_group "
            f"hold {lengths} rows of it), got {cu_seqlens.tolist()[:20]}"
        )


def _without_starts(own: Tensor, before: int, cu_seqlens: Tensor | None, call: ContextCall) -> Tensor:
    """Labels (B, T_r) without each sequence's first one, which nothing predicts."""
    own = own.clone()
    if cu_seqlens is None:
        if before == 0:  # rank 0 of a zigzag too: the one with the first chunk
            own[:, :1] = call.ignore_index
        return own
    length = own.shape[1]
    starts = cu_seqlens[:-1].long() - before
    inside = (starts >= 0) & (starts < length)
    # One place more for those that stand with other ranks: no choice by a mask, which would make a GPU wait.
    first = torch.zeros(length + 1, dtype=torch.bool, device=own.device)
    first.index_fill_(0, torch.where(inside, starts, length), True)
    return own.masked_fill_(first[:length], call.ignore_index)


def _aligned(own: Tensor, lengths: list[int], among: Members, call: ContextCall) -> Tensor:  # (B, T_r)
    """Each row's label: the one after it, which for a chunk's last row stands at the head of the next chunk."""
    batch, length = own.shape
    half = length // 2
    chunks = (own[:, :half], own[:, half:]) if call.context_layout == "zigzag" else (own,)
    nothing = own.new_full((batch, 1), call.ignore_index)
    mine = torch.cat([chunk[:, :1] if chunk.shape[1] else nothing for chunk in chunks], 1)  # (B, 1 or 2)
    if _checks_labels(call, own):  # a wrong one is refused here, where its place is known
        mine = torch.where((mine < 0) | (mine >= cast(int, call.vocab)), call.ignore_index, mine)
    heads = gather(mine, among)  # (ranks, B, 1 or 2)
    aligned = []
    for slot, chunk in enumerate(chunks):
        if call.context_layout == "zigzag":
            after = 2 * among.size - among.rank if slot else among.rank + 1  # this one is 2n − 1 − i, or i
            last = after == 2 * among.size
            place = (after, 0) if after < among.size else (2 * among.size - 1 - after, 1)
        else:
            # A rank may hold nothing.
            after = next((r for r in range(among.rank + 1, among.size) if lengths[r]), among.size)
            last, place = after == among.size, (after, 0)
        head = nothing if last else heads[place[0], :, place[1], None]
        aligned.append(torch.cat([chunk[:, 1:], head], 1) if chunk.shape[1] else chunk)
    return torch.cat(aligned, 1)


def _checks_labels(call: ContextCall, labels: Tensor) -> bool:
    return call.vocab is not None and (labels.device.type == "cpu" or validate_labels())


def _sums(
    tokens: Tensor,  # (B, T_r)
    scored: Tensor,  # (B, T_r) bool
    offsets: Tensor | None,  # (S + 1,) int64, into this rank's rows
) -> tuple[Tensor, Tensor]:  # (S,) float64, (S,) int64
    """Of this rank's part of each sequence. Deterministic on a GPU too."""
    wide = tokens.double()  # 0 where nothing is scored
    if offsets is None:
        return wide.sum(1), scored.sum(1)
    counts = torch.nn.functional.pad(scored[0].cumsum(0), (1, 0))[offsets].diff()
    return torch.segment_reduce(wide[0], "sum", lengths=offsets.diff(), unsafe=True, initial=0.0), counts
