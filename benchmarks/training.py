"""Whole training runs beside each other: fastpref's, TRL's and plain loops, each in a process of its own.

    python -m fastpref.benchmarks.training --case training-bf16 training-fp32 --json FILE [--provider NAME ...]
    python -m fastpref.benchmarks.training --class gpu --seconds 300 --json FILE

All start from the same weights and take the same pairs in the same order (TRL's tokens are checked against ours). A row
holds the time of each step (the first apart), what a step was spent on, the reference's pass, the process's peak and
the losses. In fp32 every contestant's losses must be TRL's at every step, to a relative 1e-4: otherwise the exit code
is 1, and the lines say where. Rows are written after each contestant.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from time import monotonic
from typing import Any

from fastpref.options import Parser, UsageError

from . import results
from .arguments import check_names, check_seconds, fail, pick_device
from .cases_training import CASES, CLASSES, TrainingCase
from .process import Process, TimeUp
from .promises import judge
from .providers import providers_of
from .providers.base import Provider

DATA = Path(__file__).parents[2] / "shared" / "data"
# Of the losses, between two contestants in fp32.
AGREE = 1e-4
PEAK_IN = 2**20


def row_of(case: TrainingCase, provider: Provider, answer: dict[str, Any]) -> results.Row:
    """The row of a run; times are of its steps after the first, which loads and allocates what the rest has.

    Raises:
        RuntimeError: a loss is not finite.
    """
    from .measure import spread

    strange = [step for step, loss in enumerate(answer["losses"], 1) if not math.isfinite(loss)]
    if strange:
        raise RuntimeError(f"its losses of steps {', '.join(map(str, strange))} are not finite")
    seconds, tokens, phases = answer["seconds"], answer["tokens"], answer["phases"]
    steady = seconds[1:]
    timed = spread(steady)
    work = mean(tokens[1:])
    shares = {name: 1e3 * median(phase[name] for phase in phases[1:]) for name in (phases[0] if phases else ())}
    return {
        "suite": "training",
        "case": case.name,
        "mode": "train",
        **provider.fields(),
        **case.fields(),
        "first_ms": 1e3 * seconds[0],
        **timed,
        "reference_ms": 1e3 * answer["reference_seconds"],
        "whole_ms": 1e3 * (answer["reference_seconds"] + sum(seconds)),
        "phases_ms": shares or None,
        "outside_layers": _outside(phases[1:], 0.0),
        "outside_layers_with_reference": _outside(phases[1:], answer["reference_seconds"] / len(seconds)),
        "tokens_per_second": sum(tokens[1:]) / sum(steady),
        "work": work,
        "work_unit": "tokens",
        "rate": sum(tokens[1:]) / sum(steady),
        "rate_unit": "tokens/s",
        "peak_bytes": answer["peak_bytes"],
        "base_bytes": answer["base_bytes"],
        "growth_bytes": answer["peak_bytes"] - answer["base_bytes"],
        "losses": answer["losses"],
        **dict.fromkeys(("share", "series", "limit", "limit_ms", "ratio_to_limit", "loss_error", "loss_error_against")),
        "stolen_share": answer["stolen_share"],
    }


def _outside(phases: Sequence[dict[str, float]], reference: float) -> float | None:
    """The share of the steps that is not the layers' forward and backward; optimiser and clipping are not of it."""
    if not phases:
        return None
    rest = sum(phase["rest"] + reference for phase in phases)
    return rest / (rest + sum(phase["layers"] for phase in phases))


def compare_losses(rows: Sequence[results.Row]) -> list[str]:
    """Writes each row's largest relative distance from TRL's losses into it; lines for those of fp32 that disagree.

    Where TRL has no row, the plain loop's losses stand in for them.
    """
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = {row["provider"]: row for row in rows if row["case"] == case}
        base = next((here[name] for name in ("trl", "trl_fastest", "trl_precomputed", "plain") if name in here), None)
        for row in here.values():
            if base is None or row is base:
                continue
            pairs = enumerate(zip(row["losses"], base["losses"], strict=True), 1)
            step, worst = max(((n, abs(a - b) / abs(b)) for n, (a, b) in pairs), key=lambda found: found[1])
            row["loss_error"], row["loss_error_against"] = worst, base["provider"]
            if row["dtype"] == "fp32" and worst > AGREE:
                lines.append(
                    f"{case}: the losses of {row['provider']} are not those of {base['provider']}: {worst:.1e} of them "
                    f"at step {step} ({row['losses'][step - 1]:.6f} against {base['losses'][step - 1]:.6f}), "
                    f"at most {AGREE:g} is rounding"
                )
    return lines


