"""Log-probs and preference gradients from hidden states and the head's weight: the logits never exist."""

from __future__ import annotations

from fastpref.linear.api import linear_sequence_logps, linear_token_logps
from fastpref.linear.preference import LinearPreferenceOutput, linear_preference_loss

__all__ = ["LinearPreferenceOutput", "linear_preference_loss", "linear_sequence_logps", "linear_token_logps"]
