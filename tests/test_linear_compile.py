"""The linear path under torch.compile and autocast, and its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers import slow_interpreted
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastpref
from fastpref import reference
from fastpref.linear import compiled

B, T, H, V = 4, 7, 16, 131
OFFSETS = torch.tensor([0, 3, 3, 20, 28], dtype=torch.int32)
linear_sequence_logps: Any = fastpref.linear_sequence_logps


def make(dtype: torch.dtype = torch.float32, device: str = "cpu", *, length: int = T) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, length, H), (V, H), (V,))
    tensors = [torch.randn(*shape, generator=generator).to(dtype).to(device) for shape in shapes]
    labels = torch.randint(V, (B, length), generator=generator)
    labels[0, 2] = labels[3, 1:] = -100
    return tensors, labels.to(device)


def results(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """What the function returns, and the gradients of a weighted sum of its first result."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    found = function(*leaves)
    value, *others = found if isinstance(found, tuple) else (found,)
    weights = torch.linspace(-1, 2, value.numel(), device=value.device).view(value.shape)
    gradients = torch.autograd.grad((value * weights).sum(), leaves)
    return [value.detach(), *(x for x in others if x is not None), *gradients]


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To rounding: a graph keeps nothing, so that other sums are made."""
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        step = 2e-6 if b.dtype not in (torch.bfloat16, torch.float16) else torch.finfo(b.dtype).eps
        torch.testing.assert_close(a, b, rtol=step, atol=step * b.abs().max().item())


COMPILED: dict[str, dict[str, Any]] = {
    "padded": {},
    "mean, lengths, mask": {
        "reduction": "mean",
        "return_lengths": True,
        "mask": torch.arange(B * T).view(B, T) % 4 < 3,
    },
    "packed, softcap": {"cu_seqlens": OFFSETS, "softcap": 5.0, "temperature": 0.7},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", COMPILED)
@slow_interpreted
def test_compiled_without_graph_breaks_is_eager(name: str, backend: str, device: str) -> None:
    torch.compiler.reset()
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in COMPILED[name].items()}
    (hidden, weight, bias), labels = make(cast(torch.dtype, options.pop("dtype", torch.float32)), device)
    if "cu_seqlens" in options:
        hidden, labels = hidden.flatten(0, 1), labels.flatten()

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_sequence_logps(hidden, weight, labels, bias=bias, **options)

    graph = torch.compile(call, fullgraph=True, backend="aot_eager")
    same(results(graph, [hidden, weight, bias]), results(call, [hidden, weight, bias]))


def test_one_dynamic_graph_serves_every_length(device: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(
        lambda h, w, y: fastpref.linear_token_logps(h, w, y), fullgraph=True, dynamic=True, backend=counter
    )
    counts = []
    for length in (7, 5, 9):
        (hidden, weight, _), labels = make(device=device, length=length)
        eager = results(lambda h, w, y=labels: fastpref.linear_token_logps(h, w, y), [hidden, weight])
        same(results(lambda h, w, y=labels: graph(h, w, y), [hidden, weight]), eager)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


def test_a_frozen_head_in_a_graph_gets_no_gradient(device: str) -> None:
    torch.compiler.reset()
    (hidden, weight, bias), labels = make(device=device)

    def call(hidden: Tensor) -> Tensor:
        return linear_sequence_logps(hidden, weight, labels, bias=bias)

    same(results(torch.compile(call, fullgraph=True, backend="aot_eager"), [hidden]), results(call, [hidden]))


@pytest.mark.parametrize("loss", ["dpop", "aot", "own"])
@pytest.mark.slow
def test_the_loss_compiles_too(loss: str, device: str) -> None:
    """Under torch.compile its `losses` have a gradient as well; what it returns is the same."""
    torch.compiler.reset()
    (hidden, weight, bias), labels = make(device=device)
    ref = torch.linspace(-30, -10, B, device=device)
    function: Any = (lambda a, b, c, d: F.softplus(b - a + c - d)) if loss == "own" else loss

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return tuple(fastpref.linear_preference_loss(hidden, weight, labels, ref, bias=bias, loss=function))

    def wanted(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return tuple(x if i == 0 or x is None else x.detach() for i, x in enumerate(call(hidden, weight, bias)))

    graph = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = results(lambda *x: tuple(y if i == 0 or y is None else y.detach() for i, y in enumerate(graph(*x))), [
        hidden, weight, bias,
    ])  # fmt: skip
    same(found, results(wanted, [hidden, weight, bias]))


def test_a_second_derivative_of_the_operator_raises(device: str) -> None:
    (hidden, weight, _), labels = make(device=device)
    hidden.requires_grad_()
    options = (1, -100, [1.0, 1.0, 0.0], torch.float32, 2**30)
    value = compiled.linear_token_logps_op(hidden, weight, None, labels, None, *options)[0]
    (grad,) = torch.autograd.grad(value.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("name", ["forward", "frozen", "options", "extras", "backward", "backward of hidden"])
@slow_interpreted
def test_operators_pass_opcheck(name: str, backend: str, device: str) -> None:
    (hidden, weight, bias), labels = make(device=device, length=3)
    mask = labels > 2
    plain = (1, -100, [1.0, 1.0, 0.0], torch.float32, 2**30)
    capped = (0, 3, [0.7, 2.0, 3.0], torch.float32, 2**30)
    positive = labels.clamp(min=0)
    with torch.no_grad():
        *_, saved = compiled.linear_token_logps_op(hidden, weight, bias, labels, mask, *plain)
    grad = torch.ones(labels.shape, device=device)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    operator, arguments = {
        "forward": (compiled.linear_token_logps_op, (*leaves, labels, mask, *plain)),
        "frozen": (compiled.linear_token_logps_op, (leaves[0], weight, None, labels, None, *plain)),
        "options": (compiled.linear_token_logps_op, (leaves[0], leaves[1], None, positive, None, *capped)),
        "extras": (compiled.linear_token_logps_op, (*leaves, labels, mask, *plain, "entropy,is_top1", True)),
        "backward": (
            compiled.linear_token_logps_backward_op,
            (grad, None, saved, hidden, weight, bias, labels, mask, *plain, [True, True, True]),
        ),
        "backward of hidden": (
            compiled.linear_token_logps_backward_op,
            (grad, None, saved, hidden.transpose(0, 1).contiguous().transpose(0, 1), weight, None, labels, mask, *plain,
             [True, False, False]),
        ),
    }[name]  # fmt: skip
    torch.library.opcheck(operator, arguments)


# Autocast


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
def test_autocast_takes_mixed_dtypes_and_gives_each_its_own_back(
    traced: bool, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, device: str
) -> None:
    """Closer to float64 than F.linear under autocast, which rounds logits; gradients in the dtypes of the inputs."""
    torch.compiler.reset()
    (hidden, weight, bias), labels = make(device=device)
    tensors = [hidden.to(hidden_dtype), weight.to(weight_dtype), bias]

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_sequence_logps(hidden, weight, labels, bias=bias)

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.sequence_logps(F.linear(hidden, weight, bias), labels)

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.sequence_logps(F.linear(hidden, weight, bias), labels, dtype=torch.float64)

    truth = results(exact, [x.double() for x in tensors])
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if traced else call
    with torch.autocast(device, dtype=torch.bfloat16):
        found, theirs = results(function, tensors), results(plain, tensors)
    assert [x.dtype for x in found] == [torch.float32, hidden_dtype, weight_dtype, torch.float32]
    for a, b, c in zip(found, theirs, truth, strict=True):
        # Where nothing but the result is rounded to bfloat16, both round it: by luck one or the other is nearer.
        error, limit = (x.double().sub(c).norm().item() for x in (a, b))
        assert error <= 1.1 * limit


def test_autocast_that_is_off_inside_changes_nothing_and_dtypes_apart_are_refused(device: str) -> None:
    (hidden, weight, _), labels = make(device=device)
    wanted = linear_sequence_logps(hidden, weight, labels)
    with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
        assert torch.equal(linear_sequence_logps(hidden, weight, labels), wanted)
        with pytest.raises(TypeError, match="weight must have the dtype of the hidden states, bfloat16, got a float32"):
            linear_sequence_logps(hidden.bfloat16(), weight, labels)


def test_the_backward_may_run_outside_of_autocast(device: str) -> None:
    (hidden, weight, bias), labels = make(device=device)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return linear_sequence_logps(hidden, weight, labels, bias=bias)

    outside = results(call, [hidden, weight, bias])
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = results(call, [hidden, weight, bias])
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))