def _parser() -> Parser:
    summary = str(__doc__).partition("\n")[0]
    parser = Parser(prog="python -m fastpref.benchmarks.training", description=summary, allow_abbrev=False)
    add = parser.add_argument
    add("--case", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(CASES)}")
    add("--class", dest="device_class", choices=tuple(CLASSES), help="the cases of a class of devices, instead")
    add("--provider", nargs="+", default=[], metavar="NAME", help="only these contestants")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where torch finds one")
    add("--steps", type=int, metavar="N", help="optimiser steps, in place of the case's (at least 2)")
    add("--data", type=Path, default=DATA, metavar="DIR", help="the folder of real pairs and tokenizer (%(default)s)")
    add("--seconds", type=float, help="for everything; a contestant may take half of what is left (default: no limit)")
    add("--json", type=Path, metavar="FILE", help="where rows are written, after each contestant")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 losses disagree, 2 bad input, 130 interrupted."""
    from .measure import head_of

    try:
        options = _parser().parse_args(argv)
        results.check_json(options.json)
        cases, device = _chosen(options)
        tiny = all(case.name in CLASSES["tiny"] for case in cases)
        device_class = "tiny" if tiny else "gpu" if device == "cuda" else "cpu"
        store = results.Store(options.json, head_of(device, device_class, 2**26))
        store.save()
        _run_all(cases, options, device, store)
    except KeyboardInterrupt:
        print(f"interrupted; {len(store.rows)} rows are kept")
        return 130
    except (ValueError, OSError) as error:
        return fail("training", error)
    wrong = compare_losses(store.rows)
    store.save(complete=True)
    for promise in judge(store.rows, device_class):
        print(promise)
    for line in wrong:
        print(f"LOSSES DISAGREE: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _chosen(options: argparse.Namespace) -> tuple[list[TrainingCase], str]:
    device = pick_device(options.device)
    if bool(options.case) == bool(options.device_class):
        raise UsageError(f"give --case or --class; cases are {', '.join(CASES)}")
    names = options.case or CLASSES[options.device_class]
    check_names("case", names, CASES)
    check_names("provider", options.provider, [provider.name for provider in providers_of("training")])
    if options.steps is not None and options.steps < 2:
        raise UsageError(f"--steps must be at least 2 (the first is told apart), got {options.steps}")
    check_seconds(options.seconds)
    changes = {} if options.steps is None else {"steps": options.steps}
    return [replace(CASES[name], **changes) for name in names], device


def _run_all(cases: Sequence[TrainingCase], options: argparse.Namespace, device: str, store: results.Store) -> None:
    from .inputs_training import write_inputs

    end = None if options.seconds is None else monotonic() + options.seconds
    for case in cases:
        named = options.provider or case.providers
        wanted = [provider for provider in providers_of("training") if not named or provider.name in named]
        with tempfile.TemporaryDirectory(prefix="fastpref-training-") as folder:
            write_inputs(case, Path(folder), options.data)
            for provider in wanted:
                reason = provider.why_not(case, device)
                left = None if end is None else end - monotonic()
                if reason is None and left is not None and left <= 0:
                    reason = f"the {options.seconds:g} s were over"
                if reason is None:
                    seconds = None if left is None else max(left / 2, 30.0)
                    reason = _run_one(case, provider, folder, device, seconds, store)
                if reason is not None:
                    print(f"{case.name} {provider.name}: skipped, {reason}", flush=True)
                    store.skip("training", case.name, "train", provider.name, reason)


def _run_one(
    case: TrainingCase, provider: Provider, folder: str, device: str, seconds: float | None, store: results.Store
) -> str | None:
    """Adds the row; or why there is none."""
    try:
        with Process(device) as process:
            question = {"provider": provider.name, "case": asdict(case), "folder": folder}
            answer = process.ask("train", seconds, within=None, **question)
        row = row_of(case, provider, answer)
    except TimeUp:
        return f"it was not done within its {seconds:.0f} s"
    except MemoryError as error:
        return f"out of memory: {error}"
    except RuntimeError as error:
        return str(error)
    compare_losses([*store.rows, row])
    store.add(row)
    print(_line(row), flush=True)
    return None


def _line(row: results.Row) -> str:
    outside = "" if row["outside_layers"] is None else f", {row['outside_layers']:.0%} of it outside the layers"
    return (
        f"{row['case']} {row['provider']}: {row['median_ms'] / 1e3:.3f} s a step{outside} (first "
        f"{row['first_ms'] / 1e3:.3f} s, reference {row['reference_ms'] / 1e3:.3f} s before), "
        f"{row['tokens_per_second']:,.0f} tokens/s, peak {row['peak_bytes'] / PEAK_IN:,.0f} MiB "
        f"({row['growth_bytes'] / PEAK_IN:,.0f} beyond imports)"
    )


if __name__ == "__main__":
    sys.exit(main())
