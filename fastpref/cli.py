"""The command `fastpref`, whose subcommands USAGE lists. Bad input gives one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

USAGE = """usage: fastpref COMMAND [options]

commands:
  train    train a causal language model on preference pairs
  demo     make data, train a small model with DPO and with DPOP, and show what each did
  study    align one model by DPO, DPOP, SFT, KL-SFT and TRL's trainer, and report what holds
  bench    time fastpref beside other ways to the same numbers, and beside this machine's limit
  plan     print what a model's head needs, by which plan, and the longest sequence that fits
  doctor   print versions and devices, which paths will run, and check one kernel

fastpref COMMAND --help lists a command's options.
"""

# What a user's options or data can raise before anything is trained.
INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError)


def train_command(arguments: list[str]) -> int:
    try:
        from fastpref.options import UsageError
        from fastpref.training.arguments import parse_arguments
        from fastpref.training.durable import SaveError
        from fastpref.training.loop import train_run
        from fastpref.training.nonfinite import NonFiniteError
        from fastpref.training.oom import MemoryLimitError
        from fastpref.training.prepare import ResumeError, prepare
        from fastpref.training.stopping import exit_code, how_to_go_on

        run = prepare(parse_arguments(arguments))
    except INPUT_ERRORS as error:
        return _fail("fastpref train", error, code=2)
    try:
        result = train_run(run)
    except (ResumeError, UsageError) as error:
        return _fail("fastpref train", error, code=2)
    except (NonFiniteError, MemoryLimitError, SaveError) as error:
        return _fail("fastpref train", error, code=1)
    if result.stopped is not None:
        run.console.say(how_to_go_on(result.stopped, result.step, result.output_dir))
        return exit_code(result.stopped)
    if run.accelerator.is_main_process and result.dry_run is None:
        print(f"trained {result.step} steps; {result.output_dir}/README.md lists metrics, curves and the model")
    return 0


def demo_command(arguments: list[str]) -> int:
    try:
        from fastpref.demo.cli import main as demo
    except ImportError as error:
        return _fail("fastpref demo", error, code=2)
    return demo(arguments)


def study_command(arguments: list[str]) -> int:
    try:
        from fastpref.benchmarks.study.cli import main as study
    except ImportError as error:
        return _fail("fastpref study", error, code=2)
    return study(arguments)


def bench_command(arguments: list[str]) -> int:
    try:
        from fastpref.benchmarks.cli import main as bench
    except ImportError as error:
        return _fail("fastpref bench", error, code=2)
    return bench(arguments)


def doctor_command(arguments: list[str]) -> int:
    from fastpref.doctor import main as doctor

    return doctor(arguments)


def plan_command(arguments: list[str]) -> int:
    from fastpref.plan_cli import main as plan

    return plan(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "demo": demo_command,
    "study": study_command,
    "bench": bench_command,
    "plan": plan_command,
    "doctor": doctor_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 1 failed, 2 bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        from fastpref import __version__

        print(f"fastpref {__version__}")
        return 0
    command = COMMANDS.get(given[0])
    if command is None:
        known = ", ".join(COMMANDS)
        return _fail("fastpref", ValueError(f"unknown command {given[0]!r}; the commands are {known}"), code=2)
    return command(given[1:])


def _fail(program: str, error: Exception, *, code: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"{program}: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
