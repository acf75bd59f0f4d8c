"""Every way that a benchmark can put beside another, by suite; one file a project."""

from __future__ import annotations

from . import cut_cross_entropy, liger, ours, plain, quack, step, torch_own, training, trl
from .base import Provider

_FILES = (ours, plain, torch_own, trl, liger, cut_cross_entropy, quack, step, training)


def providers_of(suite: str) -> tuple[Provider, ...]:
    return tuple(provider for file in _FILES for provider in getattr(file, suite.upper(), ()))
