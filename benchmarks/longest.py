"""How long may a pair be, to train within so much memory? For training steps, or for whole training runs.

    python -m fastpref.benchmarks.longest --within 80GiB [--device cuda|cpu] [--model NAME] [--seconds N] [--json FILE]
    python -m fastpref.benchmarks.longest --training --within 6GiB --json FILE

A pair is two sequences of one length, half of each scored; activations of the layers are checkpointed for everyone, so
that head and loss decide. A step (forward, loss, backward, clipping, AdamW) is one of the step suite's providers; each
keeps its model in a process of its own, and on a CPU the limit counts what it takes beyond its imports. With
--training each trial is two steps of a real run in a fresh process, with the reference's log-probs known (who keeps a
reference model in memory pays for it), and on a CPU the limit counts the whole process.

Peaks of a few short lengths foretell the longest one, and trials below and above it confirm that: what failed is at
most 3% longer than what fits. Providers share the time, the first one taking the most of it; where time ends a search,
`stopped_by` is "time" and `longest` a lower bound. Rows are written after each provider.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from fastpref.options import Parser, UsageError

from . import results
from .arguments import check_names, check_seconds, fail, pick_device, size
from .cases_step import MODELS, StepCase
from .cases_training import longest_case
from .foretell import SHORTEST, Found, foretell
from .process import Ended, Process, TimeUp
from .providers import providers_of
from .providers.base import Provider

PROGRAM = "python -m fastpref.benchmarks.longest"


class Kind(NamedTuple):
    """What is tried, and by class of device: the model, the first length, and the last (nobody's pairs are longer)."""

    name: str
    model: dict[str, str]
    start: dict[str, int]
    most: dict[str, int]
    providers: tuple[str, ...]  # by default, most wanted first: time may run out
    share: float  # of the time that is left, for each provider but the last
    seconds: float


STEP = Kind(
    "step",
    {"tiny": "tiny", "gpu": "llama3-8b-head", "cpu": "gpt2-head"},
    {"tiny": 32, "gpu": 2048, "cpu": 256},
    {"tiny": 4096, "gpu": 2**20, "cpu": 2**20},
    ("fastpref", "plain", "trl", "liger", "trl_liger", "fastpref_hidden", "fastpref_logits", "compiled"),
    0.5,
    300.0,
)
# On a CPU a run of the last length takes minutes: attention grows with its square.
TRAINING = Kind(
    "training",
    {"tiny": "tiny", "gpu": "qwen3-0.6b", "cpu": "qwen3-shallow"},
    {"tiny": 32, "gpu": 4096, "cpu": 256},
    {"tiny": 2048, "gpu": 2**17, "cpu": 2**14},
    ("fastpref", "plain", "plain_cached"),
    0.7,
    840.0,
)


class Plan(NamedTuple):
    kind: Kind
    device: str
    device_class: str
    within: int
    model: str
    precision: str
    most: int
    providers: list[Provider]

    def case(self, length: int) -> Any:
        if self.kind is TRAINING:
            return longest_case(self.model, self.precision, length)
        # On a CPU a compiler under the limit fails of it, and takes half a minute a length.
        compiled = self.device_class == "gpu"
        name = f"longest-{self.model}"
        return StepCase(name, self.model, length, dtype=self.precision, checkpointing=True, compiled=compiled)

    def process(self) -> Process:
        ahead = ("transformers", "fastpref.benchmarks.suites.step") if self.kind is STEP else ()
        return Process(self.device, exact=True, ahead=ahead)


class Steps:
    """A provider's steps in a process that keeps its model; another one where it died."""

    def __init__(self, chosen: Plan, provider: Provider, process: Process) -> None:
        self.chosen, self.provider, self.ready = chosen, provider, False
        self.process: Process | None = process

    def peak(self, length: int, seconds: float) -> int:
        end = monotonic() + seconds
        self.process = self.process or self.chosen.process()
        try:
            if not self.ready:
                case = asdict(self.chosen.case(0))
                self.process.ask("set_up", seconds, provider=self.provider.name, case=case, within=self.chosen.within)
                self.ready = True
            return int(self.process.ask("step", end - monotonic(), length=length)["peak_bytes"])
        except Ended:
            self.process, self.ready = None, False
            raise

    def close(self) -> None:
        if self.process is not None:
            self.process.close()


class Runs:
    """A contestant's training runs, each in its process; their inputs lie in `folder`."""

    def __init__(self, chosen: Plan, provider: Provider, folder: Path) -> None:
        self.chosen, self.provider, self.folder = chosen, provider, folder

    def peak(self, length: int, seconds: float) -> int:
        from .inputs_training import write_inputs

        case, end = self.chosen.case(length), monotonic() + seconds
        write_inputs(case, self.folder, Path())
        question = {"provider": self.provider.name, "case": asdict(case), "folder": str(self.folder)}
        with self.chosen.process() as process:
            answer = process.ask("train", max(end - monotonic(), 1.0), within=self.chosen.within, **question)
        return int(answer["peak_bytes"])

    def close(self) -> None:
        return


class Search:
    """One provider's search: its deadline, and the peaks that were seen."""

    def __init__(self, chosen: Plan, trials: Steps | Runs, deadline: float, say: Callable[[str], None]) -> None:
        self.chosen, self.trials, self.deadline, self.say = chosen, trials, deadline, say
        self.peaks: dict[int, int] = {}
        self.last: tuple[int, float] | None = None  # length and seconds of the last that fitted

    def peak_of(self, length: int) -> int | None:
        start = monotonic()
        left = self.deadline - start
        # The time grows at least half in proportion; what is set up once is part of it.
        if left <= 0 or (self.last is not None and left < self.last[1] * max(1.0, 0.5 * length / self.last[0])):
            raise TimeUp
        try:
            peak = self.trials.peak(length, left)
        except (MemoryError, Ended) as error:
            if isinstance(error, Ended) and not (error.by_signal and self.chosen.device == "cpu"):
                raise
            self.say(f"{length:,} tokens: does not fit ({error}), {monotonic() - start:.0f} s")
            return None
        self.peaks[length], self.last = peak, (length, monotonic() - start)
        self.say(f"{length:,} tokens: fits, {peak / 2**30:.3f} GiB, {self.last[1]:.0f} s")
        return peak


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--training", action="store_true", help="whole training runs in place of steps")
    add("--within", type=size, metavar="SIZE", help="the limit, as 6GiB (default on a GPU: 80GiB)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where torch finds one")
    add("--model", help=f"one of {', '.join(MODELS)}")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16; for training runs on a CPU fp32")
    add("--provider", nargs="+", default=[], metavar="NAME", help="only these providers")
    add("--most", type=int, metavar="TOKENS", help="the last length tried")
    add("--seconds", type=float, help=f"for all together (default: {STEP.seconds:g}; {TRAINING.seconds:g} for runs)")
    add("--json", type=Path, metavar="FILE", help="where rows are written, after each provider")
    add("--tiny", action="store_true", help="a tiny model: proves the search")
    return parser


def plan(options: argparse.Namespace) -> Plan:
    """What the options ask for."""
    kind = TRAINING if options.training else STEP
    device = pick_device(options.device)
    if device == "cpu" and not sys.platform.startswith("linux"):
        raise UsageError("on a CPU the search needs Linux: its limit is the kernel's")
    if options.tiny and options.model not in (None, "tiny"):
        raise UsageError(f"--tiny is the model tiny, and --model says {options.model}: give one of them")
    device_class = "tiny" if options.tiny else "gpu" if device == "cuda" else "cpu"
    model = options.model or kind.model[device_class]
    check_names("model", [model], MODELS)
    check_seconds(options.seconds)
    most = kind.most[device_class] if options.most is None else options.most
    if most < SHORTEST:
        raise UsageError(f"--most must be at least {SHORTEST} tokens, got {most}")
    known = {provider.name: provider for provider in providers_of(kind.name) if provider.family != "limit"}
    check_names("provider", options.provider, known)
    names = options.provider or kind.providers
    precision = options.precision or ("fp32" if kind is TRAINING and device == "cpu" else "bf16")
    within = _within(options, kind, device)
    return Plan(kind, device, device_class, within, model, precision, most, [known[name] for name in names])


def _within(options: argparse.Namespace, kind: Kind, device: str) -> int:
    if device == "cuda":
        import torch

        there = torch.cuda.get_device_properties(0).total_memory
        within = options.within or 80 * 2**30
    else:
        from fastpref.memory import available

        there = available()
        # A process with torch and transformers in it takes some of the limit of a whole run.
        tiny = 2**31 if kind is TRAINING else 2**26
        within = options.within or (tiny if options.tiny else None)
        if within is None:
            raise UsageError("--within says how much memory there is to train in on a CPU, as --within 4GiB")
    if within > there:
        raise UsageError(f"--within is {within / 2**30:.1f} GiB, and {device} has {there / 2**30:.1f} GiB to give")
    return int(within)


STEP_FIELDS = ("model", "batch", "layers", "hidden", "vocab", "share", "dtype", "frozen", "checkpointing")


def row_of(chosen: Plan, provider: Provider, found: Found, peak_bytes: int | None, seconds: float) -> results.Row:
    case = chosen.case(0)
    if chosen.kind is TRAINING:
        fields = {name: value for name, value in case.fields().items() if name not in ("length", "max_length", "steps")}
        fields |= {"share": 0.5, "whole_process": chosen.device == "cpu"}
    else:
        fields = {field: getattr(case, field) for field in STEP_FIELDS}
    return {
        "suite": "longest",
        "case": case.name,
        "mode": "train",
        **provider.fields(),
        **fields,
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
        results.check_json(options.json)
        chosen = plan(options)
        from .measure import head_of

        store = results.Store(options.json, head_of(chosen.device, chosen.device_class, 2**26))
        store.save()
    except (ValueError, OSError) as error:
        return fail("longest", error)
    try:
        _search_all(chosen, options.seconds or chosen.kind.seconds, store)
    except KeyboardInterrupt:
        print(f"interrupted; {len(store.rows)} rows are kept")
        return 130
    store.save(complete=True)
    return 0


def _search_all(chosen: Plan, seconds: float, store: results.Store) -> None:
    end = monotonic() + seconds
    able = []
    for provider in chosen.providers:
        reason = provider.why_not(chosen.case(SHORTEST), chosen.device)
        if reason is None:
            able.append(provider)
        else:
            _skip(chosen, provider, reason, store)
    waiting: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="fastpref-longest-") as folder:
        try:
            for place, provider in enumerate(able, 1):
                left, last = end - monotonic(), place == len(able)
                if left <= 0:
                    _skip(chosen, provider, f"the {seconds:g} s were over", store)
                    continue
                trials: Steps | Runs = Runs(chosen, provider, Path(folder))
                if chosen.kind is STEP:
                    trials = Steps(chosen, provider, waiting.pop() if waiting else chosen.process())
                    # The next one imports while this one computes; a CPU has no cores for that.
                    waiting += [] if last or chosen.device == "cpu" else [chosen.process()]
                _search(chosen, provider, trials, left if last else chosen.kind.share * left, store)
        finally:
            for process in waiting:
                process.close()


def _search(chosen: Plan, provider: Provider, trials: Steps | Runs, seconds: float, store: results.Store) -> None:
    start = monotonic()

    def say(text: str) -> None:
        print(f"{provider.name}: {text}", flush=True)

    one = Search(chosen, trials, start + seconds, say)
    try:
        start_at = chosen.kind.start[chosen.device_class]
        found = foretell(one.peak_of, chosen.within, start=start_at, most=chosen.most)
    except RuntimeError as error:
        _skip(chosen, provider, str(error), store)
        return
    finally:
        trials.close()
    store.add(row_of(chosen, provider, found, one.peaks.get(found.longest), round(monotonic() - start, 2)))
    say(f"longest {found.longest:,} tokens, stopped by {found.stopped_by}")


def _skip(chosen: Plan, provider: Provider, reason: str, store: results.Store) -> None:
    print(f"{provider.name}: skipped, {reason}", flush=True)
    store.skip("longest", chosen.case(SHORTEST).name, "train", provider.name, reason)


if __name__ == "__main__":
    sys.exit(main())
