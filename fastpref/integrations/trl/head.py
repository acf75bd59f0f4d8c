"""`model(..., labels=labels, fused_lm_head=True)` by fastpref: TRL's fused head, replaced.

TRL gives its models a second forward, whose per-token outputs feed all that its trainers compute. `add_fast_head` gives
them ours instead, with the same arguments and outputs: the losses, mixes, weightings, metrics and adapters stay TRL's
own code, and the same numbers go into it.

What makes it faster: scored positions alone reach the head, whose tiles are sized for the machine and are kept for the
backward; the batch's padding is cut, and what the two sequences of a pair have in common goes through the model once.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from fastpref.checks import check_choice
from fastpref.extras import EXTRAS, TokenExtras
from fastpref.integrations.trl.rows import IGNORE, SharedRow, share_rows
from fastpref.models import ScoredTokens, model_token_logps, set_attention, why_not_packed
from fastpref.models.segments import NAME as SEGMENTS

LAYOUTS = ("shared", "padded")
# What a shared row is made of. With anything else among a forward's arguments (images, positions, embeddings, a cache)
# rows stay as they are.
SHARED_INPUTS = {"input_ids", "attention_mask"}

logger = logging.getLogger(__name__)


def add_fast_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    layout: str = "shared",
    max_length: int | None = None,
) -> None:
    """TRL's `add_fused_lm_head`, with fastpref behind it: `model` gets a forward that knows `fused_lm_head=True`.

    Args:
        model: a transformers causal LM, not wrapped yet (of a PEFT model its base).
        temperature, outputs: as TRL's.
        cast_lm_head_to_fp32: not offered; products are summed in float32 anyway.
        layout: "shared" puts a batch of pairs, [all chosen; all rejected], into one row, where the model and the batch
            allow that, and says why where they do not; "padded" never does.
        max_length: tokens of the longest sequence, by default the most positions that the model has; shared rows
            are not used with a model whose attention has a shorter window.

    Without `fused_lm_head=True` the forward is the original one, with the attention that the model had.
    """
    check_choice("layout", layout, LAYOUTS)
    if cast_lm_head_to_fp32:
        raise ValueError("cast_lm_head_to_fp32=True is not offered: load the model with dtype=torch.float32 for it")
    for name in outputs:
        check_choice("outputs", name, ("log_probs", *EXTRAS))
    FastHead(model, temperature, tuple(name for name in EXTRAS if name in outputs), layout, max_length)


class FastHead:
    """What a model's forward does with `fused_lm_head=True`, and which attention it has when."""

    def __init__(
        self, model: Any, temperature: float, extras: tuple[str, ...], layout: str, max_length: int | None
    ) -> None:
        # A copy of the model has its own. Of several, of trainers one after the other, the last one is in charge.
        heads: list[FastHead] = vars(model).setdefault("fastpref_heads", [])
        for earlier in heads:
            earlier.restore_attention()
        self.model = model
        self.temperature = temperature
        self.extras = extras
        self.longest: int | None = None  # tokens of the longest sequence that may share a row
        self.shares = layout == "shared" and self._can_share(max_length)
        self.own_attention: str | None = None  # the model's, while it has the one of shared rows
        self.original: Callable[..., Any] = model.forward
        text = model.config.get_text_config()
        self.config = text
        # Rotary attention sees how far tokens are apart; a table of learned positions, where they stand.
        self.rotary = getattr(text, "rope_parameters", None) is not None
        place, names = len(heads), list(inspect.signature(type(model).forward).parameters)[1:]

        # generate() checks its arguments against the signature, so it stays the original's.
        @functools.wraps(type(model).forward)
        def forward(model: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            head: FastHead = model.fastpref_heads[place]
            if fused_lm_head:
                return head.score(**dict(zip(names, args, strict=False)), **kwargs)
            shared = head.own_attention is not None
            head.restore_attention()
            outputs = head.original(*args, **kwargs)
            if shared and torch.is_grad_enabled():  # a row that came before may yet be run again, in a backward
                head._segment_attention()
            return outputs

        model.forward = types.MethodType(forward, model)
        heads.append(self)

    def score(
        self,
        *,
        labels: Tensor | None = None,  # (B, T) int64
        shift_labels: Tensor | None = None,  # (B, T) int64, aligned
        num_items_in_batch: Any = None,
        **inputs: Any,
    ) -> FusedCausalLMOutput:
        given = labels if shift_labels is None else shift_labels
        if given is None:
            raise ValueError("fused_lm_head=True needs labels or shift_labels")
        # PEFT passes what it was not given as None.
        inputs = {name: value for name, value in inputs.items() if value is not None and name != "use_cache"}
        if getattr(self.config, "output_router_logits", False):
            inputs.setdefault("output_router_logits", True)
        elif not inputs.get("output_router_logits", True):
            del inputs["output_router_logits"]
        shared = self._shared(inputs, given) if self.shares and shift_labels is None else None
        if shared is not None:
            self._segment_attention()
            values, model_outputs = self._run(shared.row.inputs, shared.row.scored)
            tokens, *others = _placed(values, shared.places, (len(given), given.shape[1] - 1))
        elif shift_labels is None:
            values, model_outputs = self._run({**inputs, "labels": given}, None)
            tokens, *others = (x if x is None else x[:, 1:] for x in values)
        else:
            places = (given.flatten() != IGNORE).nonzero().squeeze(1)
            ends = (given != IGNORE).sum(1).cumsum(0)
            scored = ScoredTokens(places, given.flatten()[places], torch.cat([ends.new_zeros(1), ends]))
            values, model_outputs = self._run(inputs, scored)
            tokens, *others = _placed(values, places, given.shape)
        mask = (given[:, 1:] if shift_labels is None else given) != IGNORE
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -tokens.sum() / count
        aux_loss = None
        if inputs.get("output_router_logits"):
            aux_loss = getattr(model_outputs, "aux_loss", None)
            if aux_loss is None:
                raise ValueError(f"{type(self.model).__name__} gives no aux_loss with output_router_logits=True")
            loss = loss + getattr(self.config, "router_aux_loss_coef", 0.0) * aux_loss
        extras = TokenExtras(*others)._asdict()
        return FusedCausalLMOutput(loss=loss, log_probs=tokens, label_mask=mask, aux_loss=aux_loss, **extras)

    def _run(self, inputs: dict[str, Any], scored: ScoredTokens | None) -> tuple[tuple[Tensor | None, ...], Any]:
        """Log-probs and extras, and the model's outputs."""
        tokens, *extras, outputs = model_token_logps(
            self.model,
            inputs,
            scored=scored,
            temperature=self.temperature,
            extras=self.extras,
            return_outputs=True,
            run=self.original,
        )
        return (tokens, *(extras[0] if extras else TokenExtras())), outputs

    def _shared(self, inputs: dict[str, Any], labels: Tensor) -> SharedRow | None:
        """The batch as one row; TRL asks for policy and reference with the same labels, and the row is kept there."""
        other = sorted(set(inputs) - SHARED_INPUTS)
        if other or "input_ids" not in inputs:
            say(f"a batch has {', '.join(other) or 'no input_ids'}")
            return None
        input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if self.longest is not None and input_ids.shape[-1] > self.longest:
            say(f"a batch is longer than {self.longest} tokens, up to which the model can")
            return None
        known = getattr(labels, "fastpref_row", None)
        if known is not None and known[0] is input_ids and known[1] is mask and known[2] == self.rotary:
            found = known[3]
        else:
            found = share_rows(input_ids, mask, labels, left_padding=self.rotary)
            labels.fastpref_row = (input_ids, mask, self.rotary, found)  # type: ignore[attr-defined]
        if isinstance(found, str):
            say(found)
            return None
        return found

    def _can_share(self, max_length: int | None) -> bool:
        text = self.model.config.get_text_config()
        longest = max_length or getattr(text, "max_position_embeddings", None) or 2**31
        if any(hasattr(weight, "ds_id") or hasattr(weight, "full_tensor") for weight in self.model.parameters()):
            reason: str | None = "the model's weights are sharded, so that it cannot be tried"
        else:
            reason = why_not_packed(self.model, max_length=2**31)
            if reason is not None:  # perhaps for sequences of any length, perhaps for long ones alone
                self.longest, reason = longest, why_not_packed(self.model, max_length=longest)
        if reason is not None:
            say(reason)
        return reason is None

    def _segment_attention(self) -> None:
        # It stays until another call wants the model's own: checkpointed layers run again in the backward.
        if self.model.config._attn_implementation != SEGMENTS:
            self.own_attention = self.model.config._attn_implementation
            set_attention(self.model)

    def restore_attention(self) -> None:
        """Give the model the attention back that it had before a shared row came."""
        if self.own_attention is not None:
            self.model.set_attn_implementation(self.own_attention)
            self.own_attention = None


def _placed(values: Sequence[Tensor | None], places: Tensor, shape: Sequence[int]) -> list[Any]:
    """Each of (N,) in a tensor of that shape, 0 where nothing is scored."""
    return [None if x is None else x.new_zeros(math.prod(shape)).index_copy(0, places, x).view(*shape) for x in values]


@functools.cache  # once for each reason
def say(reason: str) -> None:
    logger.warning("layout=shared is not possible: %s. Rows are padded", reason)
