"""The fused path of the losses of one argument, on the torch path and on the kernel, against the registry's formula."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import reference
from fastpref.losses import LOSSES, PairLogps, coefficients, preference_loss

EPS = torch.finfo(torch.float32).eps
FUSED = [name for name, spec in LOSSES.items() if spec.fused]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sigmoid": [{"margin_clip": 0.2}],
    "sigmoid_norm": [{"margin_clip": 0.2}],
    "dpop": [{"lam": 0.0}, {"lam": 3.5}, {"lam": 1.0, "margin_clip": 0.31}],
    "cdpo": [{"label_smoothing": 0.0}, {"label_smoothing": 0.4, "margin_clip": 0.2}],
    "robust": [{"label_smoothing": 0.1}, {"label_smoothing": 0.45, "margin_clip": 0.2}],
}
CASES = [(name, options) for name in FUSED for options in [{}, *OPTIONS.get(name, [])]]
each_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{','.join(f'{k}={v:g}' for k, v in o.items())}" for n, o in CASES]
)


def make_pairs(size: int, device: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy = [-60 + 12 * torch.randn(size, generator=generator) for _ in range(2)]
    logps = policy + [p + 4 * torch.randn(size, generator=generator) for p in policy]
    return [t.to(device) for t in logps]


def run_fused(name: str, logps: list[Tensor], options: dict[str, Any], upstream: Tensor | None = None) -> list[Tensor]:
    """Losses, both gradients, both rewards and the penalty (zeros where the loss has none)."""
    policy = [t.detach().requires_grad_() for t in logps[:2]]
    out = preference_loss(*policy, *logps[2:], loss=name, **options)
    out.losses.backward(torch.ones_like(out.losses) if upstream is None else upstream)
    penalty = torch.zeros_like(out.losses) if out.penalty is None else out.penalty
    grads = [t.grad for t in policy if t.grad is not None]
    return [out.losses.detach(), *grads, out.chosen_rewards, out.rejected_rewards, penalty]


def run_formula(name: str, logps: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The same of the registry's formula and autograd."""
    spec = LOSSES[name]
    full = spec.check_options(options)
    policy = [t.detach().requires_grad_() for t in logps[:2]]
    pairs = PairLogps(*policy, *logps[2:])
    losses = spec.formula(pairs, 0.1, **full)
    grads = torch.autograd.grad(losses.sum(), policy)
    penalty = torch.zeros_like(losses) if spec.penalty is None else spec.penalty(pairs, **full)
    rewards = [0.1 * pairs.chosen_ratio, 0.1 * pairs.rejected_ratio]
    return [t.detach() for t in (losses, *grads, *rewards, penalty)]


def test_the_promised_losses_are_fused_and_all_their_options_tried() -> None:
    assert {"sigmoid", "cdpo", "ipo", "hinge", "dpop"} <= set(FUSED)
    for name in FUSED:
        tried = {key for options in OPTIONS.get(name, []) for key in options}
        assert tried == {option.name for option in LOSSES[name].options}, name


@each_case
def test_fused_values_gradients_rewards_and_penalty_are_the_formula_s_to_rounding(
    name: str, options: dict[str, Any], backend: str, device: str
) -> None:
    for size in (31, 1, 2, 127, 257):  # 257 needs a second block
        logps = make_pairs(size, device, seed=size)
        fused, formula = run_fused(name, logps, options), run_formula(name, logps, options)
        for got, wanted in zip(fused, formula, strict=True):
            scale = wanted.abs().max().item()
            torch.testing.assert_close(got, wanted, rtol=4 * EPS, atol=2 * EPS * scale)


@each_case
def test_large_margins_give_the_values_and_gradients_of_float64(
    name: str, options: dict[str, Any], backend: str, device: str
) -> None:
    ratios = torch.tensor([-1e4, -1e3, -104.5, -30.0, -1.0, 0.25, 2.0, 30.0, 104.5, 1e3, 1e4])
    c, r = (t.flatten() for t in torch.meshgrid(ratios, -ratios, indexing="ij"))
    zero = torch.zeros_like(c)
    logps = [t.to(device) for t in (c, r, zero, zero)]
    exact = [t.double().cpu() for t in logps]
    policy = [t.requires_grad_() for t in exact[:2]]
    full = LOSSES[name].check_options(options)
    losses = reference.preference_losses(name, *exact, beta=0.1, dtype=torch.float64, **full)  # type: ignore[arg-type]
    wanted = [losses.detach(), *torch.autograd.grad(losses.sum(), policy)]
    for got, value in zip(run_fused(name, logps, options), wanted, strict=False):
        assert got.isfinite().all()
        # exp(−|u|) turns the rounding of u into |u| roundings: 60 at most before the value is below 1e-26.
        torch.testing.assert_close(got.cpu().double(), value, rtol=64 * EPS, atol=1e-26)


