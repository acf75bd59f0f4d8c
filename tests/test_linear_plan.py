"""The planner: what it promises of products and memory, budgets from one tile upwards, and the measured peak."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref import memory
from fastpref.linear import preference, tokens
from fastpref.linear.plan import CPU, GPU, MIB, Machine, Plan, Problem, minimum_budget, plan_preference, plan_tokens
from fastpref.linear.tokens import LinearTokenLogps, Request
from fastpref.tiled import Transform

AMD = replace(GPU, upcast=True)
FORCED = [None, "recompute", "two-pass"]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    operand = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rows = draw(st.integers(0, 100_000))
    return Problem(
        rows=rows,
        hidden_size=draw(st.integers(1, 9000)),
        vocab=draw(st.integers(1, 300_000)),
        operand=operand,
        hidden_dtype=draw(st.sampled_from([operand, torch.float32])),
        weight_dtype=draw(st.sampled_from([operand, torch.float32])),
        hidden=draw(st.booleans()),
        weight=draw(st.booleans()),
        softcap=draw(st.booleans()),
        largest_pair=draw(st.integers(0, rows)),
        pairs=draw(st.integers(1, 8)),
    )


def products_of_the_table(plan: Plan, problem: Problem) -> float:
    wanted = problem.hidden + problem.weight
    return {
        "forward": 1,
        "frozen": 2,
        "keep": 1 + wanted,
        "mixed": 1 + wanted + (1 - plan.kept / plan.slices),
        "recompute": 2 + wanted,
        "two-pass": 1 + 2 * wanted,  # each gradient from its logits again
        "stream": 3,
    }[plan.name]


def check(plan: Plan, problem: Problem, machine: Machine, budget: int) -> None:
    assert plan.peak <= budget
    assert plan.products == pytest.approx(products_of_the_table(plan, problem))
    assert 1 <= plan.row_block <= machine.rows
    assert 1 <= plan.columns <= machine.columns
    assert plan.slices == math.ceil(problem.vocab / plan.columns)
    assert 0 <= plan.kept <= plan.slices
    assert (plan.kept == plan.slices) == (plan.name in ("keep", "stream"))
    assert plan.dh_in_forward == (plan.name == "frozen")
    assert plan.name in plan.describe


# Once a plan of 2.6 times the budget.
WIDE = Problem(3469, 4096, 2, torch.bfloat16, torch.float32, torch.bfloat16, hidden=True, softcap=True)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), machine=st.sampled_from([CPU, GPU, AMD]), factor=st.floats(1, 3000))
@example(problem=WIDE, machine=GPU, factor=5.0)
@example(problem=replace(WIDE, rows=0, weight=True), machine=CPU, factor=1.0)
def test_the_modelled_peak_is_within_any_budget_that_holds_a_tile(
    problem: Problem, machine: Machine, factor: float
) -> None:
    budget = int(minimum_budget(problem, machine) * factor)
    for forced in FORCED:
        check(plan_tokens(problem, machine, budget, force=forced), problem, machine, budget)
    check(plan_preference(problem, machine, budget), problem, machine, budget)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), machine=st.sampled_from([CPU, GPU, AMD]), factor=st.floats(1, 3000), more=st.floats(1, 100))
def test_a_larger_budget_makes_no_more_products_unless_larger_tiles_take_it(
    problem: Problem, machine: Machine, factor: float, more: float
) -> None:
    budget = int(minimum_budget(problem, machine) * factor)
    small, large = (plan_tokens(problem, machine, b) for b in (budget, int(budget * more)))
    # What is left for keeping may be less beside larger tiles.
    if (large.row_block, large.columns) == (small.row_block, small.columns) or small.kept == 0:
        assert large.products <= small.products


@settings(max_examples=50, deadline=None)
@given(problem=problems(), machine=st.sampled_from([CPU, GPU]))
def test_the_least_budget_that_the_error_names_is_enough(problem: Problem, machine: Machine) -> None:
    low = minimum_budget(problem, machine)
    with pytest.raises(ValueError, match=rf"smaller than one tile .* give at least {low} bytes") as caught:
        plan_tokens(problem, machine, low - 1)
    assert f"for {problem.rows} scored rows, H={problem.hidden_size}, V={problem.vocab}" in str(caught.value)
    assert plan_tokens(problem, machine, low).peak <= low


HEADLINE = Problem(
    8192, 4096, 128256, torch.bfloat16, torch.bfloat16, torch.bfloat16, hidden=True, weight=True, largest_pair=8192
)


def test_the_plans_of_section_4_of_the_design() -> None:
    """8192 rows of an 8B model: 1, 2, 3 products with memory enough, and 3 at 32k tokens a pair by streaming."""
    frozen = replace(HEADLINE, weight=False)
    assert plan_tokens(replace(frozen, hidden=False), GPU, 1024 * MIB).products == 1
    assert plan_tokens(frozen, GPU, 1024 * MIB).products == 2
    assert plan_tokens(HEADLINE, GPU, 4096 * MIB).name == "keep"
    assert 3 < plan_tokens(HEADLINE, GPU, 1024 * MIB).products < 4
    long = replace(HEADLINE, rows=65536, largest_pair=65536, pairs=1)
    plan = plan_preference(long, GPU, 4096 * MIB)
    assert (plan.name, plan.products) == ("stream", 3)
    assert plan.peak < 4096 * MIB


def test_force_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"keeping every tile needs .* bytes, the budget is"):
        plan_tokens(HEADLINE, GPU, 1024 * MIB, force="keep")
    frozen = replace(HEADLINE, weight=False, rows=10**6)
    with pytest.raises(ValueError, match="the frozen plan does not fit"):
        plan_tokens(frozen, GPU, minimum_budget(frozen, GPU), force="frozen")
    with pytest.raises(ValueError, match="the stream plan needs a trainable head and a loss of one argument"):
        plan_preference(replace(HEADLINE, largest_pair=0), GPU, 1024 * MIB, force="stream")
    with pytest.raises(ValueError, match="the stream plan does not fit"):
        plan_preference(HEADLINE, GPU, 512 * MIB, force="stream")


# Budgets in use


def values_and_gradients(budget: int, loss: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 40, 16), (507, 16), (507,))
    leaves = [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    labels = torch.randint(507, (4, 40), generator=generator)
    labels[:2, :11] = -100
    seen: list[Plan] = []
    arguments: tuple[Any, ...] = (Transform(), torch.float64, budget, None, seen.append)
    if loss:
        monkeypatch.setattr(preference, "Request", lambda *_: Request(1, -100, *arguments))
        ref = torch.full((4,), -100.0, dtype=torch.float64)
        value = preference.linear_preference_loss(leaves[0], leaves[1], labels, ref, bias=leaves[2]).loss
    else:
        value = LinearTokenLogps.apply(*leaves, labels, None, Request(1, -100, *arguments))
    upstream = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape)
    return seen[0], [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


@pytest.mark.parametrize("loss", [False, True], ids=["log-probs", "loss"])
def test_every_budget_gives_the_same_numbers(loss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one tile to more than everything, over five plans; in float64, where only a mistake makes a difference."""
    # Traffic costs nothing, so that keeping and streaming pay at this H.
    machine = replace(CPU, rows=16, columns=48, min_rows=8, min_columns=16, balance=0.0)
    monkeypatch.setattr(tokens, "machine_of", lambda device: machine)
    problem = Problem(136, 16, 507, torch.float64, torch.float64, torch.float64, hidden=True, weight=True)
    low = minimum_budget(problem, machine)
    plans = set()
    _, wanted = values_and_gradients(2**30, loss, monkeypatch)
    for factor in (1, 1.1, 1.5, 2, 3, 5, 8, 12, 16, 25, 1e4):
        plan, found = values_and_gradients(int(low * factor), loss, monkeypatch)
        plans.add(plan.name)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert plans >= {"two-pass", "mixed", "keep"}
    assert "stream" in plans or not loss


