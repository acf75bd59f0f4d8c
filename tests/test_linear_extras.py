"""Entropy and the other extras of the linear path, and the entropy's gradient, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from acceptance import Triple, no_worse_than_eager
from helpers import slow_interpreted
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.extras import EXTRAS, TokenExtras
from fastpref.linear import plan as planning
from fastpref.linear import tokens
from fastpref.linear.tokens import LinearTokenLogps, Request
from fastpref.tiled import Transform

pytestmark = pytest.mark.numeric
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORM: dict[str, Any] = {"temperature": 1.3, "logit_scale": 2.0, "softcap": 5.0}


def make(
    dtype: torch.dtype, device: str, *, length: int = 9, shift: int = 1, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """[hidden, weight, bias] with logits of a standard deviation near 3, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, length, 16, generator=generator)
    weight = torch.randn(307, 16, generator=generator) * 0.75
    bias = torch.randn(307, generator=generator)
    tensors = [x.to(dtype).to(device) for x in (hidden, weight, bias)]
    labels = torch.randint(307, (3, length), generator=generator).to(device)
    # A third of the labels are the largest logit.
    labels[0, shift:] = F.linear(*(x.float() for x in tensors)).argmax(-1)[0, : length - shift]
    labels[1, :4] = -100
    return tensors, labels


def ours(tensors: Sequence[Tensor], labels: Tensor, **options: Any) -> tuple[Tensor, TokenExtras]:
    hidden, weight, *bias = tensors
    bias_of = bias[0] if bias else None
    return fastpref.linear_token_logps(hidden, weight, labels, bias=bias_of, extras=EXTRAS, **options)


def plain(tensors: Sequence[Tensor], labels: Tensor, dtype: torch.dtype, **options: Any) -> tuple[Tensor, TokenExtras]:
    logits = F.linear(*(x.to(dtype) for x in tensors))
    given: dict[str, Any] = {"dtype": dtype, **options}
    return reference.token_logps(logits, labels, **given), reference.token_extras(logits, labels, **given)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> planning.Machine:
    """Several blocks of rows and slices of the vocabulary, of which V is no multiple."""
    machine = replace(planning.CPU, rows=16, columns=96, min_rows=8, min_columns=48)
    monkeypatch.setattr(tokens, "machine_of", lambda device: machine)
    return machine


