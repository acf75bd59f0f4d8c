"""Every loss against its paper's formula in float64, against TRL's in exact arithmetic, and its promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, getcontext
from functools import partial
from typing import Any

import pytest
import torch
from acceptance import Triple, no_worse_than_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref import reference
from fastpref.losses import (
    LOSSES,
    PairLogps,
    PreferenceOutput,
    coefficients,
    dpo_loss,
    dpop_loss,
    get_loss,
    preference_loss,
)

pytestmark = pytest.mark.numeric
getcontext().prec = 60
EPS = torch.finfo(torch.float32).eps

# Beside the defaults: each option of each loss away from its default (a test below checks that none is
# missing).
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sigmoid": [{"margin_clip": 0.2}],
    "dpop": [{"lam": 0.0}, {"lam": 3.5}, {"lam": 1.0, "margin_clip": 0.3}],
    "cdpo": [
        {"label_smoothing": 0.0},
        {"label_smoothing": 0.4},
        {"label_smoothing": 0.2, "margin_clip": 0.2},
    ],
    "robust": [
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.45},
        {"label_smoothing": 0.2, "margin_clip": 0.2},
    ],
    "sigmoid_norm": [{"margin_clip": 0.05}],
    "exo_pair": [{"label_smoothing": 0.2}, {"margin_clip": 0.2}],
    "bco_pair": [{"delta": 0.7}, {"delta": -2.0}],
    "aot": [{"label_smoothing": 0.3}, {"margin_clip": 0.1}],
    "aot_unpaired": [{"label_smoothing": 0.3}, {"margin_clip": 0.1}],
    "discopop": [{"tau": 1.0}, {"tau": 0.5, "margin_clip": 0.2}],
    "simpo": [{"gamma": 0.0}, {"gamma": 1.4, "margin_clip": 1.45}],
    "orpo": [{"margin_clip": 0.3}],
    "cpo": [{"alpha": 0.0}, {"alpha": 0.02, "margin_clip": 0.2}],
    "kl_sft": [{"alpha": 0.0}, {"alpha": 7.0}],
}
CASES = [(name, options) for name in LOSSES for options in [{}, *OPTIONS.get(name, [])]]
CASE_IDS = [f"{name}-{','.join(f'{k}={v:g}' for k, v in options.items())}" for name, options in CASES]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
each_loss = pytest.mark.parametrize("name", LOSSES)


def make_pairs(name: str, size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Log-probs as a model gives them: sums near −60, token means near −2, the reference near the policy."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread, drift = (-60.0, 12.0, 4.0) if LOSSES[name].reduction == "sum" else (-2.0, 0.5, 0.3)
    policy = [mean + spread * torch.randn(size, generator=generator).clamp(-3, 3) for _ in range(2)]
    logps = policy + [p + drift * torch.randn(size, generator=generator) for p in policy]
    return [t.to(dtype) for t in logps[: 4 if LOSSES[name].needs_reference else 2]]


def with_defaults(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {o.name: o.default for o in LOSSES[name].options} | options


def gradients(losses: Tensor, policy: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(losses.sum(), policy, materialize_grads=True))


def run_reference(
    name: str, logps: list[Tensor], options: dict[str, Any], dtype: torch.dtype, beta: float = 0.1
) -> list[Tensor]:
    """Losses and both gradients of the plain-torch twin."""
    logps = [t.to(dtype) for t in logps]
    policy = [t.requires_grad_() for t in logps[:2]]
    losses = reference.preference_losses(name, *logps, beta=beta, dtype=dtype, **with_defaults(name, options))
    return [losses.detach(), *gradients(losses, policy)]


def run_ours(name: str, logps: list[Tensor], options: dict[str, Any], beta: float = 0.1) -> list[Tensor]:
    logps = [t.clone() for t in logps]
    policy = [t.requires_grad_() for t in logps[:2]]
    losses = preference_loss(*logps, loss=name, beta=beta, **options).losses
    return [losses.detach(), *gradients(losses, policy)]


def test_each_option_of_each_loss_is_tried_away_from_its_default() -> None:
    for name, spec in LOSSES.items():
        for option in spec.options:
            tried = {options[option.name] for options in OPTIONS[name] if option.name in options}
            assert tried - {option.default}, f"{name}: {option.name}"
    assert set(reference.PREFERENCE_LOSSES) == set(LOSSES)


@each_case
def test_values_and_gradients_are_as_near_to_float64_as_eager_float32(name: str, options: dict[str, Any]) -> None:
    """Of 31, 1, 2 and 127 pairs: whatever a vector holds, some are left over."""

    def draw(seed: int) -> list[Triple]:
        columns = []
        for run in (run_ours, partial(run_reference, dtype=torch.float32), partial(run_reference, dtype=torch.float64)):
            each = [run(name, make_pairs(name, size, seed=seed + size), options) for size in (31, 1, 2, 127)]
            columns.append([torch.cat(values) for values in zip(*each, strict=True)])
        assert columns[0][0].dtype == torch.float32
        return list(zip(*columns, strict=True))

    no_worse_than_eager(draw, draws=2)


@each_case
def test_float64_formulas_pass_gradcheck_and_equal_the_twin(name: str, options: dict[str, Any]) -> None:
    logps = make_pairs(name, 7, seed=3, dtype=torch.float64)
    spec, full = LOSSES[name], with_defaults(name, options)

    def formula(chosen: Tensor, rejected: Tensor) -> Tensor:
        return spec.formula(PairLogps(chosen, rejected, *logps[2:]), 0.1, **full)

    policy = [t.clone().requires_grad_() for t in logps[:2]]
    assert torch.autograd.gradcheck(formula, policy)
    twin = reference.preference_losses(name, *logps, beta=0.1, dtype=torch.float64, **full)
    torch.testing.assert_close(formula(*logps[:2]), twin, rtol=1e-12, atol=1e-13)


# TRL 1.16's formulas (cpo, simpo and orpo: its CPO and ORPO trainers) in 60 digits, where nothing overflows.
# c and r are the log-ratios of the chosen and the rejected response, or for the last three their log-probs.
def sig(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def logsig(x: Decimal) -> Decimal:
    return -(1 + (-x).exp()).ln()


def _trl_exo(c: Decimal, r: Decimal, b: Decimal) -> Decimal:
    eps, u = Decimal("0.001"), b * (c - r)
    return sig(u) * (logsig(u) - (1 - eps).ln()) + sig(-u) * (logsig(-u) - eps.ln())


def _trl_robust(c: Decimal, r: Decimal, b: Decimal) -> Decimal:
    eps, u = Decimal("0.1"), b * (c - r)
    return (-(1 - eps) * logsig(u) + eps * logsig(-u)) / (1 - 2 * eps)


def _trl_discopop(c: Decimal, r: Decimal, b: Decimal) -> Decimal:
    u = b * (c - r)
    mix = sig(u / Decimal("0.05"))
    return -logsig(u) * (1 - mix) + (-u).exp() * mix


def _trl_orpo(w: Decimal, x: Decimal, b: Decimal) -> Decimal:
    log_odds = (w - x) - ((1 - w.exp()).ln() - (1 - x.exp()).ln())
    return -w - b * logsig(log_odds)


TRL: dict[str, tuple[dict[str, Any], Callable[[Decimal, Decimal, Decimal], Decimal]]] = {
    "sigmoid": ({}, lambda c, r, b: -logsig(b * (c - r))),
    "hinge": ({}, lambda c, r, b: max(Decimal(0), 1 - b * (c - r))),
    "ipo": ({}, lambda c, r, b: (c - r - 1 / (2 * b)) ** 2),
    "exo_pair": ({"label_smoothing": 1e-3}, _trl_exo),
    "nca_pair": ({}, lambda c, r, b: -logsig(b * c) - (logsig(-b * c) + logsig(-b * r)) / 2),
    "robust": ({"label_smoothing": 0.1}, _trl_robust),
    "bco_pair": ({}, lambda c, r, b: -logsig(b * c) - logsig(-b * r)),
    "sppo_hard": ({}, lambda c, r, b: (c - Decimal("0.5") / b) ** 2 + (r + Decimal("0.5") / b) ** 2),
    "apo_zero": ({}, lambda c, r, b: 1 - sig(b * c) + sig(b * r)),
    "apo_down": ({}, lambda c, r, b: sig(b * c) + 1 - sig(b * (c - r))),
    "discopop": ({"tau": 0.05}, _trl_discopop),
    "sigmoid_norm": ({}, lambda c, r, b: -logsig(b * (c - r))),
    "simpo": ({"gamma": 0.5}, lambda w, x, b: -logsig(b * (w - x - Decimal("0.5") / b))),
    "orpo": ({}, _trl_orpo),
    "cpo": ({"alpha": 1.0}, lambda w, x, b: -logsig(b * (w - x)) - w),
    "sft": ({}, lambda w, x, b: -w),
    # Not in TRL: from the papers.
    "cdpo": (
        {"label_smoothing": 0.25},
        lambda c, r, b: -Decimal("0.75") * logsig(b * (c - r)) - Decimal("0.25") * logsig(-b * (c - r)),
    ),
    "dpop": ({"lam": 5.0}, lambda c, r, b: -logsig(b * (c - r - 5 * max(Decimal(0), -c)))),
    "kl_sft": ({"alpha": 2.0}, lambda c, r, b: c * c),  # plus −π_w, added below
}
RATIOS = [-1e4, -300.0, -21.5, -1.0, 0.5, 7.25, 150.0, 1e4]
FREE = [-1e4, -100.0, -3.0, -0.25, -(2.0**-20), -(2.0**-39)]


def _derivative(f: Callable[[Decimal], Decimal], x: Decimal) -> Decimal:
    step = Decimal("1e-20")
    return (f(x + step) - f(x - step)) / (2 * step)


@pytest.mark.parametrize("name", TRL)
def test_values_and_gradients_are_trl_s_from_ordinary_to_ten_thousand_nats(name: str) -> None:
    options, formula = TRL[name]
    free = not LOSSES[name].needs_reference
    grid = [(a, b) for a in (FREE if free else RATIOS) for b in (FREE if free else RATIOS)]
    beta = Decimal("0.125")  # exact in float32, so that only our own rounding is measured
    first = torch.tensor([a for a, _ in grid])
    second = torch.tensor([b for _, b in grid])
    ref = torch.full_like(first, -16384.0)  # exact sums with the grid
    logps = [first, second] if free else [first + ref, second + ref, ref, ref]
    if not free:  # what the float32 inputs hold
        grid = [((w - x).item(), (v - x).item()) for w, v, x in zip(*logps[:3], strict=True)]

    def at(a: Decimal, b: Decimal) -> Decimal:
        own = -(a + Decimal(-16384)) if name == "kl_sft" else Decimal(0)
        return own + formula(a, b, beta)

    near_zero = EPS / 32 if name == "apo_down" else 1e-12  # its two terms, of up to β/4, may cancel
    for row, (x, y) in enumerate(grid):
        a, b = Decimal(x), Decimal(y)
        wanted = [at(a, b), _derivative(partial(at, b=b), a), _derivative(partial(at, a), b)]
        got = run_ours(name, [t[row : row + 1] for t in logps], options, beta=0.125)
        for value, exact in zip(got, map(float, wanted), strict=True):
            # exp(−u) turns a rounding of u into |u| roundings of the result, and below 1e-12 all is 0 to us.
            assert value.item() == pytest.approx(exact, rel=1e-5, abs=near_zero), (x, y)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_values_are_trl_s_at_large_margins_too(name: str) -> None:
    w, x, rw, rx = ([v * scale for v in RATIOS] for scale in (1.0, -0.5, 0.25, 0.75))
    if name == "aot":
        policy = sorted(a - b for a, b in zip(w, x, strict=True))
        other = sorted(a - b for a, b in zip(rw, rx, strict=True))
    else:
        policy = sorted(a - b for a, b in zip(w, rw, strict=True))
        other = sorted(a - b for a, b in zip(x, rx, strict=True))
    us = [Decimal("0.125") * Decimal(a - b) for a, b in zip(policy, other, strict=True)]
    eps = Decimal("0.25")
    wanted = [float(-(1 - eps) * logsig(u) - eps * logsig(-u)) for u in us]
    logps = [torch.tensor(v) for v in (w, x, rw, rx)]
    got, *grads = run_ours(name, logps, {"label_smoothing": 0.25}, beta=0.125)
    assert got.tolist() == pytest.approx(wanted, rel=1e-5)
    assert all(g.isfinite().all() for g in grads)


def test_orpo_of_certain_responses_is_finite_and_worsens_with_the_rejected_one() -> None:
    """Log-probs of exactly 0: the chosen one costs nothing, the rejected one as much as the cut allows."""
    certain, likely = torch.zeros(1), torch.full((1,), -0.5)
    for chosen, rejected in [(certain, likely), (likely, certain), (certain, certain)]:
        values = run_ours("orpo", [chosen, rejected], {})
        assert all(v.isfinite().all() for v in values)
    good = preference_loss(certain, likely, loss="orpo").loss
    bad = preference_loss(likely, certain, loss="orpo").loss
    assert good < 1e-6
    assert bad.item() == pytest.approx(0.5 + 0.1 * (math.log(1e12) - math.log(1 / math.expm1(0.5))), rel=1e-5)


def test_lambda_zero_is_dpo_to_the_last_bit() -> None:
    logps = make_pairs("sigmoid", 127)
    for options in [{}, {"margin_clip": 0.2}]:
        dpo, dpop = run_ours("sigmoid", logps, options), run_ours("dpop", logps, {"lam": 0.0, **options})
        assert all(torch.equal(a, b) for a, b in zip(dpo, dpop, strict=True))
    infinite = [torch.tensor([-math.inf]), *(t[:1] for t in logps[1:])]
    assert torch.equal(dpop_loss(*infinite, lam=0.0).losses, dpo_loss(*infinite).losses)


@pytest.mark.parametrize("name", ["sigmoid", "dpop", "cdpo", "robust", "sigmoid_norm", "aot", "aot_unpaired"])
def test_equal_policy_and_reference_give_ln_2_to_float32_rounding(name: str) -> None:
    chosen, rejected = make_pairs("sigmoid", 31)[:2]
    out = preference_loss(chosen, rejected, chosen.clone(), rejected.clone(), loss=name)
    assert (out.losses - math.log(2)).abs().max() <= 2**-24
    assert abs(out.loss.item() - math.log(2)) <= 2**-23
    assert torch.equal(out.chosen_rewards, torch.zeros(31))


def test_dpop_by_hand() -> None:
    """β = 0.5, λ = 2. Chosen fell by 1: u = ½·((−1) − (−3) − 2·1) = 0. It rose by 1: u = ½·(1 − (−3)) = 2."""
    chosen = torch.tensor([-11.0, -9.0], requires_grad=True)
    rejected = torch.tensor([-13.0, -13.0], requires_grad=True)
    out = dpop_loss(chosen, rejected, torch.full((2,), -10.0), torch.full((2,), -10.0), beta=0.5, lam=2.0)
    assert out.losses.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-2))], rel=1e-6)
    assert out.penalty is not None
    assert out.penalty.tolist() == [2.0, 0.0]
    assert out.chosen_rewards.tolist() == [-0.5, 0.5]
    assert out.rejected_rewards.tolist() == [-1.5, -1.5]
    out.losses.sum().backward()
    tail = 1 / (1 + math.exp(2))
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-0.5 * 0.5 * 3, -0.5 * tail], rel=1e-6)
    assert rejected.grad.tolist() == pytest.approx([0.5 * 0.5, 0.5 * tail], rel=1e-6)


@each_case
def test_rewards_penalty_and_mean_are_what_the_output_says(name: str, options: dict[str, Any]) -> None:
    logps = make_pairs(name, 31)
    logps[0].requires_grad_()
    out = preference_loss(*logps, loss=name, beta=0.3, **options)
    assert isinstance(out, PreferenceOutput)
    ratios = [logps[i] - logps[i + 2] if len(logps) == 4 else logps[i] for i in range(2)]
    torch.testing.assert_close(out.chosen_rewards, (0.3 * ratios[0]).detach(), rtol=EPS, atol=0)
    torch.testing.assert_close(out.rejected_rewards, (0.3 * ratios[1]).detach(), rtol=EPS, atol=0)
    assert torch.equal(out.loss, out.losses.mean())
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.chosen_rewards, out.rejected_rewards))
    full = with_defaults(name, options)
    if name == "dpop":
        wanted = full["lam"] * (logps[2] - logps[0]).clamp(min=0)
    elif name == "kl_sft":
        wanted = 0.5 * full["alpha"] * (logps[0] - logps[2]) ** 2
    else:
        assert out.penalty is None
        return
    assert out.penalty is not None
    assert not out.penalty.requires_grad
    torch.testing.assert_close(out.penalty, wanted.detach(), rtol=2 * EPS, atol=0)


@each_case
def test_coefficients_are_the_gradients_of_preference_loss(name: str, options: dict[str, Any]) -> None:
    logps = make_pairs(name, 31)
    losses, d_chosen, d_rejected = coefficients(LOSSES[name], *logps, beta=0.1, **options)
    for got, wanted in zip((losses, d_chosen, d_rejected), run_ours(name, logps, options), strict=True):
        assert not got.requires_grad
        assert torch.equal(got, wanted)


def assert_equal_to_rounding(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Four roundings: of a value, or where terms cancel of the largest, or of the terms (β·σ′ ≤ 0.1/4)."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * EPS, atol=4 * EPS * max(0.025, b.abs().max().item()))


@pytest.mark.parametrize("size", [64, 31])
@each_loss
def test_a_permutation_of_the_pairs_permutes_the_losses_of_separable_ones_only(name: str, size: int) -> None:
    """Bitwise where vectors hold all pairs; torch computes the rest by other functions, equal to rounding."""
    logps = make_pairs(name, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    before = run_ours(name, logps, {})
    after = run_ours(name, [t[order] for t in logps], {})
    if LOSSES[name].separable:
        moved = [t[order] for t in before]
        if size % 64 == 0:
            assert all(torch.equal(a, b) for a, b in zip(moved, after, strict=True))
        else:
            assert_equal_to_rounding(after, moved)
        alone = [run_ours(name, [t[row : row + 1] for t in logps], {}) for row in range(size)]
        assert_equal_to_rounding([torch.cat(values) for values in zip(*alone, strict=True)], before)
    else:  # sorted: the order of the pairs leaves the entries where they are
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[0][order], after[0])


@pytest.mark.parametrize("name", [n for n in LOSSES if any(o.name == "margin_clip" for o in LOSSES[n].options)])
def test_margin_clip_stops_the_gradient_outside_and_changes_nothing_inside(name: str) -> None:
    for chosen, rejected, outside in [(-1.0, -8.0, True), (-2.0, -2.3, False)]:
        logps = [torch.tensor([value]) for value in (chosen, rejected, -2.3, -2.4)]
        logps = logps if LOSSES[name].needs_reference else logps[:2]
        clipped = run_ours(name, logps, {"margin_clip": 2.0}, beta=5.0)
        free = run_ours(name, logps, {}, beta=5.0)
        if outside:
            sft_slope = -1.0 if name in ("orpo", "cpo") else 0.0  # the clip leaves their SFT term alone
            assert (clipped[1].item(), clipped[2].item()) == (sft_slope, 0.0)
            assert clipped[0].item() != free[0].item()
        else:
            assert all(torch.equal(a, b) for a, b in zip(clipped, free, strict=True))
            assert free[2].item() != 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_loss
def test_half_precision_inputs_are_computed_in_float32_and_get_gradients_of_their_own_dtype(
    name: str, dtype: torch.dtype
) -> None:
    logps = make_pairs(name, 31, dtype=dtype)
    half, full = run_ours(name, logps, {}), run_ours(name, [t.float() for t in logps], {})
    assert half[0].dtype == torch.float32
    assert torch.equal(half[0], full[0])
    assert half[1].dtype == dtype
    assert torch.equal(half[1], full[1].to(dtype))


@each_loss
def test_float64_is_kept_only_where_every_input_is_float64(name: str) -> None:
    logps = make_pairs(name, 5, dtype=torch.float64)
    out = preference_loss(*logps, loss=name)
    assert out.losses.dtype == out.loss.dtype == out.chosen_rewards.dtype == torch.float64
    mixed = preference_loss(logps[0].float(), *logps[1:], loss=name)
    assert mixed.losses.dtype == mixed.rejected_rewards.dtype == torch.float32


def test_a_nan_stays_in_its_own_pair() -> None:
    for name, spec in LOSSES.items():
        if not spec.separable:
            continue
        logps = make_pairs(name, 3)
        clean = run_ours(name, logps, {})
        logps[0][1] = math.nan
        dirty = run_ours(name, logps, {})
        assert dirty[0][1].isnan()
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_minus_infinity_gives_the_limits_that_the_docstring_names() -> None:
    finite, minus_inf = torch.tensor([-3.0]), torch.tensor([-math.inf])
    losses, d_chosen, d_rejected = coefficients(LOSSES["sigmoid"], minus_inf, finite, finite, finite, beta=0.1)
    assert losses.item() == math.inf
    assert d_chosen.item() == pytest.approx(-0.1)
    assert d_rejected.item() == pytest.approx(0.1)
    losses, d_chosen, d_rejected = coefficients(LOSSES["sigmoid"], finite, minus_inf, finite, finite, beta=0.1)
    assert (losses.item(), d_chosen.item(), d_rejected.item()) == (0.0, 0.0, 0.0)
    assert dpo_loss(minus_inf, minus_inf, finite, finite).loss.isnan()


@given(data=st.data(), name=st.sampled_from(sorted(LOSSES)), size=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_log_probs_down_to_minus_ten_thousand_give_finite_losses_and_gradients(data: Any, name: str, size: int) -> None:
    values = st.lists(st.floats(-1e4, -(2.0**-20), width=32), min_size=size, max_size=size)
    logps = [torch.tensor(data.draw(values)) for _ in range(4 if LOSSES[name].needs_reference else 2)]
    options = data.draw(st.sampled_from([{}, *OPTIONS.get(name, [])]))
    beta = data.draw(st.floats(1e-3, 1.0))
    losses, *grads = run_ours(name, logps, options, beta)
    exact, *exact_grads = run_reference(name, logps, options, torch.float64, beta)
    assert losses.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    # Log-ratios round at 1e4·2⁻²⁴ = 6e-4 nats and DPOP's λ multiplies that; the loss moves by its slope times
    # that.
    weight = 2 * (1 + float(options.get("lam", 50.0 if name == "dpop" else 0.0)))
    slope = max(g.abs().max().item() for g in exact_grads)
    assert (losses.double() - exact).abs().max() <= 1e-3 * weight * max(slope, beta) + 1e-5 * exact.abs().max()


@given(
    margins=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=40),
    name=st.sampled_from(["sigmoid", "hinge"]),
    beta=st.floats(1e-3, 10.0),
)
@settings(max_examples=60, deadline=None)
def test_a_larger_margin_never_costs_more(margins: list[float], name: str, beta: float) -> None:
    chosen = torch.tensor(sorted(margins))
    zero = torch.zeros_like(chosen)
    losses = preference_loss(chosen, zero, zero, zero, loss=name, beta=beta).losses
    assert (losses.diff() <= 0).all()
    assert (losses >= 0).all()


def test_the_registry_says_what_the_design_says() -> None:
    assert {n for n, s in LOSSES.items() if s.reduction == "mean"} == {
        "ipo", "simpo", "orpo", "sigmoid_norm", "sft", "kl_sft",
    }  # fmt: skip
    assert {n for n, s in LOSSES.items() if not s.needs_reference} == {"simpo", "orpo", "cpo", "sft"}
    assert {n for n, s in LOSSES.items() if not s.separable} == {"aot", "aot_unpaired"}
    assert {"sigmoid", "cdpo", "ipo", "hinge", "dpop"} <= {n for n, s in LOSSES.items() if s.fused}
    assert get_loss("dpo") is LOSSES["sigmoid"]
    for name, spec in LOSSES.items():
        assert spec.name == name
        assert spec.formula.__doc__
        assert spec.formula_text
        assert spec.paper


def test_dpo_and_dpop_by_name_are_preference_loss() -> None:
    logps = make_pairs("sigmoid", 31)
    for ours, general in [
        (
            dpo_loss(*logps, beta=0.3, margin_clip=1.0),
            preference_loss(*logps, loss="dpo", beta=0.3, margin_clip=1.0),
        ),
        (dpop_loss(*logps, beta=0.3, lam=2.0), preference_loss(*logps, loss="dpop", beta=0.3, lam=2.0)),
        (dpop_loss(*logps), preference_loss(*logps, loss="dpop")),
    ]:
        assert torch.equal(ours.losses, general.losses)
        assert torch.equal(ours.chosen_rewards, general.chosen_rewards)
