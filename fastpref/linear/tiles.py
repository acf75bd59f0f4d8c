"""What happens to a tile of logits between two products, in plain torch; kernels/linear.py has the same in Triton.

x (R, C) holds the columns start..start + C of R rows of logits; z is x + bias through the transform, and `slope`
1 − tanh² of a softcap, 1 without. The label's own logit leaves the tile before anything is summed: it is kept exactly
(`target`), so that 1 − p is a sum of what is left and never the difference of two numbers near 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.backend import use_triton
from fastpref.tiled import Transform

# exp of less is 0 in float64 too, and 0·FAR is 0 where 0·(−inf) would be NaN.
FAR = -2000.0


def _columns_of(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Which rows have their label in the tile, and in which column."""
    rows = ((labels >= start) & (labels < start + count)).nonzero().flatten()
    return rows, labels[rows] - start


def fold(
    x: Tensor,  # (R, C), overwritten
    labels: Tensor,  # (R,) int64
    bias: Tensor | None,  # (C,)
    maximum: Tensor,  # (R,), updated
    total: Tensor,  # (R,), updated
    target: Tensor,  # (R,), updated
    *,
    start: int,
    transform: Transform,
    out: Tensor | None = None,  # (R, C), any dtype; may be x
    rescale: Tensor | None = None,  # (R,)
    keep_scale: float = 1.0,
    weighted: Tensor | None = None,  # (R,), updated
    squares: Tensor | None = None,  # (R,), updated
    sum_z: Tensor | None = None,  # (R,), updated
) -> None:
    """Folds a tile into each row's running maximum m and sum s = Σ exp(z − m) over the columns that are not its label.

    `target` receives z of the label where the tile has it, `out` keep_scale·exp(z − m)·slope with 0 for the label, and
    `rescale` exp(m_before − m): what earlier sums must be multiplied by. `weighted` is Σ exp(z − m)·(z − m), `squares`
    Σ exp(2·(z − m)) and `sum_z` Σ z over the same columns, where they are asked for.
    """
    if _runs_triton(x):
        from fastpref.kernels import linear as kernels

        options: dict[str, Any] = {"out": out, "rescale": rescale, "keep_scale": keep_scale, **_factors(transform)}
        options |= {"weighted": weighted, "squares": squares, "sum_z": sum_z}
        kernels.fold(x, labels, bias, maximum, total, target, start=start, **options)
        return
    if bias is not None:
        x.add_(bias)
    tanh = torch.empty_like(x) if transform.softcap and out is not None else None
    transform.apply_(x, tanh)
    rows, columns = _columns_of(labels, start, x.shape[1])
    target[rows] = x[rows, columns]
    if sum_z is not None:
        x[rows, columns] = 0.0
        sum_z.add_(x.sum(1))
    x[rows, columns] = -torch.inf
    highest = torch.maximum(maximum, x.amax(1))
    base = torch.where(highest == -torch.inf, 0.0, highest)  # a tile of −inf must not make NaN
    x.sub_(base.unsqueeze(1))
    distance = None if weighted is None and squares is None else x.clamp(min=FAR)
    x.exp_()
    factor = torch.exp(maximum - base)
    if weighted is not None and distance is not None:
        moved = torch.where(factor == 0, 0.0, factor * (weighted + total * (maximum - base)))
        weighted.copy_(moved.add_(distance.mul_(x).sum(1)))
    if squares is not None and distance is not None:
        squares.mul_(factor.square()).add_(torch.mul(x, x, out=distance).sum(1))
    total.mul_(factor).add_(x.sum(1))
    maximum.copy_(highest)
    if rescale is not None:
        rescale.copy_(factor)
    if out is not None:
        if tanh is not None:
            x.mul_(tanh.square_().neg_().add_(1.0))
        if keep_scale != 1.0:
            x.mul_(keep_scale)
        if out is not x:
            out.copy_(x)


def gradient_from_kept(
    kept: Tensor,  # (R, C), what `fold` left in `out`
    labels: Tensor,  # (R,)
    rowscale: Tensor,  # (R,)
    own: Tensor,  # (R,), the label's own entry
    out: Tensor,  # (R, C)
    *,
    start: int,
) -> None:
    """out = kept·rowscale, and `own` in the label's column; one rounding."""
    if _runs_triton(out):
        from fastpref.kernels import linear as kernels

        kernels.gradient_from_kept(kept, labels, rowscale, own, out, start=start)
        return
    if out.dtype == rowscale.dtype:
        out.copy_(kept).mul_(rowscale.unsqueeze(1))
    else:
        out.copy_(kept.to(rowscale.dtype) * rowscale.unsqueeze(1))
    rows, columns = _columns_of(labels, start, out.shape[1])
    out[rows, columns] = own[rows].to(out.dtype)


def gradient_from_logits(
    x: Tensor,  # (R, C), overwritten
    labels: Tensor,  # (R,)
    bias: Tensor | None,  # (C,)
    maximum: Tensor,  # (R,), the row's own, label included
    rowscale: Tensor,  # (R,)
    own: Tensor,  # (R,)
    out: Tensor,  # (R, C); may be x
    *,
    start: int,
    transform: Transform,
    tilt: Tensor | None = None,  # (R,)
) -> None:
    """out = exp(z − maximum)·slope·(rowscale + tilt·(z − maximum)), and `own` in the label's column; one rounding."""
    if _runs_triton(x):
        from fastpref.kernels import linear as kernels

        factors = _factors(transform)
        kernels.gradient_from_logits(x, labels, bias, maximum, rowscale, own, out, start=start, tilt=tilt, **factors)
        return
    if bias is not None:
        x.add_(bias)
    tanh = torch.empty_like(x) if transform.softcap else None
    transform.apply_(x, tanh)
    x.sub_(maximum.unsqueeze(1))
    if tilt is None:
        x.exp_().mul_(rowscale.unsqueeze(1))
    else:
        line = x.clamp(min=FAR).mul_(tilt.unsqueeze(1)).add_(rowscale.unsqueeze(1))
        x.exp_().mul_(line)
    if tanh is not None:
        x.mul_(tanh.square_().neg_().add_(1.0))
    if out is not x:
        out.copy_(x)
    rows, columns = _columns_of(labels, start, x.shape[1])
    out[rows, columns] = own[rows].to(out.dtype)


def _runs_triton(x: Tensor) -> bool:
    # float64 is for gradient checks: the kernels compute in float32.
    return x.dtype != torch.float64 and use_triton(x)


def _factors(transform: Transform) -> dict[str, float]:
    return {
        "temperature": transform.temperature,
        "logit_scale": transform.logit_scale,
        "softcap": transform.softcap,
    }
