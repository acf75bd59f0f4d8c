"""The report page, and the blocks of README.md and docs/benchmarks.md, as Markdown, from results files.

page.md is the page's text, which is filled with tables. Ratios are taken within a file alone: its rows come from one
run on one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from fastpref.tables import markdown_table

from ..promises import Promise, judge
from .markdown import against, escaped, length_table, rows_table, runs_table
from .plots import pictures
from .words import (
    MODES,
    OURS,
    TITLES,
    Row,
    case_words,
    cases_of,
    day_and_commit,
    device,
    headline,
    is_timed,
    longest_tokens,
    memory,
    series_of,
    series_slug,
    shape,
    single_rows,
    slug,
    three,
    versions,
)

File = dict[str, Any]
Files = Mapping[str, File]  # by the name of the file without .json
Planned = Mapping[str, Sequence[Row]]  # by suite: cases of the GPU, as rows without numbers

CLASSES = {"cpu": "CPU", "gpu": "GPU", "quick": "A quick look", "tiny": "Tiny, to prove that it runs"}
COMMAND = "python -m fastpref.benchmarks.report"
NOT_MEASURED = "On a GPU: **not measured** yet."
_AGAINST = (
    "fastpref",
    "of the limit",
    "fastest rival",
    "plain",
    "peak",
    "rival's peak",
    "value error",
    "rival's error",
)


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip()


def report(files: Files, planned: Planned) -> str:
    sections = [_class_section(name, here, planned if name == "gpu" else {}) for name, here in _by_class(files).items()]
    if sweeps := {name: file for name, file in files.items() if not _with_rows(file)}:
        header = ["file", "rows", "device", "measured"]
        sections.append(["## Sweeps", "", *markdown_table(header, map(_sweep_line, sweeps.items()), len(header))])
    parts = {"command": COMMAND, "note": _text("note.md"), "summary": "\n".join(_summary(files))}
    devices = "\n".join(line for lines in sections for line in [*lines, ""])
    return Template(_text("page.md")).substitute(parts, devices=devices).rstrip() + "\n"


def short_block(files: Files) -> str:
    """README.md's: the summary, and how many promises are met."""
    promises = _promises(files)
    met = sum(promise.met for promise in promises)
    return "\n".join([*_summary(files), "", f"{met} of {len(promises)} promises are met."])


def tables_block(files: Files, folder: str) -> str:
    """docs/benchmarks.md's: a table a suite, pictures, and what is promised and missed; `folder` holds the files."""
    lines: list[str] = []
    for device_class, here in _by_class(files).items():
        if device_class == "gpu" and not here:
            lines += [NOT_MEASURED, ""]
        for suite in ("logps", "linear", "step", "training") if device_class in ("cpu", "gpu") else ():
            name, group = _headline(here, suite)
            if group:
                where = f"{device(here[name])}; {day_and_commit(here[name])}; {versions(here[name], group)}"
                lines += [f"{TITLES[suite]}: {shape(group[0])}. {where}.", "", *rows_table(group), ""]
                picture = slug(suite, group[0]["case"])
                if suite in ("linear", "training") and picture in pictures(here[name]):
                    lines += [f"![{TITLES[suite]}]({folder}/plots/{name}/{picture}.png)", ""]
    return "\n".join([*lines, _text("note.md"), "", *_promise_table(_promises(files))]).rstrip()


def _by_class(files: Files) -> dict[str, dict[str, File]]:
    """Files with timed rows by class of device: the GPU is always there, first where it is measured, else last."""
    present = {name: file for name, file in files.items() if _with_rows(file)}
    measured = sorted({file["device_class"] for file in present.values()}, key=lambda c: (c != "gpu", c))
    order = measured if "gpu" in measured else [*measured, "gpu"]
    return {c: {name: file for name, file in present.items() if file["device_class"] == c} for c in order}


def _with_rows(file: File) -> bool:
    return any(is_timed(row) or "longest" in row for row in file["rows"])


def _timed(file: File, suite: str) -> list[Row]:
    return [row for row in file["rows"] if is_timed(row) and row["suite"] == suite]


