"""Tables and sizes as the commands print them: by rich where it is installed, in plain text otherwise."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
