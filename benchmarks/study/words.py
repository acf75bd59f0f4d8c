"""How the study's page writes numbers, intervals and Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fastpref.benchmarks.study.measures import Interval

MISSING = "not measured"
SPECIAL = "\\`*_[]<>|~&$"  # what Markdown, or GitHub in it, takes for markup within a line
MINUS = "\N{MINUS SIGN}"  # a hyphen would let the number break over two lines


def number(form: str) -> Callable[[float], str]:
    """A writer of numbers in this format; what rounds to zero carries no sign."""

    def write(value: float) -> str:
        text = format(value, form)
        return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)

    return write


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def writer(form: str) -> Callable[[float], str]:
    return percent if form == "percent" else number(form)


def with_interval(interval: Interval | None, write: Callable[[float], str], *, between: str = " ") -> str:
    """ "51% [43%, 60%]"; `between` stands before the bracket."""
    if interval is None:
        return MISSING
    return f"{write(interval.estimate)}{between}[{write(interval.low)}, {write(interval.high)}]"


def listed(names: Sequence[str], *, last: str = "and") -> str:
    """ "a, b and c", or "nothing"."""
    if len(names) < 2:
        return names[0] if names else "nothing"
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def plural(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def escaped(text: str) -> str:
    """Any text as the contents of a cell of a Markdown table: shown as it is, with the lines that it has."""
    marked = "".join(f"\\{character}" if character in SPECIAL else character for character in text)
    return "<br>".join(marked.replace("\r", "").split("\n"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> list[str]:
    """Lines of a Markdown table; the first `words` columns to the left, the numbers after them to the right."""
    lines = [list(header), ["---"] * words + ["---:"] * (len(header) - words), *map(list, rows)]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"a row of the table has {len(line)} cells, its header {len(header)}: {line}")
    return ["| " + " | ".join(line) + " |" for line in lines]
