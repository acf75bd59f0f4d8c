"""The suites by name."""

from __future__ import annotations

from ..providers import providers_of
from .base import Suite
from .linear import LinearSuite
from .logps import LogpsSuite
from .losses import LossesSuite
from .step import StepSuite

SUITES: dict[str, Suite] = {
    suite.name: suite(providers_of(suite.name)) for suite in (LogpsSuite, LinearSuite, LossesSuite, StepSuite)
}
