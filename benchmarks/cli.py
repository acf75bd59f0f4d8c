"""`fastpref bench`: measure, show, and keep what was measured; or compare two results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.folders import Owner, check, claim
from fastpref.options import Parser, UsageError, given_path
from fastpref.tables import print_table

from . import results
from .arguments import fail, need
from .report.compare import compare

# Of a folder of results: more of them may come to it, and one of a name is replaced when asked to.
OWNER = Owner("fastpref bench", resume=True)
# Beyond this share of time that a hypervisor took, times are not to be trusted.
MUCH_STOLEN = 0.02
DESCRIPTION = """Time, memory and error of fastpref beside other ways to the same numbers, and beside the limit of this
machine, all measured in one run. Writes a results file (row by row: an interrupted run keeps its rows) and pictures."""
NOTE = """±: half of what lies between the quartiles. Limit: 100% is what the machine did in the same run. MiB: the peak
beyond inputs and gradients. Errors are against float64: of the value in nats, of the gradient relative to it."""


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
    parser.add_argument(
        "--output_dir",
        type=given_path,
        default=Path("fastpref-bench"),
        help="folder of the results (default: %(default)s)",
    )
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
    try:
        options = _parser().parse_args(argv)
        if options.compare:
            comparison = compare(*(results.read(Path(path)) for path in options.compare))
            print(comparison.format())
            return comparison.exit_code
        run, entries = _prepare(options)
    except (ValueError, OSError) as error:
        return fail("fastpref bench", error)
    if options.list:
        _list(entries, run)
        return 0
    try:
        claimed = claim(options.output_dir, OWNER)  # that it cannot be made shows only here
    except OSError as error:
        run.close()
        return fail("fastpref bench", error)
    try:
        with claimed:
            _measure_all(run, entries)
            claimed.finish()
            _show(run)
            if run.rows and not options.no_plots:
                from .report.plots import plot_all

                made = plot_all(results.read(run.path), run.path.parent)
                print(f"pictures: {', '.join(path.name for path in made)}")
    except KeyboardInterrupt:
        print(f"interrupted; {len(run.rows)} rows are kept in {run.path}")
        return 130
    finally:
        run.close()
    return 0


def _prepare(options: Any) -> tuple[Any, list[Any]]:
    if not re.fullmatch(r"[\w.-]+", options.name):
        raise UsageError(f"--name must be letters, digits, '.', '_' and '-', got {options.name!r}")
    if options.quick and options.device_class not in (None, "quick"):
        raise UsageError(f"--quick is the set quick, and --device_class says {options.device_class}: give one of them")
    path = None
    if not options.list:
        need("bench", "rich", "psutil", *([] if options.no_plots else ["matplotlib"]))
        check(options.output_dir, OWNER)
        path = options.output_dir / f"{options.name}.json"
        if path.exists() and not options.overwrite:
            raise UsageError(f"{path} is there: give another --name or --output_dir, or --overwrite")
    from .runner import Run, select  # after the cheap checks: it imports torch, and times a copy

    run = Run("quick" if options.quick else options.device_class or "auto", path)
    return run, select(run.entries(), suites=options.suite, cases=options.case, providers=options.provider)


def _list(entries: Sequence[Any], run: Any) -> None:
    for suite in dict.fromkeys(entry.suite for entry in entries):
        mine = [entry for entry in entries if entry.suite is suite]
        print(f"suite {suite.name} (limit: {suite.limit})")
        print(f"  cases: {', '.join(dict.fromkeys(e.case.name for e in mine))}")
        for name, case in {e.provider: e.case for e in mine}.items():
            provider = suite.providers[name]
            reason = provider.why_not(case, run.device)
            print(f"  {name}: {provider.how}{f'  [skipped: {reason}]' if reason else ''}")


def _measure_all(run: Any, entries: Sequence[Any]) -> None:
    from fastpref.console import Console

    from .runner import measure

    console = Console()
    device = f"{run.head['device']}, set {run.device_class}, copy {run.head['copy_gb_per_s']:.1f} GB/s"
    console.say(f"{device}; {len(entries)} rows, kept in {run.path}")
    with console.bar("bench", len(entries), unit="row") as bar:
        for entry in entries:
            row = measure(run, entry)
            what = f"{row['median_ms']:.2f} ms" if row else f"skipped: {run.skipped[-1]['reason']}"
            console.say(f"{entry.name}: {what}")
            bar.advance()
    run.save(complete=True)


def _show(run: Any) -> None:
    from .promises import judge

    print_rows(run.rows)
    reasons: dict[str, list[str]] = {}
    for row in run.skipped:
        reasons.setdefault(row["reason"], []).append(row["provider"])
    for reason, names in reasons.items():
        print(f"skipped, {reason}: {', '.join(dict.fromkeys(names))}")
    if (worst := max((row["stolen_share"] or 0 for row in run.rows), default=0)) > MUCH_STOLEN:
        print(
            f"up to {worst:.0%} of the processors' time during a row went to other machines on this host: measure again"
        )
    for promise in judge(run.rows, run.device_class):
        print(promise)
    print(f"{len(run.rows)} rows in {run.path}")


def print_rows(rows: Sequence[results.Row]) -> None:
    """A table a suite."""
    for suite in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == suite]
        cells = [[f"{row['case']}, {row['mode']}", *_cells(row)] for row in mine]
        # A case is named once, beside its first row.
        named = [
            [case if place == 0 or case != cells[place - 1][0] else "", *numbers]
            for place, (case, *numbers) in enumerate(cells)
        ]
        header = ["case", "", "ms", "±", mine[0]["rate_unit"], "limit", "MiB", "value err", "grad err"]
        print_table(f"{suite}: the limit is {mine[0]['limit']}", header, named, words=("case", ""))
    print(NOTE)


def _cells(row: results.Row) -> list[str]:
    peak = row["peak_beyond_gradient_bytes"]
    return [
        row["provider"],
        f"{row['median_ms']:.2f}" if row["median_ms"] < 100 else f"{row['median_ms']:.0f}",
        f"{(row['q3_ms'] - row['q1_ms']) / row['median_ms'] / 2:.0%}",
        f"{row['rate']:.3g}",
        _or_dash(row["ratio_to_limit"], ".0%"),
        _or_dash(None if peak is None else peak / 2**20, ".1f"),
        _or_dash(row["value_error"], ".1e"),
        _or_dash(row["gradient_error"], ".1e"),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
