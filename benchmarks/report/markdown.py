"""Rows of a results file as tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from fastpref.tables import markdown_table

from .words import LIMIT, Row, best_of_ours, error, fastest_rival, memory, milliseconds, peak_of, times, tokens


def escaped(text: str) -> str:
    """Text that others wrote, as a cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def against(group: Sequence[Row]) -> list[str]:
    """Ours against the limit, the fastest rival and plain code: time, then peaks, then errors of ours and the rival."""
    ours, rival = best_of_ours(group), fastest_rival(group)
    plain = next((row for row in group if row["provider"] == "plain"), None)
    if ours is None:
        return ["–"] * 8

    def beside(row: Row | None, name: str) -> str:
        return f"{name}{times(row['median_ms'] / ours['median_ms'])}" if row else "–"

    return [
        f"**{milliseconds(ours['median_ms'])}**",
        _share_of_limit(ours),
        beside(rival, f"`{rival['provider']}` " if rival else ""),
        beside(plain, ""),
        memory(peak_of(ours)),
        memory(peak_of(rival)) if rival else "–",
        error(ours.get("value_error")),
        error(rival.get("value_error")) if rival else "–",
    ]


def _share_of_limit(row: Row) -> str:
    return "–" if row.get("ratio_to_limit") is None else f"{row['ratio_to_limit']:.0%}"


def rows_table(group: Sequence[Row]) -> list[str]:
    """All rows of a case and mode, the fastest first; columns that none of them has are left out."""
    ours = best_of_ours(group)
    columns: dict[str, list[str]] = {"": [], "time": [], "±": [], "× fastpref": [], "of the limit": [], "tokens/s": []}
    columns |= {"peak": [], "value error": [], "gradient error": []}
    for row in sorted(group, key=lambda row: (row["family"] != LIMIT, row["median_ms"])):
        name = f"`{row['provider']}`" if row["family"] != LIMIT else f"the limit: {row['limit']}"
        per_second = row.get("tokens_per_second")
        cells = (
            f"**{name}**" if row is ours else name,
            milliseconds(row["median_ms"]),
            f"{(row['q3_ms'] - row['q1_ms']) / row['median_ms'] / 2:.0%}",
            times(row["median_ms"] / ours["median_ms"]) if ours else "–",
            _share_of_limit(row),
            "–" if per_second is None else f"{per_second:,.0f}",
            memory(peak_of(row)),
            error(row.get("value_error")),
            error(row.get("gradient_error")),
        )
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    kept = {name: cells for name, cells in columns.items() if any(cell != "–" for cell in cells)}
    return markdown_table(list(kept), list(zip(*kept.values(), strict=True)))


def length_table(group: Sequence[Row]) -> list[str]:
    """Time and peak of each provider, a column a length."""
    lengths = sorted({row["length"] for row in group})
    found = {(row["provider"], row["length"]): row for row in group if row["family"] != LIMIT}
    lines = []
    for provider in dict.fromkeys(name for name, _ in found):
        cells = (found.get((provider, length)) for length in lengths)
        lines.append([f"`{provider}`", *("–" if row is None else _time_and_peak(row) for row in cells)])
    return markdown_table(["time, peak", *map(tokens, lengths)], lines)


def _time_and_peak(row: Row) -> str:
    peak = row.get("peak_beyond_gradient_bytes")
    return milliseconds(row["median_ms"]) + ("" if peak is None else f", {memory(peak)}")


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
    return markdown_table([*header, "losses"], lines)


def _outside(row: Row) -> str:
    if row["outside_layers"] is None:
        return "–"
    return f"{row['outside_layers']:.0%} ({row['outside_layers_with_reference']:.0%})"
