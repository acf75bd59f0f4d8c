"""The pictures of a results file: bars against rivals, time, memory and error against length, the longest pair.

`plot_all` draws what the file has rows for and nothing else. fastpref is blue, others grey, the limit a dashed line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .bars import bars, longest, runs
from .curves import ERROR, MEMORY, TIME, against_length, lines_of
from .words import LIMIT, Row, cases_of, headline, is_timed, series_of, series_slug, single_rows, slug

FEW = 2  # a table says as much of so many rows


def plot_all(file: dict[str, Any], folder: Path, *, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draws into `folder`, which is made, and returns what was written; `formats` are "png" and "svg"."""
    import matplotlib

    drawn = pictures(file)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    style: Any = {"svg.hashsalt": "fastpref", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        for name, draw in drawn.items():
            figure = draw()
            for extension in formats:
                path = folder / f"{name}.{extension}"
                # Without the date and the version of matplotlib the same rows give the same file.
                figure.savefig(path, dpi=150, metadata={"Date": None} if extension == "svg" else {"Software": None})
                paths.append(path)
    return paths


def pictures(file: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The pictures that a file gives, by name, and how to draw each; without matplotlib."""
    found: dict[str, Callable[[], Any]] = {}
    timed = [row for row in file["rows"] if is_timed(row)]
    for suite in dict.fromkeys(row["suite"] for row in timed):
        rows = [row for row in timed if row["suite"] == suite]
        if suite == "training":
            groups = {case: group for (case, _), group in cases_of(rows).items() if len(group) > FEW}
            found |= {slug(suite, case): partial(runs, file, group) for case, group in groups.items()}
        elif suite != "losses":  # microseconds, without a shape that a picture would show
            found |= _of_cases(file, suite, rows)
        for (series, mode), group in series_of(rows).items():
            for axis in (TIME, MEMORY, *([ERROR] if suite == "logps" else [])):
                if len(lines_of(group, axis)) > 1:
                    found[series_slug(suite, series, mode, axis.name)] = partial(against_length, file, group, axis)
    rows = [row for row in file["rows"] if row.get("longest")]
    for case in dict.fromkeys(row["case"] for row in rows):
        found[slug("longest", case)] = partial(longest, file, [row for row in rows if row["case"] == case])
    return found


def _of_cases(file: dict[str, Any], suite: str, rows: Sequence[Row]) -> dict[str, Callable[[], Any]]:
    """A picture a case, its modes below each other, where more than a few stand beside each other."""
    groups: dict[str, list[list[Row]]] = {}
    for (case, _), group in cases_of(single_rows(rows) or headline(rows)).items():
        if sum(row["family"] != LIMIT for row in group) > FEW:
            groups.setdefault(case, []).append(group)
    return {slug(suite, case): partial(bars, file, panels) for case, panels in groups.items()}
