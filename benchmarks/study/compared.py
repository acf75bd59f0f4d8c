"""The study's pictures of what came out: win rates by the proxy judge, answers, and what each swept setting changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.benchmarks.study.plots import COLORS, GREY, caption, dots, new_figure, save, set_title, tidy
from fastpref.benchmarks.study.reading import SHORT_TITLES, Study

# Purple to orange, pale in the middle: told apart by every kind of colour vision, and in grey by the numbers.
MAP = "PuOr_r"
# Nats; beyond this a straight axis leaves no room for those near zero.
FAR = 100.0


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
        axes.set_title(f"{set_title(name)} set", fontsize=12, fontweight="bold")
    caption(figure, "% of held-out prompts that the row wins, under it its 95% interval")
    save(figure, path)


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
        row[0].set_title(f"{set_title(name)} set", fontsize=12, fontweight="bold", loc="left")
    caption(figure, "lines: 95% intervals")
    save(figure, path)


def sweep(study: Study, path: Path) -> None:
    """A line for each swept setting; what it does to three measures. The one that was taken is filled."""
    from matplotlib.ticker import PercentFormatter

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
            _logarithmic(axes, values)
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
    save(figure, path)


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with numbers such as 2, 5 and 10 on it, or with powers of ten where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    if max(values) < 50 * min(values):
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
