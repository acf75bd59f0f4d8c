"""Whether a model can be given rows that hold several sequences: by what its config says, then by a trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastpref.checks import check_choice
from fastpref.models.head import unwrap
from fastpref.models.packing import pack_pairs
from fastpref.models.segments import ATTENTIONS, set_attention

# Layers whose output for a token depends on nothing but the keys and values that attention shows it.
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "dense", "sparse")
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
# Rotary positions that change with the longest sequence: where the length stands beyond which they do.
LIMITS = {"longrope": "original_max_position_embeddings", "dynamic": "max_position_embeddings"}

# Two pairs of the trial: lengths of prompt, chosen and rejected response.
TRIAL = ((5, 7, 6), (4, 3, 8))
FLOAT32_TOLERANCE = 1e-5
TF32_TOLERANCE = 4e-3
NOISE = 8.0  # times the difference that batching alone makes, which in a deep model is more than one rounding
MOST_NOISE = 30.0  # times the tolerance: a difference beyond that is no rounding


def why_not_packed(model: Any, *, max_length: int, attention: str = "sdpa") -> str | None:
    """None where rows of `pack_pairs` give the log-probs of rows of their own; else the reason, with the model's name.

    Args:
        model: a transformers causal LM, as it will run: device, dtype, adapters.
        max_length: tokens of the longest sequence; a sliding window at least as long hides nothing.

    The model's attention is as before afterwards: `set_attention` is what sets it.
    """
    check_choice("attention", attention, ATTENTIONS)
    causal_lm = unwrap(model)
    name = type(getattr(causal_lm, "get_base_model", lambda: causal_lm)()).__name__
    reason = _by_config(causal_lm, max_length)
    if reason is None and attention == "flex" and causal_lm.device.type == "cpu":
        reason = "FlexAttention has no backward on a CPU"
    if reason is None and causal_lm.device.type != "meta":  # without numbers there is nothing to try
        try:
            reason = _by_trial(causal_lm, attention)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code makes of an input that it does not know
            reason = f"it fails on one ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None if reason is None else f"{name} cannot be given several sequences in a row: {reason}"


def _by_config(model: Any, max_length: int) -> str | None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers, whose state runs on from one sequence into the next"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_LAYERS))
    if kinds:
        return f"it has layers of other kinds than attention over all keys ({', '.join(kinds)})"
    for attribute in WINDOWS:
        window = getattr(config, attribute, None)
        if isinstance(window, int) and 0 < window < max_length:
            return f"its attention has a window ({attribute}={window}) below max_length={max_length}"
    rotary = getattr(config, "rope_parameters", None) or {}
    for of_kind in (rotary, *rotary.values()):  # some models have several, by the kind of layer
        kind = of_kind.get("rope_type") if isinstance(of_kind, Mapping) else None
        limit = {**vars(config), **of_kind}.get(LIMITS[kind]) if kind in LIMITS else None
        if limit is not None and limit < max_length:
            return (
                "its rotary positions are others for a whole row as soon as one of its sequences is longer than "
                f"{limit} tokens (rope_type={kind}), and max_length={max_length}"
            )
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced (transformers' attention interface is not used)"
    return None


@torch.no_grad()
def _by_trial(model: Any, attention: str) -> str | None:
    generator = np.random.default_rng(0)
    vocab = model.get_input_embeddings().weight.shape[0]

    def tokens(count: int) -> Any:
        return generator.integers(0, vocab, count)

    chosen: list[tuple[Any, int]] = []
    rejected: list[tuple[Any, int]] = []
    for lengths in TRIAL:
        prompt, *responses = (tokens(length) for length in lengths)
        for found, response in zip((chosen, rejected), responses, strict=True):
            found.append((np.concatenate([prompt, response]), len(prompt)))
    sequences = [*chosen, *rejected]
    with _evaluating(model):
        alone = _own_rows(model, sequences, batched=False)
        noise = _largest(_own_rows(model, sequences, batched=True) - alone)
        with _attention(model, attention):
            row = pack_pairs(chosen, rejected, attention=attention, device=model.device)
            logits = model(**row.inputs, use_cache=False).logits[0].float()
        together = logits[row.scored.source]
    size = _largest(alone)
    difference, tolerance = _largest(together - alone), _tolerance(model) * size
    allowed = max(tolerance, min(NOISE * noise, MOST_NOISE * tolerance))
    if not difference <= allowed:
        return f"its logits differ by {difference:.2g} from those of rows of their own ({size:.2g} at most)"
    return None


def _own_rows(model: Any, sequences: list[tuple[Any, int]], *, batched: bool) -> Tensor:  # (N, V) float32
    """The logits that predict the responses' tokens, of a row a sequence: one by one, or padded on the right."""
    rows = pad_sequence([torch.from_numpy(ids) for ids, _ in sequences], batch_first=True).to(model.device)
    lengths = [len(ids) for ids, _ in sequences]
    if batched:
        seen = torch.arange(rows.shape[1])[None] < torch.tensor(lengths)[:, None]
        logits = list(model(input_ids=rows, attention_mask=seen.long().to(model.device), use_cache=False).logits)
    else:
        each = zip(rows, lengths, strict=True)
        logits = [model(input_ids=row[None, :length], use_cache=False).logits[0] for row, length in each]
    starts = (start for _, start in sequences)
    found = zip(logits, starts, lengths, strict=True)
    return torch.cat([values[start - 1 : length - 1].float() for values, start, length in found])


def _tolerance(model: Any) -> float:
    if model.dtype != torch.float32:
        return 4 * torch.finfo(model.dtype).eps
    tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return TF32_TOLERANCE if tf32 else FLOAT32_TOLERANCE


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was:
            module.training = True


@contextmanager
def _attention(model: Any, attention: str) -> Iterator[None]:
    before = model.config._attn_implementation
    set_attention(model, attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
