"""Accuracy of every plan of the linear path against float64, and extreme and special values.

`way` is how a device works: a CPU widens operands to float32, a GPU multiplies 16-bit tiles; the latter runs here on
whatever device there is. Tiles are small, and V is a multiple of none, so that several blocks and slices happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from acceptance import Triple, no_worse_than_eager
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.linear import plan as planning
from fastpref.linear import tokens
from fastpref.linear.tokens import LinearTokenLogps, Request
from fastpref.tiled import Transform

pytestmark = pytest.mark.numeric
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLANS = ["frozen", "keep", "mixed", "recompute", "two-pass"]
ALIGNED: dict[str, Any] = {"shift": False}


def make(
    dtype: torch.dtype, device: str, *, rows: int = 43, hidden_size: int = 16, vocab: int = 507, seed: int = 0
) -> list[Tensor]:
    """[hidden, weight, bias, labels]: logits of a standard deviation near 3."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, rows, hidden_size, generator=generator)
    weight = torch.randn(vocab, hidden_size, generator=generator) * (3 / hidden_size**0.5)
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(vocab, (1, rows), generator=generator).to(device)
    return [*(x.to(dtype).to(device) for x in (hidden, weight, bias)), labels]


def plain(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The whole of the logits in `dtype`, from the same rounded inputs."""

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden.to(dtype), weight.to(dtype), bias.to(dtype))
        return reference.token_logps(logits, labels, shift=False, dtype=dtype)

    return call


def linear(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return fastpref.linear_token_logps(hidden, weight, labels, bias=bias, shift=False)


def run(function: Callable[..., Tensor], tensors: Sequence[Tensor], wanted: int = 3) -> list[Tensor]:
    """Values, and the gradients of the first `wanted` of hidden, weight and bias, for upstream values of any sign."""
    *inputs, labels = tensors
    leaves = [x.detach().clone().requires_grad_(i < wanted) for i, x in enumerate(inputs)]
    value = function(*leaves, labels)
    upstream = torch.linspace(-1.5, 2.0, value.numel(), device=value.device, dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves[:wanted], upstream)]


def check(
    plan: str, dtype: torch.dtype, machine: planning.Machine, make: Callable[[int], list[Tensor]], draws: int
) -> None:
    """Values and gradients of a plan, for the inputs that `make` makes of a seed."""
    wanted = 1 if plan == "frozen" else 3

    def draw(seed: int) -> list[Triple]:
        tensors = make(seed)
        exact = [*(x.double() for x in tensors[:3]), tensors[3]]
        mine = run(forced(plan, dtype, machine), tensors, wanted)
        eager, truth = run(plain(torch.float32), tensors, wanted), run(plain(torch.float64), exact, wanted)
        return list(zip(mine, eager, truth, strict=True))

    no_worse_than_eager(draw, draws)


@pytest.fixture
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> planning.Machine:
    machine = getattr(planning, request.param.upper())
    machine = replace(machine, rows=16, columns=96, min_rows=8, min_columns=48)
    monkeypatch.setattr(tokens, "machine_of", lambda device: machine)
    return machine


def forced(plan: str, dtype: torch.dtype, machine: planning.Machine) -> Callable[..., Tensor]:
    """The function of a plan, which it checks to be the one that is taken."""

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        budget = 2**30
        seen: list[planning.Plan] = []
        if plan == "mixed":
            problem = planning.Problem(
                labels.numel(), hidden.shape[-1], len(weight), dtype, dtype, dtype, hidden=True, weight=True
            )
            budget = planning.plan_tokens(problem, machine, 2**30, force="recompute").peak + 2 * labels.numel() * (
                machine.columns * dtype.itemsize + 4
            )
        force = None if plan == "frozen" else plan  # "mixed" is forced by the budget: it keeps what fits
        request = Request(0, -100, Transform(), dtype, budget, force, seen.append)
        value = LinearTokenLogps.apply(hidden, weight, bias, labels, None, request)
        assert seen[0].name == plan
        assert seen[0].slices > 1
        assert (seen[0].kept == 2) == (plan == "mixed")
        return value

    return call


@pytest.mark.parametrize("small_tiles", ["cpu", "gpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_as_accurate_as_eager(
    plan: str, dtype: torch.dtype, small_tiles: planning.Machine, device: str
) -> None:
    check(plan, dtype, small_tiles, lambda seed: make(dtype, device, rows=211, seed=seed), draws=2)


@pytest.mark.parametrize("small_tiles", ["gpu"], indirect=True)
@pytest.mark.parametrize("plan", PLANS)
def test_the_kernels_drive_every_plan(plan: str, small_tiles: planning.Machine, backend: str, device: str) -> None:
    dtype = torch.bfloat16
    check(plan, dtype, small_tiles, lambda seed: make(dtype, device, rows=23, vocab=255, seed=seed), draws=2)


def confident(p: float, dtype: torch.dtype, device: str, *, seed: int = 0) -> list[Tensor]:
    """Rows whose label has the probability p, or near to it: the head's row of the label points along them."""
    hidden, weight, bias, labels = make(dtype, device, rows=64, seed=seed)
    labels[:] = 7
    hidden = hidden.float()
    direction = F.normalize(torch.ones(hidden.shape[-1], device=device), dim=0)
    hidden = hidden - (hidden @ direction).unsqueeze(-1) * direction  # all rows alike along the direction: 4
    hidden = hidden + 4 * direction
    others = torch.cat([weight[:7], weight[8:]]).float()
    rest = torch.cat([bias[:7], bias[8:]]).float()
    scores = (hidden @ others.t() + rest).logsumexp(-1)
    weight[7] = (direction * (scores.mean() + math.log(p / (1 - p)) - bias[7].float()) / 4).to(dtype)
    return [hidden.to(dtype), weight, bias, labels]


@pytest.mark.parametrize("small_tiles", ["cpu", "gpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.999, 0.999999])
@pytest.mark.parametrize("plan", PLANS)
def test_confident_rows_keep_their_gradient(
    plan: str, p: float, dtype: torch.dtype, small_tiles: planning.Machine, device: str
) -> None:
    """1 − p is a sum of the others: a difference of numbers near 1 has no digits left at p = 0.999999."""

    def make_confident(seed: int) -> list[Tensor]:
        tensors = confident(p, dtype, device, seed=seed)
        assert -plain(torch.float64)(*tensors).max() < 3 * (1 - p)
        return tensors

    check(plan, dtype, small_tiles, make_confident, draws=4)


@pytest.mark.parametrize("small_tiles", ["cpu"], indirect=True)
@pytest.mark.parametrize("plan", PLANS)
def test_digits_beside_1_survive(plan: str, small_tiles: planning.Machine, device: str) -> None:
    """At p = 0.999999 log p and 1 − p are right to five digits; p itself, or its norm, has one left in float32."""
    tensors = confident(0.999999, torch.float32, device)
    exact = [*(x.double() for x in tensors[:3]), tensors[3]]
    wanted = 1 if plan == "frozen" else 3
    mine, truth = (
        run(forced(plan, torch.float32, small_tiles), tensors, wanted),
        run(plain(torch.float64), exact, wanted),
    )
    torch.testing.assert_close(mine[0].double(), truth[0], rtol=1e-5, atol=0)
    for a, b in zip(mine[1:], truth[1:], strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_sum_is_as_good_as_float64(dtype: torch.dtype, backend: str, device: str) -> None:
    """2,000 tokens (fewer where a kernel is interpreted): relative error of the sum below 1e-6, asked for is 1e-5."""
    rows = 200 if backend == "triton" and device == "cpu" else 2000
    hidden, weight, bias, labels = make(dtype, device, rows=rows, vocab=255)
    value = fastpref.linear_sequence_logps(hidden, weight, labels, bias=bias, **ALIGNED)
    assert isinstance(value, Tensor)
    exact = plain(torch.float64)(hidden, weight, bias, labels).sum()
    assert abs(value.item() / exact.item() - 1) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(dtype: torch.dtype, backend: str, device: str) -> None:
    """±1e4: the winner takes all, without overflow."""
    hidden = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]], dtype=dtype, device=device)
    logits = [[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]]
    weight = torch.tensor(logits, dtype=dtype, device=device).t().contiguous()
    tensors = [hidden, weight, torch.zeros(3, dtype=dtype, device=device), torch.tensor([[0, 1, 2, 1]], device=device)]
    mine = run(linear, tensors)
    truth = run(plain(torch.float64), [*(x.double() for x in tensors[:3]), tensors[3]])
    torch.testing.assert_close(mine[0].double(), truth[0], rtol=1e-6, atol=0)
    rounded = 2e-7 * 1e4  # of products with the weight: where they cancel, float32 leaves that
    for a, b, atol in zip(mine[1:], truth[1:], (rounded, 1e-6, 1e-6), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4 * torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("vocab", [1, 2, 5000])
def test_rows_of_equal_logits(vocab: int, backend: str, device: str) -> None:
    """The gradient of hidden is 0, a sum of terms that all round the same way: as far from it as eager's."""

    def draw(seed: int) -> list[Triple]:
        size = vocab + seed * (vocab > 2)
        hidden = torch.ones(1, 1, 2, device=device)
        weight, bias = torch.full((size, 2), -1.625, device=device), torch.zeros(size, device=device)
        tensors = [hidden, weight, bias, torch.zeros(1, 1, dtype=torch.long, device=device)]
        value, dh, _, db = run(linear, tensors)
        assert value.item() == pytest.approx(-math.log(size), rel=1e-6, abs=0)
        assert db[0].item() / -1.5 == pytest.approx(1 - 1 / size, rel=1e-6, abs=0)  # the upstream value is −1.5
        eager = run(plain(torch.float32), tensors)[1]
        return [(dh, eager, torch.zeros_like(dh, dtype=torch.float64))]

    no_worse_than_eager(draw, draws=2)


@pytest.mark.parametrize("wanted", [1, 3], ids=["frozen", "trainable"])
def test_a_label_at_minus_infinity_scores_that_with_a_finite_gradient(wanted: int, backend: str, device: str) -> None:
    tensors = make(torch.float32, device, rows=9)
    tensors[2][40:90] = -math.inf
    tensors[3][0, 4] = 44
    tensors[3][0, 5] = 3
    mine = run(linear, tensors, wanted)
    truth = run(plain(torch.float64), [*(x.double() for x in tensors[:3]), tensors[3]], wanted)
    assert mine[0][0, 4] == -math.inf
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(x).all() for x in mine[1:])


@pytest.mark.parametrize("small_tiles", ["cpu", "gpu"], indirect=True)
@pytest.mark.parametrize("plan", PLANS)
def test_slices_of_minus_infinity_make_no_nan(plan: str, small_tiles: planning.Machine, device: str) -> None:
    """The first slices, and the last, are all −inf."""

    def make_cut(seed: int) -> list[Tensor]:
        tensors = make(torch.float32, device, seed=seed)
        tensors[2][:200] = tensors[2][460:] = -math.inf
        tensors[3].remainder_(260).add_(200)
        return tensors

    check(plan, torch.float32, small_tiles, make_cut, draws=4)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_what_is_scored_and_not_finite_is_seen(special: float, backend: str, device: str) -> None:
    """A hidden row that is NaN or infinite gives NaN for its token, and for no other."""
    tensors = make(torch.float32, device, rows=9)
    tensors[0][0, 3] = special
    value = linear(*tensors)
    assert torch.isnan(value[0, 3])
    others = torch.cat([value[0, :3], value[0, 4:]])
    assert torch.isfinite(others).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("small_tiles", ["cpu", "gpu"], indirect=True)
@pytest.mark.parametrize("wanted", [1, 3], ids=["frozen", "trainable"])
def test_rows_that_are_not_scored_are_not_read(
    wanted: int, small_tiles: planning.Machine, poison: float, device: str
) -> None:
    """NaN or infinity in an ignored, masked or last row reaches neither a value nor any gradient."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 6, 16, generator=generator).to(device)
    weight = torch.randn(77, 16, generator=generator).to(device)
    labels = torch.randint(77, (2, 6), generator=generator).to(device)
    labels[0, 2] = -100
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[1, 4] = False

    def score(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return fastpref.linear_token_logps(hidden, weight, labels, mask=mask)

    poisoned = hidden.clone()
    for sequence, t in ((0, 1), (1, 3), (0, 5), (1, 5)):  # each predicts the label after it; the last predicts none
        poisoned[sequence, t] = poison
    clean = run(score, [hidden, weight, labels], min(wanted, 2))
    found = run(score, [poisoned, weight, labels], min(wanted, 2))
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)
    assert (found[1][0, 1] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("factor", [1e-7, 1e4])
@pytest.mark.parametrize("small_tiles", ["gpu"], indirect=True)
@pytest.mark.parametrize("plan", ["keep", "recompute", "two-pass"])
def test_upstream_values_of_any_size_survive_float16_tiles(
    plan: str, factor: float, temperature: float, small_tiles: planning.Machine, device: str
) -> None:
    """As autocast to float16 has it: float32 in and out, float16 between. Too small or too large for float16 alone."""
    *inputs, labels = make(torch.float16, device)
    tensors = [*(x.float() for x in inputs), labels]
    request = Request(0, -100, Transform(temperature), torch.float16, 2**30, plan)

    def mine(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return LinearTokenLogps.apply(hidden, weight, bias, labels, None, request) * factor

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        logps = reference.token_logps(logits, labels, shift=False, temperature=temperature, dtype=torch.float64)
        return logps * factor

    truth = run(exact, [*(x.double() for x in inputs), labels])
    for a, b in zip(run(mine, tensors)[1:], truth[1:], strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 2**-10 * b.norm()
