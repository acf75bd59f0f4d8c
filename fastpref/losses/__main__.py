"""`python -m fastpref.losses` prints the registry as a Markdown table: the one in the README."""

from __future__ import annotations

from fastpref.losses.registry import LOSSES, NOTATION
from fastpref.losses.spec import LossSpec


def table() -> str:
    lines = ["| loss | formula of one pair | log-probs | options | source |", "| --- | --- | --- | --- | --- |"]
    lines += [_row(spec) for spec in LOSSES.values()]
    return "\n".join(lines) + f"\n\n{NOTATION}.\n"


def _row(spec: LossSpec) -> str:
    names = ", ".join(f"`{name}`" for name in (spec.name, *spec.aliases)) + (" ⚡" if spec.fused else "")
    options = ", ".join(f"`{option.name}={option.default}`" for option in spec.options) or "–"
    kind = (
        spec.reduction
        + ("" if spec.needs_reference else ", no reference")
        + ("" if spec.separable else ", whole batch")
    )
    return f"| {names} | {spec.formula_text} | {kind} | {options} | {spec.paper} |"


if __name__ == "__main__":
    print(table(), end="")