@pytest.mark.parametrize("options", [{}, TRANSFORM, {"shift": False}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@slow_interpreted
def test_extras_are_as_accurate_as_eager(
    dtype: torch.dtype, options: dict[str, Any], backend: str, device: str, small_tiles: Any
) -> None:
    length = 24 if backend == "torch" else 12

    def draw(seed: int) -> list[Triple]:
        tensors, labels = make(dtype, device, length=length, shift=options.get("shift", 1), seed=seed)
        values, found = ours(tensors, labels, **options)
        eager, truth = (plain(tensors, labels, kind, **options) for kind in (torch.float32, torch.float64))
        assert found.is_top1 is not None
        assert truth[1].is_top1 is not None
        assert found.is_top1.dtype == torch.bool
        assert torch.equal(found.is_top1, truth[1].is_top1)
        assert found.is_top1.sum() > length - 2
        triples = [(values, eager[0], truth[0])]
        for name in ("entropy", "mean_logits", "log_sum_sq_probs"):
            mine = getattr(found, name)
            assert (mine.dtype, mine.shape) == (torch.float32, labels.shape)
            triples.append((mine, getattr(eager[1], name), getattr(truth[1], name)))
        return triples

    no_worse_than_eager(draw, draws=4)


def test_what_is_not_asked_for_is_none_and_the_rest_and_the_values_are_unchanged(backend: str, device: str) -> None:
    tensors, labels = make(torch.float32, device)
    hidden, weight, bias = tensors
    values, everything = ours(tensors, labels)
    assert torch.equal(values, fastpref.linear_token_logps(hidden, weight, labels, bias=bias))
    for name in EXTRAS:
        again, found = fastpref.linear_token_logps(hidden, weight, labels, bias=bias, extras=[name])
        assert torch.equal(again, values)
        assert [key for key, value in found._asdict().items() if value is not None] == [name]
        assert torch.equal(getattr(found, name), getattr(everything, name))
        assert not getattr(found, name)[1, :4].any()


def test_sequences_append_lengths_and_extras_in_that_order(device: str) -> None:
    (hidden, weight, bias), labels = make(torch.float32, device)
    call: Any = fastpref.linear_sequence_logps
    values = call(hidden, weight, labels, bias=bias)
    with_extras = call(hidden, weight, labels, bias=bias, extras=("entropy",))
    with_both = call(hidden, weight, labels, bias=bias, extras=("entropy",), return_lengths=True)
    _, tokens_found = ours([hidden, weight, bias], labels)
    assert torch.equal(with_extras[0], values)
    assert torch.equal(with_both[0], values)
    assert torch.equal(with_both[1], (labels[:, 1:] != -100).sum(1))
    assert torch.equal(with_extras[1].entropy, tokens_found.entropy)
    assert torch.equal(with_both[2].entropy, tokens_found.entropy)
    packed = call(
        hidden.flatten(0, 1), weight, labels.flatten(), bias=bias, extras=("entropy",),
        cu_seqlens=torch.tensor([0, 9, 18, 27], device=device),
    )  # fmt: skip
    assert packed[1].entropy.shape == (27,)
    torch.testing.assert_close(packed[1].entropy.view(3, 9), tokens_found.entropy, rtol=1e-6, atol=1e-6)


def one_row(logits: Tensor, label: int, **options: Any) -> TokenExtras:
    """The extras of a row of given logits: hidden states of 1, and the logits as the head."""
    hidden, labels = torch.ones(1, 1, 1, device=logits.device), torch.tensor([[label]], device=logits.device)
    return ours([hidden, logits.unsqueeze(1)], labels, shift=False, **options)[1]


def test_a_confident_row_keeps_the_digits_of_its_entropy(backend: str, device: str, small_tiles: Any) -> None:
    """With q = Σ exp(z − z_y) over the others, 5e-15 here, p = 1 / (1 + q): 1.0 in float32, and nearly in float64."""
    lead = 38.0
    logits = torch.zeros(200, device=device)
    logits[7] = lead
    found = one_row(logits, 7)
    assert found.entropy is not None
    assert found.log_sum_sq_probs is not None
    q = 199 * math.exp(-lead)
    assert found.entropy.item() == pytest.approx(math.log1p(q) + lead * q / (1 + q), rel=1e-5)
    squares = 199 * math.exp(-2 * lead)
    assert found.log_sum_sq_probs.item() == pytest.approx(math.log1p(squares) - 2 * math.log1p(q), rel=1e-5)


def test_impossible_entries_add_nothing_and_make_no_nan(backend: str, device: str, small_tiles: Any) -> None:
    """A whole tile of −inf, first or last, and a label that is impossible; the mean is −inf, as the logits' is."""
    for empty in (slice(0, 100), slice(110, 200)):
        logits = torch.linspace(-3, 3, 200, device=device)
        logits[empty] = -torch.inf
        for label in (105, 0 if empty.start == 0 else 199):
            found = one_row(logits, label)
            truth = reference.token_extras(
                logits.double()[None, None], torch.tensor([[label]], device=device), shift=False, dtype=torch.float64
            )
            for mine, exact in zip(found, truth, strict=True):
                assert mine is not None
                torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-6, atol=1e-6)


def test_equal_logits_are_all_top_and_of_entropy_log_v(backend: str, device: str, small_tiles: Any) -> None:
    for value in (-1e4, 0.0, 1e4):
        found = one_row(torch.full((200,), value, device=device), 150)
        assert found.is_top1 is not None
        assert found.is_top1.item()
        assert found.mean_logits is not None
        assert found.mean_logits.item() == value
        for each, wanted in ((found.entropy, math.log(200)), (found.log_sum_sq_probs, -math.log(200))):
            assert each is not None
            assert each.item() == pytest.approx(wanted, rel=3e-7)


def test_one_entry_has_no_entropy(backend: str, device: str) -> None:
    found = one_row(torch.tensor([2.5], device=device), 0)
    assert [x.item() for x in found if x is not None] == [0.0, 2.5, True, 0.0]


def test_extras_are_constants_unless_the_entropys_gradient_is_asked_for(device: str) -> None:
    tensors, labels = make(torch.float32, device)
    leaves = [x.requires_grad_() for x in tensors]
    values, found = ours(leaves, labels)
    assert values.requires_grad
    assert not any(x.requires_grad for x in found if x is not None)
    _, found = ours(leaves, labels, entropy_grad=True)
    assert [x.requires_grad for x in found if x is not None] == [True, False, False, False]


# The entropy's gradient


def request(plan: str | None, seen: list[planning.Plan], dtype: torch.dtype, **more: Any) -> Request:
    return Request(1, -100, Transform(*more.pop("transform", ())), dtype, 2**30, plan, seen.append, **more)


def bonus(values: Tensor, entropy: Tensor) -> Tensor:
    """Upstream gradients of either sign for both."""
    weights = torch.linspace(-1.5, 2, values.numel(), device=values.device, dtype=values.dtype).view(values.shape)
    return (values * weights).sum() + (entropy * weights.flip(0)).sum()


@pytest.mark.parametrize("wanted", [1, 3], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("plan", ["recompute", "two-pass", None])
@pytest.mark.parametrize("transform", [(), (1.3, 2.0, 5.0)], ids=["plain", "softcap"])
def test_every_plan_has_the_entropys_gradient_in_float64(
    transform: tuple[float, ...], plan: str | None, wanted: int, device: str, small_tiles: Any
) -> None:
    """No plan keeps tiles or gathers dh beside the logsumexp; upstream gradients for log-probs and for entropies."""
    tensors, labels = make(torch.float64, device)
    seen: list[planning.Plan] = []
    asked = request(plan, seen, torch.float64, transform=transform, extras=("entropy",), entropy_grad=True)
    named = dict(zip(("temperature", "logit_scale", "softcap"), transform, strict=False))
    leaves, exact = ([x.clone().requires_grad_(i < wanted) for i, x in enumerate(tensors)] for _ in range(2))
    values, entropy, *_ = LinearTokenLogps.apply(*leaves, labels, None, asked)
    true_values, true = plain(exact, labels, torch.float64, **named)
    assert true.entropy is not None
    found = torch.autograd.grad(bonus(values, entropy), leaves[:wanted])
    truth = torch.autograd.grad(bonus(true_values, true.entropy), exact[:wanted])
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (seen[0].kept, seen[0].dh_in_forward) == (0, False)
    assert seen[0].slices > 1
    assert seen[0].products == {"two-pass": 1 + 2 * min(wanted, 2)}.get(plan or "", 2 + min(wanted, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@slow_interpreted
def test_the_entropys_gradient_is_as_accurate_as_eager(
    dtype: torch.dtype, backend: str, device: str, small_tiles: Any
) -> None:
    def gradients(
        call: Callable[..., tuple[Tensor, TokenExtras]], tensors: Sequence[Tensor], labels: Tensor, *more: Any
    ) -> Sequence[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        values, found = call(leaves, labels, *more, **TRANSFORM)
        assert found.entropy is not None
        return torch.autograd.grad(bonus(torch.zeros_like(values), found.entropy), leaves)

    def draw(seed: int) -> list[Triple]:
        tensors, labels = make(dtype, device, length=20 if backend == "torch" else 6, seed=seed)
        mine = gradients(partial(ours, entropy_grad=True), tensors, labels)
        eager = gradients(plain, tensors, labels, torch.float32)
        truth = gradients(plain, [x.double() for x in tensors], labels, torch.float64)
        return list(zip(mine, eager, truth, strict=True))

    no_worse_than_eager(draw, draws=4 if backend == "torch" else 2)


@pytest.mark.parametrize("used", ["entropy", "log-probs"])
def test_either_upstream_gradient_may_be_missing(used: str, device: str) -> None:
    tensors, labels = make(torch.float32, device)
    leaves, exact = [x.clone().requires_grad_() for x in tensors], [x.double().requires_grad_() for x in tensors]
    values, found = ours(leaves, labels, entropy_grad=True)
    true_values, true = plain(exact, labels, torch.float64)
    mine, wanted = (values, true_values) if used == "log-probs" else (found.entropy, true.entropy)
    assert mine is not None
    assert wanted is not None
    for a, b in zip(torch.autograd.grad(mine.sum(), leaves), torch.autograd.grad(wanted.sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6 * b.abs().max().item())


def test_impossible_entries_have_no_gradient_and_make_no_nan(backend: str, device: str) -> None:
    bias = torch.linspace(-2, 2, 150, device=device)
    bias[::3] = -torch.inf
    hidden, weight = torch.randn(1, 4, 5, device=device), torch.randn(150, 5, device=device)
    labels = torch.tensor([[1, 2, 0, 4]], device=device)  # 0 is impossible

    def gradients(x: Tensor, w: Tensor) -> Sequence[Tensor]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        _, found = ours([x, w, bias.to(x.dtype)], labels, shift=False, entropy_grad=True)
        assert found.entropy is not None
        return torch.autograd.grad(found.entropy.sum(), (x, w))

    kept = bias > -torch.inf
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = F.linear(x, w[kept], bias[kept].double()).log_softmax(-1)
    truth = torch.autograd.grad(-(log_p.exp() * log_p).sum(), (x, w))
    for a, b in zip(gradients(hidden, weight), truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6 * b.abs().max().item())


def test_a_second_derivative_of_the_entropy_raises(device: str) -> None:
    tensors, labels = make(torch.float32, device)
    tensors[0].requires_grad_()
    _, found = ours(tensors, labels, entropy_grad=True)
    assert found.entropy is not None
    (grad,) = torch.autograd.grad(found.entropy.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("plan", ["keep", "frozen", "mixed"])
def test_a_plan_without_logits_in_the_backward_refuses_the_entropys_gradient(plan: str, device: str) -> None:
    tensors, labels = make(torch.float32, device)
    leaves = [x.requires_grad_(i == 0) for i, x in enumerate(tensors)]
    asked = request(plan, [], torch.float32, extras=("entropy",), entropy_grad=True)
    with pytest.raises(ValueError, match=f"the {plan} plan has no gradient of entropies"):
        LinearTokenLogps.apply(*leaves, labels, None, asked)


# torch.compile


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_compiled_without_graph_breaks_is_eager(entropy_grad: bool, device: str) -> None:
    torch.compiler.reset()
    tensors, labels = make(torch.float32, device)

    def call(*leaves: Tensor) -> Any:
        return ours(leaves, labels, entropy_grad=entropy_grad, softcap=5.0)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        values, found = function(*leaves)
        assert [x.requires_grad for x in found] == [entropy_grad, False, False, False]
        gradients = torch.autograd.grad(bonus(values, found.entropy), leaves)
        results.append([values.detach(), *(x.detach().float() for x in found), *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * b.abs().max().item())


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"extras": "entropy"}, TypeError, "extras must be a sequence of names"),
        ({"extras": ("entropy", "mean")}, ValueError, "extras must be one of entropy, is_top1,"),
        ({"extras": ("is_top1",), "entropy_grad": True}, ValueError, 'entropy_grad=True needs "entropy" among extras'),
        ({"entropy_grad": 1}, TypeError, "entropy_grad must be True or False, got 1"),
    ],
    ids=str,
)
def test_bad_extras_say_what_is_wanted(options: dict[str, Any], error: type[Exception], message: str) -> None:
    (hidden, weight, _), labels = make(torch.float32, "cpu")
    for function in (fastpref.linear_token_logps, fastpref.linear_sequence_logps):
        with pytest.raises(error, match=message):
            function(hidden, weight, labels, **options)
