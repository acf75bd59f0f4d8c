"""How the study's page and pictures write numbers and intervals, and text in a cell of a Markdown table."""

from __future__ import annotations

from collections.abc import Callable

from fastpref.benchmarks.study.measures import Interval

MISSING = "not measured"
SPECIAL = "\\`*_[]<>|~&$"  # what Markdown, or GitHub in it, takes for markup within a line
MINUS = "\N{MINUS SIGN}"  # a hyphen would let the number break over two lines


def number(form: str) -> Callable[[float | None], str]:
    """A writer of numbers in this format, or "percent"; what rounds to zero carries no sign."""

    def write(value: float | None) -> str:
        if value is None:
            return MISSING
        if form == "percent":
            return f"{100 * value:.0f}%"
        text = format(value, form)
        return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)

    return write


def with_interval(interval: Interval | None, form: str, *, between: str = " ") -> str:
    """ "51% [43%, 60%]"; `between` stands before the bracket."""
    if interval is None:
        return MISSING
    write = number(form)
    return f"{write(interval.estimate)}{between}[{write(interval.low)}, {write(interval.high)}]"


def escaped(text: str) -> str:
    """Any text as the contents of a cell of a Markdown table: shown as it is, with the lines that it has."""
    marked = "".join(f"\\{character}" if character in SPECIAL else character for character in text)
    return "<br>".join(marked.replace("\r", "").split("\n"))
