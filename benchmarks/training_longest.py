"""How long may a pair be, for a whole training run to stay within so much memory? fastpref.train and plain loops.

    python -m fastpref.benchmarks.training_longest --within 6GiB --json FILE
    python -m fastpref.benchmarks.training_longest --within 80GiB --model qwen3-0.6b --precision bf16 --device cuda

longest.py asks this of a step's providers; here each trial is two steps of a real run in a fresh process, with
reference log-probs known (who keeps a reference model in memory pays for it) and the layers' activations checkpointed
for everyone. On a CPU the limit counts the whole process. Peaks of a few short lengths foretell the longest one, and
runs below and above it confirm that: what failed is at most 3% longer than what fits. Rows are written after each
contestant.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from fastpref.checks import parse_budget
from fastpref.options import Parser, UsageError

from . import results
from .cases_step import MODELS
from .cases_training import longest_case
from .longest import Found
from .longest_process import TimeUp
from .providers import providers_of
from .providers.base import Provider

RESOLUTION = 0.03
SHORTEST = 16
START = {"cpu": 256, "gpu": 4096, "tiny": 32}
# The last length tried. On a CPU a run of that length takes minutes: attention grows with its square.
MOST = {"cpu": 16384, "gpu": 131072, "tiny": 2048}
DEFAULTS = ("fastpref", "plain", "plain_cached")
# A guess is confirmed from a little below it, and not further away than this many times the longest that was run.
BELOW, REACH = 0.99, 8

# The peak of a run of so many tokens, or None where memory did not suffice; may raise TimeUp.
Trial = Callable[[int], "int | None"]


def foretell(peak_of: Trial, limit: int, *, start: int, most: int, resolution: float = RESOLUTION) -> Found:
    """The longest length whose run stays within `limit`, and one at most `resolution` longer that does not.

    Peaks grow almost linearly with the length: the two longest runs that fitted foretell where the limit is met.
    """
    peaks: dict[int, int] = {}
    failed: int | None = None
    length = min(start, most)
    try:
        while True:
            peak = peak_of(length)
            if peak is None:
                failed = length
            else:
                peaks[length] = peak
            longest = max(peaks, default=0)
            if longest == most:
                return Found(longest, failed, "length")
            if failed is not None and (failed - longest <= resolution * longest or failed <= SHORTEST):
                return Found(longest, failed, "memory")
            length = _next(peaks, failed, limit, most, resolution)
    except TimeUp:
        return Found(max(peaks, default=0), failed, "time")


def _next(peaks: dict[int, int], failed: int | None, limit: int, most: int, resolution: float) -> int:
    """The length to try: below the foretold one first, then just beyond the longest that fits."""
    if not peaks:
        assert failed is not None
        return max(failed // 2, 1)
    longest = max(peaks)
    if len(peaks) == 1:
        wanted = 2.0 * longest if failed is None else (longest + failed) / 2
    else:
        before = max(length for length in peaks if length != longest)
        slope = (peaks[longest] - peaks[before]) / (longest - before)
        wanted = longest + (limit - peaks[longest]) / slope if slope > 0 else math.inf
        wanted = min(BELOW * wanted, float(REACH * longest))
    step = resolution * longest
    if failed is None:
        return min(most, max(math.floor(wanted), math.floor(longest + step), longest + 1))
    if wanted >= failed:  # memory was refused earlier than foretold
        wanted = (longest + failed) / 2
    lowest = longest + max(1, math.floor(step))
    return min(max(math.floor(wanted), lowest), failed - 1)


class Search:
    """One contestant's runs: each in its process, with a deadline."""

    def __init__(
        self, chosen: Plan, provider: Provider, folder: Path, deadline: float, say: Callable[[str], None]
    ) -> None:
        self.chosen, self.provider, self.folder, self.deadline, self.say = chosen, provider, folder, deadline, say
        self.peaks: dict[int, int] = {}
        self.last: tuple[int, float] | None = None  # length and seconds of the longest run

    def peak_of(self, length: int) -> int | None:
        from .inputs_training import write_inputs
        from .training_process import run_once

        left = self.deadline - monotonic()
        if left <= 0 or (self.last is not None and left < self.last[1] * max(1.0, 0.5 * length / self.last[0])):
            raise TimeUp
        case = longest_case(self.chosen.model, self.chosen.precision, length)
        write_inputs(case, self.folder, Path())
        start = monotonic()
        answer = run_once(
            self.provider.name,
            case,
            self.folder,
            self.chosen.device,
            within=self.chosen.within,
            seconds=max(self.deadline - start, 1.0),
        )
        seconds = monotonic() - start
        if not answer["fits"]:
            self.say(f"{length:,} tokens: does not fit ({answer['why']}), {seconds:.0f} s")
            return None
        self.peaks[length], self.last = answer["peak_bytes"], (length, seconds)
        self.say(f"{length:,} tokens: fits, {answer['peak_bytes'] / 2**30:.3f} GiB, {seconds:.0f} s")
        return self.peaks[length]


class Plan(NamedTuple):
    device: str
    device_class: str
    within: int
    model: str
    precision: str
    most: int
    providers: list[Provider]


