"""The study's pictures: training, margins, drift from the base; win rates, answers, what each swept setting changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpref.benchmarks.study.curves import Points, accuracies, log_ratios, mean_curve, points, rewards
from fastpref.benchmarks.study.curves import margins as margins_of
from fastpref.benchmarks.study.reading import MEASURES, SET_TITLES, SHORT_TITLES, TITLES, Cell, Study
from fastpref.benchmarks.study.words import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which differ for every kind of colour vision; TRL's two runs are also dashed.
COLORS = {
    "base": "0.55",
    "dpo": "#D55E00",
    "dpop": "#0072B2",
    "sft": "#009E73",
    "kl_sft": "#CC79A7",
    "trl": "0.15",
    "trl_matched": "#E69F00",
}
DASHED = ("trl", "trl_matched")
CHOSEN, REJECTED, NEUTRAL, GREY = "#0072B2", "#D55E00", "0.25", "0.35"
# Purple to orange, pale in the middle: told apart by every kind of colour vision, and in grey by the numbers.
MAP = "PuOr_r"
# Nats; beyond this a straight axis leaves no room for those near zero.
FAR = 100.0
DPI = 110
COLUMNS = 3


def pictures(study: Study) -> dict[str, Callable[[Path], None]]:
    """By file name, what draws each picture for which the results have something to draw."""
    trained = [name for name in study.sets if study.present(name, base=False)]
    found: dict[str, Callable[[Path], None]] = {
        f"training-{name}.png": functools.partial(training, study, name) for name in trained
    }
    if trained:
        of_all = (margins, drift, wins, answers)
        found |= {f"{draw.__name__}.png": functools.partial(draw, study) for draw in of_all}
    if study.results["sweep"]:
        found["sweep.png"] = functools.partial(sweep, study)
    return found


def training(study: Study, pair_set: str, path: Path) -> None:
    """A column for each method: its loss, and under it what becomes of chosen and rejected rewards."""
    from matplotlib.ticker import MaxNLocator

    methods = [name for name in study.present(pair_set, base=False) if _histories(study, pair_set, name)]
    columns = 2 if len(methods) == 4 else min(COLUMNS, len(methods))
    bands = -(-len(methods) // columns)
    figure = new_figure(10.5, 5.0 * bands + 0.5, f"Training on the {SET_TITLES[pair_set]} set")
    parts = figure.subfigures(bands, 1, squeeze=False)[:, 0]
    for band, part in enumerate(parts):
        here = methods[band * columns : (band + 1) * columns]
        grid = part.subplots(2, columns, squeeze=False, height_ratios=[2, 3])
        for unused in range(len(here), columns):
            for axes in grid[:, unused]:
                axes.set_visible(False)
        for place, method in enumerate(here):
            cells = _histories(study, pair_set, method)
            upper, lower = grid[0, place], grid[1, place]
            upper.set_title(TITLES[method], fontsize=12, fontweight="bold")
            _seeds(upper, [points(cell["history"], "loss") for cell in cells], NEUTRAL)
            lower.axhline(0, color=GREY, linewidth=0.9)
            _rewards(lower, cells)
            for axes in (upper, lower):
                tidy(axes)
                last = max(cell["steps"] for cell in cells)
                axes.set_xlim(0, last * (1.02 if axes is upper else 1.42))
                axes.set_xticks([tick for tick in MaxNLocator(4, integer=True).tick_values(0, last) if tick <= last])
            lower.set_xlabel("optimiser step", fontsize=10)
        grid[0, 0].set_ylabel("loss (training)", fontsize=11)
        grid[1, 0].set_ylabel("reward (held-out pairs)", fontsize=11)
    caption(figure, "thin: one seed each, thick: their mean; every panel has its own scale")
    figure.savefig(path, format="png")


def _rewards(axes: Any, cells: Sequence[Cell]) -> None:
    """Both rewards, each with its name and last value beside the end of its mean, the higher one's above."""
    ends = []
    for name, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
        steps, values = _seeds(axes, [rewards(cell, name) for cell in cells], color, marker="o")
        if len(values):
            ends.append((values[-1], steps[-1], name, color))
    for side, (value, step, name, color) in zip(("top", "bottom"), sorted(ends), strict=False):
        text = f"{name}\n{number('+.2f')(value)}"
        axes.annotate(text, (step, value), xytext=(6, 0), textcoords="offset points", color=color, fontsize=10, va=side)
    axes.margins(y=0.2)


