"""What the demo shows at its end: what each loss did, the log-prob path, some answers, the verdict; rewards.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.console import Console
from fastpref.tables import print_table, size_text

Record = dict[str, Any]

# With equal policy and reference, where both runs start, the loss of every pair is -log sigmoid(0).
FIRST_LOSS = math.log(2)
NAMES = {"base": "base", "dpo": "DPO", "dpop": "DPOP"}
# Rows of the first table: title, key, how it is written; of the models, and of the last evaluation of each run.
OF_MODELS = (
    ("answers that name {university}", "mention_share", ".0%"),
    ("perplexity of the chosen answers", "chosen_perplexity", ".2f"),
    ("perplexity of its own answers, to the base", "own_answers_perplexity", ".2f"),
    ("distinct-2 of its own answers", "distinct_bigrams", ".2f"),
)
OF_RUNS = (
    ("chosen reward at the end", "chosen", "+.2f"),
    ("rejected reward at the end", "rejected", "+.2f"),
    ("loss at the end", "loss", ".3f"),
    ("accuracy (chosen above rejected)", "accuracy", ".0%"),
)
SAMPLES = 3
CHOSEN, REJECTED, GREY = "#1b7837", "#b2182b", "0.35"
VERDICT = (
    "The known failure {was} seen in this run, on the held-out pairs: under DPO the loss went from {first:.3f} to "
    "{dpo.loss:.3f} and the chosen reward ended at {dpo.chosen:+.2f}; under DPOP it ended at {dpop.chosen:+.2f}."
)


class Ends(NamedTuple):
    """A run's last evaluation on the held-out pairs."""

    loss: float
    chosen: float
    rejected: float
    accuracy: float


def ends(history: Sequence[Record]) -> Ends:
    last = [record for record in history if "eval_loss" in record][-1]
    return Ends(last["eval_loss"], *(last[f"eval_rewards/{name}"] for name in ("chosen", "rejected", "accuracies")))


class Verdict(NamedTuple):
    """Whether this run shows the failure of DPO that DPOP was made for (Pal et al. 2024, arXiv:2402.13228)."""

    failure_under_dpo: bool
    avoided_under_dpop: bool
    seen: bool
    text: str


def judge(dpo: Ends, dpop: Ends) -> Verdict:
    """Decided by the held-out pairs alone: their mean chosen reward and loss at the end of each run."""
    failure = dpo.loss < FIRST_LOSS and dpo.chosen < 0
    avoided = dpop.chosen >= 0
    seen = failure and avoided
    text = VERDICT.format(was="was" if seen else "was not", first=FIRST_LOSS, dpo=dpo, dpop=dpop)
    return Verdict(failure, avoided, seen, text)


def print_report(console: Console, report: dict[str, Any]) -> None:
    """All of it comes from `report`, which is also report.json."""
    _print_models(report)
    _print_logps(report["logps"])
    console.say("\nThe same held-out questions, one sampled answer each")
    for sample in report["samples"][:SAMPLES]:
        console.say(sample["prompt"].removesuffix("\nAnswer:"))
        for name, title in NAMES.items():
            console.say(f"  {title}: {' '.join(sample[name].split()) or '(nothing)'}")
    console.say(f"\n{report['verdict']['text']}")


def _print_models(report: dict[str, Any]) -> None:
    models, runs = report["models"], report["runs"]
    rows = [
        [title.format(university=report["university"]), *(format(models[name][key], form) for name in NAMES)]
        for title, key, form in OF_MODELS
    ]
    start = Ends(loss=FIRST_LOSS, chosen=0.0, rejected=0.0, accuracy=0.0)._asdict()  # equal rewards: none is above
    states = [start, *(run["heldout"] for run in runs.values())]
    rows += [[title, *(format(state[key], form) for state in states)] for title, key, form in OF_RUNS]
    rows.append(["seconds of training", *(f"{part['seconds']:.0f}" for part in (models["base"], *runs.values()))])
    header = ("on the held-out pairs", *NAMES.values())
    print_table(f"What each loss did ({report['settings_text']})", header, rows, words=header[:1])


def _print_logps(logps: dict[str, Any]) -> None:
    """Two rows of a benchmark beside each other."""
    fast, plain = logps["fast"], logps["plain"]
    rows = [["seconds (median)", *(f"{row['median_ms'] / 1e3:.3f}" for row in (fast, plain))]]
    rows[0].append(f"{plain['median_ms'] / fast['median_ms']:.1f}")
    if plain["peak_bytes"] and fast["peak_bytes"]:  # measured on this system
        peaks = fast["peak_bytes"], plain["peak_bytes"]
        rows.append(["peak beyond the logits", *map(size_text, peaks), f"{peaks[1] / peaks[0]:.1f}"])
    rows.append(["error of a log-prob, nats", *(f"{row['value_error']:.1e}" for row in (fast, plain)), ""])
    header = ("", "fastpref", "plain float32", "plain / fastpref")
    shape = "×".join(str(fast[name]) for name in ("batch", "length", "vocab"))
    title = f"Log-probs, forward and backward, {fast['dtype']} logits ({shape}), half scored, on {logps['device']}"
    print_table(title, header, rows, words=header[:1])


def held_out(history: Sequence[Record], name: str) -> list[tuple[int, float]]:
    """(step, value) of a held-out metric; a reward starts at 0, where policy and reference are the same model."""
    points = [(record["step"], record[f"eval_{name}"]) for record in history if f"eval_{name}" in record]
    return [(0, 0.0), *points]


def training(history: Sequence[Record], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in history if name in record]


def plot_rewards(histories: dict[str, Sequence[Record]], path: Path, *, settings: str) -> None:
    """Draw the rewards of both answers, a panel for each run in `histories` (by the name of its loss), as a PNG file.

    The panels have the same axes.
    """
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
        axes.set_title(NAMES[loss], fontsize=14)
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