def test_the_logistic_loss_keeps_its_relative_accuracy_where_it_is_tiny(backend: str, device: str) -> None:
    margins = torch.linspace(-80, 80, 1281)
    logps = [t.to(device) for t in (margins, torch.zeros(1281), torch.zeros(1281), torch.zeros(1281))]
    losses, d_chosen, _ = coefficients(LOSSES["sigmoid"], *logps, beta=1.0)
    exact = torch.logaddexp(torch.zeros(1281).double(), -margins.double())
    slope = -torch.sigmoid(-margins.double())
    allowed = EPS * (3 + margins.abs().double())
    assert ((losses.cpu().double() - exact).abs() <= allowed * exact).all()
    assert ((d_chosen.cpu().double() - slope).abs() <= allowed * slope.abs()).all()


def test_equal_policy_and_reference_give_ln_2_to_float32_rounding(backend: str, device: str) -> None:
    chosen, rejected = make_pairs(31, device)[:2]
    losses = preference_loss(chosen, rejected, chosen.clone(), rejected.clone()).losses
    assert (losses.double() - math.log(2)).abs().max() <= 2**-24 * (2 if device == "cuda" else 1)


def test_lambda_zero_is_dpo_to_the_last_bit_and_at_minus_infinity(backend: str, device: str) -> None:
    logps = make_pairs(127, device)
    logps[0][5] = -math.inf
    for options, limit in [({}, math.inf), ({"margin_clip": 0.2}, math.log1p(math.exp(0.2)))]:
        dpo, dpop = run_fused("sigmoid", logps, options), run_fused("dpop", logps, {"lam": 0.0, **options})
        assert all(torch.equal(a, b) for a, b in zip(dpo, dpop, strict=True))
        assert dpo[0][5].item() == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize("name", FUSED)
def test_nan_and_infinity_come_out_as_the_formula_has_them(name: str, backend: str, device: str) -> None:
    specials = torch.tensor([math.nan, -math.inf, -3.0])
    chosen, rejected = (t.flatten().to(device) for t in torch.meshgrid(specials, specials, indexing="ij"))
    ref = torch.full_like(chosen, -2.0)
    fused = run_fused(name, [chosen, rejected, ref, ref], {})
    formula = run_formula(name, [chosen, rejected, ref, ref], {})
    torch.testing.assert_close(fused[0], formula[0], rtol=4 * EPS, atol=0, equal_nan=True)
    finite = formula[1].isfinite() & formula[0].isfinite()
    torch.testing.assert_close(fused[1][finite], formula[1][finite], rtol=4 * EPS, atol=0)
    assert fused[0][:3].isnan().all()


@pytest.mark.parametrize("name", ["sigmoid", "dpop"])
def test_strides_do_not_matter(name: str, backend: str, device: str) -> None:
    logps = make_pairs(31, device)
    wanted = run_fused(name, logps, {})
    halves = [*torch.cat(logps[:2]).chunk(2), *torch.cat(logps[2:]).chunk(2)]
    steps = [torch.stack([t, t + 1], dim=1)[:, 0] for t in logps]
    for given in (halves, steps):
        assert all(torch.equal(a, b) for a, b in zip(run_fused(name, given, {}), wanted, strict=True))
    one = [t[:1] for t in logps]
    expanded = run_fused(name, [t.expand(5) for t in one], {})
    for got, alone in zip(expanded, run_fused(name, one, {}), strict=True):
        assert torch.equal(got, alone.expand(5))


def test_the_upstream_gradient_may_differ_by_pair_vanish_and_have_stride_zero(backend: str, device: str) -> None:
    logps = make_pairs(31, device)
    once = run_fused("dpop", logps, {})
    upstream = torch.linspace(-2, 2, 31, device=device)
    upstream[3] = 0.0
    scaled = run_fused("dpop", logps, {}, upstream)
    assert torch.equal(scaled[1], once[1] * upstream)
    assert torch.equal(scaled[2], once[2] * upstream)
    expanded = run_fused("dpop", logps, {}, torch.tensor(-0.5, device=device).expand(31))
    assert torch.equal(expanded[1], once[1] * -0.5)


