"""From a padded batch to one row without padding, each pair's common prompt once; and back to the batch's places."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpref.models import PackedRow, ScoredTokens, pack_pairs

IGNORE = -100


class SharedRow(NamedTuple):
    row: PackedRow
    places: Tensor  # (N,) int64: of each scored token in the flattened (2P, T − 1), position t for label t + 1


def share_rows(
    input_ids: Tensor,  # (2P, T) int64, all chosen ones, then all rejected ones
    attention_mask: Tensor | None,  # (2P, T), 0 on padding, which may stand on either side
    labels: Tensor,  # (2P, T) int64, -100 where nothing is scored
    *,
    left_padding: bool,
) -> SharedRow | str:
    """The batch as one row, or the reason why it must stay as it is. On a GPU this waits for the batch, once.

    Args:
        left_padding: take sequences that begin behind padding: for a model that sees how far tokens are apart, and not
            where they stand.
    """
    if input_ids.dim() != 2 or len(input_ids) % 2 or input_ids.shape != labels.shape:
        return "a batch does not hold pairs of sequences"
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    elif attention_mask.shape != input_ids.shape:
        return "a batch's attention_mask is not one of its tokens"
    ids, seen, wanted = torch.stack([input_ids, attention_mask.to(input_ids.dtype), labels]).cpu().numpy()
    seen, scored, width = seen != 0, wanted != IGNORE, ids.shape[1]
    begins, ends = seen.argmax(1), width - seen[:, ::-1].argmax(1)
    if not seen.any(1).all() or (ends - begins != seen.sum(1)).any():
        return "a batch's attention_mask has gaps"
    if (scored & ~seen).any() or (wanted != ids)[scored].any():
        return "a batch's labels are other tokens than its inputs"
    if not scored[:, 1:].any():
        return "in a batch nothing is scored"
    if (begins > 0).any() and not left_padding:
        return "a batch is padded on the left, and the model's positions are learned"
    sequences: list[tuple[np.ndarray, int]] = []
    places, kept = [], []
    for index, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        of_row = scored[index, begin:end]
        if begin and of_row[0]:
            return "in a batch padding predicts a token that is scored"
        of_row = of_row[1:]  # nothing predicts a sequence's first token
        start = 1 + int(of_row.argmax()) if of_row.any() else end - begin
        sequences.append((ids[index, begin:end], start))
        places.append(index * (width - 1) + np.arange(begin + start, end) - 1)
        kept.append(of_row[start - 1 :])
    half = len(sequences) // 2
    device = input_ids.device
    row = pack_pairs(sequences[:half], sequences[half:], device=device)
    place, keep = np.concatenate(places), np.concatenate(kept)
    if not keep.all():  # a response with a hole, as another turn's question is
        kept_ones = _on(np.flatnonzero(keep), device)
        cu_seqlens = _on(np.cumsum([0, *(part.sum() for part in kept)]), device)
        row = row._replace(scored=ScoredTokens(row.scored.source[kept_ones], row.scored.labels[kept_ones], cu_seqlens))
        place = place[keep]
    return SharedRow(row, _on(place, device))


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)
