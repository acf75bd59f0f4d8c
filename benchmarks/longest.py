"""How long may a pair be, to train within so much memory? For each provider of the step suite.

    python -m fastpref.benchmarks.longest --within 80GiB [--device cuda|cpu] [--model NAME] [--seconds N] [--json FILE]

A pair is two sequences of one length, half of each scored. A whole step (forward, loss, backward, clipping, AdamW),
with the weights and the optimiser's moments that it needs, has to stay within the limit; activations of the layers are
checkpointed for everyone, so that head and loss decide. The length doubles until a step fails, then the gap is
bisected to an eighth. Each provider has a process of its own (longest_worker.py), which is under the limit and may die
of it.

Providers share the time: one may take half of what is left. Where time ends a search first, `stopped_by` is "time" and
`longest` a lower bound. Rows are written after each provider.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from fastpref.checks import parse_budget
from fastpref.options import Parser, UsageError

from . import results
from .cases_step import MODELS, StepCase
from .longest_process import Ended, Process, TimeUp
from .providers import providers_of
from .providers.base import Provider

# The order of the run, most wanted first: time may run out.
ORDER = ("fastpref", "plain", "trl", "liger", "trl_liger", "fastpref_hidden", "fastpref_logits", "compiled")
PRECISION = 8  # of the length
SHORTEST = 16
# The first length tried, and the last: nobody's pairs are longer.
START = {"gpu": 2048, "cpu": 256, "tiny": 32}
MOST = {"gpu": 2**20, "cpu": 2**20, "tiny": 4096}


class Found(NamedTuple):
    longest: int  # 0 where not even SHORTEST tokens fit
    next_failed: int | None
    stopped_by: str  # "memory", "time", or "length" where MOST fits


def search(fits: Callable[[int], bool], *, start: int, most: int) -> Found:
    """The longest length that fits, to an eighth of it; `fits` may raise TimeUp."""
    longest, failed, length = 0, None, min(start, most)
    try:
        while failed is None and longest < most:
            if fits(length):
                longest, length = length, min(2 * length, most)
            else:
                failed = length
        while failed is not None and failed - longest > max(longest // PRECISION, SHORTEST):
            middle = (longest + failed) // 2
            if fits(middle):
                longest = middle
            else:
                failed = middle
    except TimeUp:
        return Found(longest, failed, "time")
    return Found(longest, failed, "length" if failed is None else "memory")


class Search:
    """One provider's search: its process, started anew where it died, the deadline, and the peak at the longest."""

    def __init__(self, process: Process, question: dict[str, Any], deadline: float, say: Callable[[str], None]) -> None:
        self.process, self.question, self.deadline, self.say = process, question, deadline, say
        self.ready = False
        self.peak_bytes: int | None = None
        self.last: tuple[int, float] | None = None  # length and seconds

    def fits(self, length: int) -> bool:
        if self.last is not None and self._left() < self.last[1] * length / self.last[0]:
            raise TimeUp  # a step takes at least in proportion to its length
        start = monotonic()
        answer = None if self.ready else self._start()
        if answer is None:
            answer = self._ask({"length": length})
        seconds = monotonic() - start
        if "error" in answer:
            raise RuntimeError(answer["error"])
        if not answer["fits"]:
            self.say(f"{length} tokens: does not fit ({answer['why']})")
            return False
        self.peak_bytes, self.last = answer["peak_bytes"], (length, seconds)
        self.say(f"{length} tokens: fits, {answer['peak_bytes'] / 2**30:.2f} GiB, {seconds:.1f} s")
        return True

    def _start(self) -> dict[str, Any] | None:
        """None where model and optimiser are there; otherwise what their process answered."""
        answer = self._ask(self.question)
        self.ready = bool(answer.get("fits"))
        return None if self.ready else answer

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.process.ask(question, self._left())
        except Ended as ended:
            device, self.ready = self.process.device, False
            if device != "cpu" or not ended.by_signal:
                raise RuntimeError(str(ended)) from None
            self.process = Process(device)
            return {"fits": False, "why": str(ended)}

    def _left(self) -> float:
        return self.deadline - monotonic()


def _size(text: str) -> int:
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory_budget ")) from None


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastpref.benchmarks.longest",
        description=str(__doc__).partition("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--within", type=_size, metavar="SIZE", help="the limit, as 80GiB (default: 80GiB on a GPU, 64MiB with --tiny)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where torch finds one")
    add("--model", help=f"one of {', '.join(MODELS)} (default: llama3-8b-head on a GPU, gpt2-head on a CPU)")
    add("--provider", nargs="+", default=[], metavar="NAME", help="only these providers")
    add("--seconds", type=float, default=300.0, help="for all providers together (default: %(default)g)")
    add("--json", type=Path, metavar="FILE", help="where rows are written, after each provider")
    add("--tiny", action="store_true", help=f"a tiny model, to {MOST['tiny']} tokens: proves the search")
    return parser


class Plan(NamedTuple):
    device: str
    device_class: str
    within: int
    case: StepCase
    providers: list[Provider]