def test_the_gradient_reaches_whichever_of_the_two_policies_asks_for_it(backend: str, device: str) -> None:
    logps = make_pairs(7, device)
    both = run_fused("sigmoid", logps, {})
    for position in (0, 1):
        given = [t.clone() for t in logps]
        given[position].requires_grad_()
        preference_loss(*given).losses.sum().backward()
        grad = given[position].grad
        assert grad is not None
        assert torch.equal(grad, both[1 + position])


def test_the_same_call_twice_is_bitwise_equal(backend: str, device: str) -> None:
    logps = make_pairs(257, device)
    for name in FUSED:
        first, second = run_fused(name, logps, {}), run_fused(name, logps, {})
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float64_is_computed_in_float64_on_either_backend(backend: str, device: str) -> None:
    logps = [t.double() for t in make_pairs(31, device)]
    got = run_fused("sigmoid", logps, {})
    wanted = reference.preference_losses("sigmoid", *logps, beta=0.1, dtype=torch.float64, margin_clip=None)
    assert got[0].dtype == got[1].dtype == torch.float64
    torch.testing.assert_close(got[0], wanted, rtol=1e-14, atol=0)


def test_a_double_backward_says_that_there_is_none(backend: str, device: str) -> None:
    logps = make_pairs(5, device)
    chosen = logps[0].requires_grad_()
    (grad,) = torch.autograd.grad(preference_loss(*logps).loss, chosen, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivative only.*double backward take the formula"):
        torch.autograd.grad(grad.sum(), chosen)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.functional.hessian(lambda w: preference_loss(w, *logps[1:]).loss, logps[0].detach())


def test_forward_mode_says_that_there_is_none(backend: str, device: str) -> None:
    logps = make_pairs(5, device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logps[0], torch.ones_like(logps[0]))
        with pytest.raises(NotImplementedError, match=r"first derivative only.*forward-mode"):
            preference_loss(dual, *logps[1:])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda w: preference_loss(w, *logps[1:]).loss, (logps[0],), (torch.ones_like(logps[0]),))


def test_the_formula_that_those_errors_name_has_second_derivatives() -> None:
    logps = [t.double() for t in make_pairs(5, "cpu")]

    def formula(w: Tensor, x: Tensor) -> Tensor:
        return LOSSES["dpop"].formula(PairLogps(w, x, *logps[2:]), 0.1, lam=3.0)

    assert torch.autograd.gradgradcheck(formula, [t.requires_grad_() for t in logps[:2]])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FUSED, "discopop", "orpo", "aot", "kl_sft"])
def test_torch_compile_takes_preference_loss_in_one_graph(name: str, backend: str, device: str) -> None:
    """Fused ones are the same op: bitwise equal. The others are traced as they stand."""
    torch._dynamo.reset()
    logps = make_pairs(31, device)
    logps = [t / 30 for t in logps] if LOSSES[name].reduction == "mean" else logps
    logps = logps if LOSSES[name].needs_reference else [-t.abs() for t in logps[:2]]

    def both(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = preference_loss(*given, loss=name)
        return out.loss, out.chosen_rewards, out.rejected_rewards

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for function in (both, compiled):
        chosen = logps[0].clone().requires_grad_()
        loss, *rewards = function(chosen, *logps[1:])
        loss.backward()
        assert not any(t.requires_grad for t in rewards)
        assert chosen.grad is not None
        results.append([loss.detach(), *rewards, chosen.grad])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=0 if name in FUSED else 4 * EPS, atol=0)


def test_the_custom_op_passes_torch_s_own_checks(backend: str, device: str) -> None:
    logps = make_pairs(31, device)
    logps[0].requires_grad_()
    form = LOSSES["dpop"].margin(0.1, lam=3.0)  # type: ignore[misc]
    torch.library.opcheck(
        torch.ops.fastpref.margin_loss.default,
        (*logps, 0.1, *form),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_double_backward_of_the_custom_op_says_that_there_is_none() -> None:
    torch._dynamo.reset()
    logps = make_pairs(5, "cpu")
    chosen = logps[0].requires_grad_()
    loss = torch.compile(lambda w: preference_loss(w, *logps[1:]).loss, backend="eager")(chosen)
    (grad,) = torch.autograd.grad(loss, chosen, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(grad.sum(), chosen)


@pytest.mark.slow
def test_every_loss_runs_where_triton_is_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from fastpref.losses import LOSSES, preference_loss
for name, spec in LOSSES.items():
    logps = [-torch.rand(3) for _ in range(4 if spec.needs_reference else 2)]
    assert preference_loss(*logps, loss=name).loss.isfinite(), name
print("ran", len(LOSSES))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("FASTPREF_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert done.stdout.strip() == f"ran {len(LOSSES)}", done.stderr
