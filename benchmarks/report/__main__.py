"""`python -m fastpref.benchmarks.report`: the report page, its pictures, and blocks of other pages, from results files.

Without options it reads the committed files and writes benchmarks/results/REPORT.md, benchmarks/results/plots/, and the
blocks in README.md and docs/benchmarks.md. With `--results DIR` it writes into DIR and no other page, unless `--readme`
names one.
`--check` writes nothing and says what is stale: pictures by whether they are there, text as it stands.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.folders import check_file
from fastpref.options import Parser, UsageError, given_path

from .. import results
from ..arguments import fail
from .page import COMMAND, report, short_block, tables_block
from .plots import pictures, plot_all
from .words import Row

RESULTS = Path(__file__).parents[1] / "results"
README = Path(__file__).parents[2] / "README.md"
PAGES = (README, README.parent / "docs" / "benchmarks.md")
OPENING = f"<!-- results: written by `{COMMAND}` -->"
SHORT_OPENING = OPENING.replace("results:", "results in short:")
BLOCK = re.compile(r"(<!-- results(?P<short> in short)?: [^\n]*-->\n)(.*?)(<!-- end of results -->)", re.DOTALL)
LEFTOVER = "shows rows that no results file has: delete it"
# Sizes the planned cases of the GPU, before there is one.
PLANNED_MEMORY = 80 * 2**30


def _parser() -> Parser:
    parser = Parser(prog=COMMAND, description="Report page, pictures and the pages' blocks from results files.")
    parser.add_argument("--results", type=given_path, default=RESULTS, metavar="DIR", help="folder of the JSON files")
    parser.add_argument(
        "--readme",
        type=given_path,
        default=None,
        metavar="FILE",
        help="a page whose block is written too (default: only with the committed results, README.md and "
        "docs/benchmarks.md)",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 and names where it is stale")
    return parser


def main(argv: Sequence[str]) -> int:
    """0 written or up to date, 1 stale (--check), 2 bad input."""
    try:
        options = _parser().parse_args(argv)
        folder: Path = options.results
        committed = folder.resolve() == RESULTS.resolve()
        pages = (options.readme,) if options.readme else PAGES if committed else ()
        files = read_all(folder)
        if not options.check:
            check_output(folder)
        texts = {folder / "REPORT.md": report(files, planned_on_gpu())}
        texts |= {page: _with_block(page, files, folder) for page in pages}
        if options.check:
            stale = _stale(folder, files, texts)
            print("\n".join([*stale, f"run `{COMMAND}`"] if stale else ["up to date"]))
            return 1 if stale else 0
        for path in write(folder, files, texts):
            print(path)
        for path in _leftover_pictures(folder, files):
            print(f"{path} {LEFTOVER}")
    except (ValueError, OSError) as error:
        return fail(COMMAND, error)
    return 0


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """The results files of a folder by name, in order; every one must be of this schema."""
    if not folder.is_dir():
        raise UsageError(f"--results must be a folder of results files, got {folder}")
    files = {path.stem: results.read(path) for path in sorted(folder.glob("*.json"))}
    if not files:
        raise UsageError(f"--results {folder} holds no results file: fastpref bench writes them")
    return files


def planned_on_gpu() -> dict[str, list[Row]]:
    """The cases of the GPU, as rows without numbers: what a page says of them until somebody has measured."""
    from ..cases_training import CASES, CLASSES
    from ..suites import SUITES  # imports torch

    whole = [{"suite": "training", "case": name, **CASES[name].fields()} for name in CLASSES["gpu"]]
    planned = {
        name: [
            {"suite": name, "case": case.name, **{field: getattr(case, field) for field in suite.shape}}
            for case in suite.cases("gpu", memory=PLANNED_MEMORY)
        ]
        for name, suite in SUITES.items()
    }
    return {**planned, "training": whole}


def _with_block(page: Path, files: dict[str, dict[str, Any]], folder: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if len(BLOCK.findall(text)) != 1:
        raise UsageError(
            f"{page} must have one line {OPENING} or {SHORT_OPENING}, and after it one <!-- end of results -->"
        )
    relative = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()

    def block(match: re.Match[str]) -> str:
        written = short_block(files) if match["short"] else tables_block(files, relative)
        return f"{match[1]}{written}\n{match[4]}"

    return BLOCK.sub(block, text)


def _wanted_pictures(folder: Path, files: dict[str, dict[str, Any]]) -> set[Path]:
    return {folder / "plots" / stem / f"{name}.png" for stem, file in files.items() for name in pictures(file)}


def _leftover_pictures(folder: Path, files: dict[str, dict[str, Any]]) -> list[Path]:
    """Pictures of rows that no file has any longer."""
    return sorted(set(folder.glob("plots/*/*.png")) - _wanted_pictures(folder, files))


def _stale(folder: Path, files: dict[str, dict[str, Any]], texts: dict[Path, str]) -> list[str]:
    lines = []
    for path, text in texts.items():
        if not path.exists():
            lines.append(f"{path} is missing")
        elif path.read_text(encoding="utf-8") != text:
            lines.append(f"{path} is not what the results files give")
    lines += [f"{path} is missing" for path in sorted(_wanted_pictures(folder, files)) if not path.exists()]
    return lines + [f"{path} {LEFTOVER}" for path in _leftover_pictures(folder, files)]


def check_output(folder: Path) -> None:
    """Refuse to write over a page or pictures that this command did not write."""
    check_file(folder / "REPORT.md", mark=COMMAND, option="the report")
    plots = folder / "plots"
    if plots.exists() and not (folder / "REPORT.md").exists():
        raise UsageError(f"{plots} is there, and no REPORT.md that this command wrote: give another --results")


def write(folder: Path, files: dict[str, dict[str, Any]], texts: dict[Path, str]) -> list[Path]:
    """Pictures first: the texts name them. What rows no longer show stays, for its owner to delete."""
    written = []
    for stem, file in files.items():
        if pictures(file):
            written += plot_all(file, folder / "plots" / stem)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
