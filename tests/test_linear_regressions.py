"""What went wrong once on the linear path, and where no other test looks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastpref
from fastpref.linear import plan as planner
from fastpref.linear import preference, products, tokens
from fastpref.linear.rows import find_rows
from fastpref.linear.tokens import LinearTokenLogps, Request
from fastpref.tiled import Transform


@pytest.mark.parametrize("upcast", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("plan", ["keep", "recompute", "two-pass", "frozen"])
def test_float16_keeps_the_gradient_of_a_vocabulary_far_below_its_maximum(
    plan: str, upcast: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp(−18) is below what float16 can hold; a loss scale that comes afterwards could not bring it back."""
    monkeypatch.setattr(tokens, "machine_of", lambda _: replace(planner.CPU, upcast=upcast, columns=64, rows=64))
    vocab = 300
    hidden = torch.ones(1, 1, 8, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(vocab, 8, dtype=torch.float16)
    weight[7] = 18 / 8  # one competitor far above a flat tail
    weight[20:, 0], weight[20:, 1] = 0.5, -0.5  # equal logits, but seen in dh
    weight.requires_grad_(plan != "frozen")
    labels = torch.tensor([[3]])
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    request = Request(0, -100, Transform(), torch.float16, 2**30, plan)
    values = LinearTokenLogps.apply(hidden, weight, None, labels, None, request)
    scale = 16384.0
    found = torch.autograd.grad(values, wanted, torch.full_like(values, scale))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = F.linear(*exact).log_softmax(-1)[..., 3]
    want = torch.autograd.grad(truth, exact[: len(wanted)], torch.full_like(truth, scale))
    if plan != "frozen":
        assert want[1][100, 0].abs() > 1e-4, "the case must be one where the tail counts"
        torch.testing.assert_close(found[1][100:].double(), want[1][100:], rtol=4e-3, atol=0)
    torch.testing.assert_close(found[0].double(), want[0], rtol=2e-3, atol=2e-3 * want[0].abs().max().item())


def test_streaming_decides_the_kink_of_dpop_as_the_loss_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """At π = ref a difference in float64 has a sign where the loss, in float32, sees 0."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(83, 8, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(83, (2, 9), generator=generator)
    ref = fastpref.linear_sequence_logps(hidden, weight, labels).detach()
    found = {}
    for plan in ("recompute", "stream"):

        def forced(*fields: object, plan: str = plan) -> Request:
            return Request(*fields, plan)

        monkeypatch.setattr(preference, "Request", forced)
        out = fastpref.linear_preference_loss(hidden, weight, labels, ref, loss="dpop", lam=5.0)
        found[plan] = torch.autograd.grad(out.loss, (hidden, weight))
    for a, b in zip(found["stream"], found["recompute"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_callable_that_reads_a_parameter_raises_though_nothing_else_is_trained() -> None:
    beta = torch.nn.Parameter(torch.tensor(0.1))
    hidden, weight = torch.randn(2, 5, 4), torch.randn(11, 4)
    labels = torch.randint(11, (2, 5))

    def loss(chosen, rejected, *_):
        return -F.logsigmoid(beta * (chosen - rejected))

    with pytest.raises(ValueError, match="reads a float32 tensor of shape"):
        fastpref.linear_preference_loss(hidden, weight, labels, loss=loss)
    with torch.no_grad():
        assert not fastpref.linear_preference_loss(hidden, weight, labels, loss=loss).loss.requires_grad


@pytest.mark.parametrize("offsets", [[0, 12, 10], [0, -3, 10], [1, 5, 10], [0, 5, 9]], ids=str)
def test_offsets_that_nobody_has_looked_at_are_refused_with_the_one_look_at_the_rows(offsets: list[int]) -> None:
    """On a GPU they arrive unchecked."""
    labels = torch.arange(10)[None]
    with pytest.raises(ValueError, match="cu_seqlens must begin with 0, never decrease and end with N_total = 10"):
        find_rows(labels, None, 0, -100, 11, torch.tensor(offsets))


def test_many_blocks_take_the_memory_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of hidden rows and of dh have one buffer each: all that is allocated stays under the plan's peak."""
    machine = replace(planner.CPU, rows=64, min_rows=64, columns=256)
    monkeypatch.setattr(tokens, "machine_of", lambda _: machine)
    hidden = torch.randn(2, 400, 2048).bfloat16().requires_grad_()
    weight = torch.randn(300, 2048).bfloat16()
    labels = torch.randint(300, (2, 400))
    labels[:, ::3] = -100
    plans: list[planner.Plan] = []
    request = Request(0, -100, Transform(), torch.bfloat16, 2**30, "frozen", plans.append)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        LinearTokenLogps.apply(hidden, weight, None, labels, None, request)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= plans[0].peak + 2**16


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_float8_is_refused(name: str) -> None:
    tensors = {"hidden": torch.randn(1, 3, 4), "weight": torch.randn(7, 4)}
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="must have 16 bits or more"):
        fastpref.linear_token_logps(tensors["hidden"], tensors["weight"], torch.zeros(1, 3, dtype=torch.long))


def test_a_callable_that_returns_integers_and_an_empty_reduction_are_refused() -> None:
    hidden, weight, labels = torch.randn(2, 5, 4), torch.randn(11, 4), torch.randint(11, (2, 5))
    with pytest.raises(ValueError, match="a floating-point dtype is needed"):
        fastpref.linear_preference_loss(hidden, weight, labels, loss=lambda c, *_: (c > 0).int())
    with pytest.raises(ValueError, match="reduction must be one of mean, sum"):
        fastpref.linear_preference_loss(hidden, weight, labels, reduction="", loss="simpo")


@pytest.mark.numeric
def test_what_the_process_allows_float32_products_does_not_reach_a_float32_head() -> None:
    """Nor is the setting another one afterwards. (On a CPU it reaches products where there are bfloat16 units.)"""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 33, 64, generator=generator), torch.randn(83, 64, generator=generator)
    labels = torch.randint(83, (2, 33), generator=generator)

    def values_and_gradients() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        values = fastpref.linear_token_logps(*leaves, labels)
        return [values, *torch.autograd.grad(values.sum(), leaves)]

    before, expected = torch.get_float32_matmul_precision(), values_and_gradients()
    try:
        torch.set_float32_matmul_precision("medium")
        found = values_and_gradients()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("fuses", [True, False])
def test_a_torch_that_cannot_add_a_product_to_wider_sums_takes_two_steps(
    fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: torch's operators are replaced by ones that take `out_dtype` on this device."""
    plain = {"mm": torch.mm, "addmm": torch.addmm}

    def mm(
        a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return plain["mm"](a.to(out_dtype), b.to(out_dtype), out=out)

    def addmm(
        add: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype, out: torch.Tensor
    ) -> torch.Tensor:
        if not fuses:
            raise RuntimeError("self.dtype() must be that of the operands")
        return plain["addmm"](add, a.to(out_dtype), b.to(out_dtype), out=out)

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    products.adds_wider.cache_clear()
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    try:
        a = torch.randn(5, 7).bfloat16()
        out = torch.ones(5, 3)
        b = torch.randn(7, 3).bfloat16()
        products.multiply(a.as_subclass(OnGpu), b, out, add=True)
        assert products.adds_wider(a.device, a.dtype) is fuses
        torch.testing.assert_close(out, 1 + a.float() @ b.float(), rtol=1e-6, atol=1e-6)
    finally:
        products.adds_wider.cache_clear()