def _seeds(
    axes: Any, curves: Sequence[Points], color: str, *, marker: str = "", linestyle: str = "-", label: str = ""
) -> Points:
    """A thin line a seed and the thick line of their mean, which is given back; empty where there is no number."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        axes.text(0.5, 0.6, "no finite value", transform=axes.transAxes, ha="center", color=GREY, style="italic")
        return np.zeros(0), np.zeros(0)
    for steps, values in curves:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.4, linestyle=linestyle)
    mean = mean_curve(curves)
    axes.plot(*mean, color=color, linewidth=2.2, linestyle=linestyle, marker=marker, markersize=4, label=label)
    return mean


def margins(study: Study, path: Path) -> None:
    """Margins and accuracies on the held-out pairs, a row for each set."""
    columns = (
        ("log-ratio of chosen less rejected, nats", margins_of, 0.0),
        ("accuracy, % of the pairs", accuracies, 50.0),
    )
    figure = new_figure(10.5, 4.2 * len(study.sets) + 0.4, "Margins and accuracies on the held-out pairs")
    grid = figure.subplots(len(study.sets), 2, squeeze=False)
    for row, name in zip(grid, study.sets, strict=True):
        for axes, (label, curve, line) in zip(row, columns, strict=True):
            axes.axhline(line, color=GREY, linewidth=0.9)
            _methods(axes, study, name, curve)
            axes.set_title(f"{SET_TITLES[name]} set", fontsize=12, fontweight="bold")
            axes.set_ylabel(label, fontsize=11)
    caption(figure, "thin: one seed each, thick: their mean; accuracies of KL-SFT by means per token, none of SFT")
    figure.savefig(path, format="png")


def drift(study: Study, path: Path) -> None:
    """How far each method goes: what becomes of the chosen answers' log-prob, and the KL of its own answers."""
    figure = new_figure(10.5, 4.2 * len(study.sets) + 0.4, "Drift from the base")
    grid = figure.subplots(len(study.sets), 2, squeeze=False, width_ratios=[3, 2])
    for (left, right), name in zip(grid, study.sets, strict=True):
        left.axhline(0, color=GREY, linewidth=0.9)
        _methods(left, study, name, lambda cell: log_ratios(cell, "chosen"))
        left.set_title(f"{SET_TITLES[name]} set: held-out chosen answers", fontsize=12, fontweight="bold")
        left.set_ylabel("mean log-ratio to the base, nats", fontsize=11)
        dots(right, study, name, study.present(name, base=False), "kl", form=".1f")
        right.set_title("its own answers, at the end", fontsize=12, fontweight="bold")
        right.set_xlabel("KL from the base, nats per answer", fontsize=11)
    caption(figure, "left: thin, one seed each, thick, their mean; right: with 95% intervals")
    figure.savefig(path, format="png")


def _methods(axes: Any, study: Study, pair_set: str, curve: Callable[[Cell], Points]) -> None:
    """A curve a method over the share of its run that is done."""
    for method in study.present(pair_set, base=False):
        curves = []
        for cell in _histories(study, pair_set, method):
            steps, values = curve(cell)
            if len(steps):
                curves.append((100 * steps / max(cell["steps"], 1), values))
        if curves:
            line = "--" if method in DASHED else "-"
            _seeds(axes, curves, COLORS[method], linestyle=line, label=SHORT_TITLES[method])
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the run, %", fontsize=10)
    axes.margins(y=0.08)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, framealpha=0.7)
    tidy(axes)


