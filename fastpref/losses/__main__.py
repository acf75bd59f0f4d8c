"""`python -m fastpref.losses` prints the registry as a Markdown table: the one in docs/losses.md."""

from __future__ import annotations

from fastpref.losses.registry import KTO, LOSSES, NOTATION
from fastpref.losses.spec import LossSpec
from fastpref.tables import markdown_table


def table() -> str:
    header = ("loss", "formula of one pair", "log-probs", "options", "source")
    lines = markdown_table(header, map(_row, (*LOSSES.values(), KTO)), words=len(header))
    return "\n".join(lines) + f"\n\n{NOTATION}.\n"


def _row(spec: LossSpec) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in (spec.name, *spec.aliases)) + (" ⚡" if spec.fused else "")
    options = ", ".join(f"`{option.name}={option.default}`" for option in spec.options) or "–"
    kind = (
        spec.reduction
        + ("" if spec.needs_reference else ", no reference")
        + ("" if spec.separable else ", whole batch")
        + (", unpaired" if spec.unpaired else "")
    )
    return names, spec.formula_text, kind, options, spec.paper


if __name__ == "__main__":
    print(table(), end="")
