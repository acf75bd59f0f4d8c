"""Bars: the providers of one case beside each other, and the longest pair that each of them trains.

Also what every picture shares: the colours, and a figure with its title and the lines that say what was measured where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .words import (
    LIMIT,
    MODES,
    OURS,
    TITLES,
    Row,
    best_of_ours,
    day_and_commit,
    device,
    longest_tokens,
    memory,
    milliseconds,
    shape,
    times,
    versions,
)

# Two blues and four greys: apart in lightness, so that no kind of colour blindness and no grey print mixes them up.
BLUES = ("#0060a8", "#4d9fd6", "#9ccbe8")
GREYS = ("#3d3d3d", "#6b6b6b", "#909090", "#ababab")
INK, WARNING = "#1a1a1a", "#b3541e"
BAR, LIGHT_BAR = "#a9a9a9", "#d0d0d0"  # rivals; plain code and what is not the best that there is
LOG_FROM = 60.0  # the slowest over the fastest bar: beyond, the fastest would be a sliver


def canvas(file: dict[str, Any], rows: Sequence[Row], title: str, subtitle: str, height: float, panels: Sequence[int]):
    """A figure with a title, three small lines under it, and panels of the given relative heights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height))
    figure.text(0.02, 1 - 0.16 / height, title, fontsize=13, fontweight="bold", color=INK, va="top")
    lines = (subtitle, f"{device(file)}; {day_and_commit(file)}", versions(file, rows))
    figure.text(0.02, 1 - 0.46 / height, "\n".join(lines), fontsize=9, color=GREYS[1], va="top", linespacing=1.4)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": panels})[:, 0]
    return figure, list(axes)


def bars(file: dict[str, Any], groups: Sequence[Sequence[Row]]) -> Any:
    counts = [len([row for row in group if row["family"] != LIMIT]) for group in groups]
    rows = [row for group in groups for row in group]
    title = f"{TITLES.get(rows[0]['suite'], rows[0]['suite'])}: {rows[0]['case']}"
    height = 1.5 + sum(0.34 * count + 0.75 for count in counts)
    figure, axes = canvas(file, rows, title, shape(rows[0]), height, [count + 1 for count in counts])
    for axis, group in zip(axes, groups, strict=True):
        _bar_panel(axis, group)
    names = max(len(row["provider"]) for row in rows)
    figure.subplots_adjust(
        left=0.045 + 0.0098 * names, right=0.85, top=1 - 1.5 / height, bottom=0.35 / height, hspace=0.62
    )
    return figure


def _bar_panel(axis: Any, group: Sequence[Row]) -> None:
    rows = sorted((row for row in group if row["family"] != LIMIT), key=lambda row: row["median_ms"])
    ours = best_of_ours(rows)
    values = [row["median_ms"] for row in rows]
    middle = [min(max(row["q1_ms"], 0), row["median_ms"]) for row in rows]
    whiskers = [
        [row["median_ms"] - low for row, low in zip(rows, middle, strict=True)],
        [max(row["q3_ms"] - row["median_ms"], 0) for row in rows],
    ]
    colours = [_bar_colour(row, ours) for row in rows]
    axis.barh(range(len(rows)), values, xerr=whiskers, color=colours, height=0.68, error_kw={"lw": 1, "ecolor": INK})
    axis.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color(BLUES[0] if row["family"] == OURS else INK)
        label.set_fontweight("bold" if row is ours else "normal")
    axis.invert_yaxis()
    axis.tick_params(length=0)
    limit = next((row["limit_ms"] for row in rows if row.get("limit_ms")), None)
    logarithmic = max(values) > LOG_FROM * min([*values, limit or math.inf])
    if logarithmic:
        axis.set_xscale("log")
    else:
        axis.xaxis.get_major_locator().set_params(nbins=5)
    axis.xaxis.set_major_formatter(lambda value, _: tick_of_time(value))
    for place, row in enumerate(rows):
        ratio = "" if ours is None or row is ours else f", {times(row['median_ms'] / ours['median_ms'])}"
        text = f"{milliseconds(row['median_ms'])}{ratio}"
        axis.annotate(
            text,
            (max(row["q3_ms"], row["median_ms"]), place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    beside = f"; × times {ours['provider']}" if ours else ""
    scale = ", log axis" if logarithmic else ""
    axis.set_title(
        f"{MODES.get(rows[0]['mode'], rows[0]['mode'])}: median and quartiles{beside}{scale}",
        fontsize=9.5,
        loc="left",
        pad=19,
    )
    if limit:
        axis.axvline(limit, color=WARNING, ls="--", lw=1.3)
        label = f"{rows[0]['limit']}: {milliseconds(limit)}"
        at_right = not logarithmic and limit > 0.6 * max(values)
        axis.annotate(
            label,
            (limit, 1),
            (-3 if at_right else 0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8.5,
            color=WARNING,
            ha="right" if at_right else "left",
        )


def _bar_colour(row: Row, ours: Row | None) -> str:
    if row["family"] == OURS:
        return BLUES[0] if row is ours else BLUES[2]
    return BAR if row["rival"] else LIGHT_BAR


def tick_of_time(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value / 1e3:g} s" if value >= 1e3 else f"{value:g} ms" if value >= 1 else f"{value * 1e3:g} µs"


def longest(file: dict[str, Any], rows: Sequence[Row]) -> Any:
    rows = sorted(rows, key=lambda row: -row["longest"])
    height = 1.4 + 0.38 * len(rows)
    within = memory(rows[0]["within_bytes"])
    title = f"The longest pair that trains within {within}: {rows[0]['case']}"
    figure, (axis,) = canvas(
        file,
        rows,
        title,
        ", ".join(part for part in ("tokens a sequence, two sequences", shape(rows[0])) if part),
        height,
        [1],
    )
    names = max(len(row["provider"]) for row in rows)
    figure.subplots_adjust(left=0.045 + 0.0098 * names, right=0.85, top=1 - 1.15 / height, bottom=0.1 / height)
    ours = next((row for row in rows if row["provider"] == OURS), None)
    colours = [_bar_colour(row, ours) for row in rows]
    axis.barh(range(len(rows)), [row["longest"] for row in rows], color=colours, height=0.68)
    axis.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    for place, row in enumerate(rows):
        text, end = longest_tokens(row), (row["longest"], place)
        axis.annotate(text, end, (5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    return figure
