"""Whether the TRL that is installed is one that this integration was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastpref.integrations.tested import TRL as TESTED
from fastpref.integrations.tested import in_range


def check_trl() -> None:
    """ImportError unless TRL is there, in a tested version."""
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise ImportError('fastpref.integrations.trl needs TRL: pip install "fastpref[trl]"') from error
    if not in_range(found, TESTED):
        raise ImportError(
            f"fastpref.integrations.trl is tested with TRL {TESTED}, and TRL {found} is installed: "
            f'pip install "trl=={TESTED}.*", or use TRL\'s trainer as it is'
        )
