"""curves.png: loss, rewards, margin, accuracy, log-probs and penalty over the steps of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastpref.training.run import Run

Record = dict[str, Any]

REFRESH_SECONDS = 30.0
COLUMNS = 3
SMOOTHED_FROM = 30  # records: from here on their running mean is drawn, and they themselves behind it
CHOSEN, REJECTED, NEUTRAL, SECOND = "#1b7837", "#b2182b", "#2b5c8a", "#b8720a"


@dataclass(frozen=True)
class _Curve:
    name: str
    label: str
    color: str
    marker: str = "o"


@dataclass(frozen=True)
class _Panel:
    title: str
    curves: Sequence[_Curve]
    line: float | None = None  # drawn across, for the eye
    share: bool = False  # of values in [0, 1]


class Clock:
    """When to draw again: not before half a minute has passed, and fifty times what drawing took."""

    def __init__(self) -> None:
        self._next = time.monotonic() + REFRESH_SECONDS

    @property
    def due(self) -> bool:
        return time.monotonic() >= self._next

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        now = time.monotonic()
        self._next = now + max(REFRESH_SECONDS, 50 * (now - self._began))


def draw(run: Run, history: Sequence[Record]) -> None:
    """curves.png in the run folder; a line instead where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        run.console.say('matplotlib is not installed, so there is no curves.png: pip install "fastpref[train]"')
        return
    options = run.config.loss_options if isinstance(run.config.loss_options, dict) else {}
    details = "".join(f", {name} {value}" for name, value in options.items())
    title = f"{run.spec.name}: beta {run.config.beta:g}{details}, learning rate {run.learning_rate:g}"
    plot_curves(history, run.output_dir / "curves.png", title=title)


def plot_curves(history: Sequence[Record], path: Path, *, title: str) -> None:
    """Draw the run's records, training as lines and evaluation as hollow points, into the PNG file `path`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = {name.removeprefix("eval_") for record in history for name in record}
    panels = [panel for panel in _panels(names) if any(curve.name in names for curve in panel.curves)]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 3.5 * rows + 0.4), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    last = max((record["step"] for record in history), default=1)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        if panel.line is not None:
            axes.axhline(panel.line, color="0.35", linewidth=0.8, linestyle=":")
        for curve in panel.curves:
            _draw(axes, history, curve)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlim(0, last * 1.03 + 0.1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if place >= len(panels) - COLUMNS:
            axes.set_xlabel("step", fontsize=8, loc="right")
        if panel.share:
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6, min_n_ticks=3))
        # Below the axes: inside there is no place that no curve can reach.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False, fontsize=8)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _panels(names: set[str]) -> list[_Panel]:
    penalty = next((name for name in sorted(names) if name.endswith("/penalty")), None)
    rewards = [_Curve("rewards/chosen", "chosen", CHOSEN, "^"), _Curve("rewards/rejected", "rejected", REJECTED, "v")]
    logps = [_Curve("logps/chosen", "chosen", CHOSEN, "^"), _Curve("logps/rejected", "rejected", REJECTED, "v")]
    if penalty is None:
        sixth = _Panel("Gradient norm", [_Curve("grad_norm", "gradient norm", NEUTRAL)])
    else:
        sixth = _Panel(f"Penalty of {penalty.removesuffix('/penalty')}", [_Curve(penalty, "penalty", SECOND)], line=0)
    return [
        _Panel("Loss", [_Curve("loss", "loss", NEUTRAL)]),
        _Panel("Rewards", rewards, line=0),
        _Panel("Reward margin", [_Curve("rewards/margins", "margin", NEUTRAL)], line=0),
        _Panel("Accuracy", [_Curve("rewards/accuracies", "accuracy", SECOND)], line=0.5, share=True),
        _Panel("Log-probs of the responses", logps),
        sixth,
        _Panel("KL estimate", [_Curve("kl", "KL", SECOND)], line=0),
    ]


def _draw(axes: Any, history: Sequence[Record], curve: _Curve) -> None:
    train = [(record["step"], record[curve.name]) for record in history if curve.name in record]
    held_out = [(record["step"], record[f"eval_{curve.name}"]) for record in history if f"eval_{curve.name}" in record]
    style = {"color": curve.color, "label": curve.label}
    if len(train) >= SMOOTHED_FROM:
        steps, values = zip(*train, strict=True)
        axes.plot(steps, values, color=curve.color, linewidth=0.8, alpha=0.3)
        axes.plot(steps, _running_mean(values, len(values) // 15), linewidth=1.8, **style)
    elif train:
        few = {"marker": curve.marker, "markersize": 5} if len(train) <= 10 else {}
        axes.plot(*zip(*train, strict=True), linewidth=1.6, **few, **style)
    if held_out:
        points = {"marker": curve.marker, "markerfacecolor": "white", "markersize": 5, "linestyle": "--"}
        axes.plot(
            *zip(*held_out, strict=True), linewidth=1, **points, color=curve.color, label=f"{curve.label}, held out"
        )


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of each value and its `width` nearest neighbours on either side, or as many as there are."""
    near = [values[max(0, place - width) : place + width + 1] for place in range(len(values))]
    return [sum(some) / len(some) for some in near]
