"""Autograd around the linear path: who gets a gradient, what is refused, strides, and calls that repeat."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastpref
from fastpref.linear import api
from fastpref.linear.plan import Plan
from fastpref.linear.tokens import LinearTokenLogps, Request
from fastpref.tiled import Transform

B, T, H, V = 3, 7, 17, 131
SECOND_DERIVATIVE = r"no second derivative; use fastpref\.reference\.token_logps"
# Without the types of what return_lengths adds.
linear_sequence_logps: Any = fastpref.linear_sequence_logps
linear_token_logps: Any = fastpref.linear_token_logps


def make(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H), (V, H), (V,))
    tensors = [torch.randn(*shape, generator=generator).to(dtype).to(device) for shape in shapes]
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, 2] = -100
    return tensors, labels.to(device)


def gradients(tensors: list[Tensor], labels: Tensor, wanted: tuple[bool, ...] = (True,) * 3) -> list[Tensor | None]:
    hidden, weight, bias = (x.detach().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True))
    value = linear_sequence_logps(hidden, weight, labels, bias=bias)
    (value * torch.tensor([1.5, -0.25, 2.0], device=value.device)).sum().backward()
    return [value.detach(), hidden.grad, weight.grad, bias.grad]


# Who gets a gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [x for x in itertools.product([False, True], repeat=3) if any(x)], ids=str)
def test_who_asks_gets_the_gradient_that_all_together_get(
    wanted: tuple[bool, ...], dtype: torch.dtype, device: str
) -> None:
    tensors, labels = make(dtype, device)
    _, *everything = gradients(tensors, labels)
    _, *found = gradients(tensors, labels, wanted)
    for one, all_, asked in zip(found, everything, wanted, strict=True):
        assert (one is not None) == asked
        if one is not None and all_ is not None:
            step = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(one, all_, rtol=step, atol=step * all_.abs().max().item())


def test_without_anybody_who_asks_there_is_no_graph(backend: str, device: str) -> None:
    (hidden, weight, bias), labels = make(device=device)
    assert not linear_sequence_logps(hidden, weight, labels, bias=bias).requires_grad


def plans_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    seen: list[Plan] = []
    monkeypatch.setattr(api, "Request", functools.partial(Request, on_plan=seen.append))
    return seen


def test_under_no_grad_one_product_is_made_whatever_requires_a_gradient(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    (hidden, weight, bias), labels = make(device=device)
    seen = plans_of_calls(monkeypatch)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    with torch.no_grad():
        linear_sequence_logps(hidden, weight, labels, bias=bias)
    with torch.inference_mode():
        linear_sequence_logps(hidden, weight, labels, bias=bias)
    assert [plan.name for plan in seen] == ["forward", "forward"]


def test_a_frozen_head_takes_two_products(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    (hidden, weight, bias), labels = make(device=device)
    seen = plans_of_calls(monkeypatch)
    linear_sequence_logps(hidden.requires_grad_(), weight, labels, bias=bias)
    assert (seen[0].name, seen[0].products) == ("frozen", 2)


@pytest.mark.parametrize("plan", ["frozen", "keep", "recompute", "two-pass"])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_gradcheck_of_every_plan_in_float64(plan: str, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plan's gradients against finite differences of its own values."""
    monkeypatch.setenv("FASTPREF_BACKEND", "torch")
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 3), (7, 3), (7,))
    leaves = [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    labels = torch.randint(7, (2, 4), generator=generator)
    labels[1, 2] = -100
    mask = torch.rand(2, 4, generator=generator) < 0.8
    request = Request(1, -100, Transform(0.7, 1.3, softcap), torch.float64, 2**30, plan)
    if plan == "frozen":
        leaves[1:] = [x.detach() for x in leaves[1:]]
    assert torch.autograd.gradcheck(
        lambda *x: LinearTokenLogps.apply(*x, labels, mask, request), leaves, rtol=1e-7, atol=1e-8
    )


# What is refused


@pytest.mark.parametrize("frozen", [True, False])
def test_a_second_derivative_raises_and_names_the_reference(frozen: bool, backend: str, device: str) -> None:
    """Also beside a first-order term, and where the upstream gradient is a constant: never a term that is dropped."""
    (hidden, weight, _), labels = make(device=device)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    value = linear_sequence_logps(hidden, weight, labels).sum()
    (grad,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        (hidden.square().sum() + grad.square().sum()).backward()
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        torch.autograd.functional.hessian(lambda h: linear_token_logps(h, weight, labels).sum(), hidden.detach())


def test_the_first_derivative_with_create_graph_is_the_usual_one(backend: str, device: str) -> None:
    tensors, labels = make(device=device)
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = linear_sequence_logps(leaves[0], leaves[1], labels, bias=leaves[2])
    upstream = torch.tensor([1.5, -0.25, 2.0], device=device)
    found = torch.autograd.grad(value, leaves, upstream, create_graph=True)
    for a, b in zip(found, gradients(tensors, labels)[1:], strict=True):
        assert b is not None
        assert torch.equal(a.detach(), b)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("function", [linear_token_logps, linear_sequence_logps])
def test_forward_mode_raises(function: Callable[..., Tensor], position: int, device: str) -> None:
    tensors, labels = make(device=device)
    with forward_ad.dual_level():
        tensors[position] = forward_ad.make_dual(tensors[position], torch.ones_like(tensors[position]))
        with pytest.raises(RuntimeError, match="no forward-mode derivative; use reverse mode"):
            function(tensors[0], tensors[1], labels, bias=tensors[2])


@pytest.mark.parametrize("position", [0, 1])
def test_a_change_in_place_between_forward_and_backward_raises(position: int, device: str) -> None:
    tensors, labels = make(device=device)
    leaves = [x.requires_grad_() for x in tensors]
    value = linear_sequence_logps(leaves[0], leaves[1], labels, bias=leaves[2])
    with torch.no_grad():
        leaves[position].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


# Calls that repeat


def test_a_graph_that_is_kept_can_be_walked_again(backend: str, device: str) -> None:
    tensors, labels = make(device=device)
    for wanted in ((True, True, True), (True, False, False)):
        hidden, weight, bias = (x.clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True))
        value = linear_sequence_logps(hidden, weight, labels, bias=bias)
        leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
        first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(value.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            value.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_twice_is_bitwise_equal(dtype: torch.dtype, backend: str, device: str) -> None:
    tensors, labels = make(dtype, device)
    for a, b in zip(gradients(tensors, labels), gradients(tensors, labels), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool, device: str) -> None:
    (hidden, weight, _), labels = make(device=device)

    def head(x: Tensor) -> Tensor:
        return linear_sequence_logps(x * 1.5, weight, labels)

    plain, kept = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    head(plain).sum().backward()
    checkpoint(head, kept, use_reentrant=reentrant).sum().backward()
    assert plain.grad is not None
    assert kept.grad is not None
    assert torch.equal(kept.grad, plain.grad)


# Strides


def strided(kind: str, hidden: Tensor) -> Tensor:
    """`hidden` as a view with other strides, which holds NaN wherever it must not be read."""
    nan = float("nan")
    view = {
        "sliced": hidden.new_full((B, T + 3, H), nan)[:, 2 : T + 2],
        "transposed": hidden.new_full((T, B, H), nan).transpose(0, 1),
        "features first": hidden.new_full((B, H, T), nan).transpose(1, 2),
        "part of the features": hidden.new_full((B, T, H + 5), nan)[..., :H],
        "every second row": hidden.new_full((B, 2 * T, H), nan)[:, ::2],
        "every second feature": hidden.new_full((B, T, 2 * H), nan)[..., ::2],
    }[kind]
    return view.copy_(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind",
    ["sliced", "transposed", "features first", "part of the features", "every second row", "every second feature"],
)
def test_strides_of_hidden_states_change_nothing(kind: str, dtype: torch.dtype, device: str) -> None:
    tensors, labels = make(dtype, device)
    view = strided(kind, tensors[0])
    assert not view.is_contiguous()
    for a, b in zip(gradients([view, *tensors[1:]], labels), gradients(tensors, labels), strict=True):
        assert a is not None
        assert b is not None
        step = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=step, atol=step * b.abs().max().item())


@pytest.mark.parametrize("shape", [(1, T, H), (B, 1, H), (1, 1, H)], ids=str)
def test_expanded_hidden_states_do_as_their_copy(shape: tuple[int, ...], device: str) -> None:
    tensors, labels = make(device=device)
    leaf = tensors[0][: shape[0], : shape[1]].clone().requires_grad_()
    copied = leaf.detach().expand(B, T, H).contiguous()
    wanted = gradients([copied, *tensors[1:]], labels)[1]
    weights = torch.tensor([1.5, -0.25, 2.0], device=device)
    value = linear_sequence_logps(leaf.expand(B, T, H), tensors[1], labels, bias=tensors[2])
    (value * weights).sum().backward()
    assert wanted is not None
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, wanted.sum_to_size(shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "every second row"])
def test_strides_of_the_head_change_nothing(kind: str, device: str) -> None:
    tensors, labels = make(device=device)
    weight = {
        "transposed": tensors[1].t().contiguous().t(),
        "sliced": torch.nn.functional.pad(tensors[1], (2, 3), value=float("nan"))[:, 2 : H + 2],
        "every second row": tensors[1].repeat_interleave(2, 0)[::2],
    }[kind]
    assert not weight.is_contiguous()
    wide_bias = tensors[2].repeat_interleave(2)[::2]
    found = gradients([tensors[0], weight, wide_bias], labels)
    for a, b in zip(found, gradients(tensors, labels), strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


def test_labels_mask_and_upstream_gradients_of_any_strides(device: str) -> None:
    (hidden, weight, _), labels = make(device=device)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)).to(device) < 0.7
    hidden.requires_grad_()
    turned = [x.t().contiguous().t() for x in (labels, mask)]
    plain, strange = (linear_token_logps(hidden, weight, y, mask=m) for y, m in ((labels, mask), turned))
    assert torch.equal(plain, strange)
    upstream = torch.linspace(-2, 3, B, device=device)[:, None].expand(B, T)
    (a,) = torch.autograd.grad(plain, hidden, upstream)
    (b,) = torch.autograd.grad(strange, hidden, upstream.contiguous())
    assert torch.equal(a, b)
