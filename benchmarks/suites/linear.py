"""A DPO loss from hidden states and the head's weight, beside the matrix products that nobody gets around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import DTYPES, LinearCase, linear_cases
from ..inputs import make_linear
from ..measure import Timer, copies_needed
from ..providers.base import Provider
from .base import Inputs, Output, Suite, beside
from .linear_truth import LinearTruth

# What goes through torch.compile alone: of no use where the shape would be compiled for longer than it runs.
_COMPILED = ("compiled", "cut_cross_entropy_compile")
# After "products", which is no way to the loss but its floor. On two cores torch's own options for
# linear_cross_entropy take 100 s a call, ten times the tuned ones.
BESIDE = beside("linear")
# Without gradients: what the reference's log-probs cost. In the cases that have "all" or "most" beside fastpref, which
# are also those where the memory of the slow ones is measured on a CPU: it is a call more, and much the same elsewhere.
FORWARD = ("products", "fastpref_logps", "extras", "plain")
THOROUGH = ("all", "most", "lengths")
# The products are tried on so much of the vocabulary before they are timed.
TRIAL_VOCAB = 32768


class LinearSuite(Suite):
    name = "linear"
    case_type = LinearCase
    limit = "the matrix products alone"
    limit_provider = "products"
    work_unit = "FLOP"
    shape = ("batch", "length", "hidden", "vocab", "share", "dtype", "scored_rows", "frozen", "budget")
    limit_shape = shape[:-1]  # the budget is fastpref's alone
    gradient_names = ("hidden", "weight")
    extra = {"products": None, "products_dtype": None, "products_width": None}  # noqa: RUF012 (a ClassVar)

    def __init__(self, providers: Sequence[Provider]) -> None:
        floor = Provider("products", lambda *_: None, "limit", "the same matrix products, nothing between them")
        super().__init__([floor, *providers])
        self.ways: dict[tuple[Any, ...], tuple[torch.dtype, int]] = {}

    def cases(self, device_class: str, *, memory: int) -> list[LinearCase]:
        return linear_cases(device_class)

    def entries(self, case: LinearCase, device_class: str) -> list[tuple[str, str]]:
        beside = [name for name in BESIDE[case.beside] if case.compiled or name not in _COMPILED]
        if case.beside != "none":  # what stands alone has its limit from a case of the same shape, where there is one
            beside.insert(0, "products")
        forward = [(name, "forward") for name in FORWARD if case.beside in ("all", "most")]
        return [*((name, "train") for name in beside), *forward]

    def load(self, case: LinearCase, device: str, *, truth: bool) -> Inputs:
        if not truth:  # the reference's log-probs change values, not time or memory
            hidden, weight, labels = make_linear(case, device, 0)
            return Inputs([[hidden, weight, labels, torch.zeros(case.batch, device=device)]], None)
        itemsize = DTYPES[case.dtype].itemsize
        size = (case.vocab + case.batch * case.length) * case.hidden * itemsize
        sets = []
        for seed in range(copies_needed(size)):
            hidden, weight, labels = make_linear(case, device, seed)
            if seed == 0:
                first = LinearTruth.of(case, hidden, weight, labels)
            sets.append([hidden, weight, labels, first.ref_logps])
        return Inputs(sets, first)

    def prepare(self, case: LinearCase, provider: str, mode: str, inputs: Inputs, device: str) -> None:
        if provider == "products":
            self.ways[_key(case, mode)] = _fastest_way(case, mode, inputs.sets[0], device)
            return
        # A call on a few rows: it imports what takes seconds and 150 MiB, and compiles nothing.
        small = replace(case, length=9, hidden=32, vocab=64, pairs=1, share=1.0, compiled=False)
        if not self.providers[provider].compiles:
            self.call(small, provider, mode, self.load(small, device, truth=False).sets[0])

    def call(self, case: LinearCase, provider: str, mode: str, inputs: list[Any]) -> Output:
        hidden, weight, labels, ref_logps = inputs
        if provider == "products":
            rows = hidden.detach()[:, :-1][labels[:, 1:] != -100]
            products(case, mode, *self.ways[_key(case, mode)], rows, weight.detach())
            return Output(None, [])
        function = self.providers[provider].call
        if mode == "forward":
            with torch.no_grad():
                return Output(function(hidden.detach(), weight.detach(), labels, ref_logps, case), [])
        loss = function(hidden, weight, labels, ref_logps, case)
        return Output(loss.detach(), list(torch.autograd.grad(loss, [hidden] if case.frozen else [hidden, weight])))

    def errors(self, case: LinearCase, truth: LinearTruth, output: Output) -> dict[str, Any]:
        return {} if output.value is None else truth.errors(output.value, output.gradients)

    def work(self, case: LinearCase, mode: str) -> int:
        return case.products(mode) * case.unit_operations

    def weighs(self, case: LinearCase, provider: str, device: str) -> bool:
        slow = self.providers[provider].slow and device == "cpu"
        return provider != "products" and (not slow or case.beside in THOROUGH)

    def facts(self, case: LinearCase, provider: str, mode: str, median_ms: float) -> dict[str, Any]:
        facts: dict[str, Any] = {"products": case.products(mode)}
        if provider == "products":
            dtype, width = self.ways[_key(case, mode)]
            facts |= {"products_dtype": str(dtype).removeprefix("torch."), "products_width": width}
        return facts


def _key(case: LinearCase, mode: str) -> tuple[Any, ...]:
    return (*(getattr(case, field) for field in LinearSuite.limit_shape), mode)


def _ways(case: LinearCase, device: str) -> list[tuple[torch.dtype, int]]:
    """Dtypes and widths of vocabulary slices in which the products alone are tried; the fastest of them counts."""
    dtype = DTYPES[case.dtype]
    if device != "cpu":
        return [(dtype, case.vocab), (dtype, 16384)]
    return [(dtype, 4096), (torch.float32, 4096)] if dtype != torch.float32 else [(dtype, 4096), (dtype, case.vocab)]


def _fastest_way(case: LinearCase, mode: str, inputs: list[Any], device: str) -> tuple[torch.dtype, int]:
    hidden, weight, labels, _ = (x.detach() for x in inputs)
    rows = hidden[:, :-1][labels[:, 1:] != -100]
    part = case if device != "cpu" else replace(case, vocab=min(case.vocab, TRIAL_VOCAB))
    trials = {}
    for way in _ways(case, device):
        timer = Timer(device)
        for _ in range(3):
            timer.before()
            timer.run(partial(products, part, mode, *way, rows, weight[: part.vocab]))
        trials[way] = min(timer.seconds())
    return min(trials, key=trials.__getitem__)


def products(case: LinearCase, mode: str, dtype: torch.dtype, width: int, rows: Tensor, weight: Tensor) -> None:
    """The matrix products of `rows` (N, H) and the head, with no element between them touched.

    The logits stand for their own gradient: the shapes are the same. Where `dtype` is wider than the weight's, slices
    are widened, and the slice of dW narrowed, as anyone must who multiplies in it.
    """
    count = case.products(mode)
    x = rows.to(dtype)
    dh = torch.zeros_like(x)
    dw = torch.empty_like(weight) if count == 3 else None
    for start in range(0, case.vocab, width):
        part = weight[start : start + width].to(dtype)
        z = x @ part.T
        if count > 1:
            dh.addmm_(z, part)
        if dw is not None and dtype == dw.dtype:
            torch.mm(z.T, x, out=dw[start : start + width])
        elif dw is not None:
            dw[start : start + width] = z.T @ x