def _headline(files: Files, suite: str) -> tuple[str, list[Row]]:
    """A suite's headline, with its file: of several runs the one where most stand beside each other."""
    groups = {name: headline(_timed(file, suite)) for name, file in files.items()}
    name = max(groups, key=lambda name: len(groups[name]), default="")
    return name, groups.get(name, [])


def _summary(files: Files) -> list[str]:
    """A line a suite and class of devices; the GPU's where nothing is measured."""
    header = ["", "fastpref", "fastest other", "plain torch", "peak memory", "the other's peak"]
    rows = []
    for device_class, here in _by_class(files).items():
        for suite, title in TITLES.items():
            _, group = _headline(here, suite)
            if group:
                ours, _, *others = against(group)
                rows.append([f"{title}, {CLASSES[device_class]}<br>{shape(group[0])}", ours, *others[:4]])
    lines = markdown_table(header, rows)
    return lines if _by_class(files)["gpu"] else [*lines, "", NOT_MEASURED]


def _class_section(device_class: str, files: Files, planned: Planned) -> list[str]:
    lines = [f"## {CLASSES.get(device_class, device_class)}", ""]
    if files:
        header = ["file", "device", "measured", "versions", "threads", "copy"]
        lines += [*markdown_table(header, [_head_line(name, file) for name, file in files.items()], 4), ""]
    lines += _promise_table(_promises(files))
    there = {row["suite"] for file in files.values() for row in file["rows"]}
    for suite in [*TITLES, *sorted(there - TITLES.keys())]:
        for name, file in files.items():
            if rows := _timed(file, suite):
                lines += [f"### {TITLES.get(suite, suite)}", "", f"From [{name}]({name}.json).", ""]
                lines += _training(name, file, rows) if suite == "training" else _suite(suite, name, file, rows)
    for name, file in files.items():
        lines += _longest(name, file)
    return [*lines, *_planned(files, planned), *_skipped(files)]


def _planned(files: Files, planned: Planned) -> list[str]:
    """Cases that nobody has measured."""
    found = {(row["suite"], row["case"]) for file in files.values() for row in file["rows"] if "case" in row}
    cases = [case for rows in planned.values() for case in rows if (case["suite"], case["case"]) not in found]
    if not cases:
        return []
    lines = [[TITLES[case["suite"]], f"`{case['case']}`", shape(case)] for case in cases]
    command = "`benchmarks/on_gpu.sh OUT_DIR` measures these, with `--training` the whole training runs."
    return [f"**Not measured** yet; {command}", "", *markdown_table(["suite", "case", "shape"], lines, 3), ""]


def _head_line(name: str, file: File) -> list[str]:
    ended = "" if file.get("complete", True) else f", **interrupted** after {len(file['rows'])} rows"
    packages = f"python {file['python']}, {versions(file, file['rows'])}"
    copy = f"{file['copy_gb_per_s']:.1f} GB/s"
    return [f"[{name}]({name}.json)", device(file), day_and_commit(file) + ended, packages, str(file["threads"]), copy]


def _sweep_line(item: tuple[str, File]) -> list[str]:
    name, file = item
    suites = ", ".join(f"`{suite}`" for suite in dict.fromkeys(row["suite"] for row in file["rows"]))
    return [f"[{name}]({name}.json)", f"{len(file['rows'])} of {suites or 'none'}", device(file), day_and_commit(file)]


def _promises(files: Files) -> list[Promise]:
    return [promise for file in files.values() for promise in judge(file["rows"], file["device_class"])]


def _promise_table(promises: Sequence[Promise]) -> list[str]:
    """The missed ones first."""
    if not promises:
        return []
    met = sum(promise.met for promise in promises)
    rows = [
        [f"`{p.case}`", p.what, three(p.got), f"{'≥' if p.at_least else '≤'} {p.bound:g}", p.verdict]
        for p in sorted(promises, key=lambda promise: promise.met)
    ]
    header = ["case", "what", "got", "promised", ""]
    return [f"### Promises: {met} of {len(promises)} met", "", *markdown_table(header, rows, 2), ""]


