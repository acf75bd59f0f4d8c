"""`fastpref bench`: measure, show, and keep what was measured; or compare two results."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastpref.options import Parser, UsageError

from . import results
from .report.compare import compare

# Beyond this share of time that a hypervisor took, times are not to be trusted.
MUCH_STOLEN = 0.02
DESCRIPTION = """Time, memory and error of fastpref beside other ways to the same numbers, and beside the limit of this
machine, all measured in one run. Writes a results file (row by row: an interrupted run keeps its rows) and pictures."""


def _parser() -> Parser:
    parser = Parser(prog="fastpref bench", description=DESCRIPTION, allow_abbrev=False)
    which = parser.add_argument_group("what is measured")
    which.add_argument("--quick", action="store_true", help="a small set: under a minute on a laptop's CPU")
    which.add_argument(
        "--device_class",
        default=None,
        help="the set: cpu, gpu, quick or tiny (default: gpu where torch finds one, else cpu)",
    )
    which.add_argument("--suite", nargs="+", default=[], metavar="NAME", help="only these suites")
    which.add_argument("--case", nargs="+", default=[], metavar="NAME", help="only these cases")
    which.add_argument("--provider", nargs="+", default=[], metavar="NAME", help="only these providers")
    which.add_argument("--list", action="store_true", help="print suites, cases and providers, and measure nothing")
    parser.add_argument("--output_dir", default="./fastpref-bench", help="folder of the results (default: %(default)s)")
    parser.add_argument("--name", default="results", help="of the results file, without .json (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a results file of this name")
    parser.add_argument("--no_plots", action="store_true", help="draw no pictures")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="measure nothing: say what got slower, larger or less exact beyond the noise from one results file to "
        "another; exit code 1 if something did",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """0 done, 1 something got worse (--compare), 2 bad input, 130 interrupted."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has no width of its own
    try:
        options = _parser().parse_args(argv)
        if options.compare:
            comparison = compare(*(results.read(Path(path)) for path in options.compare))
            console.print(comparison.format(), markup=False, highlight=False, soft_wrap=True)
            return comparison.exit_code
        run, entries = _prepare(options)
    except (ValueError, OSError) as error:
        return _fail(error)
    if options.list:
        _list(console, entries, run)
        return 0
    try:
        _measure_all(run, entries, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; {len(run.rows)} rows are kept in {run.path}")
        return 130
    finally:
        run.close()
    _show(run, console, plots=not options.no_plots)
    return 0


def _fail(error: Exception) -> int:
    print(f"fastpref bench: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _prepare(options: Any) -> tuple[Any, list[Any]]:
    if not re.fullmatch(r"[\w.-]+", options.name):
        raise UsageError(f"--name must be letters, digits, '.', '_' and '-', got {options.name!r}")
    if options.quick and options.device_class not in (None, "quick"):
        raise UsageError(f"--quick is the set quick, and --device_class says {options.device_class}: give one of them")
    path = Path(options.output_dir) / f"{options.name}.json"
    if path.exists() and not (options.overwrite or options.list):
        raise UsageError(f"{path} is there already: give another --output_dir or --name, or --overwrite to replace it")
    if path.parent.exists() and not path.parent.is_dir():
        raise UsageError(f"--output_dir {path.parent} is a file; a folder is wanted")
    from .runner import Run, select  # after the cheap checks: it imports torch, and times a copy

    run = Run("quick" if options.quick else options.device_class or "auto", None if options.list else path)
    entries = select(run.entries(), suites=options.suite, cases=options.case, providers=options.provider)
    if run.path is not None:
        run.save()  # a folder that cannot be written to says so now
    return run, entries


def _list(console: Console, entries: Sequence[Any], run: Any) -> None:
    for suite in dict.fromkeys(entry.suite for entry in entries):
        mine = [entry for entry in entries if entry.suite is suite]
        console.print(f"suite {suite.name} (limit: {suite.limit})", style="bold", highlight=False)
        console.print(f"  cases: {', '.join(dict.fromkeys(e.case.name for e in mine))}", highlight=False)
        for name, case in {e.provider: e.case for e in mine}.items():
            provider = suite.providers[name]
            reason = provider.why_not(case, run.device)
            note = f"  [skipped: {reason}]" if reason else ""
            console.print(f"  {name}: {provider.how}{note}", markup=False, highlight=False, soft_wrap=True)


def _measure_all(run: Any, entries: Sequence[Any], console: Console) -> None:
    from .runner import measure

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, transient=True) if console.is_terminal else None
    device = f"{run.head['device']}, set {run.device_class}, copy {run.head['copy_gb_per_s']:.1f} GB/s"
    console.print(f"{device}; {len(entries)} rows, kept in {run.path}", highlight=False, soft_wrap=True)
    with progress or nullcontext():
        task = progress.add_task("", total=len(entries)) if progress else None
        for number, entry in enumerate(entries, 1):
            if progress and task is not None:
                progress.update(task, description=entry.name)
            start = perf_counter()
            row = measure(run, entry)
            if progress and task is not None:
                progress.advance(task)
            else:
                what = f"{row['median_ms']:.2f} ms" if row else f"skipped: {run.skipped[-1]['reason']}"
                took = perf_counter() - start
                line = f"[{number}/{len(entries)}] {entry.name}: {what} ({took:.0f} s)"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    run.save(complete=True)


def _show(run: Any, console: Console, *, plots: bool) -> None:
    from .promises import judge
    from .tables import NOTE, tables

    for table in tables(run.rows):
        console.print(table)
    console.print(NOTE, style="dim", highlight=False)
    for reason, rows in _by_reason(run.skipped).items():
        console.print(f"skipped, {reason}: {', '.join(rows)}", markup=False, highlight=False, soft_wrap=True)
    if (worst := max((row["stolen_share"] or 0 for row in run.rows), default=0)) > MUCH_STOLEN:
        note = (
            f"up to {worst:.0%} of the processors' time during a row went to other machines on this host: measure again"
        )
        console.print(note, style="bold", highlight=False, soft_wrap=True)
    for promise in judge(run.rows, run.device_class):
        console.print(str(promise), highlight=False, soft_wrap=True)
    made = []
    if plots and run.rows:
        from .report.plots import plot_all

        made = plot_all(results.read(run.path), run.path.parent)
    console.print(f"{len(run.rows)} rows in {run.path}", highlight=False, soft_wrap=True)
    if made:
        console.print(f"pictures: {', '.join(path.name for path in made)}", highlight=False, soft_wrap=True)


def _by_reason(skipped: Sequence[results.Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in skipped:
        names = found.setdefault(row["reason"], [])
        if row["provider"] not in names:
            names.append(row["provider"])
    return found
