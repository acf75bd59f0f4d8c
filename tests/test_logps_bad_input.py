"""Bad arguments of token_logps and sequence_logps: each has its exception type and a message that helps."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import fastpref

B, T, V = 2, 4, 11


def logits(*shape, **options):
    return torch.randn(*(shape or (B, T, V)), generator=torch.Generator().manual_seed(0)).to(**options)


def labels(*shape, **options):
    return torch.randint(V, shape or (B, T), generator=torch.Generator().manual_seed(1)).to(**options)


def packed(**more):
    """Eight packed rows; `cu_seqlens` is to be given."""
    return {"logits": logits(B * T, V), "labels": labels(B * T), **more}


def with_label(value, b=1, t=2):
    changed = labels()
    changed[b, t] = value
    return changed


# Wrong in both functions: name -> (arguments other than good logits and labels, exception, part of the message).
SHARED = {
    "logits are a list": ({"logits": [[1.0]]}, TypeError, "logits must be a torch.Tensor, got [[1.0]] (list)"),
    "logits are NumPy": ({"logits": np.zeros((B, T, V))}, TypeError, "logits must be a torch.Tensor, got array("),
    "logits are None": ({"logits": None}, TypeError, "logits must be a torch.Tensor, got None (NoneType)"),
    "logits are integers": (
        {"logits": torch.zeros(B, T, V, dtype=torch.long)},
        TypeError,
        "logits must have a floating-point dtype, got a int64 tensor of shape (2, 4, 11) on cpu",
    ),
    "logits are complex": (
        {"logits": logits(dtype=torch.complex64)},
        TypeError,
        "floating-point dtype, got a complex64",
    ),
    "logits are a vector": (
        {"logits": logits(V), "labels": labels(1)},
        ValueError,
        "logits must be (B, T, V), or (N_tot",
    ),
    "logits are 4-D": ({"logits": logits(1, B, T, V)}, ValueError, "got a float32 tensor of shape (1, 2, 4, 11)"),
    "labels are a list": ({"labels": [[1, 2]]}, TypeError, "labels must be a torch.Tensor, got [[1, 2]] (list)"),
    "labels are float": ({"labels": labels().float()}, TypeError, "labels must have an integer dtype, got a float32"),
    "labels are bool": ({"labels": labels() > 3}, TypeError, "labels must have an integer dtype, got a bool"),
    "labels are shifted, logits are not": (
        {"labels": labels()[:, 1:]},
        ValueError,
        "labels must have the shape (2, 4) of the logits without their last dimension, got a int64 tensor of shape "
        "(2, 3) on cpu; with shift=True pass both unshifted",
    ),
    "labels are flat": ({"labels": labels(B * T)}, ValueError, "labels must have the shape (2, 4)"),
    "labels would broadcast": ({"labels": labels(1, T)}, ValueError, "got a int64 tensor of shape (1, 4)"),
    "vocabulary is empty": ({"logits": logits(B, T, 0)}, ValueError, "a vocabulary of at least one entry"),
    "vocabulary is strided": (
        {"logits": logits(B, T, 2 * V)[..., ::2]},
        ValueError,
        "stride 1 in their last dimension, got strides (88, 22, 2); pass logits.contiguous()",
    ),
    "vocabulary is transposed": ({"logits": logits(B, V, T).transpose(1, 2)}, ValueError, "got strides (44, 1, 4)"),
    "vocabulary is expanded": ({"logits": logits(B, T, 1).expand(B, T, V)}, ValueError, "got strides (4, 1, 0)"),
    "mask is a list": ({"mask": [[True]]}, TypeError, "mask must be a torch.Tensor, got [[True]] (list)"),
    "mask has another length": (
        {"mask": torch.ones(B, T - 1)},
        ValueError,
        "mask must have the shape (2, 4) of labels, got a float32 tensor of shape (2, 3)",
    ),
    "mask would broadcast": ({"mask": torch.ones(T)}, ValueError, "mask must have the shape (2, 4) of labels"),
    "labels on another device": (
        {"labels": labels(device="meta")},
        ValueError,
        "labels is on meta, logits are on cpu; move one of them",
    ),
    "mask on another device": ({"mask": torch.ones(B, T, device="meta")}, ValueError, "mask is on meta, logits are on"),
    "cu_seqlens on another device": (
        packed(cu_seqlens=torch.zeros(3, dtype=torch.int32, device="meta")),
        ValueError,
        "cu_seqlens is on meta, logits are on cpu",
    ),
    "packed without cu_seqlens": (
        packed(),
        ValueError,
        "packed logits of shape (8, 11) with shift=True need cu_seqlens",
    ),
    "cu_seqlens with padded logits": (
        {"cu_seqlens": torch.tensor([0, 8])},
        ValueError,
        "cu_seqlens goes with packed logits (N_total, V), got logits of shape (2, 4, 11)",
    ),
    "cu_seqlens is a list": (
        packed(cu_seqlens=[0, 8]),
        TypeError,
        "cu_seqlens must be a torch.Tensor, got [0, 8] (list)",
    ),
    "cu_seqlens is float": (
        packed(cu_seqlens=torch.tensor([0.0, 8.0])),
        TypeError,
        "cu_seqlens must be int32 or int64",
    ),
    "cu_seqlens is int16": (
        packed(cu_seqlens=torch.tensor([0, 8], dtype=torch.int16)),
        TypeError,
        "cu_seqlens must be int32 or int64, got a int16",
    ),
    "cu_seqlens is 2-D": (
        packed(cu_seqlens=torch.tensor([[0, 8]])),
        ValueError,
        "cu_seqlens must be (B + 1,), got a int64",
    ),
    "cu_seqlens is a scalar": (packed(cu_seqlens=torch.tensor(8)), ValueError, "cu_seqlens must be (B + 1,)"),
    "cu_seqlens is empty": (packed(cu_seqlens=torch.zeros(0).long()), ValueError, "cu_seqlens must be (B + 1,)"),
    "cu_seqlens does not begin at 0": (
        packed(cu_seqlens=torch.tensor([1, 4, 8])),
        ValueError,
        "cu_seqlens must begin with 0, never decrease and end with N_total = 8, got [1, 4, 8]",
    ),
    "cu_seqlens decreases": (
        packed(cu_seqlens=torch.tensor([0, 5, 4, 8])),
        ValueError,
        "N_total = 8, got [0, 5, 4, 8]",
    ),
    "cu_seqlens ends early": (
        packed(cu_seqlens=torch.tensor([0, 4, 7])),
        ValueError,
        "end with N_total = 8, got [0, 4, 7]",
    ),
    "cu_seqlens ends late": (
        packed(cu_seqlens=torch.tensor([0, 4, 9])),
        ValueError,
        "end with N_total = 8, got [0, 4, 9]",
    ),
    "cu_seqlens is lengths": (packed(cu_seqlens=torch.tensor([4, 4])), ValueError, "cu_seqlens must begin with 0"),
    "temperature is 0": ({"temperature": 0.0}, ValueError, "temperature must be a finite number in (0, inf), got 0.0"),
    "temperature is negative": ({"temperature": -1.0}, ValueError, "temperature must be a finite number in (0, inf)"),
    "temperature is NaN": ({"temperature": float("nan")}, ValueError, "temperature must be a finite number"),
    "temperature is infinite": ({"temperature": float("inf")}, ValueError, "temperature must be a finite number"),
    "temperature is a string": ({"temperature": "1"}, TypeError, "temperature must be a number, got '1' (str)"),
    "temperature is a bool": ({"temperature": True}, TypeError, "temperature must be a number, got True (bool)"),
    "temperature is None": ({"temperature": None}, TypeError, "temperature must be a number, got None"),
    "logit_scale is 0": ({"logit_scale": 0}, ValueError, "logit_scale must be a finite number in (0, inf), got 0"),
    "logit_scale is a list": ({"logit_scale": [1.0]}, TypeError, "logit_scale must be a number, got [1.0] (list)"),
    "softcap is 0": ({"softcap": 0.0}, ValueError, "softcap must be a finite number in (0, inf), got 0.0"),
    "softcap is negative": ({"softcap": -30.0}, ValueError, "softcap must be a finite number in (0, inf), got -30.0"),
    "softcap is False": ({"softcap": False}, TypeError, "softcap must be a number, got False (bool)"),
    "ignore_index is None": ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None (NoneType)"),
    "ignore_index is a float": ({"ignore_index": -100.0}, TypeError, "ignore_index must be an int, got -100.0 (float)"),
    "ignore_index is a bool": ({"ignore_index": False}, TypeError, "ignore_index must be an int, got False (bool)"),
    "shift is 1": ({"shift": 1}, TypeError, "shift must be True or False, got 1 (int)"),
    "shift is None": ({"shift": None}, TypeError, "shift must be True or False, got None"),
    "inplace_backward is a string": (
        {"inplace_backward": "yes"},
        TypeError,
        "inplace_backward must be True or False, got 'yes' (str)",
    ),
    "inplace_backward with expanded logits": (
        {"logits": logits(1, T, V).expand(B, T, V), "inplace_backward": True},
        ValueError,
        "elements do not share memory, got strides (0, 11, 1) (an expanded tensor); use inplace_backward=False",
    ),
    "label is V": ({"labels": with_label(V)}, ValueError, "labels[1, 2] is 11, outside [0, V=11); mark positions"),
    "label is huge": ({"labels": with_label(2**40)}, ValueError, "labels[1, 2] is 1099511627776, outside [0, V=11)"),
    "label is negative": ({"labels": with_label(-1)}, ValueError, "labels[1, 2] is -1, outside [0, V=11)"),
    "label is another ignore_index": (
        {"labels": with_label(-100), "ignore_index": 0},
        ValueError,
        "labels[1, 2] is -100, outside [0, V=11)",
    ),
    "an option that does not exist": ({"temprature": 1.0}, TypeError, "unexpected keyword argument 'temprature'"),
}

# Wrong in sequence_logps alone.
SEQUENCE = {
    "reduction does not exist": ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum; got 'none'"),
    "reduction is None": ({"reduction": None}, TypeError, "reduction must be a string, one of mean, sum; got None"),
    "on_empty does not exist": ({"on_empty": "skip"}, ValueError, "on_empty must be one of raise, zero; got 'skip'"),
    "on_empty is a bool": ({"on_empty": True}, TypeError, "on_empty must be a string, one of raise, zero; got True"),
    "return_lengths is 1": ({"return_lengths": 1}, TypeError, "return_lengths must be True or False, got 1 (int)"),
    "packed and aligned without cu_seqlens": (
        packed(shift=False),
        ValueError,
        "packed logits of shape (8, 11) need cu_seqlens to say where sequences begin; for one sequence pass logits",
    ),
    "a sequence of ignored labels": (
        {"labels": torch.tensor([[1, 2, 3, 4], [5, -100, -100, -100]]), "on_empty": "raise"},
        ValueError,
        "sequences [1] of 2 have no scored token (on_empty='raise')",
    ),
    "a mask that leaves nothing": (
        {"mask": torch.zeros(B, T), "on_empty": "raise"},
        ValueError,
        "sequences [0, 1] of 2 have no scored token",
    ),
    "a packed sequence without rows": (
        packed(cu_seqlens=torch.tensor([0, 8, 8]), on_empty="raise"),
        ValueError,
        "sequences [1] of 2 have no scored token",
    ),
}


def call(function, arguments):
    arguments = {"logits": logits(), "labels": labels(), **arguments}
    return function(arguments.pop("logits"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize("function", [fastpref.token_logps, fastpref.sequence_logps], ids=["token", "sequence"])
@pytest.mark.parametrize("case", SHARED)
def test_bad_input_raises(case, function):
    arguments, exception, message = SHARED[case]
    with pytest.raises(exception, match=re.escape(message)) as caught:
        call(function, arguments)
    assert caught.type is exception


@pytest.mark.parametrize("case", SEQUENCE)
def test_bad_input_of_sequence_logps_raises(case):
    arguments, exception, message = SEQUENCE[case]
    with pytest.raises(exception, match=re.escape(message)) as caught:
        call(fastpref.sequence_logps, arguments)
    assert caught.type is exception


def test_options_by_position_are_refused():
    with pytest.raises(TypeError, match="2 positional arguments"):
        fastpref.token_logps(logits(), labels(), None)
    with pytest.raises(TypeError, match="2 positional arguments"):
        fastpref.sequence_logps(logits(), labels(), "mean")


def test_a_backend_that_does_not_exist_raises(monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FASTPREF_BACKEND must be one of auto, torch, triton, got 'cuda'"):
        fastpref.sequence_logps(logits(), labels())


def test_the_kernels_on_a_cpu_without_the_interpreter_raise(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("FASTPREF_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="FASTPREF_BACKEND=triton with a tensor on cpu: set TRITON_INTERPRET=1"):
        fastpref.token_logps(logits(), labels())


def test_the_kernels_without_triton_raise(monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "triton")
    monkeypatch.setattr("fastpref.backend.triton_installed", lambda: False)
    with pytest.raises(RuntimeError, match="FASTPREF_BACKEND=triton, but Triton is not installed: pip install triton"):
        fastpref.token_logps(logits(), labels())


EDGES = {
    "integer temperature": {"temperature": 2},
    "NumPy temperature": {"temperature": np.float64(1.5)},
    "wide label dtype is not needed": {"labels": labels(dtype=torch.int8)},
    "a label that is not scored may be anything": {
        "labels": with_label(V, 0, 0),
        "mask": torch.tensor([[0, 1, 1, 1]] * B),
    },
    "ignore_index inside the vocabulary": {"ignore_index": 3},
    "ignore_index beyond the vocabulary": {"labels": with_label(50000), "ignore_index": 50000},
    "one position": {"logits": logits(B, 1, V), "labels": labels(B, 1)},
    "no position": {"logits": logits(B, 0, V), "labels": labels(B, 0)},
    "no sequence": {"logits": logits(0, T, V), "labels": labels(0, T)},
    "vocabulary of one, strided": {"logits": logits(B, T, 2)[..., ::2], "labels": labels() * 0},
    "no mask left": {"mask": torch.zeros(B, T)},
    "packed, no sequence": {
        "logits": logits(0, V),
        "labels": labels(0),
        "cu_seqlens": torch.zeros(1, dtype=torch.int64),
    },
    "packed, one sequence": packed(cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)),
    "packed, empty sequences": packed(cu_seqlens=torch.tensor([0, 0, 8, 8])),
    "expanded without inplace": {"logits": logits(1, T, V).expand(B, T, V)},
    "inplace with a batch of one that is expanded": {
        "logits": logits(1, T, V).expand(1, T, V),
        "labels": labels(1, T),
        "inplace_backward": True,
    },
    "inplace without a gradient": {"inplace_backward": True},
    "float64": {"logits": logits(dtype=torch.float64)},
}


@pytest.mark.parametrize("case", EDGES)
def test_valid_edges_do_not_raise(case, backend):
    tokens = call(fastpref.token_logps, EDGES[case])
    values = call(fastpref.sequence_logps, EDGES[case])
    assert tokens.dtype == values.dtype == torch.float32
    assert torch.isfinite(tokens).all()
    torch.testing.assert_close(values.sum(), tokens.sum(), rtol=1e-6, atol=1e-6)


def test_the_first_label_is_not_scored_and_may_be_anything(backend):
    values = fastpref.sequence_logps(logits(), with_label(10**6, 0, 0))
    assert torch.equal(values, fastpref.sequence_logps(logits(), with_label(0, 0, 0)))


def test_on_empty_raise_lets_a_scored_batch_pass(backend):
    values = fastpref.sequence_logps(logits(), labels(), on_empty="raise")
    assert torch.equal(values, fastpref.sequence_logps(logits(), labels()))
