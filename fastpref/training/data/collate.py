"""From pairs to a batch for the model: one row without padding, or a padded row a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fastpref.models import ScoredTokens, pack_pairs, set_attention, why_not_packed
from fastpref.training.config import TrainConfig
from fastpref.training.data.batches import Sizes
from fastpref.training.data.tokens import Ids, Pair, Response

IGNORE = -100
PAD_MULTIPLE = 8  # tensor cores want it; more would only be padding


@dataclass(frozen=True)
class Layout:
    """How pairs lie in a batch, and on which device."""

    name: str  # shared, packed or padded; what a model cannot be given is not asked for here
    pad_id: int
    max_length: int
    device: torch.device | str = "cpu"
    attention: str = "sdpa"
    repeat_last: bool = False  # of a shared prefix, in both sequences
    unpaired: bool = False  # a batch holds one of a pair's sequences, but for the reference pass

    def width(self, longest: int) -> int:
        """Of rows that hold a sequence each: rounded up to a multiple of 8, but never beyond `max_length`."""
        return max(longest, min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.max_length))

    def tokens(self, pair: Pair) -> int:
        """Tokens of the pair's own in a batch; padding to other pairs comes on top."""
        if self.unpaired:
            return pair.length
        together = len(pair.chosen.ids) + len(pair.rejected.ids)
        return together - max(pair.shared - self.repeat_last, 0) if self.name == "shared" else together

    def sizes(self, pairs: Sequence[Pair]) -> Sizes:
        """What pairs take in batches."""
        longest = tuple(pair.length for pair in pairs)
        widths = tuple(map(self.width, longest)) if self.name == "padded" else None
        return Sizes(tuple(map(self.tokens, pairs)), longest, widths, sequences=1 if self.unpaired else 2)


def settle_layout(
    config: TrainConfig,
    model: Any,
    *,
    pad_id: int,
    max_length: int,
    device: torch.device,
    say: Callable[[str], None],
    unpaired: bool = False,
) -> Layout:
    """The layout asked for, or the padded one where the model cannot be given it, which a line then says.

    It sets the model's attention to what the layout needs.
    """
    name = config.layout
    if name != "padded":
        reason = why_not_packed(model, max_length=max_length, attention=config.attention)
        if reason is None:
            set_attention(model, config.attention)
        else:
            say(f"layout={name} is not possible: {reason}. Rows are padded (layout=padded)")
            name = "padded"
    repeat_last = config.logps == "logits"
    return Layout(name, pad_id, max_length, device, config.attention, repeat_last, unpaired)


Part = Literal["both", "chosen", "rejected"]  # of each pair


@dataclass(frozen=True)
class Batch:
    """P pairs, as 2P sequences: all chosen ones, then all rejected ones; or P of either. labels or scored is None."""

    inputs: dict[str, Any]  # of the model's forward
    labels: Tensor | None  # (2P, T) int64, -100 outside the response: a row a sequence
    scored: ScoredTokens | None  # of 2P sequences: rows that hold several
    rows: list[int]  # (P,) dataset rows
    tokens: int  # of the 2P sequences, not padding; a shared prompt counts for both
    ref_chosen: Tensor | None  # (P,) float32
    ref_rejected: Tensor | None  # (P,) float32
    desirable: Tensor | None  # (P,) bool, of unpaired data
    part: Part

    @property
    def scored_tokens(self) -> tuple[Tensor, Tensor]:
        """How many tokens of each chosen and of each rejected response are scored, (P,) int64 each."""
        if self.scored is not None:
            chosen, rejected = self.scored.cu_seqlens.diff().chunk(2)
        else:
            chosen, rejected = (cast(Tensor, self.labels)[:, 1:] != IGNORE).sum(1).chunk(2)
        return chosen, rejected


def collate(pairs: Sequence[Pair], layout: Layout, part: Part = "both") -> Batch:
    """Pairs as a batch. Nothing in it depends on the layout but the shape of what the model gets."""
    labels, scored = None, None
    chosen = [] if part == "rejected" else [pair.chosen for pair in pairs]
    rejected = [] if part == "chosen" else [pair.rejected for pair in pairs]
    responses = chosen + rejected
    if layout.name == "padded":
        inputs, labels = _padded(responses, layout)
    else:
        inputs, scored = pack_pairs(
            list(map(_scored, chosen or rejected)),
            list(map(_scored, rejected)) if part == "both" else None,
            share_prefix=layout.name == "shared",
            repeat_last=layout.repeat_last,
            attention=layout.attention,
            device=layout.device,
        )

    def column(values: list[float | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        if len(known) < len(pairs):
            return None
        return torch.tensor(known, dtype=torch.float32).to(layout.device, non_blocking=True)

    wanted = column([pair.desirable for pair in pairs])
    return Batch(
        inputs=inputs,
        labels=labels,
        scored=scored,
        rows=[pair.row for pair in pairs],
        tokens=sum(len(response.ids) for response in responses),
        ref_chosen=column([pair.ref_chosen_logp for pair in pairs]),
        ref_rejected=column([pair.ref_rejected_logp for pair in pairs]),
        desirable=None if wanted is None else wanted.bool(),
        part=part,
    )


def _scored(response: Response) -> tuple[Ids, int]:
    """Nothing predicts a sequence's first token, be it a response's: without a prompt it is not scored."""
    return response.ids, max(response.start, 1)


def _padded(responses: Sequence[Response], layout: Layout) -> tuple[dict[str, Any], Tensor]:
    """Rows padded on the right, where a causal model's default positions stay right.

    To the `Layout.width` of the batch's longest sequence. Padding is known by its position and nothing else: `pad_id`
    may be the id of a real token (EOS often is).
    """
    width = layout.width(max(len(response.ids) for response in responses))
    input_ids = torch.full((len(responses), width), layout.pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for place, (ids, start) in enumerate(responses):
        tokens = torch.from_numpy(ids).long()
        input_ids[place, : len(ids)] = tokens
        attention_mask[place, : len(ids)] = 1
        labels[place, start : len(ids)] = tokens[start:]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    placed = {name: value.to(layout.device, non_blocking=True) for name, value in inputs.items()}
    return placed, labels.to(layout.device, non_blocking=True)
