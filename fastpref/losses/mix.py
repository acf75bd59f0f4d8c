"""Weighted sums of losses: DPO with a share of SFT, as in RPO or MPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastpref.checks import check_number
from fastpref.losses.spec import LossSpec, PairLogps, ResponseTokens


def mixed(specs: Sequence[LossSpec], weights: Sequence[float] | None) -> LossSpec:
    """The sum of the losses, each with its weight (1 by default), as a loss.

    Where some are of summed and some of mean log-probs, it takes sums and divides by the responses' token counts. A
    term takes those of the options that are its own, and its own defaults.
    """
    if any(spec.unpaired for spec in specs):
        raise ValueError(f"loss {', '.join(spec.name for spec in specs)}: a loss of unpaired responses stands alone")
    weights = [1.0] * len(specs) if weights is None else weights
    if len(weights) != len(specs):
        raise ValueError(f"loss_weights must be {len(specs)} numbers, one for each loss, got {len(weights)}: {weights}")
    checked = [check_number("loss_weights", weight, minimum=0.0, open_minimum=True) for weight in weights]
    terms = tuple(zip(specs, checked, strict=True))
    reduction = "mean" if all(spec.reduction == "mean" for spec in specs) else "sum"

    def formula(pairs: PairLogps, beta: float, *, tokens: ResponseTokens | None = None, **options: Any) -> Tensor:
        parts = [
            weight * spec.formula(_as_meant(spec, reduction, pairs, tokens), beta, **spec.own_options(options))
            for spec, weight in terms
        ]
        return sum(parts[1:], parts[0])

    penalised = next((spec for spec in specs if spec.penalty is not None), None)

    def penalty(pairs: PairLogps, *, tokens: ResponseTokens | None = None, **options: Any) -> Tensor:
        assert penalised is not None
        assert penalised.penalty is not None
        return penalised.penalty(_as_meant(penalised, reduction, pairs, tokens), **penalised.own_options(options))

    return LossSpec(
        name=" + ".join(spec.name if weight == 1 else f"{weight:g} {spec.name}" for spec, weight in terms),
        formula=formula,
        formula_text=" + ".join(f"{weight:g}·({spec.formula_text})" for spec, weight in terms),
        paper="; ".join(spec.paper for spec in specs),
        reduction="mean" if reduction == "mean" else "sum",
        needs_reference=any(spec.needs_reference for spec in specs),
        separable=all(spec.separable for spec in specs),
        options=tuple({option.name: option for spec in specs for option in spec.options}.values()),
        penalty=None if penalised is None else penalty,
        terms=terms,
    )


def _as_meant(spec: LossSpec, reduction: str, pairs: PairLogps, tokens: ResponseTokens | None) -> PairLogps:
    """A term's log-probs: without the reference if it has none, and means where it is of means."""
    if not spec.needs_reference:
        pairs = pairs._replace(ref_chosen=None, ref_rejected=None)
    if spec.reduction == reduction:
        return pairs
    assert tokens is not None  # checked where they came in
    counts = [count.to(pairs.policy_chosen.dtype).clamp(min=1) for count in tokens]  # an empty response has a sum of 0
    return PairLogps(*(logps if logps is None else logps / counts[i % 2] for i, logps in enumerate(pairs)))  # type: ignore[arg-type]
