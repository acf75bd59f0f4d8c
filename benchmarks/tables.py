"""The rows of a run as tables in a terminal, one a suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]
NOTE = (
    "±: half of what lies between the quartiles. Limit: 100% is what the machine did in the same run. MiB: the peak "
    "beyond inputs and gradients. Errors are against float64: of the value in nats, of the gradient relative to it."
)


def tables(rows: Sequence[Row]) -> list[Table]:
    suites = dict.fromkeys(row["suite"] for row in rows)
    return [_table(suite, [row for row in rows if row["suite"] == suite]) for suite in suites]


def _table(suite: str, rows: Sequence[Row]) -> Table:
    title = f"{suite}: the limit is {rows[0]['limit']}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for name in ("ms", "±", rows[0]["rate_unit"], "limit", "MiB", "value err", "grad err"):
        table.add_column(name, justify="right", no_wrap=True)
    for case, mode in dict.fromkeys((row["case"], row["mode"]) for row in rows):
        table.add_row(f"{case}, {mode}", style="italic")
        for row in rows:
            if (row["case"], row["mode"]) == (case, mode):
                style = {"fastpref": "bold", "limit": "dim"}.get(row["family"], "")
                table.add_row(*cells(row), style=style)
    return table


def cells(row: Row) -> list[str]:
    half_spread = (row["q3_ms"] - row["q1_ms"]) / row["median_ms"] / 2
    peak = row["peak_beyond_gradient_bytes"]
    return [
        f"  {row['provider']}",
        f"{row['median_ms']:.2f}" if row["median_ms"] < 100 else f"{row['median_ms']:.0f}",
        f"{half_spread:.0%}",
        f"{row['rate']:.3g}",
        _or_dash(row["ratio_to_limit"], ".0%"),
        "-" if peak is None else f"{peak / 2**20:.1f}",
        _or_dash(row["value_error"], ".1e"),
        _or_dash(row["gradient_error"], ".1e"),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