def _parser() -> Parser:
    summary = str(__doc__).partition("\n")[0]
    parser = Parser(prog="python -m fastpref.benchmarks.training_longest", description=summary, allow_abbrev=False)
    add = parser.add_argument
    add("--within", type=_size, metavar="SIZE", help="the limit, as 6GiB (default: 80GiB on a GPU, 6GiB on a CPU)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where torch finds one")
    add("--model", help=f"one of {', '.join(MODELS)} (default: qwen3-0.6b on a GPU, qwen3-shallow on a CPU)")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--provider", nargs="+", default=list(DEFAULTS), metavar="NAME", help="of the contestants of training.py")
    add("--most", type=int, metavar="TOKENS", help=f"the last length tried (default: {MOST['cpu']}, {MOST['gpu']})")
    add("--seconds", type=float, default=840.0, help="for all together (default: %(default)g)")
    add("--json", type=Path, metavar="FILE", help="where rows are written, after each contestant")
    add("--tiny", action="store_true", help="a tiny model: proves the search")
    return parser


def _size(text: str) -> int:
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory_budget ")) from None


def plan(options: argparse.Namespace) -> Plan:
    """What the options ask for; UsageError, naming what is known, where they ask for something else."""
    import torch

    gpu = torch.cuda.is_available()
    device = options.device or ("cuda" if gpu else "cpu")
    if device == "cuda" and not gpu:
        raise UsageError("--device cuda, but torch finds no GPU here: take --device cpu")
    if device == "cpu" and not sys.platform.startswith("linux"):
        raise UsageError("on a CPU the search needs Linux: its limit is the kernel's")
    device_class = "tiny" if options.tiny else "gpu" if device == "cuda" else "cpu"
    model = options.model or {"tiny": "tiny", "gpu": "qwen3-0.6b", "cpu": "qwen3-shallow"}[device_class]
    if model not in MODELS:
        raise UsageError(f"unknown model {model!r}; known are {', '.join(MODELS)}")
    if not 0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds must be above 0 and finite, got {options.seconds:g}")
    most = options.most or MOST[device_class]
    if most < SHORTEST:
        raise UsageError(f"--most must be at least {SHORTEST} tokens, got {most}")
    known = {provider.name: provider for provider in providers_of("training")}
    if unknown := [name for name in options.provider if name not in known]:
        raise UsageError(f"unknown provider {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    within = options.within or (80 if device == "cuda" else 6) * 2**30
    precision = options.precision or ("bf16" if device == "cuda" else "fp32")
    return Plan(device, device_class, within, model, precision, most, [known[name] for name in options.provider])


def row_of(chosen: Plan, provider: Provider, found: Found, peak_bytes: int | None, seconds: float) -> results.Row:
    case = longest_case(chosen.model, chosen.precision, 0)
    fields = {name: value for name, value in case.fields().items() if name not in ("length", "max_length", "steps")}
    return {
        "suite": "longest",
        "case": case.name,
        "mode": "train",
        "provider": provider.name,
        "family": provider.family,
        "rival": provider.rival,
        "how": provider.how,
        **fields,
        "share": 0.5,
        "series": None,
        "within_bytes": chosen.within,
        "whole_process": chosen.device == "cpu",
        "longest": found.longest,
        "next_failed": found.next_failed,
        "stopped_by": found.stopped_by,
        "peak_bytes": peak_bytes,
        "seconds": seconds,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 2 bad input, 130 interrupted."""
    from .training import environment_of

    try:
        options = _parser().parse_args(argv)
        chosen = plan(options)
        head = environment_of(chosen.device, chosen.device_class)
        if options.json is not None:
            results.write(options.json, head, [])
    except (ValueError, OSError) as error:
        print(f"training_longest: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    rows: list[results.Row] = []
    skipped: list[results.Row] = []
    end = monotonic() + options.seconds
    try:
        with tempfile.TemporaryDirectory(prefix="fastpref-training-") as folder:
            for place, provider in enumerate(chosen.providers, 1):
                # The first one's runs are the longest: it may take most of the time, the last one what is left.
                left = end - monotonic()
                seconds = left if place == len(chosen.providers) else 0.7 * left
                reason = provider.why_not(longest_case(chosen.model, chosen.precision, SHORTEST), chosen.device)
                reason = reason or _search(chosen, provider, Path(folder), seconds, rows)
                if reason is not None:
                    print(f"{provider.name}: skipped, {reason}", flush=True)
                    key = {"suite": "longest", "case": "longest-training", "mode": "train", "provider": provider.name}
                    skipped.append({**key, "reason": reason})
                if options.json is not None:
                    results.write(options.json, head, rows, skipped)
    except KeyboardInterrupt:
        print(f"interrupted; {len(rows)} rows are kept")
        return 130
    if options.json is not None:
        results.write(options.json, {**head, "complete": True}, rows, skipped)
    return 0


def _search(chosen: Plan, provider: Provider, folder: Path, seconds: float, rows: list[Any]) -> str | None:
    """Adds the row; or why there is none."""
    start = monotonic()

    def say(text: str) -> None:
        print(f"{provider.name}: {text}", flush=True)

    one = Search(chosen, provider, folder, start + seconds, say)
    try:
        found = foretell(one.peak_of, chosen.within, start=START[chosen.device_class], most=chosen.most)
    except RuntimeError as error:
        return str(error)
    rows.append(row_of(chosen, provider, found, one.peaks.get(found.longest), round(monotonic() - start, 2)))
    say(f"longest {found.longest:,} tokens, stopped by {found.stopped_by}")
    return None


if __name__ == "__main__":
    sys.exit(main())
