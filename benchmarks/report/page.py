"""The report page, and the blocks of README.md and docs/benchmarks.md, as Markdown, from results files.

Ratios are taken within a file alone: its rows come from one run on one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..promises import Promise, judge
from .markdown import against, length_table, rows_table, table
from .plots import pictures
from .training import section as training_section
from .words import (
    MODES,
    OURS,
    TITLES,
    Row,
    cases_of,
    day_and_commit,
    device,
    headline,
    is_timed,
    longest_tokens,
    memory,
    series_of,
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
# What markdown.against tells first.
_AGAINST = ("fastpref", "of the limit", "fastest rival, × ours", "plain, × ours", "peak", "rival's peak")
COMMAND = "python -m fastpref.benchmarks.report"
NOT_MEASURED = "not measured"
NOTE = (
    "Limit: what the same machine did in the same run with nothing but the unavoidable work; 100% is the limit. Peak: "
    "beyond inputs and gradients. Errors are against float64: of the value in nats, of gradients relative to their "
    "norm. `rival` is the fastest of those that are others' work."
)


def report(files: Files, planned: Planned) -> str:
    lines = [
        "# Results",
        "",
        f"Written by `{COMMAND}` from the JSON files beside this page; nothing here is typed.",
        "",
    ]
    lines += [*_in_short(files, planned), "", NOTE, ""]
    for device_class, here in _by_class(files).items():
        lines += _class_section(device_class, here, planned if device_class == "gpu" else {})
    if sweeps := {name: file for name, file in files.items() if not _with_rows(file)}:
        lines += [
            "## Sweeps",
            "",
            *table(["file", "rows", "device", "measured"], map(_sweep_line, sweeps.items())),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def short_block(files: Files) -> str:
    """README.md's: a line a suite, the GPU's line where nothing is measured, and how many promises are met."""
    promises = [promise for file in files.values() for promise in judge(file["rows"], file["device_class"])]
    header = ["", "fastpref", "fastest other", "plain torch", "peak memory", "the other's peak"]
    rows = []
    for device_class, here in _by_class(files).items():
        for suite, title in TITLES.items():
            groups = [headline([row for row in _timed(file) if row["suite"] == suite]) for file in here.values()]
            if group := max(groups, key=len, default=[]):
                ours, _, *others = against(group)
                rows.append([f"{title}, {CLASSES[device_class]}<br>{shape(group[0])}", ours, *others[:4]])
    lines = [*table(header, rows), ""]
    if not any(file["device_class"] == "gpu" for file in files.values()):
        lines += [f"On a {CLASSES['gpu']}: **{NOT_MEASURED}** yet.", ""]
    return "\n".join([*lines, f"{sum(promise.met for promise in promises)} of {len(promises)} promises are met."])


def tables_block(files: Files, folder: str) -> str:
    """docs/benchmarks.md's: a table a suite, pictures, and what is promised and missed; `folder` holds the files."""
    lines: list[str] = []
    for device_class, here in _by_class(files).items():
        if device_class not in ("cpu", "gpu"):
            continue
        if not here:
            lines += [f"On a {CLASSES[device_class]}: **{NOT_MEASURED}** yet.", ""]
        for suite in ("logps", "linear", "step", "training"):
            groups = {
                name: headline([row for row in _timed(file) if row["suite"] == suite]) for name, file in here.items()
            }
            # A suite may have been measured in several runs: the one where most stand beside each other.
            name = max(groups, key=lambda name: len(groups[name]), default="")
            if group := groups.get(name):
                where = _where(here[name], group)
                lines += [f"{TITLES[suite]}: {shape(group[0])}. {where}.", "", *rows_table(group), ""]
                picture = slug(suite, group[0]["case"])
                if suite in ("linear", "training") and picture in pictures(here[name]):
                    lines += [f"![{TITLES[suite]}]({folder}/plots/{name}/{picture}.png)", ""]
    promises = [promise for file in files.values() for promise in judge(file["rows"], file["device_class"])]
    return "\n".join([*lines, NOTE.split(" `rival`")[0], "", *_promises(promises)]).rstrip()


def _by_class(files: Files) -> dict[str, dict[str, File]]:
    """Files with timed rows by class of device: the GPU is always there, first where it is measured, else last."""
    present = {name: file for name, file in files.items() if _with_rows(file)}
    measured = sorted({file["device_class"] for file in present.values()}, key=lambda c: (c != "gpu", c))
    order = measured if "gpu" in measured else [*measured, "gpu"]
    return {c: {name: file for name, file in present.items() if file["device_class"] == c} for c in order}


def _with_rows(file: File) -> bool:
    return any(is_timed(row) or "longest" in row for row in file["rows"])


def _timed(file: File) -> list[Row]:
    return [row for row in file["rows"] if is_timed(row)]


def _in_short(files: Files, planned: Planned) -> list[str]:
    header = ["on", "case", *_AGAINST]
    lines = []
    for device_class, here in _by_class(files).items():
        for suite in [suite for suite in TITLES if suite != "longest"]:
            groups = [headline([row for row in _timed(file) if row["suite"] == suite]) for file in here.values()]
            group = max(groups, key=len, default=[])
            if group:
                lines.append([CLASSES[device_class], f"{suite} `{group[0]['case']}`", *against(group)[:6]])
            elif device_class == "gpu" and suite in planned:
                lines.append([CLASSES[device_class], suite, *[NOT_MEASURED] * 6])
    return table(header, lines)


