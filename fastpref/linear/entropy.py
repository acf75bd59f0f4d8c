"""The gradient of a row's log-prob and of its entropy, as numbers a row that make the tile of dz.

    dz_j = g·(onehot − p)_j − h·p_j·(log p_j + H)

with g and h the upstream gradients of log-prob and entropy H. With e = exp(z − m) and p = e / s that is, but for the
label, e·(rowscale + tilt·(z − m)): rowscale = −(g + h·(H − log s)) / s, tilt = −h / s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.linear.operands import TOP, Head
from fastpref.linear.statistics import Finished
from fastpref.tiled import Transform


class Upstream(NamedTuple):
    """Derivatives of a loss by each row's log-prob and, where that is wanted, by its entropy."""

    logps: Tensor  # (N,)
    entropy: Tensor | None = None  # (N,)

    def span(self, start: int, stop: int) -> Upstream:
        return Upstream(self.logps[start:stop], None if self.entropy is None else self.entropy[start:stop])


class RowScales(NamedTuple):
    rowscale: Tensor  # (N,)
    tilt: Tensor | None  # (N,)
    own: Tensor  # (N,), the label's entry
    unit: Tensor | None  # (), what results must be multiplied by


def row_scales(upstream: Upstream, done: Finished, target: Tensor, head: Head) -> RowScales:
    g, h = upstream
    entropy = done.extras.entropy
    # float16 would lose what is small: the largest dz that can be becomes TOP, and the results are scaled back.
    unit = None
    if head.narrow == torch.float16:
        largest = g.abs()
        if h is not None and entropy is not None:
            largest = largest + h.abs() * (entropy + 1.0)  # −p·log p is below 1
        unit = (largest.amax() * (head.slope / TOP)).clamp(min=1e-30)
        g = g / unit
        h = None if h is None else h / unit
    g = g.to(head.wide) * head.slope
    if h is None or entropy is None:
        return RowScales(-g / done.norm, None, g * done.rest * own_slope(target, head.transform), unit)
    h = h.to(head.wide) * head.slope
    log_norm = done.norm.log()
    lead = target - done.maximum
    p = torch.exp(lead) / done.norm
    bonus = torch.where(p == 0, 0.0, h * p * (lead - log_norm + entropy))
    own = (g * done.rest - bonus) * own_slope(target, head.transform)
    return RowScales(-(g + h * (entropy - log_norm)) / done.norm, -h / done.norm, own, unit)


def own_slope(target: Tensor, transform: Transform) -> Tensor | float:
    """1 − tanh² at the label's logit, from z = softcap·tanh / temperature."""
    if not transform.softcap:
        return 1.0
    # Near saturation each rounding of the tanh counts many times: float32 would add its own to those of z.
    wide = target if target.device.type == "mps" else target.double()
    return (1.0 - (wide * (transform.temperature / transform.softcap)).square()).to(target.dtype)