def dots(axes: Any, study: Study, pair_set: str, methods: Sequence[str], measure: str, *, form: str) -> None:
    """A measure of each method as a dot with its interval and its number, the first method on top."""
    shown = [(name, study.interval(pair_set, name, measure)) for name in methods]
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    right = max((interval.high for _, interval in shown if interval is not None), default=1.0)
    for row, (method, interval) in enumerate(reversed(shown)):
        if interval is None:
            axes.text(0, row, " not measured", va="center", fontsize=9, color=GREY, style="italic")
            continue
        axes.plot([interval.low, interval.high], [row, row], color=COLORS[method], linewidth=2.2)
        axes.plot(interval.estimate, row, "o", color=COLORS[method], markersize=7)
        text = number(form)(interval.estimate)
        axes.annotate(
            text, (interval.high, row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=10, color=GREY
        )
    axes.set_yticks(range(len(shown)), [SHORT_TITLES[name] for name, _ in reversed(shown)], fontsize=10)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlim(min(0.0, axes.get_xlim()[0]), (right or 1.0) * 1.25)  # room for the numbers
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if MEASURES[measure].form == "percent":
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    tidy(axes)


def wins(study: Study, path: Path) -> None:
    """A matrix for each set: how often the proxy judge prefers the row's answer, with its interval."""
    figure = new_figure(
        8.6, 6.4 * len(study.sets) + 0.5, "Win rates by the proxy judge: the row's method against the column's"
    )
    grid = figure.subplots(len(study.sets), 1, squeeze=False)[:, 0]
    for axes, name in zip(grid, study.sets, strict=True):
        methods = study.present(name)
        values = [[0.5] * len(methods) for _ in methods]
        for row, first in enumerate(methods):
            for column, second in enumerate(methods):
                rate = None if first == second else study.proxy_wins(name, first, second)
                if rate is None:
                    axes.text(column, row, "–", ha="center", va="center", color=GREY, fontsize=12)
                    continue
                values[row][column] = rate.estimate
                axes.text(column, row - 0.14, f"{100 * rate.estimate:.0f}%", ha="center", va="center", fontsize=13)
                ends = f"{100 * rate.low:.0f} to {100 * rate.high:.0f}"
                axes.text(column, row + 0.22, ends, ha="center", va="center", fontsize=9)
        axes.imshow(values, cmap=MAP, vmin=-0.5, vmax=1.5, aspect="auto")
        titles = [SHORT_TITLES[method] for method in methods]
        axes.set_xticks(range(len(methods)), [title.replace(" (", "\n(") for title in titles], fontsize=10)
        axes.set_yticks(range(len(methods)), titles, fontsize=10)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{SET_TITLES[name]} set", fontsize=12, fontweight="bold")
    caption(figure, "% of held-out prompts that the row wins, under it its 95% interval")
    figure.savefig(path, format="png")


def answers(study: Study, path: Path) -> None:
    """Mentions, repetition and variety of each method's answers, a row for each set."""
    columns = (
        ("mention_share", "share that names the target", "percent"),
        ("longest_span", "longest repeated span, words", ".1f"),
        ("distinct_2", "distinct-2", ".2f"),
    )
    figure = new_figure(10.5, 3.4 * len(study.sets) + 0.4, "The answers to the held-out prompts")
    grid = figure.subplots(len(study.sets), len(columns), squeeze=False, sharey="row")
    for row, name in zip(grid, study.sets, strict=True):
        methods = study.present(name)
        for axes, (measure, label, form) in zip(row, columns, strict=True):
            dots(axes, study, name, methods, measure, form=form)
            axes.set_xlabel(label, fontsize=11)
        row[0].set_title(f"{SET_TITLES[name]} set", fontsize=12, fontweight="bold", loc="left")
    caption(figure, "lines: 95% intervals")
    figure.savefig(path, format="png")


def sweep(study: Study, path: Path) -> None:
    """A line for each swept setting; what it does to three measures. The one that was taken is filled."""
    from matplotlib.ticker import LogLocator, PercentFormatter

    rows = study.results["sweep"]
    columns = (
        ("chosen_log_ratio", "log-ratio of chosen, nats"),
        ("mention_share", "share that names the target"),
        ("proxy_perplexity", "proxy perplexity of own answers"),
    )
    # A free line between methods.
    places, at, previous = [], 0.0, None
    for row in rows:
        at += 1.8 if previous not in (None, row["method"]) else 1.0
        places.append(-at)
        previous = row["method"]
    figure = new_figure(10.5, 0.27 * (at + 1) + 1.6, "What each swept setting changes, on the tuning seed")
    grid = figure.subplots(1, len(columns), sharey=True)
    for axes, (measure, label) in zip(grid, columns, strict=True):
        for row, place in zip(rows, places, strict=True):
            if row.get(measure) is not None:
                color = COLORS[row["method"]]
                fill = color if row["chosen"] else "white"
                axes.plot(
                    row[measure], place, "o", color=color, markerfacecolor=fill, markersize=8, markeredgewidth=1.6
                )
        values = [row[measure] for row in rows if row.get(measure) is not None]
        if measure == "mention_share":
            axes.set_xlim(-0.06, 1.06)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        elif measure == "proxy_perplexity" and values:
            axes.set_xscale("log")
            if max(values) < 50 * min(values):
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        elif measure == "chosen_log_ratio":
            axes.axvline(0, color=GREY, linewidth=0.9)
            if min(values, default=0) < -FAR:
                axes.set_xscale("symlog", linthresh=10)
                axes.margins(x=0.08)
        axes.set_xlabel(label, fontsize=11)
        tidy(axes)
    names = [f"{SHORT_TITLES[row['method']]}: {row['changed'].replace('_', ' ').replace('=', ' ')}" for row in rows]
    grid[0].set_yticks(places, names, fontsize=10)
    for label_text, row in zip(grid[0].get_yticklabels(), rows, strict=True):
        label_text.set_color(COLORS[row["method"]])
        label_text.set_fontweight("bold" if row["chosen"] else "normal")
    caption(figure, "filled, bold: the setting that the results use")
    figure.savefig(path, format="png")


def _histories(study: Study, pair_set: str, method: str) -> list[Cell]:
    return [cell for cell in study.cells(pair_set, method) if cell.get("history")]


def new_figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
    return figure


def caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=10, color=GREY)


def tidy(axes: Any) -> None:
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
