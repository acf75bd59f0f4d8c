"""Tables and sizes: for a terminal by rich, in plain text where it is not installed; for a page in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec


def size_text(count: float) -> str:
    """Bytes as "1.50 GiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}" if count < 100 * unit else f"{count / unit:,.0f} {name}"
    return f"{count / 2**10:.1f} KiB"


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[str] = ()
) -> None:
    """Print to stdout; the columns named in `words` to the left, numbers to the right."""
    print(f"\n{title}")
    if find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in header:
            table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        # It takes what it needs: a pipe or a narrow window cuts nothing.
        Console(highlight=False, markup=False, width=200).print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if name in words else cell.rjust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        ]
        print("  ".join(cells).rstrip())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """The lines of a Markdown table; the first `words` columns to the left, numbers to the right.

    Cells are Markdown: a caller whose text may hold "|" or a line break escapes it.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    lines = [list(header), ["---"] * words + ["---:"] * (len(header) - words), *map(list, rows)]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"a row of a table must have its header's {len(header)} cells, got {len(line)}: {line}")
    return [f"| {' | '.join(line)} |" for line in lines]
