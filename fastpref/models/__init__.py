"""Hugging Face causal LMs: log-probs without logits, and rows that hold several sequences."""

from fastpref.models.api import ScoredTokens, model_logps, model_token_logps
from fastpref.models.head import SOFTCAPS
from fastpref.models.packing import PackedRow, pack_pairs, shared_length
from fastpref.models.segments import Segment, set_attention
from fastpref.models.support import why_not_packed

__all__ = [
    "SOFTCAPS",
    "PackedRow",
    "ScoredTokens",
    "Segment",
    "model_logps",
    "model_token_logps",
    "pack_pairs",
    "set_attention",
    "shared_length",
    "why_not_packed",
]
