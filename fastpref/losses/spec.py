"""What a loss is here: a formula on the four log-probs of each pair, its options, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastpref.checks import check_number, did_you_mean, interval_text


class PairLogps(NamedTuple):
    """The log-probs of B pairs. The two references are None for a loss that needs none."""

    policy_chosen: Tensor  # (B,)
    policy_rejected: Tensor  # (B,)
    ref_chosen: Tensor | None = None  # (B,)
    ref_rejected: Tensor | None = None  # (B,)

    @property
    def chosen_ratio(self) -> Tensor:  # (B,)
        """log π(y_w) − log π_ref(y_w); the policy's own log-prob where there is no reference."""
        return self.policy_chosen if self.ref_chosen is None else self.policy_chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:  # (B,)
        """The same for the rejected response."""
        return self.policy_rejected if self.ref_rejected is None else self.policy_rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:  # (B,)
        # Ratios first: with equal policy and reference both are exactly 0, and so is the margin.
        return self.chosen_ratio - self.rejected_ratio


ResponseTokens = tuple[Tensor, Tensor]  # (B,) each: scored tokens of the chosen and of the rejected responses


class MarginForm(NamedTuple):
    """A loss f(u) of one argument, u = scale·(margin − lam·max(0, ref_chosen − policy_chosen)), cut to ±clip.

    `logistic`: f(u) = −log σ(u) + tilt·u.  `hinge`: f(u) = max(0, 1 − u).  `square`: f(u) = (u − target)².
    """

    shape: Literal["logistic", "hinge", "square"]
    scale: float
    lam: float = 0.0
    tilt: float = 0.0
    target: float = 0.0
    clip: float = math.inf


@dataclass(frozen=True)
class LossOption:
    """A number that a loss takes by keyword, with its default and the interval it must lie in."""

    name: str
    default: float | None
    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    open_minimum: bool = False
    open_maximum: bool = False

    @property
    def interval(self) -> str:
        interval = interval_text(self.minimum, self.maximum, self.open_minimum, self.open_maximum)
        return f"{interval} or None" if self.default is None else interval

    def check(self, value: Any) -> float | None:
        """The value as a float, or None where None is the default; else ValueError or TypeError."""
        if value is None and self.default is None:
            return None
        return check_number(
            self.name,
            value,
            minimum=self.minimum,
            maximum=self.maximum,
            open_minimum=self.open_minimum,
            open_maximum=self.open_maximum,
        )


@dataclass(frozen=True)
class LossSpec:
    """One entry of the registry.

    `formula(pairs, beta, **options)` gives the losses `(B,)` in plain differentiable torch. A loss of one
    argument also has `margin(beta, **options)`, which says which f(u) it is, and then has a fused path.
    `penalty(pairs, **options)` is what a loss adds and reports, `(B,)`. The formula of an `unpaired` loss is that of
    `kto_loss`. A weighted sum of losses has `terms`; the formula of one that `needs_tokens` takes `tokens` besides.
    """

    name: str
    formula: Callable[..., Tensor]
    formula_text: str
    paper: str
    reduction: Literal["sum", "mean"] = "sum"  # how the paper means the log-prob of a sequence
    needs_reference: bool = True
    separable: bool = True  # whether the loss of a pair depends on that pair only
    options: tuple[LossOption, ...] = ()
    aliases: tuple[str, ...] = ()
    margin: Callable[..., MarginForm] | None = field(default=None, repr=False)
    penalty: Callable[..., Tensor] | None = field(default=None, repr=False)
    unpaired: bool = False  # of single responses, each labelled desirable or not
    terms: tuple[tuple[LossSpec, float], ...] = field(default=(), repr=False)  # of a sum, each with its weight

    @property
    def fused(self) -> bool:
        return self.margin is not None

    @property
    def needs_tokens(self) -> bool:
        """Whether it takes sums of log-probs, and means besides."""
        return any(term.reduction != self.reduction for term, _ in self.terms)

    @property
    def penalty_name(self) -> str | None:
        """The loss that the penalty is of."""
        return next((term.name for term, _ in self.terms or ((self, 1.0),) if term.penalty is not None), None)

    def own_options(self, options: Mapping[str, Any]) -> dict[str, float | None]:
        """Every option of this loss, with its default where it is not among those given; others are passed over."""
        known = {option.name for option in self.options}
        return self.check_options({name: value for name, value in options.items() if name in known})

    def check_options(self, options: Mapping[str, Any]) -> dict[str, float | None]:
        """Every option of this loss, the given values checked; TypeError for an unknown one.

        Of a sum of losses those that were given: each term has defaults of its own.
        """
        known = {option.name: option for option in self.options}
        unknown = [name for name in options if name not in known]
        if unknown:
            takes = ", ".join(f"{o.name} in {o.interval}" for o in self.options) or "no options of its own"
            hint = did_you_mean(str(unknown[0]), known)
            raise TypeError(
                f"loss {self.name!r} does not take {', '.join(map(repr, unknown))}; besides beta it takes {takes}{hint}"
            )
        if self.terms:
            return {name: value for term, _ in self.terms for name, value in term.own_options(options).items()
                    if name in options}  # fmt: skip
        return {name: option.check(options.get(name, option.default)) for name, option in known.items()}


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where every tensor is float64, else float32."""
    return torch.float64 if all(t is None or t.dtype == torch.float64 for t in tensors) else torch.float32
