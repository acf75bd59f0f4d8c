"""Curves: time, memory and error of each provider against length, with the limit where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .bars import BLUES, GREYS, WARNING, canvas, tick_of_time
from .words import LIMIT, MODES, OURS, TITLES, Row, shape, tokens

MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")


def _tick_of_memory(value: float) -> str:
    scale, unit = (2**30, "GiB") if value >= 2**30 else (2**20, "MiB") if value >= 2**20 else (2**10, "KiB")
    return f"{value / scale:g} {unit}"


class Axis(NamedTuple):
    """What stands against length."""

    name: str  # of the file and in the title
    field: str
    label: str
    tick: Callable[[float], str]
    base: int  # of the log axis


TIME = Axis("time", "median_ms", "", tick_of_time, 10)
MEMORY = Axis("memory", "peak_beyond_gradient_bytes", "; peak beyond inputs and gradients", _tick_of_memory, 2)
ERROR = Axis("error", "value_error", "; nats of a sequence's log-prob, off float64", lambda value: f"{value:g}", 10)


def lines_of(group: Sequence[Row], axis: Axis) -> dict[str, list[tuple[int, float]]]:
    """(length, value) by provider; a log axis cannot show what is not above zero."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(group, key=lambda row: row["length"]):
        value = row.get(axis.field)
        if row["family"] != LIMIT and value is not None and value > 0:
            lines.setdefault(row["provider"], []).append((row["length"], value))
    return lines


def against_length(file: dict[str, Any], group: Sequence[Row], axis_of: Axis) -> Any:
    lines = lines_of(group, axis_of)
    title = f"{TITLES.get(group[0]['suite'], group[0]['suite'])}: {axis_of.name} against length"
    first = shape({**group[0], "length": "T"})
    mode = MODES.get(group[0]["mode"], group[0]["mode"])
    figure, (axis,) = canvas(file, group, title, f"{first}; {mode}{axis_of.label}", 5.2, [1])
    figure.subplots_adjust(left=0.1, right=0.74, top=0.79, bottom=0.1)
    lengths = sorted({row["length"] for row in group})
    families = {row["provider"]: row["family"] for row in group}
    styles = _line_styles(lines, families)
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), label=name, **styles[name])
        if points[-1][0] < lengths[-1]:
            axis.plot(*points[-1], marker="x", ms=10, mew=2.2, color=styles[name]["color"], zorder=5)
    limits = {row["length"]: row["limit_ms"] for row in group if row.get("limit_ms")}
    if axis_of is TIME and limits:
        at = sorted(limits)
        axis.plot(at, [limits[length] for length in at], color=WARNING, ls="--", lw=1.3, label=group[0]["limit"])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=axis_of.base)
    if axis_of is TIME:
        axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axis.set_xticks(lengths, [tokens(length) for length in lengths])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: axis_of.tick(value))
    axis.set_xlabel("tokens a sequence")
    axis.grid(axis="y", color="#e6e6e6", lw=0.8)
    low, high = axis.get_ylim()
    if axis_of is ERROR and low < 1 < 10 * high:
        axis.set_ylim(low, max(high, 2))
        axis.axhline(1, color=WARNING, ls="--", lw=1.3)
        axis.annotate(
            "a whole nat", (0.2, 1), (0, -13), ("axes fraction", "data"), "offset points", color=WARNING, fontsize=9
        )
    if any(points[-1][0] < lengths[-1] for points in lines.values()):
        figure.text(0.76, 0.03, "× no row beyond this length", fontsize=8.5, color=GREYS[1])
    handles, names = axis.get_legend_handles_labels()
    # In the order of the lines' ends, as the eye meets them; a limit that is not in `lines` comes last.
    order = sorted(range(len(names)), key=lambda place: -lines.get(names[place], [(0, 0.0)])[-1][1])
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False, "fontsize": 9}
    axis.legend([handles[place] for place in order], [names[place] for place in order], **beside)
    return figure


def _line_styles(lines: dict[str, Any], families: dict[str, str]) -> dict[str, dict[str, Any]]:
    ours = [name for name in lines if families[name] == OURS]
    others = [name for name in lines if families[name] != OURS]
    styles: dict[str, dict[str, Any]] = {
        name: {"color": BLUES[min(place, 2)], "marker": "o", "lw": 2.6 - 0.6 * min(place, 2), "ms": 6, "zorder": 4}
        for place, name in enumerate(ours)
    }
    for place, name in enumerate(others):
        marker = MARKERS[place % len(MARKERS)]
        styles[name] = {"color": GREYS[place % len(GREYS)], "marker": marker, "lw": 1.4, "ms": 5.5, "zorder": 3}
    return styles
