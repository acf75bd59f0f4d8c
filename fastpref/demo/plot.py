"""rewards.png: what DPO and DPOP did to the rewards of both answers, side by side on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

CHOSEN, REJECTED, GREY = "#1b7837", "#b2182b", "0.35"
TITLES = {"dpo": "DPO", "dpop": "DPOP"}


def held_out(history: Sequence[Record], name: str) -> list[tuple[int, float]]:
    """(step, value) of a held-out metric; a reward starts at 0, where policy and reference are the same model."""
    points = [(record["step"], record[f"eval_{name}"]) for record in history if f"eval_{name}" in record]
    return [(0, 0.0), *points]


def training(history: Sequence[Record], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in history if name in record]


def plot_rewards(histories: dict[str, Sequence[Record]], path: Path, *, settings: str) -> None:
    """Draw one panel for each run in `histories` (by the name of its loss) into the PNG file `path`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 5), layout="constrained", dpi=150)
    figure.suptitle("Rewards of the same two answers under DPO and under DPOP", fontsize=15, fontweight="bold")
    panels = figure.subplots(1, len(histories), sharex=True, sharey=True)
    for axes, (loss, history) in zip(panels, histories.items(), strict=True):
        axes.axhline(0, color=GREY, linewidth=1.0)
        last = max(step for step, _ in held_out(history, "rewards/chosen"))
        # The chosen answer's label stands above the end of its line, the other's below: close ends stay readable.
        for name, color, side in (("chosen", CHOSEN, "bottom"), ("rejected", REJECTED, "top")):
            seen = training(history, f"rewards/{name}")
            axes.plot(*zip(*seen, strict=True), color=color, linewidth=1.0, alpha=0.35)
            points = held_out(history, f"rewards/{name}")
            axes.plot(*zip(*points, strict=True), color=color, linewidth=2.4, marker="o", markersize=5)
            axes.annotate(
                f"{name}\n{points[-1][1]:+.2f}".replace("-", "\N{MINUS SIGN}"),
                points[-1],
                xytext=(8, 0),
                textcoords="offset points",
                color=color,
                fontsize=12,
                fontweight="bold",
                va=side,
                annotation_clip=False,
            )
        axes.set_title(TITLES[loss], fontsize=14)
        axes.set_xlabel("optimiser step", fontsize=12)
        # Room for the labels at the lines' ends.
        axes.set_xlim(0, last * 1.25)
        axes.margins(y=0.16)
        axes.set_xticks([tick for tick in MaxNLocator(5, integer=True).tick_values(0, last) if tick <= last])
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11)
        note = "below 0: less likely than before training"
        axes.text(0.02, 0.02, note, transform=axes.transAxes, fontsize=10, color=GREY, style="italic")
    panels[0].set_ylabel(r"reward  $\beta\,(\log\pi - \log\pi_{\mathrm{ref}})$", fontsize=13)
    caption = f"thick: held-out pairs, thin: training pairs.  {settings}"
    figure.supxlabel(caption, fontsize=10, color=GREY)
    figure.savefig(path)
