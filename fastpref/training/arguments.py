"""The command line of `fastpref train`: options, or one YAML or JSON file with options on top."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastpref.checks import describe
from fastpref.options import Parser, UsageError, other_name
from fastpref.training.config import TrainConfig, read_json

# What other trainers (TRL, LLaMA-Factory, OpenRLHF, axolotl) call an option: ours, or what to do in its place.
_TABLE: dict[str, list[str]] = json.loads(Path(__file__).with_name("other_names.json").read_text(encoding="utf-8"))
OTHER_NAMES = {name: told for told, names in _TABLE.items() for name in names}
FILE_SUFFIXES = (".yaml", ".yml", ".json")
TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


def parse_arguments(arguments: Sequence[str]) -> TrainConfig:
    """The TrainConfig of a command line `[FILE] [--option value ...]`; options override the file's.

    Raises:
        UsageError, ValueError, TypeError: an unknown option or key, or a value that does not fit.
        FileNotFoundError: there is no such file.
    """
    arguments = list(arguments)
    parser = make_parser()
    options = argparse.Namespace()
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        # The same parser, so that a file's 1e-5 (a string to YAML) and an option's mean the same.
        try:
            options = parser.parse_args(_file_arguments(name), options)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    return TrainConfig(**vars(parser.parse_args(arguments, options)))


def make_parser() -> Parser:
    """A parser with an option for each field of TrainConfig, which checks the values."""
    parser = Parser(
        prog="fastpref train",
        usage="fastpref train [CONFIG.yaml|CONFIG.json] [--option value ...]",
        description="Train a causal language model on preference pairs.",
        allow_abbrev=False,
        other_names=OTHER_NAMES,
    )
    hints = get_type_hints(TrainConfig)
    for option in fields(TrainConfig):
        _add(parser, option, hints[option.name])
    return parser


def _add(parser: Parser, option: Field[Any], hint: Any) -> None:
    told = dict(option.metadata["parser"])
    text = option.metadata["help"].replace("%", "%%")
    if option.default not in (None, False):
        text += f" (default: {option.default})"
    names = dict.fromkeys((f"--{option.name}", f"--{option.name.replace('_', '-')}"))
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if bool in kinds:
        parser.add_argument(
            *names, type=_switch, nargs="?", const=True, default=option.default, metavar="true|false", help=text
        )
        if option.default is True:
            no = f"--no_{option.name}"
            short = f"The same as --{option.name}=false."
            parser.add_argument(no, no.replace("_", "-"), action="store_false", dest=option.name, help=short)
        return
    if get_origin(hint) is Literal:
        told["metavar"] = "{" + ",".join(get_args(hint)) + "}"  # TrainConfig checks them, with its own message
        kinds = [str]
    kind = str if str in kinds else float if list[float] in kinds else kinds[0]
    parser.add_argument(*names, type=kind, default=option.default, help=text, **told)


def _switch(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() in TRUE


def _file_arguments(name: str) -> list[str]:
    """A config file's entries as command-line options."""
    path = Path(name)
    if path.suffix not in FILE_SUFFIXES:
        raise UsageError(f"the config file must end in {', '.join(FILE_SUFFIXES)}; options start with --")
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {name!r}")
    values = _read(path)
    if not isinstance(values, dict):
        raise UsageError(f"the file must hold options by name, got {describe(values)}")
    known = {option.name: option.default for option in fields(TrainConfig)}
    hints = get_type_hints(TrainConfig)
    arguments: list[str] = []
    for key, value in values.items():
        if key not in known:
            hint = other_name(str(key), known, OTHER_NAMES) or f"the options are {', '.join(known)}"
            raise UsageError(f"unknown option {key!r}; {hint}")
        takes = get_args(hints[key]) or (hints[key],)
        if key == "resume" and value is True:
            arguments.append("--resume")  # without a value: the newest checkpoint
        elif value is None:
            if known[key] is not None:
                raise UsageError(f"{key} is empty; leave it out for its default, {known[key]!r}")
        elif isinstance(value, list) and {list[str], list[float]} & set(takes):
            arguments += [f"--{key}", *map(str, value)]
        elif isinstance(value, list) or (isinstance(value, dict) and dict[str, Any] not in takes):
            raise UsageError(f"{key} must be one value, got {describe(value)}; names are separated by commas")
        elif isinstance(value, bool) and bool not in takes and key != "resume":
            raise UsageError(f"{key} is no switch, got {str(value).lower()}")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            arguments.append(f"--{key}={text}")
    return arguments


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot be read: not UTF-8 text ({error.reason})") from error
    if path.suffix == ".json":
        try:
            return read_json(text)
        except ValueError as error:
            raise UsageError(f"cannot be read: {error}") from error
    try:
        import yaml
    except ImportError as error:
        raise ImportError('reading a YAML file needs pyyaml: pip install "fastpref[train]"') from error

    class Loader(yaml.SafeLoader):
        """YAML in which a key given twice is an error: SafeLoader silently takes the second."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            lines: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key.value, str) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise UsageError(f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}")
                lines[key.value] = line
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"cannot be read: {' '.join(str(error).split())}") from error
