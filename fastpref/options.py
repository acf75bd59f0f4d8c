"""What the commands' option parsers share: a wrong option is an exception of one line, which cli.py prints."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastpref.checks import did_you_mean


class UsageError(ValueError):
    """Options that do not parse, or name what cannot be used."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError where argparse would print its usage and exit.

    An unknown option or choice is named with the nearest known one. Of an option given twice the last counts, which
    scripts rely on; a line says so.
    """

    def __init__(self, *args: Any, other_names: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        """`other_names`: what other programs call an option, by ours or by a sentence that says what to do."""
        self.other_names = other_names or {}
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists the options")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; UsageError for what is no option, with the one that may be meant."""
        if args is not None:
            self._say_repeated(args)
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            raise UsageError("; ".join([f"unrecognized arguments: {' '.join(rest)}", *self._hints(rest)]))
        return options

    def _hints(self, rest: Sequence[str]) -> list[str]:
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        names = [arg.split("=")[0] for arg in rest if arg.startswith("--")]
        hints = {name: other_name(name, known, self.other_names, dashes="--") for name in names}
        told = [f"{name}: {hint}" if len(hints) > 1 else hint for name, hint in hints.items() if hint]
        return told or [f"{self.prog} --help lists the options"]

    def _say_repeated(self, args: Sequence[str]) -> None:
        actions = [self._option_string_actions.get(arg.split("=")[0]) for arg in args]
        for name, count in Counter(action.dest for action in actions if action is not None).items():
            if count > 1:
                print(f"{self.prog}: --{name} is given {count} times; the last one counts", file=sys.stderr)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (one of {', '.join(choices)}){hint}")


def given_path(text: str) -> Path:
    """An argparse type: a path; an empty text, as a shell makes of a variable that is not set, is no current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    return Path(text)


def other_name(name: str, known: Collection[str], others: Mapping[str, str], *, dashes: str = "") -> str:
    """What may be meant by an option `name` that is not among the `known`; nothing where that is unclear."""
    plain = name.lstrip("-").replace("-", "_")
    ours = others.get(plain.lower())
    if ours is not None:
        return f"it is {dashes}{ours} here" if ours in known else ours
    return did_you_mean(plain, known).removeprefix("; ").replace("mean '", f"mean '{dashes}")


def whole(least: int, most: int) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number in [least, most]."""

    def parse(text: str) -> int:
        number = int(text) if text.strip().isdecimal() and len(text) < 20 else -1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number in [{least}, {most}], got {text!r}")
        return number

    return parse
