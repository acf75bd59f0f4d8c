"""The command line of `fastpref train`: options, or one YAML or JSON file with options on top."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from fastpref.checks import describe
from fastpref.options import UsageError
from fastpref.training.config import TrainConfig

FILE_SUFFIXES = (".yaml", ".yml", ".json")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_arguments(arguments: Sequence[str]) -> TrainConfig:
    """The TrainConfig of a command line `[FILE] [--option value ...]`; options override the file's.

    Raises:
        UsageError, ValueError, TypeError: an unknown option or key, or a value that does not fit.
        FileNotFoundError: there is no such file.
    """
    arguments = list(arguments)
    from_file: list[str] = []
    if arguments and not arguments[0].startswith("-"):
        from_file = _file_arguments(arguments.pop(0))
    parser = _Parser(
        TrainConfig,  # type: ignore[arg-type]
        prog="fastpref train",
        usage="fastpref train [CONFIG.yaml|CONFIG.json] [--option value ...]",
        description="Train a causal language model on preference pairs.",
        allow_abbrev=False,
    )
    # One parser for both, so that a file's 1e-5 (a string to YAML) and an option's mean the same.
    config, rest = parser.parse_args_into_dataclasses(
        [*from_file, *arguments], look_for_args_file=False, return_remaining_strings=True
    )
    if rest:
        name = rest[0].split("=")[0]
        near = difflib.get_close_matches(name.lstrip("-"), [field.name for field in fields(TrainConfig)], n=1)
        hint = f"; did you mean --{near[0]}?" if near else "; fastpref train --help lists the options"
        raise UsageError(f"unknown option {name!r}{hint}")
    return config


def _file_arguments(name: str) -> list[str]:
    """A config file's entries as command-line options."""
    path = Path(name)
    if path.suffix not in FILE_SUFFIXES:
        raise UsageError(f"the config file must end in {', '.join(FILE_SUFFIXES)}, got {name!r}; options start with --")
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {name!r}")
    values = _read(path)
    if not isinstance(values, dict):
        raise UsageError(f"{name} must hold options by name, got {describe(values)}")
    known = {field.name: field.default for field in fields(TrainConfig)}
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise UsageError(f"{name}: unknown option {', '.join(unknown)}; the options are {', '.join(known)}")
    arguments: list[str] = []
    for key, value in values.items():
        if value is True:
            arguments.append(f"--{key}")  # as much as =true where the option is a switch; --resume takes no more
        elif value is None:
            if known[key] is not None:
                raise UsageError(f"{name}: {key} is empty; leave it out for its default, {known[key]!r}")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            arguments.append(f"--{key}={text}")
    return arguments


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except ImportError as error:
        raise ImportError('reading a YAML file needs pyyaml: pip install "fastpref[train]"') from error
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
