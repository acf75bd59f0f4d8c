"""What the commands' option parsers share: a wrong option is an exception of one line, which cli.py prints."""

from __future__ import annotations

import argparse
from typing import NoReturn


class UsageError(ValueError):
    """Options that do not parse, or name what cannot be used."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists the options")
