"""The losses of more than one argument, one function each: formulas on the log-probs of B pairs.

c = π_w − ref_w and r = π_l − ref_l are the log-ratios of the chosen and the rejected response, u = β·(c − r).
Each formula is written so that log-ratios of ±1e4 overflow nowhere, neither in the value nor in autograd's
derivative. Losses of the one argument u with a closed-form slope stand in `margin.py`.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.spec import PairLogps

# A mean log-prob of exactly 0 occurs (an empty response, or every token certain to float32's resolution) and
# its odds are infinite. The smallest that float32 tokens can average to is near −1e-12, so that nothing else
# is altered.
LARGEST_LOGP = -1e-12


def _clip(u: Tensor, margin_clip: float | None) -> Tensor:
    return u if margin_clip is None else u.clamp(-margin_clip, margin_clip)


def _sigmoid(u: Tensor) -> Tensor:
    """σ(u) with a derivative that survives where σ(u) rounds to 1; that of torch.sigmoid, σ·(1 − σ), is 0 there."""
    return torch.where(u > 0, 1 - torch.sigmoid(-u), torch.sigmoid(u))


def _smoothed(u: Tensor, label_smoothing: float) -> Tensor:
    """−(1−ε)·log σ(u) − ε·log σ(−u)."""
    value = -F.logsigmoid(u)
    return value + label_smoothing * u if label_smoothing else value


def exo_pair(
    pairs: PairLogps,
    beta: float,
    *,
    label_smoothing: float,
    margin_clip: float | None = None,
) -> Tensor:  # (B,)
    """KL between (σ(u), σ(−u)) and the smoothed labels (1−ε, ε).

    Ji et al. 2024 (EXO), https://arxiv.org/abs/2402.00856, eq. 16 with K = 2. ε = 0 is an infinite loss, and
    refused.
    """
    u = _clip(beta * pairs.margin, margin_clip)
    chosen = _sigmoid(u) * (F.logsigmoid(u) - math.log1p(-label_smoothing))
    rejected = _sigmoid(-u) * (F.logsigmoid(-u) - math.log(label_smoothing))
    return chosen + rejected


def nca_pair(pairs: PairLogps, beta: float) -> Tensor:  # (B,)
    """−log σ(β·c) − ½·log σ(−β·c) − ½·log σ(−β·r).

    Chen et al. 2024 (NCA), https://arxiv.org/abs/2402.05369, with K = 2.
    """
    c, r = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco_pair(pairs: PairLogps, beta: float, *, delta: float) -> Tensor:  # (B,)
    """−log σ(β·c − δ) − log σ(−(β·r − δ)). Jung et al. 2024 (BCO), https://arxiv.org/abs/2404.04656.

    The paper's δ is a running mean of the rewards of both responses; TRL kept one in its trainer and, since
    its 1.x, has none. A function without state follows TRL 1.16: δ = 0 unless given, so that a pair's loss
    depends on no other pair. Who wants the paper's keeps the mean of `chosen_rewards` and `rejected_rewards`
    and passes it.
    """
    c, r = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -F.logsigmoid(c - delta) - F.logsigmoid(delta - r)


def sppo_hard(pairs: PairLogps, beta: float) -> Tensor:  # (B,)
    """(c − 1/(2β))² + (r + 1/(2β))².

    Wu et al. 2024 (SPPO), https://arxiv.org/abs/2405.00675, eq. 4.7 with P in {0, 1} and η = 1/β.
    """
    return (pairs.chosen_ratio - 0.5 / beta).square() + (pairs.rejected_ratio + 0.5 / beta).square()


def kto(
    policy: Tensor,  # (N,)
    reference: Tensor,  # (N,)
    desirable: Tensor,  # (N,) bool
    kl: Tensor,  # ()
    beta: float,
    *,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:  # (N,)
    """w·(1 − σ(±β·(c − z))), + for a desirable response and − for an undesirable one; z = `kl`.

    Ethayarajh et al. 2024 (KTO), https://arxiv.org/abs/2402.01306, eq. 7, less the constant that makes it a value.
    """
    u = beta * (policy - reference - kl)
    losses = _sigmoid(torch.where(desirable, -u, u))
    return torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)


def aot(pairs: PairLogps, beta: float, *, label_smoothing: float, margin_clip: float | None = None) -> Tensor:  # (B,)
    """Smoothed −log σ(β·(sort(π_w − π_l) − sort(ref_w − ref_l))): a loss of the batch.

    Entry i belongs to the i-th smallest of each, not to pair i. Melnyk et al. 2024 (AOT), the paired form,
    https://arxiv.org/abs/2406.05882.
    """
    policy = torch.sort(pairs.policy_chosen - pairs.policy_rejected).values
    reference = torch.sort(cast(Tensor, pairs.ref_chosen) - cast(Tensor, pairs.ref_rejected)).values
    return _smoothed(_clip(beta * (policy - reference), margin_clip), label_smoothing)


def aot_unpaired(
    pairs: PairLogps, beta: float, *, label_smoothing: float, margin_clip: float | None = None
) -> Tensor:  # (B,)
    """Smoothed −log σ(β·(sort(c) − sort(r))): a loss of the batch.

    Entry i belongs to the i-th smallest of each, not to pair i. Melnyk et al. 2024 (AOT), the unpaired form,
    https://arxiv.org/abs/2406.05882.
    """
    delta = torch.sort(pairs.chosen_ratio).values - torch.sort(pairs.rejected_ratio).values
    return _smoothed(_clip(beta * delta, margin_clip), label_smoothing)


def apo_zero(pairs: PairLogps, beta: float) -> Tensor:  # (B,)
    """σ(−β·c) + σ(β·r): chosen up, rejected down.

    D'Oosterlinck et al. 2024 (APO), https://arxiv.org/abs/2408.06266, eq. 7.
    """
    return _sigmoid(-beta * pairs.chosen_ratio) + _sigmoid(beta * pairs.rejected_ratio)


def apo_down(pairs: PairLogps, beta: float) -> Tensor:  # (B,)
    """σ(β·c) + σ(−u): both down, rejected more.

    D'Oosterlinck et al. 2024 (APO), https://arxiv.org/abs/2408.06266, eq. 8.
    """
    return _sigmoid(beta * pairs.chosen_ratio) + _sigmoid(-beta * pairs.margin)


def discopop(pairs: PairLogps, beta: float, *, tau: float, margin_clip: float | None = None) -> Tensor:  # (B,)
    """−σ(−u/τ)·log σ(u) + σ(u/τ)·exp(−u). Lu et al. 2024 (DiscoPOP), https://arxiv.org/abs/2406.08414, eq. 5.

    `tau` is TRL's `discopop_tau`. Above 1 the exponential outgrows its weight as u falls, so that τ is at
    most 1.
    """
    u = _clip(beta * pairs.margin, margin_clip)
    logistic = -_sigmoid(-u / tau) * F.logsigmoid(u)
    # One exponential of a sum, because exp(−u) alone overflows where its weight σ(u/τ) is 0. It comes last, so that
    # autograd adds its two derivatives first: they nearly cancel at small u, and the gradient's error is smaller.
    return logistic + torch.exp(F.logsigmoid(u / tau) - u)


def simpo(pairs: PairLogps, beta: float, *, gamma: float, margin_clip: float | None = None) -> Tensor:  # (B,)
    """−log σ(β·(π_w − π_l) − γ) on token means, no reference.

    Meng et al. 2024 (SimPO), https://arxiv.org/abs/2405.14734, eq. 6.
    `gamma` is TRL's `simpo_gamma`, with its default 0.5. The paper's β lies between 2 and 10.
    """
    return -F.logsigmoid(_clip(beta * pairs.margin - gamma, margin_clip))


def _log_odds(logp: Tensor) -> Tensor:  # (B,)
    """log(p / (1 − p)) of log p; above `LARGEST_LOGP`, value and derivative are those of `LARGEST_LOGP`."""
    logp = torch.where(logp > LARGEST_LOGP, LARGEST_LOGP + (logp - logp.detach()), logp)
    return logp - torch.log(-torch.expm1(logp))


def orpo(pairs: PairLogps, beta: float, *, margin_clip: float | None = None) -> Tensor:  # (B,)
    """−π_w − β·log σ(log odds(y_w) − log odds(y_l)) on token means, no reference, odds(y) = p/(1 − p).

    Hong et al. 2024 (ORPO), https://arxiv.org/abs/2403.07691, eqs. 6 and 7, with λ = β as in TRL. The first
    term is the mean over pairs of token means; TRL takes the mean over all chosen tokens of the batch, which
    weighs by length. `margin_clip` bounds the log odds ratio.
    """
    log_odds_ratio = _log_odds(pairs.policy_chosen) - _log_odds(pairs.policy_rejected)
    return -beta * F.logsigmoid(_clip(log_odds_ratio, margin_clip)) - pairs.policy_chosen


def cpo(pairs: PairLogps, beta: float, *, alpha: float, margin_clip: float | None = None) -> Tensor:  # (B,)
    """−log σ(β·(π_w − π_l)) − α·π_w, no reference. Xu et al. 2024 (CPO), https://arxiv.org/abs/2401.08417.

    The second term is the paper's: the log-prob of the sequence, a sum. TRL takes the mean over the batch's
    tokens; `alpha` (TRL's `cpo_alpha`) near 1/length gives its weight.
    """
    return -F.logsigmoid(_clip(beta * pairs.margin, margin_clip)) - alpha * pairs.policy_chosen


def sft(pairs: PairLogps, beta: float) -> Tensor:  # (B,)
    """−π_w on token means, no reference; the rejected response and β serve the reported rewards only.

    What supervised fine-tuning minimises: the cross-entropy per token, whatever the length. TRL takes the
    mean over all chosen tokens of the batch, which weighs a pair by its length; here every pair weighs the
    same.
    """
    return -pairs.policy_chosen


def kl_sft_penalty(pairs: PairLogps, *, alpha: float, **_: float | None) -> Tensor:  # (B,)
    """(α/2)·(π_w − ref_w)²."""
    return 0.5 * alpha * pairs.chosen_ratio.square()


def kl_sft(pairs: PairLogps, beta: float, *, alpha: float) -> Tensor:  # (B,)
    """−π_w + (α/2)·(π_w − ref_w)² on token means: SFT held near the reference, from both sides.

    Half the squared log-ratio is the "k2" estimate of the KL divergence (Schulman 2020,
    http://joschu.net/blog/kl-approx.html). Its pull α·(π_w − ref_w) grows with the drift and is 0 where
    training starts; |π_w − ref_w| would have a kink there. The two terms balance where a token has gained 1/α
    nats on average. The rejected response and β serve the reported rewards only.
    """
    return kl_sft_penalty(pairs, alpha=alpha) - pairs.policy_chosen