def _class_section(device_class: str, files: Files, planned: Planned) -> list[str]:
    lines = [f"## {CLASSES.get(device_class, device_class)}", ""]
    if files:
        header = ["file", "device", "measured", "versions", "threads", "copy"]
        lines += [*table(header, [_head_line(name, file) for name, file in files.items()]), ""]
    else:
        lines += [f"{NOT_MEASURED.capitalize()} yet. `benchmarks/on_gpu.sh OUT_DIR` measures these in one command.", ""]
    promises = [promise for file in files.values() for promise in judge(file["rows"], file["device_class"])]
    lines += _promises(promises)
    there = {row["suite"] for file in files.values() for row in _timed(file)}
    for suite in [*TITLES, *sorted(there - TITLES.keys())]:
        for name, file in files.items():
            if rows := [row for row in _timed(file) if row["suite"] == suite]:
                lines += _suite_section(suite, name, file, rows)
        missing = [case for case in planned.get(suite, ()) if not _is_there(case, files)]
        if missing:
            lines += [f"### {TITLES.get(suite, suite)}" + (f": {NOT_MEASURED}" if suite in there else ""), ""]
            lines += [
                *table(["case", "fastpref", "of the limit", "fastest rival", "peak"], map(_unmeasured, missing)),
                "",
            ]
    for name, file in files.items():
        lines += _longest(name, file)
    return [*lines, *_skipped(files)]


def _is_there(case: Row, files: Files) -> bool:
    return any((r["suite"], r["case"]) == (case["suite"], case["case"]) for f in files.values() for r in _timed(f))


def _unmeasured(case: Row) -> list[str]:
    return [_case(case), *[NOT_MEASURED] * 4]


def _case(row: Row) -> str:
    return f"`{row['case']}`<br>{shape(row)}"


def _head_line(name: str, file: File) -> list[str]:
    ended = "" if file.get("complete", True) else f", **interrupted** after {len(file['rows'])} rows"
    packages = f"python {file['python']}, {versions(file, file['rows'])}"
    copy = f"{file['copy_gb_per_s']:.1f} GB/s"
    return [f"[{name}]({name}.json)", device(file), day_and_commit(file) + ended, packages, str(file["threads"]), copy]


def _sweep_line(item: tuple[str, File]) -> list[str]:
    name, file = item
    suites = ", ".join(f"`{suite}`" for suite in dict.fromkeys(row["suite"] for row in file["rows"]))
    return [f"[{name}]({name}.json)", f"{len(file['rows'])} of {suites or 'none'}", device(file), day_and_commit(file)]


def _promises(promises: Sequence[Promise]) -> list[str]:
    if not promises:
        return []
    met = sum(promise.met for promise in promises)
    rows = [
        [
            f"`{promise.case}`",
            f"{three(promise.got)} {promise.what}",
            f"at {'least' if promise.at_least else 'most'} {promise.bound:g}",
            "met" if promise.met else "**MISSED**",
        ]
        for promise in sorted(promises, key=lambda promise: promise.met)
    ]
    return [f"### Promises: {met} of {len(promises)} met", "", *table(["case", "got", "promised", ""], rows), ""]


def _suite_section(suite: str, name: str, file: File, rows: Sequence[Row]) -> list[str]:
    single = single_rows(rows)
    header = ["case", *_AGAINST, "value error", "rival's error"]
    if suite == "training":
        return [f"### {TITLES[suite]}", "", *training_section(name, rows)]
    lines = [f"### {TITLES.get(suite, suite)}", "", f"From [{name}]({name}.json). The limit is {rows[0]['limit']}.", ""]
    for mode, words in MODES.items():
        groups = [group for (_, of), group in cases_of(single).items() if of == mode]
        groups = [group for group in groups if any(row["family"] == OURS for row in group)]
        if groups:
            lines += [f"{words.capitalize()}:", "", *table(header, [[_case(g[0]), *against(g)] for g in groups]), ""]
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
        words = f"**`{case}`, {MODES.get(mode, mode)}**: {shape(group[0])}"
        lines += [words, "", *rows_table(group), ""]
    hows = {row["provider"]: row["how"] for row in rows if row.get("how")}
    lines += [f"- `{provider}`: {how}" for provider, how in hows.items()]
    return [*lines, "", "</details>", ""] if hows else [*lines, "</details>", ""]


def _names(suite: str, rows: Sequence[Row]) -> set[str]:
    """The names that pictures of these rows can have."""
    names = {slug(suite, row["case"]) for row in rows}
    for series, mode in series_of(rows):
        mode_words = [] if mode == "train" else [mode]
        names |= {slug(suite, series, *mode_words, axis) for axis in ("time", "memory", "error")}
    return names


def _longest(name: str, file: File) -> list[str]:
    rows = [row for row in file["rows"] if "longest" in row]
    lines: list[str] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = sorted((row for row in rows if row["case"] == case), key=lambda row: -(row["longest"] or 0))
        title = f"### {TITLES['longest']} within {memory(here[0]['within_bytes'])}: `{case}`"
        cells = [
            [
                f"`{row['provider']}`",
                longest_tokens(row),
                f"{row['next_failed']:,}" if row.get("next_failed") else "–",
                memory(row.get("peak_bytes")),
            ]
            for row in here
        ]
        lines += [title, "", *table(["", "tokens a sequence", "the next that failed", "peak"], cells), ""]
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
    cells = [[reason, suite, f"`{who}`", ", ".join(cases)] for (reason, suite, who), cases in found.items()]
    folded = table(["reason", "suite", "provider", "cases"], cells)
    return [f"<details><summary>Skipped: {count} rows, with the reasons</summary>", "", *folded, "", "</details>", ""]


def _where(file: File, rows: Sequence[Row]) -> str:
    return f"{device(file)}; {day_and_commit(file)}; {versions(file, rows)}"
