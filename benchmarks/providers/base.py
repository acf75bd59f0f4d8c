"""What a way to compute something is, to a benchmark: how to call it, whose it is, and where it cannot run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The options of the losses, for every provider.
BETA, LAMBDA = 0.1, 5.0


def _serves_all(case: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """`call` is what a careful user of this way would write; its arguments are those of its suite."""

    name: str
    call: Callable[..., Any]
    family: str  # "fastpref", "plain", "torch", "limit", or the project whose work it is
    how: str = ""  # one line: what is called, with which options; from hows.json
    rival: bool = False  # others' work; the fastest of them is the one to beat
    slow: bool = False  # on a CPU its calls take up to 20 s and 5 GB: two rounds
    compiles: bool = False  # under torch.compile: the first call of a shape takes many seconds
    modules: Mapping[str, str] = field(default_factory=dict)  # what it imports: the distribution that has it
    gpu_only: bool = False
    cpu_only: bool = False
    spoils: bool = False  # a call destroys its inputs
    serves: Callable[[Any], str | None] = _serves_all  # a case: why it cannot, or None

    def fields(self) -> dict[str, Any]:
        """What a row of results says of it."""
        return {"provider": self.name, "family": self.family, "rival": self.rival, "how": self.how}

    def why_not(self, case: Any, device: str) -> str | None:
        """Why there is no row of it, in words for the user; None where it can run."""
        for module, distribution in self.modules.items():
            if not _installed(module):
                return f"{distribution} is not installed"
        if self.gpu_only and not device.startswith("cuda"):
            return "needs a GPU"
        if self.cpu_only and device.startswith("cuda"):
            return "is of use on a CPU alone"
        return self.serves(case)


def _installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    # A folder of that name in the working directory has a spec too, without an origin.
    return spec is not None and spec.origin is not None
