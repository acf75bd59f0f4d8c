"""Exits with 1 where an installed package is not the version that constraints.txt pins, or is not pinned at all."""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOT_PINNED = {"fastpref", "pip"}  # this project, and what a virtual environment starts with

lines = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
pins = [Requirement(line) for line in lines if not line.startswith("#")]
pinned = {canonicalize_name(pin.name): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}
installed = {canonicalize_name(found.name): found.version for found in distributions()}
wrong = [
    f"{name} {version}, pinned: {pinned[name].specifier if name in pinned else 'no'}"
    for name, version in sorted(installed.items())
    if name not in NOT_PINNED and not (name in pinned and pinned[name].specifier.contains(version, prereleases=True))
]
print(f"{len(installed)} packages installed, {len(wrong)} other than constraints.txt has them", *wrong, sep="\n")
sys.exit(bool(wrong))
