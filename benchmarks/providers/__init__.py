"""Every way that a benchmark can put beside another, by suite; one file a project. hows.json says what each calls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from . import cut_cross_entropy, liger, ours, plain, quack, step, torch_own, training, trl
from .base import Provider

_FILES = (ours, plain, torch_own, trl, liger, cut_cross_entropy, quack, step, training)
_HOWS = json.loads(Path(__file__).with_name("hows.json").read_text(encoding="utf-8"))


def providers_of(suite: str) -> tuple[Provider, ...]:
    found = [provider for file in _FILES for provider in getattr(file, suite.upper(), ())]
    return tuple(replace(provider, how=_HOWS[suite][provider.name]) for provider in found)
