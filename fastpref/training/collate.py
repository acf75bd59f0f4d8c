"""From pairs to a padded batch: all chosen sequences, then all rejected ones, on dim 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.training.data import Pair

IGNORE = -100
PAD_MULTIPLE = 8  # tensor cores want it; more would only be padding


@dataclass(frozen=True)
class Batch:
    """P pairs as 2P sequences padded on the right, where a causal model's default positions stay right."""

    input_ids: Tensor  # (2P, T) int64
    attention_mask: Tensor  # (2P, T) int64
    labels: Tensor  # (2P, T) int64, -100 outside the response
    rows: list[int]  # (P,) dataset rows
    tokens: int  # not padding
    ref_chosen: Tensor | None  # (P,) float32
    ref_rejected: Tensor | None  # (P,) float32


def collate(pairs: Sequence[Pair], *, pad_id: int, max_length: int, device: torch.device | str = "cpu") -> Batch:
    """Pad to the batch's longest sequence, rounded up to a multiple of 8 but never beyond `max_length`.

    Padding is known by its position and nothing else: `pad_id` may be the id of a real token (EOS often is).
    """
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    longest = max(len(response.ids) for response in responses)
    width = max(longest, min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max_length))
    input_ids = torch.full((len(responses), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for place, (ids, start) in enumerate(responses):
        tokens = torch.from_numpy(ids).long()
        input_ids[place, : len(ids)] = tokens
        attention_mask[place, : len(ids)] = 1
        labels[place, start : len(ids)] = tokens[start:]

    def column(values: list[float | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        if len(known) < len(pairs):
            return None
        return torch.tensor(known, dtype=torch.float32).to(device, non_blocking=True)

    return Batch(
        input_ids=input_ids.to(device, non_blocking=True),
        attention_mask=attention_mask.to(device, non_blocking=True),
        labels=labels.to(device, non_blocking=True),
        rows=[pair.row for pair in pairs],
        tokens=sum(len(response.ids) for response in responses),
        ref_chosen=column([pair.ref_chosen_logp for pair in pairs]),
        ref_rejected=column([pair.ref_rejected_logp for pair in pairs]),
    )
