"""Which versions of other people's trainers the integrations were tested with. Imports nothing: anyone may ask."""

from __future__ import annotations

TRL = "1.16"  # its trainer is overridden where it changes from one minor version to the next


def in_range(found: str, tested: str) -> bool:
    """Whether an installed version is of the tested minor version."""
    return found.split(".")[:2] == tested.split(".")
