"""One line of advice when a run shows the known failure of margin losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpref.losses import LossSpec

# Below these a fall is noise: a reward of -0.05 is a chosen response half a nat less likely at beta = 0.1.
REWARD_FALL = 0.05
LOSS_FALL = 0.02
RECENT = 5


def falling_chosen_reward(history: Sequence[dict[str, Any]], spec: LossSpec) -> str | None:
    """Advice if the mean chosen reward of the last records is negative, and the loss below the first record's."""
    records = [record for record in history if "rewards/chosen" in record]
    if not spec.needs_reference or len(records) < 2:
        return None
    recent = records[1:][-RECENT:]  # a single batch may show anything
    chosen = sum(record["rewards/chosen"] for record in recent) / len(recent)
    loss = sum(record["loss"] for record in recent) / len(recent)
    if chosen > -REWARD_FALL or loss > records[0]["loss"] - LOSS_FALL:
        return None
    other = "a larger lam" if spec.name == "dpop" else "loss=dpop"
    return (
        "advice: the loss falls, but so does the log-prob of the chosen responses (reward "
        f"{chosen:.3f}): the margin grows by making both less likely. Remedies: {other}, "
        "margin_clip in loss_options, a smaller beta or a smaller learning_rate."
    )