# The measured peak

WORKER = """
import ctypes, gc, json, sys
libc = ctypes.CDLL(None)
assert libc.mallopt(-3, 65536) == 1 and libc.mallopt(-1, 65536) == 1  # freed memory goes back at once
import torch
torch.set_num_threads(1)
from fastpref import linear_preference_loss, linear_sequence_logps, memory
from fastpref.linear import preference
from fastpref.linear.tokens import Request

dtype, rows, H, V = getattr(torch, sys.argv[1]), 400, 256, 12000
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(2, rows, H, generator=generator).to(dtype)
weight = (torch.randn(V, H, generator=generator) / 16).to(dtype)
labels = torch.randint(V, (2, rows), generator=generator)
ref = torch.full((2,), -4000.0)

def call(kind, budget):
    with_gradient = [x.detach().requires_grad_(kind != "forward" and (i == 0 or kind != "frozen"))
                     for i, x in enumerate((hidden, weight))]
    if kind in ("loss", "stream"):
        preference.Request = lambda *asked: Request(*asked, "stream" if kind == "stream" else None)
        value = linear_preference_loss(*with_gradient, labels, ref, memory_budget=budget).loss
    else:
        value = linear_sequence_logps(*with_gradient, labels, memory_budget=budget)
    if value.requires_grad:
        value.sum().backward()
    return [x.grad for x in with_gradient if x.grad is not None]

peaks = []
for kind, budget in json.loads(sys.argv[2]):
    call(kind, budget)
    gc.collect()
    assert memory.reset_peak()
    before = memory.resident()
    gradients = call(kind, budget)
    peak = memory.peak() - before
    peaks.append(peak - sum(g.numel() * g.element_size() for g in gradients))
    del gradients
print(json.dumps(peaks))
"""
ALLOWANCE = 4 * MIB  # what libraries may hold of their own: packed operands of a product, threads


@pytest.mark.slow
@pytest.mark.skipif(not memory.reset_peak(), reason="the system keeps no peak of resident memory that can be reset")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_measured_peak_beyond_gradients_stays_under_the_budget(dtype: str) -> None:
    """800 rows against 12,000 × 256: the logits in float32 would be 37 MiB, the accumulator of a stream is 12 MiB."""
    cases = [(kind, budget * MIB) for kind in ("forward", "frozen", "trainable", "loss") for budget in (3, 16)]
    cases += [("trainable", 64 * MIB), ("stream", 24 * MIB), ("stream", 40 * MIB)]
    done = subprocess.run(
        [sys.executable, "-c", WORKER, dtype, json.dumps(cases)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for (kind, budget), peak in zip(cases, json.loads(done.stdout), strict=True):
        print(f"{kind}: {peak / MIB:.1f} MiB of {budget / MIB:.0f}")
        assert peak <= budget + ALLOWANCE, (kind, peak / MIB, budget / MIB)
