"""Bad arguments of the linear path: each has its exception type and a message that helps."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpref

B, T, H, V = 2, 4, 6, 11


def hidden(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*(shape or (B, T, H)), generator=torch.Generator().manual_seed(0)).to(**options)


def weight(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*(shape or (V, H)), generator=torch.Generator().manual_seed(1)).to(**options)


def labels(*shape: int, **options: Any) -> Tensor:
    return torch.randint(V, shape or (B, T), generator=torch.Generator().manual_seed(2)).to(**options)


def with_label(value: int) -> Tensor:
    changed = labels()
    changed[1, 2] = value
    return changed


def packed(**more: Any) -> dict[str, Any]:
    return {"hidden": hidden(B * T, H), "labels": labels(B * T), **more}


class Sharded(Tensor):
    """What a DTensor is recognised by."""

    def full_tensor(self) -> Tensor:
        return self.as_subclass(Tensor)


Case = tuple[dict[str, Any], type[Exception], str]
# name -> (arguments other than good ones, exception, part of the message); wrong in all three functions.
SHARED: dict[str, Case] = {
    # hidden states and labels
    "hidden is a list": ({"hidden": [[1.0]]}, TypeError, "hidden states must be a torch.Tensor, got [[1.0]] (list)"),
    "hidden is integers": (
        {"hidden": hidden().long()},
        TypeError,
        "hidden states must have a floating-point dtype, got a int64 tensor of shape (2, 4, 6) on cpu",
    ),
    "hidden is a vector": (
        {"hidden": hidden(H), "labels": labels(1)},
        ValueError,
        "hidden states must be (B, T, H), or (N_total, H) with cu_seqlens; got a float32 tensor of shape (6,)",
    ),
    "labels are shifted, hidden is not": (
        {"labels": labels()[:, 1:]},
        ValueError,
        "labels must have the shape (2, 4) of the hidden states without their last dimension, got a int64 tensor of "
        "shape (2, 3) on cpu; with shift=True pass both unshifted",
    ),
    "labels are float": ({"labels": labels().float()}, TypeError, "labels must have an integer dtype, got a float32"),
    "labels on another device": (
        {"labels": labels(device="meta")},
        ValueError,
        "labels is on meta, hidden states are on cpu; move one of them",
    ),
    "mask has another length": (
        {"mask": torch.ones(B, T - 1)},
        ValueError,
        "mask must have the shape (2, 4) of labels",
    ),
    "label is V": ({"labels": with_label(V)}, ValueError, "labels[1, 2] is 11, outside [0, V=11); mark positions"),
    "label is negative": ({"labels": with_label(-1)}, ValueError, "labels[1, 2] is -1, outside [0, V=11)"),
    "label is another ignore_index": (
        {"labels": with_label(-100), "ignore_index": 0},
        ValueError,
        "labels[1, 2] is -100, outside [0, V=11)",
    ),
    "packed without cu_seqlens": (packed(), ValueError, "packed hidden states of shape (8, 6) with shift=True need"),
    "cu_seqlens with padded hidden": (
        {"cu_seqlens": torch.tensor([0, 8])},
        ValueError,
        "cu_seqlens goes with packed hidden states (N_total, H), got hidden states of shape (2, 4, 6)",
    ),
    "cu_seqlens ends early": (
        packed(cu_seqlens=torch.tensor([0, 4, 7])),
        ValueError,
        "end with N_total = 8, got [0, 4, 7]",
    ),
    # the head
    "weight is a list": ({"weight": [[1.0]]}, TypeError, "weight must be a torch.Tensor, got [[1.0]] (list)"),
    "weight is NumPy": ({"weight": np.zeros((V, H))}, TypeError, "weight must be a torch.Tensor, got array("),
    "weight is a Linear": ({"weight": torch.nn.Linear(H, V)}, TypeError, "weight must be a torch.Tensor, got Linear("),
    "weight is integers": ({"weight": weight().to(torch.int8)}, TypeError, "floating-point dtype, got a int8 tensor"),
    "weight has another H": (
        {"weight": weight(V, H + 1)},
        ValueError,
        "weight must be (V, H) with the H = 6 of the hidden states, got a float32 tensor of shape (11, 7) on cpu",
    ),
    "weight is transposed": ({"weight": weight(H, V)}, ValueError, "of shape (6, 11) on cpu; it looks transposed"),
    "weight is 3-D": ({"weight": weight(1, V, H)}, ValueError, "weight must be (V, H) with at least one entry, got a"),
    "weight is flat, a shard": (
        {"weight": weight(V * H)},
        ValueError,
        "of shape (66,) on cpu; DeepSpeed ZeRO-3 and FSDP leave such a tensor outside of a module's forward: gather it",
    ),
    "weight is empty, as ZeRO-3 leaves it": (
        {"weight": weight(0)},
        ValueError,
        "deepspeed.zero.GatheredParameters, FSDP.summon_full_params or unshard()",
    ),
    "weight has no entries": ({"weight": weight(0, H)}, ValueError, "with at least one entry, got a float32 tensor of"),
    "weight is a DTensor": (
        {"weight": weight().as_subclass(Sharded)},
        ValueError,
        "weight is a DTensor, of which each rank has a part: call inside the sharded module's own forward, where it is "
        "whole, or pass weight.full_tensor(grad_placements=[Partial('avg')])",
    ),
    "hidden is a DTensor": (
        {"hidden": hidden().as_subclass(Sharded)},
        ValueError,
        "hidden is a DTensor, of which each rank has a part: call inside the sharded module's own forward, where it is "
        "whole, or pass hidden.full_tensor(",
    ),
    "weight on another device": (
        {"weight": weight(device="meta")},
        ValueError,
        "weight is on meta, hidden states are on cpu; move one of them",
    ),
    "weight has another dtype": (
        {"weight": weight(dtype=torch.bfloat16)},
        TypeError,
        "weight must have the dtype of the hidden states, float32, got a bfloat16 tensor of shape (11, 6) on cpu; "
        "convert one of them, or use torch.autocast",
    ),
    "bias is a number": ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got 1.0 (float)"),
    "bias is True": ({"bias": True}, TypeError, "bias must be a torch.Tensor, got True (bool)"),
    "bias is integers": (
        {"bias": torch.zeros(V).long()},
        TypeError,
        "bias must have a floating-point dtype, got a int",
    ),
    "bias has the length H": (
        {"bias": torch.zeros(H)},
        ValueError,
        "bias must be (V,) = (11,), got a float32 tensor of",
    ),
    "bias is a row": ({"bias": torch.zeros(1, V)}, ValueError, "bias must be (V,) = (11,), got"),
    "bias on another device": (
        {"bias": torch.zeros(V, device="meta")},
        ValueError,
        "bias is on meta, hidden states are on cpu; move one of them",
    ),
    "bias has another dtype": (
        {"bias": torch.zeros(V, dtype=torch.float64)},
        TypeError,
        "bias must have the dtype of the hidden states, float32, got a float64 tensor of shape (11,)",
    ),
    # the budget
    "budget is a float": ({"memory_budget": 1e9}, TypeError, 'must be bytes or text like "512MiB", got 1000000000.0'),
    "budget is True": ({"memory_budget": True}, TypeError, 'must be bytes or text like "512MiB", got True (bool)'),
    "budget is bytes": ({"memory_budget": b"1GiB"}, TypeError, "got b'1GiB' (bytes)"),
    "budget is a tensor": ({"memory_budget": torch.tensor(10**9)}, TypeError, "got a int64 tensor of shape ()"),
    "budget is 0": ({"memory_budget": 0}, ValueError, "memory_budget must be positive, got 0"),
    "budget is negative": ({"memory_budget": -1}, ValueError, "memory_budget must be positive, got -1"),
    "budget is no text": ({"memory_budget": ""}, ValueError, "(B, KiB, MiB, GiB), got ''"),
    "budget is two numbers": ({"memory_budget": "1 024"}, ValueError, "(B, KiB, MiB, GiB), got '1 024'"),
    "budget is too large": ({"memory_budget": "9" * 400 + "GiB"}, ValueError, "memory_budget is too large: '999"),
    "budget has a strange unit": ({"memory_budget": "1TiB"}, ValueError, "(B, KiB, MiB, GiB), got '1TiB'"),
    "budget is negative text": ({"memory_budget": "-1GiB"}, ValueError, "got '-1GiB'"),
    "budget is less than a byte": ({"memory_budget": "0.1B"}, ValueError, "memory_budget must be positive, got 0"),
    "budget is too small": (
        {"memory_budget": 100},
        ValueError,
        "memory_budget of 100 bytes is smaller than one tile for 6 scored rows, H=6, V=11: give at least",
    ),
    # options
    "temperature is 0": ({"temperature": 0.0}, ValueError, "temperature must be a finite number in (0, inf), got 0.0"),
    "logit_scale is text": ({"logit_scale": "1"}, TypeError, "logit_scale must be a number, got '1' (str)"),
    "softcap is 0": ({"softcap": 0.0}, ValueError, "softcap must be a finite number in (0, inf), got 0.0"),
    "shift is 1": ({"shift": 1}, TypeError, "shift must be True or False, got 1 (int)"),
    "ignore_index is a float": ({"ignore_index": -100.0}, TypeError, "ignore_index must be an int, got -100.0 (float)"),
}

NOT_IN_TOKENS: dict[str, Case] = {
    "packed and aligned without cu_seqlens": (
        packed(shift=False),
        ValueError,
        "packed hidden states of shape (8, 6) need cu_seqlens to say where sequences begin; for one sequence pass "
        "hidden[None], labels[None]",
    ),
    "reduction does not exist": ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum; got 'none'"),
}

SEQUENCE: dict[str, Case] = {
    **NOT_IN_TOKENS,
    "reduction is None": ({"reduction": None}, TypeError, "reduction must be a string, one of mean, sum; got None"),
    "on_empty does not exist": ({"on_empty": "skip"}, ValueError, "on_empty must be one of raise, zero; got 'skip'"),
    "return_lengths is 1": ({"return_lengths": 1}, TypeError, "return_lengths must be True or False, got 1 (int)"),
    "unknown option": ({"chunk_size": 1}, TypeError, "unexpected keyword argument 'chunk_size'"),
    "inplace_backward": ({"inplace_backward": True}, TypeError, "unexpected keyword argument 'inplace_backward'"),
}

REF = torch.full((B,), -5.0)
PREFERENCE: dict[str, Case] = {
    **NOT_IN_TOKENS,
    "an odd number of sequences": (
        {"hidden": hidden(3, T, H), "labels": labels(3, T), "ref_logps": torch.zeros(3)},
        ValueError,
        "a batch of pairs holds all chosen sequences and then all rejected ones, an even number; got 3",
    ),
    "no sequence": ({"hidden": hidden(0, T, H), "labels": labels(0, T)}, ValueError, "an even number; got 0"),
    "odd packed": (packed(cu_seqlens=torch.tensor([0, 8])), ValueError, "an even number; got 1"),
    "reference is missing": (
        {"ref_logps": None},
        ValueError,
        "loss 'sigmoid' needs the reference's log-probs, but ref_logps is None: compute them by linear_sequence_logps",
    ),
    "reference is not wanted": (
        {"loss": "simpo"},
        ValueError,
        "loss 'simpo' has no reference: ref_logps must be None, got a float32 tensor of shape (2,)",
    ),
    "reference of pairs": (
        {"ref_logps": torch.zeros(1)},
        ValueError,
        "ref_logps must be one log-prob a sequence, shape (2,) on cpu, chosen first; got a float32 tensor of "
        "shape (1,)",
    ),
    "reference of tokens": ({"ref_logps": torch.zeros(B, T)}, ValueError, "shape (2,) on cpu, chosen first; got"),
    "reference on another device": ({"ref_logps": REF.to("meta")}, ValueError, "shape (2,) on cpu, chosen first; got"),
    "reference is a list": ({"ref_logps": [0.0, 0.0]}, TypeError, "ref_logps must be a torch.Tensor, got [0.0, 0.0]"),
    "reference is integers": ({"ref_logps": torch.zeros(B).long()}, TypeError, "ref_logps must have a floating-point"),
    "reference has a gradient": (
        {"ref_logps": REF.clone().requires_grad_()},
        ValueError,
        "ref_logps requires a gradient, but the reference is a constant: pass ref_logps.detach()",
    ),
    "loss does not exist": ({"loss": "sigmiod"}, ValueError, "loss must be one of aot, "),
    "loss is a number": ({"loss": 3}, TypeError, "loss must be a string, one of aot, "),
    "option that the loss does not take": ({"lam": 5.0}, TypeError, "loss 'sigmoid' does not take 'lam'; besides beta"),
    "option out of range": ({"loss": "dpop", "lam": -1.0}, ValueError, "lam must be a finite number in [0, inf)"),
    "beta is 0": ({"beta": 0.0}, ValueError, "beta must be a finite number in (0, inf), got 0.0"),
    "option with a callable": (
        {"loss": lambda *_: None, "lam": 5.0},
        TypeError,
        "a callable loss takes no options here, got 'lam': bind them, for instance with functools.partial",
    ),
    "callable without a tensor": (
        {"loss": lambda *_: None},
        ValueError,
        "a callable loss must return (1,) losses or a",
    ),
    "callable of another shape": (
        {"loss": lambda c, *_: c.repeat(2)},
        ValueError,
        "must return (1,) losses or a scalar tensor, got a float32 tensor of shape (2,)",
    ),
}


def refuses(function: Callable[..., Any], case: Case, **more: Any) -> None:
    changed, error, message = case
    arguments: dict[str, Any] = {"hidden": hidden(), "weight": weight(), "labels": labels(), **more, **changed}
    if isinstance(arguments["weight"], Tensor) and arguments["weight"].is_floating_point():
        arguments["weight"] = arguments["weight"].detach().requires_grad_()
    with pytest.raises(error, match=re.escape(message)):
        function(**arguments)


@pytest.mark.parametrize("name", SHARED)
def test_linear_token_logps_refuses(name: str) -> None:
    refuses(fastpref.linear_token_logps, SHARED[name])


@pytest.mark.parametrize("name", SHARED | SEQUENCE)
def test_linear_sequence_logps_refuses(name: str) -> None:
    refuses(fastpref.linear_sequence_logps, (SHARED | SEQUENCE)[name])


@pytest.mark.parametrize("name", SHARED | PREFERENCE)
def test_linear_preference_loss_refuses(name: str) -> None:
    refuses(fastpref.linear_preference_loss, (SHARED | PREFERENCE)[name], ref_logps=REF)


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (True, True)], ids=["none", "hidden", "both"])
def test_the_least_budget_that_the_error_names_works(wanted: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 90, 16, generator=generator).requires_grad_(wanted[0])
    w = torch.randn(1000, 16, generator=generator).requires_grad_(wanted[1])
    y = torch.randint(1000, (2, 90), generator=generator)
    plain = fastpref.linear_sequence_logps(h, w, y)
    with pytest.raises(ValueError, match="give at least") as caught:
        fastpref.linear_sequence_logps(h, w, y, memory_budget="1KiB")
    found = re.search(r"give at least (\d+) bytes", str(caught.value))
    assert found is not None
    least = int(found[1])
    with pytest.raises(ValueError, match=f"give at least {least} bytes"):
        fastpref.linear_sequence_logps(h, w, y, memory_budget=least - 1)
    value = fastpref.linear_sequence_logps(h, w, y, memory_budget=least)
    assert isinstance(value, Tensor)
    assert isinstance(plain, Tensor)
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)
    if wanted[0]:
        value.sum().backward()
        assert h.grad is not None
        assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize(
    "budget", ["64MiB", " 64 mib ", "0.0625GiB", "65536KiB", "67.2MB", 2**26, "67108864B", "67108864"]
)
def test_budgets_that_are_fine(budget: int | str) -> None:
    value = fastpref.linear_sequence_logps(hidden(), weight(), labels(), memory_budget=budget)
    assert isinstance(value, Tensor)
    assert value.shape == (B,)


def test_a_label_out_of_range_is_nothing_where_it_is_not_scored() -> None:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2] = False
    first = labels()
    first[:, 0] = V + 3  # no position predicts it
    for y, m in ((with_label(V), mask), (first, None)):
        value = fastpref.linear_sequence_logps(hidden(), weight(), y, mask=m)
        assert isinstance(value, Tensor)
        assert torch.isfinite(value).all()


REAL_DTENSOR = """
import os, tempfile, torch
import torch.distributed as dist
from torch.distributed.tensor import Partial, Shard, distribute_tensor
import fastpref

dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
weight = distribute_tensor(torch.randn(11, 6), mesh, [Shard(0)]).requires_grad_()
hidden, labels = torch.randn(2, 4, 6, requires_grad=True), torch.randint(11, (2, 4))
try:
    fastpref.linear_sequence_logps(hidden, weight, labels)
except ValueError as error:
    assert "weight is a DTensor" in str(error), error
else:
    raise SystemExit("a DTensor went through")
fastpref.linear_sequence_logps(hidden, weight.full_tensor(grad_placements=[Partial('avg')]), labels).sum().backward()
assert type(weight.grad) is type(weight) and weight.grad.to_local().abs().sum() > 0
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_real_dtensor_is_refused_and_the_remedy_works() -> None:
    done = subprocess.run([sys.executable, "-c", REAL_DTENSOR], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