def _suite(suite: str, name: str, file: File, rows: Sequence[Row]) -> list[str]:
    single = single_rows(rows)
    lines = [f"The limit is {rows[0]['limit']}.", ""]
    for mode, words in MODES.items():
        groups = [group for (_, of), group in cases_of(single).items() if of == mode]
        groups = [group for group in groups if any(row["family"] == OURS for row in group)]
        if groups:
            cells = [[f"`{g[0]['case']}`<br>{shape(g[0])}", *against(g)] for g in groups]
            lines += [f"{words.capitalize()}:", "", *markdown_table(["case", *_AGAINST], cells), ""]
    for (series, mode), group in series_of(rows).items():
        lines += [f"Against length (`{series}`, {MODES.get(mode, mode)}):", "", *length_table(group), ""]
    drawn = [picture for picture in pictures(file) if picture in _names(suite, rows)]
    first = slug(suite, main[0]["case"]) if (main := headline(rows)) else ""
    shown = [picture for picture in drawn if picture == first or picture not in _names(suite, single)]
    lines += [line for picture in shown for line in (f"![{picture}](plots/{name}/{picture}.png)", "")]
    if others := [f"[{picture}](plots/{name}/{picture}.png)" for picture in drawn if picture not in shown]:
        lines += [f"More pictures: {', '.join(others)}.", ""]
    lines += ["<details><summary>All rows</summary>", ""]
    for (case, mode), group in cases_of(single).items():
        lines += [f"**`{case}`, {MODES.get(mode, mode)}**: {shape(group[0])}", "", *rows_table(group), ""]
    return [*lines, *_hows(rows), "</details>", ""]


def _hows(rows: Sequence[Row]) -> list[str]:
    hows = {row["provider"]: row["how"] for row in rows if row.get("how")}
    return [*(f"- `{provider}`: {how}" for provider, how in hows.items()), ""] if hows else []


def _training(name: str, file: File, rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for (case, _), group in cases_of(rows).items():
        lines += [f"**`{case}`**: {case_words(group[0])}", "", *runs_table(group), ""]
        if (picture := slug("training", case)) in pictures(file):
            lines += [f"![{case}](plots/{name}/{picture}.png)", ""]
    return [*lines, *_hows(rows)]


def _names(suite: str, rows: Sequence[Row]) -> set[str]:
    """The names that pictures of these rows can have."""
    names = {slug(suite, row["case"]) for row in rows}
    for series, mode in series_of(rows):
        names |= {series_slug(suite, series, mode, axis) for axis in ("time", "memory", "error")}
    return names


def _longest(name: str, file: File) -> list[str]:
    rows = [row for row in file["rows"] if "longest" in row]
    lines: list[str] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = sorted((row for row in rows if row["case"] == case), key=lambda row: -(row["longest"] or 0))
        title = f"### {TITLES['longest']} within {memory(here[0]['within_bytes'])}: `{case}`"
        failed = [f"{row['next_failed']:,}" if row.get("next_failed") else "–" for row in here]
        cells = [
            [f"`{row['provider']}`", longest_tokens(row), next_one, memory(row.get("peak_bytes"))]
            for row, next_one in zip(here, failed, strict=True)
        ]
        lines += [title, "", *markdown_table(["", "tokens a sequence", "the next that failed", "peak"], cells), ""]
        if (picture := slug("longest", case)) in pictures(file):
            lines += [f"![{picture}](plots/{name}/{picture}.png)", ""]
    return lines


def _skipped(files: Files) -> list[str]:
    """Reasons, each with who and where, folded away."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for file in files.values():
        for row in file["skipped"]:
            cases = found.setdefault((row["reason"], row["suite"], row["provider"]), [])
            cases += [row["case"]] if row["case"] not in cases else []
    if not found:
        return []
    count = sum(len(file["skipped"]) for file in files.values())
    cells = [[escaped(reason), suite, f"`{who}`", ", ".join(cases)] for (reason, suite, who), cases in found.items()]
    folded = markdown_table(["reason", "suite", "provider", "cases"], cells, 4)
    return [f"<details><summary>Skipped: {count} rows, with the reasons</summary>", "", *folded, "", "</details>", ""]
