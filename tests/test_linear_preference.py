"""linear_preference_loss: every loss and every plan equals preference_loss of the sequence log-probs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from fastpref import LOSSES, LinearPreferenceOutput, linear_preference_loss, preference_loss, reference
from fastpref.linear import plan as planning
from fastpref.linear import preference, tokens
from fastpref.linear.plan import Plan
from fastpref.linear.tokens import Request

P, T, H, V = 3, 9, 16, 131
LENGTHS = [8, 1, 4, 2, 7, 0]  # scored tokens: pairs of very unequal length, and a response without any
MARGIN = [name for name, spec in LOSSES.items() if spec.margin is not None]
SHIFTS = torch.tensor([0.8, -0.5, 0.3, -0.4, 0.6, 0.2])  # reference less policy: dpop's kink has pairs on both sides
linear_sequence_logps: Any = fastpref.linear_sequence_logps


def make(dtype: torch.dtype = torch.float64, device: str = "cpu", *, lengths: list[int] = LENGTHS) -> list[Tensor]:
    """[hidden, weight, bias], labels; aligned as a causal LM's, with a prompt before."""
    generator = torch.Generator().manual_seed(0)
    count = len(lengths)
    hidden = torch.randn(count, T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) / 4
    bias = torch.randn(V, generator=generator)
    labels = torch.randint(V, (count, T), generator=generator)
    for i, n in enumerate(lengths):
        labels[i, : T - n] = -100
    return [*(x.to(dtype).to(device) for x in (hidden, weight, bias)), labels.to(device)]


