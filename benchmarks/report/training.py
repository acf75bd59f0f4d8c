"""Whole training runs on the report page: a table a case, and a picture of time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bars import BAR, BLUES, INK, LIGHT_BAR, canvas
from .markdown import table
from .words import OURS, Row, best_of_ours, cases_of, error, memory, milliseconds, shape, slug, times

SUITE = "training"
NOTE = (
    "Each contestant trains in a process of its own, from the same weights and on the same pairs. A step: the median "
    "without the first one. Whole: the reference's pass, where there is one, and all steps. Peak: of the process; "
    "beyond imports: what of it came with model and training. Outside the layers: the share of a step, optimiser and "
    "clipping apart, that is not the backbone's own forward and backward; in brackets with the reference's pass. "
    "Losses: the largest relative distance from TRL's at any step."
)


def section(name: str, rows: Sequence[Row]) -> list[str]:
    """The lines of one results file's runs."""
    lines = [f"From [{name}]({name}.json). {NOTE}", ""]
    for (case, _), group in cases_of(rows).items():
        lines += [f"**`{case}`**: {case_words(group[0])}", "", *runs_table(group), ""]
        if has_picture(group):
            lines += [f"![{case}](plots/{name}/{slug(SUITE, case)}.png)", ""]
    hows = {row["provider"]: row["how"] for row in rows}
    return [*lines, *(f"- `{provider}`: {how}" for provider, how in hows.items()), ""]


def case_words(row: Row) -> str:
    data = f"{row['data']}, at most {row['max_length']:,} tokens a sequence" if row["length"] is None else ""
    checkpointing = "gradient checkpointing" if row["checkpointing"] else ""
    return ", ".join(part for part in (shape(row), f"{row['steps']} steps", data, checkpointing) if part)


def runs_table(group: Sequence[Row]) -> list[str]:
    ours = best_of_ours(group)
    header = ["", "step", "× fastpref", "first", "whole", "tokens/s", "peak", "beyond imports", "outside the layers"]
    lines = []
    for row in sorted(group, key=lambda row: row["median_ms"]):
        name = f"`{row['provider']}`"
        lines.append(
            [
                f"**{name}**" if row is ours else name,
                milliseconds(row["median_ms"]),
                times(row["median_ms"] / ours["median_ms"]) if ours else "–",
                milliseconds(row["first_ms"]),
                milliseconds(row["whole_ms"]),
                f"{row['tokens_per_second']:,.0f}",
                memory(row["peak_bytes"]),
                memory(row["growth_bytes"]),
                _outside(row),
                error(row["loss_error"]),
            ]
        )
    return table([*header, "losses"], lines)


def _outside(row: Row) -> str:
    if row["outside_layers"] is None:
        return "–"
    return f"{row['outside_layers']:.0%} ({row['outside_layers_with_reference']:.0%})"


def has_picture(group: Sequence[Row]) -> bool:
    return len(group) > 2


def picture(file: dict[str, Any], group: Sequence[Row]) -> Any:
    """Step times above, peaks below, in the order of the times."""
    rows = sorted(group, key=lambda row: row["median_ms"])
    ours = best_of_ours(rows)
    height = 2.0 + 2 * (0.34 * len(rows) + 0.75)
    title = f"Whole training runs: {rows[0]['case']}"
    figure, axes = canvas(file, rows, title, case_words(rows[0]), height, [len(rows)] * 2)
    panels = (
        ("a step: median and quartiles, without the first", "median_ms", milliseconds),
        ("peak memory of the process; dark: imports alone", "peak_bytes", memory),
    )
    for axis, (words, field, write) in zip(axes, panels, strict=True):
        values = [row[field] for row in rows]
        colours = [_colour(row, ours) for row in rows]
        whiskers = None
        if field == "median_ms":
            whiskers = [
                [max(row["median_ms"] - row["q1_ms"], 0) for row in rows],
                [max(row["q3_ms"] - row["median_ms"], 0) for row in rows],
            ]
        bar_style = {"color": colours, "height": 0.68, "error_kw": {"lw": 1, "ecolor": INK}}
        axis.barh(range(len(rows)), values, xerr=whiskers, **bar_style)
        if field == "peak_bytes" and all(row.get("base_bytes") for row in rows):
            axis.barh(range(len(rows)), [row["base_bytes"] for row in rows], color=INK, alpha=0.35, height=0.68)
        axis.set_yticks(range(len(rows)), [row["provider"] for row in rows])
        for label, row in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_color(BLUES[0] if row["family"] == OURS else INK)
            label.set_fontweight("bold" if row is ours else "normal")
        axis.invert_yaxis()
        axis.tick_params(length=0)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        for place, row in enumerate(rows):
            ratio = "" if ours is None or row is ours else f", {times(row[field] / ours[field])}"
            end = max(row["q3_ms"], row[field]) if field == "median_ms" else row[field]
            axis.annotate(
                f"{write(row[field])}{ratio}",
                (end, place),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axis.set_title(words, fontsize=9.5, loc="left")
    names = max(len(row["provider"]) for row in rows)
    figure.subplots_adjust(
        left=0.045 + 0.0098 * names, right=0.82, top=1 - 1.4 / height, bottom=0.2 / height, hspace=0.22
    )
    return figure


def _colour(row: Row, ours: Row | None) -> str:
    if row["family"] == OURS:
        return BLUES[0] if row is ours else BLUES[2]
    return BAR if row["rival"] else LIGHT_BAR
