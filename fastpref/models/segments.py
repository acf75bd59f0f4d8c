"""Attention over rows that hold several sequences: each query sees its own sequence, computed segment by segment.

A row is cut into segments. A segment's tokens attend to those before them in the segment, and before these to a prefix
that stands earlier in the row: `[prompt chosen | rejected]`, where the rejected response has the prompt as its prefix,
gives two sequences whose prompt goes through the model once (Wang & Hegde 2024, https://arxiv.org/abs/2410.20305).
No T×T mask is built and nothing hidden is computed. Every segment is an attention of its own over slices of the row, so
no sequence can leak into another.

Transformers hands a 4-dimensional attention mask to its attention functions as it is; here that is a small tensor that
carries the segments. FlexAttention takes the same segments as a block mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from fastpref.checks import check_choice, describe
from fastpref.models.head import unwrap

NAME = "fastpref_segments"
ATTENTIONS = ("sdpa", "flex")
# Rows of a masked attention on a CPU: what the mask hides is computed too, and each chunk reads all keys before it.
CHUNK = 1024


class Segment(NamedTuple):
    """Tokens start..end of a row, which see prefix_start..prefix_end before them. Segments cover a row in order."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


def segment_mask(segments: Sequence[Segment], device: torch.device | str = "cpu") -> Tensor:  # (1, 1, K, 4) int64
    """What a model set to `NAME` takes as attention_mask."""
    # Without non_blocking the host would wait for all that a GPU has queued.
    values = torch.tensor([list(segment) for segment in segments], dtype=torch.int64)
    mask = values[None, None].to(device, non_blocking=True)
    mask.segments = tuple(segments)  # type: ignore[attr-defined]  # on the host, where they are needed
    return mask


def block_mask(segments: Sequence[Segment], device: torch.device | str = "cpu") -> Any:
    """The same for FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor([segment.end - segment.start for segment in segments])
    segment_of = torch.repeat_interleave(torch.arange(len(segments)), lengths)
    begin = torch.tensor([segment.prefix_start for segment in segments])[segment_of].to(device, non_blocking=True)
    end = torch.tensor([segment.prefix_end for segment in segments])[segment_of].to(device, non_blocking=True)
    of_token = segment_of.to(device, non_blocking=True)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (of_token[query] == of_token[key]) & (key <= query)
        return own | ((begin[query] <= key) & (key < end[query]))

    length = segments[-1].end
    return create_block_mask(visible, None, None, length, length, device=str(device))


def segment_attention(
    module: nn.Module,
    query: Tensor,  # (B, heads, T, D)
    key: Tensor,  # (B, key_value_heads, T, D)
    value: Tensor,  # (B, key_value_heads, T, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # (B, T, heads, D)
    """An attention function of transformers: SDPA, segment by segment where the mask carries segments."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    segments = _segments(attention_mask)
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"attention by segments does not know {name}={options[name]!r}")
    window, longest = options.get("sliding_window"), max(map(_span, segments))
    if window is not None and window < longest:
        raise ValueError(
            f"attention by segments has no sliding window: the model's is {window}, a sequence has {longest} tokens"
        )
    lengths = [segment.end - segment.start for segment in segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    place = {segment.start: index for index, segment in enumerate(segments)}
    found = []
    for segment, q, k, v in zip(segments, queries, keys, values, strict=True):
        prefix = segment.prefix_end - segment.prefix_start
        if prefix:
            of = place[segment.prefix_start]
            k = torch.cat([keys[of][:, :, :prefix], k], dim=2)
            v = torch.cat([values[of][:, :, :prefix], v], dim=2)
        found.append(_causal(q, k, v, dropout, scaling))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def _segments(mask: Tensor | None) -> tuple[Segment, ...] | None:
    """What the mask carries; a copy (on another device, from another process, of a checkpoint) has its values alone."""
    if mask is None or mask.dtype != torch.int64:  # transformers' own masks are bool or floating
        return None
    if not hasattr(mask, "segments"):
        mask.segments = tuple(Segment(*values) for values in mask[0, 0].tolist())  # type: ignore[attr-defined]
    return mask.segments  # type: ignore[attr-defined]


def _span(segment: Segment) -> int:
    return segment.end - segment.start + segment.prefix_end - segment.prefix_start


def _causal(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> Tensor:
    """Causal attention of the last positions among all that there are keys of."""
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scale, "enable_gqa": key.shape[1] != query.shape[1]}
    rows, columns = query.shape[2], key.shape[2]
    if rows == columns:
        return scaled_dot_product_attention(query, key, value, is_causal=rows > 1, **options)
    if query.is_cuda:
        bias = causal_lower_right(rows, columns)
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, **options)
    before, found = columns - rows, []
    for begin in range(0, rows, CHUNK):
        end = min(begin + CHUNK, rows)
        seen = before + end
        mask = torch.ones(end - begin, seen, dtype=torch.bool, device=query.device).tril(before + begin)
        found.append(
            scaled_dot_product_attention(
                query[:, :, begin:end], key[:, :, :seen], value[:, :, :seen], attn_mask=mask, **options
            )
        )
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def set_attention(model: Any, attention: str = "sdpa") -> None:
    """Make a transformers model take segments: as `segment_mask` for "sdpa", as `block_mask` for "flex".

    Calls without segments (generation, padded batches) go on as before.

    Raises:
        ValueError, TypeError: another attention; a model that has none of transformers' attention functions to set.
    """
    check_choice("attention", attention, ATTENTIONS)
    model = unwrap(model)
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers model, got {describe(model)}")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if attention == "flex":
        model.set_attn_implementation("flex_attention")
        return
    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