def truth(
    tensors: list[Tensor], loss: Callable[..., Tensor], reduction: str = "sum", factor: float = 1.0
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss of the whole float64 logits, its gradients, and the log-probs."""
    leaves = [x.double().detach().requires_grad_() for x in tensors[:3]]
    logits = F.linear(leaves[0], leaves[1], leaves[2])
    logps = reference.sequence_logps(logits, tensors[3], reduction=reduction, dtype=torch.float64)
    value = loss(logps)
    return value.detach(), list(torch.autograd.grad(value * factor, leaves)), logps.detach()


def named(name: str, ref: Tensor | None, **options: Any) -> Callable[[Tensor], Tensor]:
    parts = (None, None) if ref is None else ref.chunk(2)
    return lambda logps: preference_loss(*logps.chunk(2), *parts, loss=name, **options).loss


def references(tensors: list[Tensor], name: str) -> Tensor | None:
    if not LOSSES[name].needs_reference:
        return None
    _, _, logps = truth(tensors, lambda logps: logps.sum(), LOSSES[name].reduction)
    return logps + SHIFTS[: len(logps)].to(logps)


def force(monkeypatch: pytest.MonkeyPatch, plan: str | None) -> list[Plan]:
    """Calls take the plan of that name; the list receives what they took."""
    seen: list[Plan] = []
    monkeypatch.setattr(preference, "Request", functools.partial(Request, plan=plan, on_plan=seen.append))
    return seen


def small_tiles(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    machine = replace(getattr(planning, way.upper()), rows=8, columns=48, min_rows=8, min_columns=16)
    monkeypatch.setattr(tokens, "machine_of", lambda device: machine)


def check(
    out: LinearPreferenceOutput, leaves: list[Tensor], wanted: tuple[Tensor, list[Tensor], Tensor], rtol: float
) -> None:
    """Loss, log-probs and gradients of a call, each gradient by its norm."""
    assert abs(out.loss.item() / wanted[0].item() - 1) <= 10 * rtol
    torch.testing.assert_close(torch.cat(out[-2:]).double(), wanted[2], rtol=10 * rtol, atol=10 * rtol)
    out.loss.backward()
    for leaf, gradient in zip(leaves, wanted[1], strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad.double() - gradient).norm() <= rtol * gradient.norm()


def call(tensors: list[Tensor], ref: Tensor | None, **options: Any) -> tuple[LinearPreferenceOutput, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    return linear_preference_loss(leaves[0], leaves[1], tensors[3], ref, bias=leaves[2], **options), leaves


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_by_name_is_preference_loss_of_the_log_probs(name: str, device: str) -> None:
    """float64: nothing but the mathematics is compared. Includes the reduction that the loss means."""
    tensors = make(device=device, lengths=[8, 3, 4, 2, 7, 5])  # orpo has no value for an empty response
    ref = references(tensors, name)
    out, leaves = call(tensors, ref, loss=name)
    check(out, leaves, truth(tensors, named(name, ref), LOSSES[name].reduction), 1e-10)


@pytest.mark.parametrize("plan", ["stream", "keep", "recompute", "two-pass"])
@pytest.mark.parametrize("name", MARGIN)
def test_margin_losses_by_every_plan(name: str, plan: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    small_tiles(monkeypatch, "cpu")
    seen = force(monkeypatch, plan)
    tensors = make(device=device)
    ref = references(tensors, name)
    out, leaves = call(tensors, ref, loss=name, beta=0.3)
    assert seen[0].name == plan
    assert seen[0].slices > 1
    check(out, leaves, truth(tensors, named(name, ref, beta=0.3), LOSSES[name].reduction), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["dpop", "ipo"])
def test_streaming_in_the_dtypes_of_training(
    name: str, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Rows weighted by a ratio or by 1/length, gathered in one accumulator; both sides of dpop's kink."""
    small_tiles(monkeypatch, way)
    force(monkeypatch, "stream")
    tensors = make(dtype, device)
    ref = references(tensors, name)
    assert ref is not None
    out, leaves = call(tensors, ref.float(), loss=name)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    _, gradients, logps = truth(tensors, named(name, ref), LOSSES[name].reduction)
    torch.testing.assert_close(torch.cat(out[-2:]).double(), logps, rtol=1e-6, atol=1e-6)
    out.loss.backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        assert (leaf.grad.double() - gradient).norm() <= rounding * gradient.norm()


@pytest.mark.parametrize("plan", ["stream", "recompute", None])
def test_the_kernels_drive_the_loss(plan: str | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, "gpu")
    force(monkeypatch, plan)
    tensors = make(torch.float32, lengths=[5, 2, 3, 1])
    ref = references(tensors, "dpop")
    assert ref is not None
    out, leaves = call(tensors, ref.float(), loss="dpop")
    check(out, leaves, truth(tensors, named("dpop", ref)), 1e-5)


@pytest.mark.parametrize("plan", ["stream", "recompute"])
@pytest.mark.parametrize("bound", [0.02, 1.0])
def test_margin_clip_cuts_the_gradient_of_the_pairs_outside(
    plan: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, plan)
    tensors = make()
    ref = references(tensors, "sigmoid")
    out, leaves = call(tensors, ref, loss="sigmoid", margin_clip=bound)
    wanted = truth(tensors, named("sigmoid", ref, margin_clip=bound))
    check(out, leaves, wanted, 1e-10)
    assert leaves[0].grad is not None
    silent = (leaves[0].grad == 0).flatten(1).all(1)
    assert silent[:P].any() == (bound == 0.02)


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (None, (True, False, False)),
        (None, (False, True, False)),
        (None, (False, False, True)),
        ("stream", (False, True, False)),
        ("stream", (False, False, True)),
    ],
    ids=str,
)
def test_who_asks_alone_gets_its_gradient(
    plan: str | None, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = force(monkeypatch, plan)
    tensors = make()
    ref = references(tensors, "sigmoid")
    leaves = [x.clone().requires_grad_(w) for x, w in zip(tensors[:3], wanted, strict=True)]
    linear_preference_loss(leaves[0], leaves[1], tensors[3], ref, bias=leaves[2]).loss.backward()
    assert not wanted[0] or (seen[0].name, seen[0].products) == ("frozen", 2)
    for leaf, gradient, asked in zip(leaves, truth(tensors, named("sigmoid", ref))[1], wanted, strict=True):
        assert (leaf.grad is not None) == asked
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plan", ["stream", "recompute"])
def test_packed_equals_padded(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, plan)
    tensors = make()
    ref = references(tensors, "dpop")
    offsets = torch.arange(0, 2 * P * T + 1, T)
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    hidden, labels = leaves[0].flatten(0, 1), tensors[3].flatten()
    options: dict[str, Any] = {"bias": leaves[2], "loss": "dpop", "cu_seqlens": offsets}
    out = linear_preference_loss(hidden, leaves[1], labels, ref, **options)
    check(out, leaves, truth(tensors, named("dpop", ref)), 1e-10)


@pytest.mark.parametrize("plan", ["keep", "recompute", None])
def test_nothing_scored_gives_zeros(plan: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, plan)
    tensors = make(torch.bfloat16, lengths=[0] * 6)
    out, leaves = call(tensors, torch.zeros(6))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-7)
    for leaf in leaves:
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


# Callables


def own_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, power: float = 2) -> Tensor:
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1).abs() ** power + 0.1 * chosen.mean()


@pytest.mark.parametrize(
    "function",
    [
        own_loss,
        functools.partial(own_loss, power=3),
        lambda *logps: own_loss(*logps).sum(),  # a scalar
        lambda chosen, rejected, *_: chosen.logsumexp(0) - rejected.mean(),  # all pairs at once, no reference
    ],
    ids=["per pair", "partial", "scalar", "across pairs"],
)
def test_a_callable_gets_its_gradient(function: Callable[..., Tensor]) -> None:
    tensors = make()
    ref = references(tensors, "sigmoid")
    assert ref is not None
    out, leaves = call(tensors, ref, loss=function, beta=0.5)
    check(out, leaves, truth(tensors, lambda logps: function(*logps.chunk(2), *ref.chunk(2)).mean()), 1e-10)
    torch.testing.assert_close(out.chosen_rewards, 0.5 * (out.chosen_logps - ref[:P]))
    assert out.penalty is None


