"""The command `fastpref`, whose subcommands USAGE lists. Bad input gives one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from fastpref.checks import did_you_mean
from fastpref.options import UsageError

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
INPUT_ERRORS = (ValueError, TypeError, OSError)


def train_command(arguments: list[str]) -> int:
    from fastpref.training.arguments import parse_arguments

    try:
        config = parse_arguments(arguments)
        from fastpref.training import train  # noqa: F401 - it says which package is missing
        from fastpref.training.checkpoints.durable import SaveError
        from fastpref.training.checkpoints.save import ResumeError
        from fastpref.training.loop import train_run
        from fastpref.training.memory.oom import MemoryLimitError
        from fastpref.training.monitoring.nonfinite import NonFiniteError
        from fastpref.training.monitoring.stopping import exit_code, how_to_go_on
        from fastpref.training.prepare import prepare

        run = prepare(config)
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


def main_of(module: str) -> Callable[[list[str]], int]:
    """The command that is the function `main` of a module, which is imported when the command runs."""
    return lambda arguments: import_module(module).main(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "demo": main_of("fastpref.demo.cli"),
    "study": main_of("fastpref.benchmarks.study.cli"),
    "bench": main_of("fastpref.benchmarks.cli"),
    "plan": main_of("fastpref.plan_cli"),
    "doctor": main_of("fastpref.doctor"),
}
# The extra that brings what a command imports; the others need torch alone.
EXTRAS = {"train": "train", "demo": "train", "study": "trl", "bench": "bench"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        from fastpref import __version__

        print(f"fastpref {__version__}")
        return 0
    name = given[0]
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        hint = did_you_mean(name, COMMANDS)
        return _fail("fastpref", ValueError(f"unknown command {name!r}; the commands are {known}{hint}"), code=2)
    program = f"fastpref {name}"
    try:
        return COMMANDS[name](given[1:])
    except UsageError as error:
        return _fail(program, error, code=2)
    except ImportError as error:
        return _fail(program, _with_remedy(error, EXTRAS.get(name)), code=2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def _with_remedy(error: ImportError, extra: str | None) -> Exception:
    """The error of a missing package, with what to install; a missing module of our own is a bug, and is raised."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None or extra is None:
        return error
    if error.name.split(".")[0] == "fastpref":
        raise error
    return ImportError(f'{error.name} is needed, which is not installed: pip install "fastpref[{extra}]"')


def _fail(program: str, error: Exception, *, code: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"{program}: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
