"""curves.png: loss, rewards, margins and accuracy over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastpref.training.prepare import Run

Record = dict[str, Any]

CHOSEN, REJECTED, NEUTRAL, SECOND = "#1b7837", "#b2182b", "#2b5c8a", "#b8720a"


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
    """Draw the run's records, training as lines and evaluation as points, into the PNG file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained", dpi=130)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    loss, rewards, margins = figure.subplots(1, 3)
    _draw(loss, history, "loss", NEUTRAL, "loss")
    loss.set_title("Loss")
    _draw(rewards, history, "rewards/chosen", CHOSEN, "chosen")
    _draw(rewards, history, "rewards/rejected", REJECTED, "rejected")
    rewards.axhline(0, color="0.35", linewidth=0.8, linestyle=":")
    rewards.set_title("Rewards")
    _draw(margins, history, "rewards/margins", NEUTRAL, "margin (left)")
    margins.set_title("Reward margin and accuracy")
    accuracy = margins.twinx()
    _draw(accuracy, history, "rewards/accuracies", SECOND, "accuracy (right)")
    accuracy.set_ylim(-0.02, 1.02)
    accuracy.spines[["top", "left"]].set_visible(False)
    accuracy.tick_params(axis="y", colors=SECOND)
    margins.tick_params(axis="y", colors=NEUTRAL)
    for axes in (loss, rewards, margins):
        axes.set_xlabel("step")
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for group in ((loss,), (rewards,), (margins, accuracy)):
        lines = [line for axes in group for line in axes.get_legend_handles_labels()[0]]
        # Below the axes: inside there is no place that no curve can reach.
        group[0].legend(
            handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False, fontsize=8
        )
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _draw(axes: Any, history: Sequence[Record], name: str, color: str, label: str) -> None:
    train = [(record["step"], record[name]) for record in history if name in record]
    held_out = [(record["step"], record[f"eval_{name}"]) for record in history if f"eval_{name}" in record]
    if train:
        marker = "o" if len(train) < 3 else None
        axes.plot(*zip(*train, strict=True), color=color, linewidth=1.8, marker=marker, label=label)
    if held_out:
        points = {
            "marker": "o",
            "markerfacecolor": "white",
            "markersize": 5,
            "linestyle": "--",
            "linewidth": 1,
        }
        axes.plot(*zip(*held_out, strict=True), color=color, label=f"{label}, held out", **points)
