"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpref.training.advice import Advice
from fastpref.training.dry_run import DryRun


@dataclass
class TrainResult:
    """What `fastpref.train` gives back: the model in evaluation mode; `history` holds the records of metrics.jsonl.

    `stopped` is None for a run that made all its steps; else the signal, "SIGTERM" or "SIGINT", that stopped it after
    `step` steps. Then a checkpoint holds them, and there is no final model. `dry_run` is None but for a dry run, which
    has made 0 steps: what it found, beside a model without numbers (on the meta device). `advice` holds what the loop
    has advised, at most a line of each kind. Its text leaves out the model and the lists.
    """

    output_dir: Path
    model: Any = field(repr=False)
    step: int
    history: list[dict[str, Any]] = field(repr=False)
    stopped: str | None = None
    dry_run: DryRun | None = field(default=None, repr=False)
    advice: list[Advice] = field(default_factory=list, repr=False)
