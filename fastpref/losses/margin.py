"""The losses of one argument u: which f(u) each is, and f with its slope in closed form.

These are the losses with a fused path. A loss is a function that says which `MarginForm` it is; the
mathematics of the three shapes stands once, in `margin_losses` (values, for autograd) and
`margin_coefficients` (values and slopes). The kernel in `kernels/preference.py` is tested against the second.

π_w and π_l are the log-probs of the chosen and the rejected response under the policy, ref_w and ref_l those
under the reference, and `margin` = (π_w − ref_w) − (π_l − ref_l).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.spec import MarginForm, PairLogps


def _bound(margin_clip: float | None) -> float:
    return math.inf if margin_clip is None else margin_clip


def sigmoid(beta: float, *, margin_clip: float | None = None) -> MarginForm:
    """DPO: −log σ(β·margin). Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7."""
    return MarginForm("logistic", scale=beta, clip=_bound(margin_clip))


def cdpo(beta: float, *, label_smoothing: float, margin_clip: float | None = None) -> MarginForm:
    """Conservative DPO: −(1−ε)·log σ(u) − ε·log σ(−u), u = β·margin, for labels flipped with probability ε.

    Mitchell 2023, "A note on DPO with noisy preferences", https://ericmitchell.ai/cdpo.pdf. Older TRL reached
    it by `label_smoothing` on `sigmoid`; TRL 1.16 dropped that. Here it has this one home, and `sigmoid`
    takes no smoothing.
    """
    # −log σ(−u) = −log σ(u) + u, so that the sum is −log σ(u) + ε·u.
    return MarginForm("logistic", scale=beta, tilt=label_smoothing, clip=_bound(margin_clip))


def robust(beta: float, *, label_smoothing: float, margin_clip: float | None = None) -> MarginForm:
    """Robust DPO: (−(1−ε)·log σ(u) + ε·log σ(−u)) / (1−2ε), u = β·margin; unbounded below for ε > 0.

    Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409: unbiased where labels are flipped with
    probability ε. ε = 0, TRL's default, is DPO; a usual value is 0.1.
    """
    tilt = -label_smoothing / (1 - 2 * label_smoothing)
    return MarginForm("logistic", scale=beta, tilt=tilt, clip=_bound(margin_clip))


def sigmoid_norm(beta: float, *, margin_clip: float | None = None) -> MarginForm:
    """DPO on token means: the formula is DPO's, β is larger by about a length.

    Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124, where β = 5.
    """
    return sigmoid(beta, margin_clip=margin_clip)


def hinge(beta: float) -> MarginForm:
    """max(0, 1 − β·margin), with slope 0 at the kink.

    Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425, as TRL has it: the paper's margin δ is 1/β
    here, and the ratio is taken to the reference.
    """
    return MarginForm("hinge", scale=beta)


def ipo(beta: float) -> MarginForm:
    """(margin − 1/(2β))² on token means.

    Azar et al. 2023 (IPO), https://arxiv.org/abs/2310.12036, eq. 17, with τ = β. The paper does not speak of
    length; TRL, confirmed by its authors, takes the mean over tokens, and so do we.
    """
    return MarginForm("square", scale=1.0, target=1 / (2 * beta))


def dpop(beta: float, *, lam: float, margin_clip: float | None = None) -> MarginForm:
    """DPO-Positive: −log σ(β·(margin − λ·max(0, ref_w − π_w))), with `lam` = λ; λ = 0 is DPO to the last bit.

    Pal et al. 2024 (Smaug), https://arxiv.org/abs/2402.13228, in its corrected bracketing: the penalty
    is inside the sigmoid and scaled by β. The penalty's slope at π_w = ref_w, where training starts, is 0.
    """
    return MarginForm("logistic", scale=beta, lam=lam, clip=_bound(margin_clip))


def dpop_penalty(pairs: PairLogps, *, lam: float, **_: float | None) -> Tensor:  # (B,)
    """λ·max(0, ref_w − π_w)."""
    return _penalty(pairs.chosen_ratio, lam)


def _penalty(c: Tensor, lam: float) -> Tensor:  # (B,)
    # Without the branch, a log-prob of −inf would make λ = 0 differ from DPO: 0·inf is NaN.
    return lam * torch.relu(-c) if lam else torch.zeros_like(c)


def _argument(c: Tensor, r: Tensor, penalty: Tensor, form: MarginForm) -> Tensor:  # (B,), before the cut
    margin = c - r
    return form.scale * (margin - penalty if form.lam else margin)


def _cut(u: Tensor, form: MarginForm) -> Tensor:  # (B,)
    return u if form.clip == math.inf else u.clamp(-form.clip, form.clip)


def _value(u: Tensor, form: MarginForm) -> Tensor:  # (B,)
    if form.shape == "logistic":
        value = -F.logsigmoid(u)  # softplus(−u) would do, but torch's turns linear at 20
        return value + form.tilt * u if form.tilt else value
    if form.shape == "hinge":
        return torch.relu(1 - u)
    return (u - form.target).square()


def _slope(u: Tensor, form: MarginForm) -> Tensor:  # (B,)
    if form.shape == "logistic":
        return form.tilt - torch.sigmoid(-u)
    if form.shape == "hinge":
        return -(u < 1).to(u.dtype)
    return 2 * (u - form.target)


def margin_losses(pairs: PairLogps, form: MarginForm) -> Tensor:  # (B,)
    """f(u), differentiable any number of times."""
    c, r = pairs.chosen_ratio, pairs.rejected_ratio
    return _value(_cut(_argument(c, r, _penalty(c, form.lam), form), form), form)


def margin_coefficients(
    c: Tensor,  # (B,), π_w − ref_w
    r: Tensor,  # (B,), π_l − ref_l
    form: MarginForm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each (B,)
    """f(u), λ·max(0, ref_w − π_w), df/dπ_w and df/dπ_l, in closed form."""
    penalty = _penalty(c, form.lam)
    u = _argument(c, r, penalty, form)
    inside = _cut(u, form)
    slope = form.scale * _slope(inside, form)
    if form.clip != math.inf:
        slope = torch.where(u.abs() > form.clip, 0.0, slope)
    d_chosen = torch.where(c < 0, 1 + form.lam, 1.0) * slope if form.lam else slope.clone()
    return _value(inside, form), penalty, d_chosen, -slope


def rejected_per_chosen(c: Tensor, form: MarginForm) -> Tensor:
    """(df/dπ_l) / (df/dπ_w) as `margin_coefficients` has them: it depends on c = π_w − ref_w and nothing else."""
    return -1.0 / torch.where(c < 0, 1 + form.lam, 1.0).to(c.dtype)
