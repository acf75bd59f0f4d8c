"""From pairs to one row without padding: token ids, positions, attention mask, and which position predicts what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastpref.checks import check_choice, describe
from fastpref.models.api import ScoredTokens
from fastpref.models.segments import ATTENTIONS, Segment, block_mask, segment_mask

Ids = NDArray[np.int64]


class PackedRow(NamedTuple):
    """What `model_logps(model, row.inputs, scored=row.scored)` takes."""

    inputs: dict[str, Any]  # input_ids and position_ids (1, T) int64, attention_mask
    scored: ScoredTokens  # of 2P sequences: all chosen ones, then all rejected ones, if any


def shared_length(chosen: NDArray[np.integer[Any]], rejected: NDArray[np.integer[Any]]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    shorter = min(len(chosen), len(rejected))
    differs = chosen[:shorter] != rejected[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


def pack_pairs(
    chosen: Sequence[tuple[ArrayLike, int]],
    rejected: Sequence[tuple[ArrayLike, int]] | None,
    *,
    share_prefix: bool = True,
    repeat_last: bool = False,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> PackedRow:
    """P pairs in one row, or P single sequences, for a model that `fastpref.models.set_attention` has prepared.

    With `share_prefix` what the two sequences of a pair have in common at their beginning (the prompt, and whatever
    else) stands in the row once, and its last position predicts both continuations. Values and gradients are those of
    2P rows of their own, to rounding.

    Args:
        chosen, rejected: for each pair the token ids of prompt and response, (length,), and the index of the first
            token that is scored, at least 1: nothing predicts a sequence's first token. Single
            sequences are `chosen`, and `rejected` None.
        repeat_last: let the last shared token stand in both sequences, so that no position predicts two tokens: what
            reads logits where they lie needs that.
        attention: "sdpa" or "flex", as the model was set.

    Raises:
        ValueError, TypeError: lists of different lengths, or empty; ids that are not one-dimensional integers; a start
            outside [1, length].
    """
    check_choice("attention", attention, ATTENTIONS)
    others = len(chosen) if rejected is None else len(rejected)
    if len(chosen) != others or not chosen:
        raise ValueError(f"chosen and rejected must hold as many sequences, at least 1; got {len(chosen)} and {others}")
    ids: list[Ids] = []
    positions: list[Ids] = []
    segments: list[Segment] = []
    sources: tuple[list[Ids], list[Ids]] = ([], [])
    labels: tuple[list[Ids], list[Ids]] = ([], [])
    length = 0
    for index, one in enumerate(chosen):
        first, first_start = _sequence(f"chosen[{index}]", one)
        begin, length = length, length + len(first)
        ids.append(first)
        positions.append(np.arange(len(first)))
        segments.append(Segment(begin, length))
        sources[0].append(np.arange(begin + first_start - 1, length - 1))
        labels[0].append(first[first_start:])
        if rejected is None:
            continue
        second, second_start = _sequence(f"rejected[{index}]", rejected[index])
        common = max(shared_length(first, second) - repeat_last, 0) if share_prefix else 0
        middle, length = length, length + len(second) - common
        ids.append(second[common:])
        positions.append(np.arange(common, len(second)))
        if length > middle:  # not where one response is the beginning of the other
            segments.append(Segment(middle, length, begin, begin + common) if common else Segment(middle, length))
        predicting = np.arange(second_start - 1, len(second) - 1)
        sources[1].append(np.where(predicting < common, begin + predicting, middle - common + predicting))
        labels[1].append(second[second_start:])

    def tensor(parts: Sequence[Ids]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)

    counts = [len(part) for part in [*labels[0], *labels[1]]]
    mask = segment_mask(segments, device) if attention == "sdpa" else block_mask(segments, device)
    inputs = {"input_ids": tensor(ids)[None], "position_ids": tensor(positions)[None], "attention_mask": mask}
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0).to(device, non_blocking=True)
    return PackedRow(
        inputs, ScoredTokens(tensor([*sources[0], *sources[1]]), tensor([*labels[0], *labels[1]]), cu_seqlens)
    )


def _sequence(name: str, given: tuple[ArrayLike, int]) -> tuple[Ids, int]:
    if not (isinstance(given, (tuple, list)) and len(given) == 2):
        raise TypeError(f"{name} must be (token ids, index of the first scored one), got {describe(given)}")
    values, start = given
    ids = np.asarray(values)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold token ids (length,), integers; got {ids.dtype} of shape {ids.shape}")
    if isinstance(start, bool) or not isinstance(start, (int, np.integer)):
        raise TypeError(f"{name}: the first scored token must be an index, got {describe(start)}")
    if not 1 <= start <= len(ids):
        raise ValueError(f"{name}: the first scored token must be in [1, {len(ids)}], got {start}")
    return ids.astype(np.int64), int(start)
