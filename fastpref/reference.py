"""The plain-torch truth: short, naive, in any precision, and slow.

Tests, benchmarks and the documentation all hold the fast paths against these functions. They build what the fast paths
avoid (the whole log-softmax), so that each line can be checked by eye. `dtype=torch.float64` gives the truth;
`dtype=torch.float32` is what a careful eager implementation computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fastpref.extras import TokenExtras


def scored_positions(
    labels: Tensor,  # (B, T), or (N_total,) packed
    *,
    mask: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Boolean, the shape of `labels`: True where a position of the label's own sequence predicts it and it counts."""
    scored = labels.long() != ignore_index  # in 8 bits −100 is 156
    if mask is not None:
        scored = scored & (mask != 0)
    if shift:  # the first token of a sequence has no position that predicts it
        scored = scored.clone()
        if cu_seqlens is None:
            scored[..., :1] = False
        else:
            starts = cu_seqlens[:-1].long()
            scored[starts[starts < scored.numel()]] = False
    return scored


def token_logps(
    logits: Tensor,  # (B, T, V), or (N_total, V) packed
    labels: Tensor,  # (B, T), or (N_total,)
    *,
    mask: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # the shape of labels
    """log_softmax, gather, mask; see `fastpref.token_logps` for the arguments."""
    scored = scored_positions(labels, mask=mask, shift=shift, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    z = _label_logits(logits.to(dtype), scored, shift, temperature, logit_scale, softcap)
    index = torch.where(scored, labels.long(), 0).unsqueeze(-1)
    logps = z.log_softmax(-1).gather(-1, index).squeeze(-1)
    return torch.where(scored, logps, 0.0)


def token_extras(
    logits: Tensor,  # (B, T, V), or (N_total, V) packed
    labels: Tensor,  # (B, T), or (N_total,)
    *,
    mask: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> TokenExtras:  # each the shape of labels, of `dtype` (is_top1: bool), all differentiable
    """Entropy, mean, argmax match and Σ p² of the distribution that each label is scored under."""
    scored = scored_positions(labels, mask=mask, shift=shift, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    z = _label_logits(logits.to(dtype), scored, shift, temperature, logit_scale, softcap)
    index = torch.where(scored, labels.long(), 0).unsqueeze(-1)
    log_p = z.log_softmax(-1)
    # An impossible entry (log p = −inf) adds nothing to the entropy, and 0·(−inf) would make NaN of it.
    finite = torch.where(log_p == -torch.inf, 0.0, log_p)
    entropy = -(finite * log_p.exp()).sum(-1)
    is_top1 = z.gather(-1, index).squeeze(-1) == z.amax(-1)
    return TokenExtras(
        torch.where(scored, entropy, 0.0),
        torch.where(scored, z.mean(-1), 0.0),
        scored & is_top1,
        torch.where(scored, (2 * log_p).logsumexp(-1), 0.0),
    )


def _label_logits(
    x: Tensor,  # (..., T, V)
    scored: Tensor,  # (..., T)
    shift: bool,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """The transformed logits that each label is scored under, where the label stands; zeros where it is not scored."""
    x = x * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = x / temperature
    if shift:  # position t predicts label t + 1; the row rolled to the front is never scored
        x = x.roll(1, dims=-2)
    # An unscored row may hold NaN: it must not reach the log-softmax, whose backward would multiply it by zero.
    return torch.where(scored.unsqueeze(-1), x, 0.0)


def sequence_logps(
    logits: Tensor,  # (B, T, V), or (N_total, V) packed
    labels: Tensor,  # (B, T), or (N_total,)
    *,
    reduction: str = "sum",
    mask: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (B,)
    """Per-sequence sum, or mean over scored tokens, of `token_logps`; 0 for a sequence with nothing to score."""
    tokens = token_logps(
        logits,
        labels,
        mask=mask,
        shift=shift,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        dtype=dtype,
    )
    scored = scored_positions(labels, mask=mask, shift=shift, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    if cu_seqlens is None:
        sums, lengths = tokens.sum(-1), scored.sum(-1)
    else:
        ends = cu_seqlens.tolist()
        pieces = [slice(a, b) for a, b in itertools.pairwise(ends)]
        sums = torch.stack([tokens[piece].sum() for piece in pieces])
        lengths = torch.stack([scored[piece].sum() for piece in pieces])
    return sums if reduction == "sum" else sums / lengths.clamp(min=1)


# The preference losses, each as its paper writes it. `win` and `lose` are the log-probs (B,) of the chosen
# and the rejected response under the policy, `ref_win` and `ref_lose` those under the reference.


def _log_sigmoid(u: Tensor, clip: float | None = None) -> Tensor:
    u = u if clip is None else u.clamp(-clip, clip)
    return -torch.logaddexp(torch.zeros_like(u), -u)


def _dpo(win, lose, ref_win, ref_lose, beta, margin_clip=None):
    return -_log_sigmoid(beta * (win - ref_win) - beta * (lose - ref_lose), margin_clip)


def _cdpo(win, lose, ref_win, ref_lose, beta, label_smoothing, margin_clip=None):
    u = beta * (win - ref_win) - beta * (lose - ref_lose)
    right, flipped = -_log_sigmoid(u, margin_clip), -_log_sigmoid(-u, margin_clip)
    return (1 - label_smoothing) * right + label_smoothing * flipped


def _robust(win, lose, ref_win, ref_lose, beta, label_smoothing, margin_clip=None):
    u = beta * (win - ref_win) - beta * (lose - ref_lose)
    right, flipped = -_log_sigmoid(u, margin_clip), -_log_sigmoid(-u, margin_clip)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def _hinge(win, lose, ref_win, ref_lose, beta):
    return torch.relu(1 - beta * ((win - ref_win) - (lose - ref_lose)))


def _ipo(win, lose, ref_win, ref_lose, beta):
    return ((win - lose) - (ref_win - ref_lose) - 1 / (2 * beta)) ** 2


def _dpop(win, lose, ref_win, ref_lose, beta, lam, margin_clip=None):
    penalty = torch.relu(ref_win - win)
    return -_log_sigmoid(beta * ((win - ref_win) - (lose - ref_lose) - lam * penalty), margin_clip)


def _exo_pair(win, lose, ref_win, ref_lose, beta, label_smoothing, margin_clip=None):
    u = beta * (win - ref_win) - beta * (lose - ref_lose)
    log_p = torch.stack([_log_sigmoid(u, margin_clip), _log_sigmoid(-u, margin_clip)])
    target = torch.tensor([1 - label_smoothing, label_smoothing], dtype=torch.float64)
    log_q = target.log().to(u).unsqueeze(-1)
    return (log_p.exp() * (log_p - log_q)).sum(0)


def _nca_pair(win, lose, ref_win, ref_lose, beta):
    rewards = torch.stack([beta * (win - ref_win), beta * (lose - ref_lose)])
    return -_log_sigmoid(rewards[0]) - 0.5 * _log_sigmoid(-rewards).sum(0)


def _bco_pair(win, lose, ref_win, ref_lose, beta, delta):
    return -_log_sigmoid(beta * (win - ref_win) - delta) - _log_sigmoid(-(beta * (lose - ref_lose) - delta))


def _sppo_hard(win, lose, ref_win, ref_lose, beta):
    eta = 1 / beta
    return (win - ref_win - eta * (1 - 0.5)) ** 2 + (lose - ref_lose - eta * (0 - 0.5)) ** 2


def _aot(win, lose, ref_win, ref_lose, beta, label_smoothing, margin_clip=None):
    u = beta * ((win - lose).sort().values - (ref_win - ref_lose).sort().values)
    right, flipped = -_log_sigmoid(u, margin_clip), -_log_sigmoid(-u, margin_clip)
    return (1 - label_smoothing) * right + label_smoothing * flipped


def _aot_unpaired(win, lose, ref_win, ref_lose, beta, label_smoothing, margin_clip=None):
    u = beta * ((win - ref_win).sort().values - (lose - ref_lose).sort().values)
    right, flipped = -_log_sigmoid(u, margin_clip), -_log_sigmoid(-u, margin_clip)
    return (1 - label_smoothing) * right + label_smoothing * flipped


def _apo_zero(win, lose, ref_win, ref_lose, beta):
    return 1 - torch.sigmoid(beta * (win - ref_win)) + torch.sigmoid(beta * (lose - ref_lose))


def _apo_down(win, lose, ref_win, ref_lose, beta):
    u = beta * ((win - ref_win) - (lose - ref_lose))
    return torch.sigmoid(beta * (win - ref_win)) + 1 - torch.sigmoid(u)


def _discopop(win, lose, ref_win, ref_lose, beta, tau, margin_clip=None):
    u = beta * ((win - ref_win) - (lose - ref_lose))
    u = u if margin_clip is None else u.clamp(-margin_clip, margin_clip)
    logistic = -_log_sigmoid(u) * (1 - torch.sigmoid(u / tau))
    return logistic + (_log_sigmoid(u / tau) - u).exp()  # exp(−u) alone is too large for large −u


def _simpo(win, lose, ref_win, ref_lose, beta, gamma, margin_clip=None):
    return -_log_sigmoid(beta * win - beta * lose - gamma, margin_clip)


def _orpo(win, lose, ref_win, ref_lose, beta, margin_clip=None):
    def log_odds(logp):
        return logp - (-torch.expm1(logp)).log()

    return -win - beta * _log_sigmoid(log_odds(win) - log_odds(lose), margin_clip)


def _cpo(win, lose, ref_win, ref_lose, beta, alpha, margin_clip=None):
    return -_log_sigmoid(beta * win - beta * lose, margin_clip) - alpha * win


def _sft(win, lose, ref_win, ref_lose, beta):
    return -win


def _kl_sft(win, lose, ref_win, ref_lose, beta, alpha):
    return -win + alpha * 0.5 * (win - ref_win) ** 2


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": _dpo,
    "sigmoid_norm": _dpo,
    "cdpo": _cdpo,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "dpop": _dpop,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "simpo": _simpo,
    "orpo": _orpo,
    "cpo": _cpo,
    "sft": _sft,
    "kl_sft": _kl_sft,
}


def preference_losses(
    loss: str,
    policy_chosen: Tensor,  # (B,)
    policy_rejected: Tensor,  # (B,)
    ref_chosen: Tensor | None = None,  # (B,)
    ref_rejected: Tensor | None = None,  # (B,)
    *,
    beta: float = 0.1,
    dtype: torch.dtype = torch.float32,
    **options: float | None,
) -> Tensor:  # (B,)
    """The loss of each pair; see `fastpref.preference_loss`. Every option of the loss must be given."""
    logps = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return PREFERENCE_LOSSES[loss](*(t if t is None else t.to(dtype) for t in logps), beta, **options)


def kto_losses(
    policy: Tensor,  # (N,)
    reference: Tensor,  # (N,)
    desirable: Tensor,  # (N,) bool
    log_ratios: Tensor,  # (M,), of mismatched pairs
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:  # (N,)
    """The losses of `kto_loss`, as Ethayarajh et al. 2024 write them: 1 less the value of each response."""
    z = log_ratios.mean().clamp(min=0).detach()
    reward = beta * (policy - reference)
    good = desirable_weight * (1 - torch.sigmoid(reward - beta * z))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * z - reward))
    return torch.where(desirable, good, bad)
