"""Which version of TRL the integration was tested with. Imports nothing of TRL: anyone may ask."""

from __future__ import annotations

from fastpref.environment import package_version

TRL = "1.16"  # its trainer is overridden where it changes from one minor version to the next


def in_range(found: str, tested: str) -> bool:
    """Whether an installed version is of the tested minor version."""
    return found.split(".")[:2] == tested.split(".")


def check_trl() -> None:
    """ImportError unless TRL is there, in a tested version."""
    found = package_version("trl")
    if found is None:
        raise ImportError('fastpref.integrations.trl needs TRL: pip install "fastpref[trl]"')
    if not in_range(found, TRL):
        raise ImportError(
            f"fastpref.integrations.trl is tested with TRL {TRL}, and TRL {found} is installed: "
            f'pip install "trl=={TRL}.*", or use TRL\'s trainer as it is'
        )
