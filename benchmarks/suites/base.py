"""What a suite is: cases, who stands beside whom in them, one call of a provider, and the truth it is held against."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..providers.base import Provider

MODES = ("train", "forward")


def beside(suite: str) -> dict[str, list[str]]:
    """Who stands beside whom, in the order of the run: by the name that a case gives in its `beside`."""
    text = Path(__file__).with_name("beside.json").read_text(encoding="utf-8")
    return dict(json.loads(text)[suite])


class Output(NamedTuple):
    """What a call computed. `gradients` are in the order of the suite's `gradient_names`; empty without gradients."""

    value: Tensor | None
    gradients: list[Tensor]


@dataclass
class Inputs:
    """Sets of inputs that take turns, so that caches do not flatter; the truth is that of the first set."""

    sets: list[list[Any]]
    truth: Any


class Suite(ABC):
    name: ClassVar[str]
    case_type: ClassVar[type]
    limit: ClassVar[str]  # what `limit_ms` of a row is
    limit_provider: ClassVar[str | None] = None  # the provider whose time is the limit; None: it follows from bytes
    work_unit: ClassVar[str]  # "B" or "FLOP"
    shape: ClassVar[tuple[str, ...]]  # fields of a case that its rows show
    limit_shape: ClassVar[tuple[str, ...]] = ()  # the fields on which the limit provider's time depends
    gradient_names: ClassVar[tuple[str, ...]]
    # Fields that rows of this suite have beyond those of every row.
    extra: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, providers: Sequence[Provider]) -> None:
        self.providers = {provider.name: provider for provider in providers}

    @abstractmethod
    def cases(self, device_class: str, *, memory: int) -> list[Any]:
        """The set of a device class; `memory` is the device's, in bytes."""

    @abstractmethod
    def entries(self, case: Any, device_class: str) -> list[tuple[str, str]]:
        """(provider, mode) in the order of the run; the limit's provider first."""

    @abstractmethod
    def load(self, case: Any, device: str, *, truth: bool) -> Inputs:
        """`truth=False` makes one set, for a call whose values do not matter."""

    def prepare(self, case: Any, provider: str, mode: str, inputs: Inputs, device: str) -> None:  # noqa: B027
        """What must not be part of the first call's time or memory: imports, and settings that take a trial."""

    @abstractmethod
    def call(self, case: Any, provider: str, mode: str, inputs: list[Any]) -> Output:
        """One call on one set."""

    @abstractmethod
    def errors(self, case: Any, truth: Any, output: Output) -> dict[str, Any]:
        """`value_error`, and one relative error a gradient under `gradient_errors`."""

    @abstractmethod
    def work(self, case: Any, mode: str) -> int:
        """Bytes that must move or operations that must be done, whatever a provider moves or does."""

    def weighs(self, case: Any, provider: str, device: str) -> bool:
        """Whether memory is measured: not where that is another call of half a minute; of a CPU on Linux alone."""
        return device.startswith("cuda") or sys.platform == "linux"

    def forget(self) -> None:  # noqa: B027
        """Frees what a suite keeps between calls."""

    def facts(self, case: Any, provider: str, mode: str, median_ms: float) -> dict[str, Any]:
        """Values for the fields of `extra`."""
        return {}
