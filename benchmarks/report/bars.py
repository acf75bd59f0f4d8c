"""Bars: the providers of one case beside each other: their times, whole training runs, the longest pair of each.

Also what every picture shares: the colours, and a figure with its title and the lines that say what was measured where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .words import (
    LIMIT,
    MODES,
    OURS,
    TITLES,
    Row,
    best_of_ours,
    case_words,
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
    """A panel a mode: medians and quartiles, and the limit as a dashed line."""
    panels = [sorted((row for row in g if row["family"] != LIMIT), key=lambda row: row["median_ms"]) for g in groups]
    rows = [row for group in groups for row in group]
    title = f"{TITLES.get(rows[0]['suite'], rows[0]['suite'])}: {rows[0]['case']}"
    height = 1.5 + sum(0.34 * len(panel) + 0.75 for panel in panels)
    figure, axes = canvas(file, rows, title, shape(rows[0]), height, [len(panel) + 1 for panel in panels])
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, panel, "median_ms", milliseconds)
        logarithmic = _time_scale(axis, panel)
        ours = best_of_ours(panel)
        beside = f"; × times {ours['provider']}" if ours else ""
        mode = MODES.get(panel[0]["mode"], panel[0]["mode"])
        scale = ", log axis" if logarithmic else ""
        axis.set_title(f"{mode}: median and quartiles{beside}{scale}", fontsize=9.5, loc="left", pad=19)
    _margins(figure, rows, right=0.85, top=1 - 1.5 / height, bottom=0.35 / height, hspace=0.62)
    return figure


def runs(file: dict[str, Any], group: Sequence[Row]) -> Any:
    """Whole training runs: times of a step above, peaks below, in the order of the times."""
    rows = sorted(group, key=lambda row: row["median_ms"])
    height = 2.0 + 2 * (0.34 * len(rows) + 0.75)
    title = f"Whole training runs: {rows[0]['case']}"
    figure, axes = canvas(file, rows, title, case_words(rows[0]), height, [len(rows)] * 2)
    _panel(axes[0], rows, "median_ms", milliseconds)
    axes[0].set_title("a step: median and quartiles, without the first", fontsize=9.5, loc="left")
    _panel(axes[1], rows, "peak_bytes", memory)
    axes[1].set_title("peak memory of the process; dark: imports alone", fontsize=9.5, loc="left")
    if all(row.get("base_bytes") for row in rows):
        axes[1].barh(range(len(rows)), [row["base_bytes"] for row in rows], color=INK, alpha=0.35, height=0.68)
    for axis in axes:
        _without_scale(axis)
    _margins(figure, rows, right=0.82, top=1 - 1.4 / height, bottom=0.2 / height, hspace=0.22)
    return figure


def longest(file: dict[str, Any], rows: Sequence[Row]) -> Any:
    rows = sorted(rows, key=lambda row: -row["longest"])
    height = 1.4 + 0.38 * len(rows)
    title = f"The longest pair that trains within {memory(rows[0]['within_bytes'])}: {rows[0]['case']}"
    what = ", ".join(part for part in ("tokens a sequence, two sequences", shape(rows[0])) if part)
    figure, (axis,) = canvas(file, rows, title, what, height, [1])
    _panel(axis, rows, "longest", None)
    _without_scale(axis)
    _margins(figure, rows, right=0.85, top=1 - 1.15 / height, bottom=0.1 / height)
    return figure


def _panel(axis: Any, rows: Sequence[Row], field: str, write: Callable[[float], str] | None) -> None:
    """A bar a row with what `write` makes of it, and its ratio to ours; without `write` a longest pair's words."""
    ours = best_of_ours(rows)
    values = [row[field] for row in rows]
    ends, whiskers = values, None
    if field == "median_ms":
        ends = [max(row["q3_ms"], row[field]) for row in rows]
        low = [row[field] - min(max(row["q1_ms"], 0), row[field]) for row in rows]
        whiskers = [low, [end - value for end, value in zip(ends, values, strict=True)]]
    colours = [_bar_colour(row, ours) for row in rows]
    axis.barh(range(len(rows)), values, xerr=whiskers, color=colours, height=0.68, error_kw={"lw": 1, "ecolor": INK})
    axis.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color(BLUES[0] if row["family"] == OURS else INK)
        label.set_fontweight("bold" if row is ours else "normal")
    axis.invert_yaxis()
    axis.tick_params(length=0)
    for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
        text = longest_tokens(row) if write is None else write(row[field])
        if write is not None and ours is not None and row is not ours:
            text += f", {times(row[field] / ours[field])}"
        axis.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)


def _time_scale(axis: Any, rows: Sequence[Row]) -> bool:
    """Ticks of times, and the limit; logarithmic where the fastest would be a sliver."""
    values = [row["median_ms"] for row in rows]
    limit = next((row["limit_ms"] for row in rows if row.get("limit_ms")), None)
    logarithmic = max(values) > LOG_FROM * min([*values, limit or math.inf])
    if logarithmic:
        axis.set_xscale("log")
    else:
        axis.xaxis.get_major_locator().set_params(nbins=5)
    axis.xaxis.set_major_formatter(lambda value, _: tick_of_time(value))
    if limit:
        axis.axvline(limit, color=WARNING, ls="--", lw=1.3)
        at_right = not logarithmic and limit > 0.6 * max(values)
        axis.annotate(
            f"{rows[0]['limit']}: {milliseconds(limit)}",
            (limit, 1),
            (-3 if at_right else 0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8.5,
            color=WARNING,
            ha="right" if at_right else "left",
        )
    return logarithmic


def _without_scale(axis: Any) -> None:
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)


def _margins(figure: Any, rows: Sequence[Row], **margins: float) -> None:
    """The left one leaves room for the longest name."""
    figure.subplots_adjust(left=0.045 + 0.0098 * max(len(row["provider"]) for row in rows), **margins)


def _bar_colour(row: Row, ours: Row | None) -> str:
    if row["family"] == OURS:
        return BLUES[0] if row is ours else BLUES[2]
    return BAR if row["rival"] else LIGHT_BAR


def tick_of_time(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value / 1e3:g} s" if value >= 1e3 else f"{value:g} ms" if value >= 1 else f"{value * 1e3:g} µs"