def test_a_callable_without_a_reference_receives_none() -> None:
    received: list[Any] = []

    def loss(chosen: Tensor, rejected: Tensor, *rest: Any) -> Tensor:
        received.extend(rest)
        return -chosen

    out, _ = call(make(), None, loss=loss)
    assert received == [None, None]
    torch.testing.assert_close(out.rejected_rewards, 0.1 * out.rejected_logps)


def test_a_callable_that_detaches_or_returns_something_else_raises() -> None:
    with pytest.raises(ValueError, match="does not depend on the policy's log-probs: a callable must not detach them"):
        call(make(), None, loss=lambda chosen, *_: chosen.detach())
    for wrong, got in ((lambda *_: 3.0, r"got 3.0 \(float\)"), (lambda c, *_: c[:2], r"shape \(2,\)")):
        with pytest.raises(ValueError, match=rf"must return \(3,\) losses or a scalar tensor, {got}|{got}"):
            call(make(), None, loss=wrong)


def test_a_parameter_inside_a_callable_raises_instead_of_training_nothing() -> None:
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="differentiate by the log-probs alone, but it reads a float32 tensor of sha"):
        call(make(), None, loss=lambda chosen, *_: chosen * (scale * 2).exp())
    out, _ = call(make(), None, loss=lambda chosen, *_: chosen * scale.detach())
    assert out.loss.requires_grad


# The backward


def test_what_arrives_scales_the_gradients() -> None:
    tensors = make()
    ref = references(tensors, "dpop")
    out, leaves = call(tensors, ref, loss="dpop")
    (out.loss * -2.5 + 3).backward()
    for leaf, gradient in zip(leaves, truth(tensors, named("dpop", ref), factor=-2.5)[1], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plan", ["stream", "recompute", None])
def test_a_loss_scale_saves_float16_gradients(plan: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unscaled they are below float16's smallest number: they must not be rounded before the scale meets them."""
    force(monkeypatch, plan)
    tensors = make(torch.float16)
    ref = references(tensors, "sigmoid")
    assert ref is not None
    leaves = [x.requires_grad_(plan is not None or i == 0) for i, x in enumerate(tensors[:3])]
    out = linear_preference_loss(leaves[0], leaves[1], tensors[3], ref.float(), bias=leaves[2], beta=1e-6)
    (out.loss * 2.0**20).backward()
    wanted = truth(tensors, named("sigmoid", ref, beta=1e-6), factor=2.0**20)[1]
    for leaf, gradient in zip(leaves, wanted, strict=True):
        if leaf.grad is not None:
            assert (leaf.grad.double() - gradient).norm() <= 2**-10 * gradient.norm()
    assert leaves[0].grad is not None


def test_only_the_loss_has_a_gradient() -> None:
    out, _ = call(make(), torch.zeros(6), loss="dpop")
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[2:] if x is not None)
    with pytest.raises(RuntimeError, match="a backward through `losses` of linear_preference_loss"):
        out.losses.sum().backward()
    out, _ = call(make(), torch.zeros(6))
    with pytest.raises(RuntimeError, match="a backward through `losses`"):
        (out.loss + 0.1 * out.losses.max()).backward()


def test_a_second_backward_raises() -> None:
    out, _ = call(make(), torch.zeros(6))
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second backward through linear_preference_loss: .* call the function"):
        out.loss.backward()


def test_a_second_derivative_raises() -> None:
    out, leaves = call(make(), torch.zeros(6))
    (grad,) = torch.autograd.grad(out.loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; use fastpref\.reference"):
        (leaves[0].sum() + grad.square().sum()).backward()


def test_under_no_grad_one_product_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = force(monkeypatch, None)
    tensors = make()
    with torch.no_grad():
        out, _ = call(tensors, torch.zeros(6).double())
    assert seen[0].name == "forward"
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, truth(tensors, named("sigmoid", torch.zeros(6).double()))[0])


def test_the_same_call_twice_is_bitwise_equal() -> None:
    results = []
    for _ in range(2):
        out, leaves = call(make(torch.bfloat16), torch.zeros(6), loss="dpop")
        out.loss.backward()
        results.append([*out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_policy_and_reference_give_ln_2_and_no_penalty(dtype: torch.dtype, backend: str, device: str) -> None:
    """The reference computed by linear_sequence_logps: the same tiles, so the same numbers to the last bit."""
    hidden, weight, bias, labels = make(dtype, device)
    with torch.no_grad():
        ref = linear_sequence_logps(hidden, weight, labels, bias=bias)
    for name in ("sigmoid", "dpop"):
        out, _ = call([hidden, weight, bias, labels], ref, loss=name)
        assert out.loss.item() == pytest.approx(math.log(2), rel=1.2e-7)
        assert out.chosen_rewards.tolist() == [0.0] * P
        assert out.penalty is None or out.penalty.tolist() == [0.0] * P