def plan(options: argparse.Namespace) -> Plan:
    """What the options ask for; UsageError, naming what is known, where they ask for something else."""
    import torch

    gpu = torch.cuda.is_available()
    device = options.device or ("cuda" if gpu else "cpu")
    if device == "cuda" and not gpu:
        raise UsageError("--device cuda, but torch finds no GPU here: take --device cpu")
    if options.tiny and options.model not in (None, "tiny"):
        raise UsageError(f"--tiny is the model tiny, and --model says {options.model}: give one of them")
    model = "tiny" if options.tiny else options.model or ("llama3-8b-head" if device == "cuda" else "gpt2-head")
    if model not in MODELS:
        raise UsageError(f"unknown model {model!r}; known are {', '.join(MODELS)}")
    if not 0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds must be above 0 and finite, got {options.seconds:g}")
    device_class = "tiny" if options.tiny else "gpu" if device == "cuda" else "cpu"
    within = options.within or (2**26 if options.tiny else 80 * 2**30 if device == "cuda" else None)
    if within is None:
        raise UsageError("--within says how much memory a step may take on a CPU, as --within 4GiB")
    if not options.tiny and within > (there := _memory(device)):
        raise UsageError(f"--within is {within / 2**30:.1f} GiB, and {device} has {there / 2**30:.1f} GiB to give")
    known = {provider.name: provider for provider in providers_of("step") if provider.family != "limit"}
    if unknown := [name for name in options.provider if name not in known]:
        raise UsageError(f"unknown provider {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    names = sorted(options.provider or known, key=ORDER.index)
    # On a CPU a compiler under the limit fails of it, and takes half a minute a length.
    case = StepCase(f"longest-{model}", model, 0, checkpointing=True, compiled=device_class == "gpu")
    return Plan(device, device_class, within, case, [known[name] for name in names])


def _memory(device: str) -> int:
    """All of a GPU's; on a CPU what is free for a new process."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text() if meminfo.exists() else "", re.MULTILINE)
    if found is None:
        raise UsageError("on a CPU the search needs Linux: its limit is the kernel's")
    return int(found.group(1)) * 1024


def row_of(chosen: Plan, provider: Provider, found: Found, peak_bytes: int | None, seconds: float) -> results.Row:
    case = chosen.case
    shape = ("model", "batch", "layers", "hidden", "vocab", "share", "dtype", "frozen", "checkpointing")
    return {
        "suite": "longest",
        "case": case.name,
        "mode": "train",
        "provider": provider.name,
        "family": provider.family,
        "rival": provider.rival,
        "how": provider.how,
        **{field: getattr(case, field) for field in shape},
        "series": None,
        "within_bytes": chosen.within,
        "longest": found.longest,
        "next_failed": found.next_failed,
        "stopped_by": found.stopped_by,
        "peak_bytes": peak_bytes,
        "seconds": seconds,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 2 bad input, 130 interrupted."""
    try:
        options = _parser().parse_args(argv)
        chosen = plan(options)
        head = _head(chosen)
        if options.json is not None:
            results.write(options.json, head, [])
    except (ValueError, OSError) as error:
        print(f"longest: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    rows: list[results.Row] = []
    skipped: list[results.Row] = []
    try:
        _search_all(chosen, options.seconds, rows, skipped, lambda: _save(options.json, head, rows, skipped))
    except KeyboardInterrupt:
        print(f"interrupted; {len(rows)} rows are kept")
        return 130
    _save(options.json, {**head, "complete": True}, rows, skipped)
    return 0


def _head(chosen: Plan) -> results.File:
    import torch

    from .measure import copy_bandwidth

    copy = copy_bandwidth(chosen.device, 2**26)
    if chosen.device == "cuda":
        torch.cuda.empty_cache()
    return results.environment(chosen.device, chosen.device_class, copy)


def _save(path: Path | None, head: results.File, rows: Sequence[results.Row], skipped: Sequence[results.Row]) -> None:
    if path is not None:
        results.write(path, head, rows, skipped)


def _search_all(
    chosen: Plan, seconds: float, rows: list[results.Row], skipped: list[results.Row], save: Callable[[], None]
) -> None:
    end = monotonic() + seconds
    names = ", ".join(provider.name for provider in chosen.providers)
    print(f"the longest pair of {chosen.case.model} on {chosen.device} within {chosen.within / 2**30:.2f} GiB: {names}")

    def skip(provider: Provider, reason: str) -> None:
        print(f"{provider.name}: skipped, {reason}", flush=True)
        same = {"suite": "longest", "case": chosen.case.name, "mode": "train", "provider": provider.name}
        skipped.append({**same, "reason": reason})

    reasons = [(provider, provider.why_not(chosen.case, chosen.device)) for provider in chosen.providers]
    for provider, reason in reasons:
        if reason is not None:
            skip(provider, reason)
    able = [provider for provider, reason in reasons if reason is None]
    waiting = [Process(chosen.device) for _ in able[:1]]
    try:
        for place, provider in enumerate(able, 1):
            left = end - monotonic()
            if left <= 0:
                skip(provider, f"the {seconds:g} s were over")
                continue
            process = waiting.pop() if waiting else Process(chosen.device)
            # The next one imports while this one computes; a CPU has no cores for that.
            if chosen.device != "cpu" and place < len(able):
                waiting.append(Process(chosen.device))
            try:
                row = _search_one(chosen, provider, process, left if place == len(able) else left / 2)
            except RuntimeError as error:
                skip(provider, str(error))
            else:
                rows.append(row)
                print(f"{provider.name}: longest {row['longest']} tokens, stopped by {row['stopped_by']}", flush=True)
            save()
    finally:
        for process in waiting:
            process.close()


def _search_one(chosen: Plan, provider: Provider, process: Process, seconds: float) -> results.Row:
    start = monotonic()
    question = {"provider": provider.name, "case": asdict(chosen.case), "within": chosen.within}

    def say(text: str) -> None:
        print(f"{provider.name}: {text}", flush=True)

    one = Search(process, question, start + seconds, say)
    try:
        found = search(one.fits, start=START[chosen.device_class], most=MOST[chosen.device_class])
    finally:
        one.process.close()
    return row_of(chosen, provider, found, one.peak_bytes, round(monotonic() - start, 2))


if __name__ == "__main__":
    sys.exit(main())
