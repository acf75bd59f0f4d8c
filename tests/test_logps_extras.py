"""Entropy, mean logit, argmax match and Σ p² from the read of the logits that the log-probs are made of."""

from __future__ import annotations

import pytest
import torch
from acceptance import no_worse_than_eager
from helpers import slow_interpreted

import fastpref
from fastpref import ops, reference
from fastpref.extras import EXTRAS
from fastpref.parallel.vocab import RowStatistics
from fastpref.token_values import token_values

B, T = 3, 6
EPS = torch.finfo(torch.float32).eps
NUMBERS = ("entropy", "mean_logits", "log_sum_sq_probs")
pytestmark = pytest.mark.numeric
OPTIONS = {
    "plain": {},
    "temperature and scale": {"temperature": 0.7, "logit_scale": 1.3},
    "softcap": {"temperature": 1.4, "softcap": 3.0},
    "aligned": {"shift": False},
}


def make(vocab=77, *, dtype=torch.float32, device="cpu", scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(B, T, vocab, generator=generator) * scale).to(dtype)
    labels = torch.randint(vocab, (B, T), generator=generator)
    labels[0, :2], labels[2] = -100, -100
    return logits.to(device), labels.to(device)


@pytest.mark.parametrize(
    ("vocab", "dtype", "options"),
    [
        (1, torch.float32, "plain"),
        (77, torch.bfloat16, "softcap"),
        (1040, torch.float32, "temperature and scale"),
        (2048, torch.float16, "plain"),
        (5003, torch.float32, "softcap"),
        (5003, torch.bfloat16, "aligned"),
    ],
)
@slow_interpreted
def test_extras_are_the_truth_and_logps_the_same_bits(vocab, dtype, options, backend, device):
    options = OPTIONS[options]
    mask = torch.arange(B * T, device=device).view(B, T) % 5 > 0

    def draw(seed):
        logits, labels = make(vocab, dtype=dtype, device=device, seed=seed)
        logps, extras = fastpref.token_logps(logits, labels, mask=mask, extras=EXTRAS, **options)
        truth, eager = (
            reference.token_extras(logits.to(kind), labels, mask=mask, dtype=kind, **options)
            for kind in (torch.float64, torch.float32)
        )
        assert torch.equal(extras.is_top1, truth.is_top1)
        without = fastpref.token_logps(logits, labels, mask=mask, **options)
        if backend == "torch":
            assert torch.equal(logps, without)
        else:  # another kernel, whose tiles have another depth
            torch.testing.assert_close(logps, without, rtol=2e-7, atol=1e-6)
        assert {getattr(extras, name).dtype for name in NUMBERS} == {torch.float32}
        return [tuple(getattr(each, name) for each in (extras, eager, truth)) for name in NUMBERS]

    no_worse_than_eager(draw, draws=4 if backend == "torch" else 1)


def test_one_extra_is_the_same_as_among_all_and_others_are_none(backend, device):
    logits, labels = make(device=device)
    logits, labels = logits[:1, :4], labels[:1, :4]
    _, every = fastpref.token_logps(logits, labels, extras=EXTRAS)
    for name in EXTRAS:
        _, alone = fastpref.token_logps(logits, labels, extras=[name])
        assert torch.equal(getattr(alone, name), getattr(every, name))
        assert all(getattr(alone, other) is None for other in EXTRAS if other != name)


def test_packed_extras_are_those_of_the_sequences(backend, device):
    logits, labels = make(device=device)
    _, padded = fastpref.token_logps(logits, labels, extras=EXTRAS)
    offsets = torch.arange(0, B * T + 1, T, device=device)
    values, lengths, packed = fastpref.sequence_logps(
        logits.flatten(0, 1), labels.flatten(), cu_seqlens=offsets, return_lengths=True, extras=EXTRAS
    )
    assert values.shape == lengths.shape == (B,)
    for one, other in zip(padded, packed, strict=True):
        assert torch.equal(one.flatten(), other)
    values, extras = fastpref.sequence_logps(logits, labels, extras=("is_top1",))
    assert values.shape == (B,)
    assert extras.is_top1.shape == (B, T)


def rows_of_note(device):
    """Ties, entries of −inf, constant, confident and extreme rows, and a label whose logit is −inf."""
    logits = torch.zeros(1, 7, 50, device=device)
    logits[0, 1, [3, 9]] = 5.0
    logits[0, 2] = torch.linspace(-4, 4, 50)
    logits[0, 2, ::2] = -torch.inf
    logits[0, 3, 7] = 30.0
    logits[0, 4] = torch.linspace(-1e4, 1e4, 50)
    logits[0, 5, 1:] = -torch.inf
    logits[0, 6, 8] = -torch.inf
    return logits, torch.tensor([[4, 9, 49, 7, 49, 0, 8]], device=device)


def test_ties_infinities_constant_and_confident_rows(backend, device):
    logits, labels = rows_of_note(device)
    logps, extras = fastpref.token_logps(logits, labels, shift=False, extras=EXTRAS)
    truth = reference.token_extras(logits, labels, shift=False, dtype=torch.float64)
    assert torch.equal(extras.is_top1, truth.is_top1)
    magnitude = logits.nan_to_num(neginf=0.0).abs().mean(-1)
    for name in NUMBERS:  # eight roundings: of the value, of a sum of probabilities, of the terms of a mean
        found, true = getattr(extras, name).double(), getattr(truth, name)
        bound = 8 * EPS * (1 + (magnitude if name == "mean_logits" else true.abs()))
        finite = true.isfinite()
        assert ((found - true).abs() <= bound)[finite].all(), name
        assert torch.equal(found[~finite], true[~finite])
    assert extras.is_top1.tolist() == [[True] * 6 + [False]]
    assert logps[0, 6] == -torch.inf
    assert extras.entropy[0, 5] == 0
    assert (extras.entropy >= 0).all()


def test_nan_in_rows_that_are_not_scored_reaches_nothing(backend, device):
    logits, labels = make(device=device)
    logits[2], logits[:, -1] = torch.nan, torch.inf
    logits.requires_grad_()
    logps, extras = fastpref.token_logps(logits, labels, extras=EXTRAS, entropy_grad=True)
    assert all(x.isfinite().all() for x in (logps, *extras))
    assert all((x[2] == 0).all() for x in extras)
    (logps.sum() + extras.entropy.sum()).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[2] == 0).all()


def test_nan_in_a_scored_row_is_seen(backend, device):
    logits, labels = make(device=device)
    logits[1, 2, 5] = torch.nan
    logits[1, 2, labels[1, 3]] = 100.0  # the largest number of the row
    _, extras = fastpref.token_logps(logits, labels, extras=EXTRAS)
    assert not extras.is_top1[1, 3]
    for name in NUMBERS:
        assert getattr(extras, name).isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("dtype", "options", "inplace"),
    [
        (torch.float32, "plain", False),
        (torch.float32, "softcap", True),
        (torch.bfloat16, "temperature and scale", True),
        (torch.bfloat16, "aligned", False),
    ],
)
@slow_interpreted
def test_entropy_gradient_is_the_truth(dtype, options, inplace, backend, device):
    options = OPTIONS[options]

    def gradient(function, x, upstream):
        x = x.clone().requires_grad_()
        logps, entropy = function(x * 1 if inplace else x)
        (upstream[0] * logps + upstream[1] * entropy).sum().backward()
        return x.grad

    def draw(seed):
        logits, labels = make(2100, dtype=dtype, device=device, seed=seed)
        logits[1, 0, :9] = -torch.inf
        upstream = torch.randn(2, B, T, generator=torch.Generator().manual_seed(seed)).to(device)

        def ours(x):
            logps, extras = fastpref.token_logps(
                x, labels, extras=("entropy",), entropy_grad=True, inplace_backward=inplace, **options
            )
            return logps, extras.entropy

        def truth(x):
            to = {"dtype": x.dtype, **options}
            return reference.token_logps(x, labels, **to), reference.token_extras(x, labels, **to).entropy

        found, exact = gradient(ours, logits, upstream), gradient(truth, logits.double(), upstream)
        assert found.dtype == dtype
        return [(found, gradient(truth, logits.float(), upstream).to(dtype), exact)]

    no_worse_than_eager(draw, draws=4 if backend == "torch" else 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shift", [True, False])
def test_gradcheck_in_float64(shift, softcap):
    """Through the operator, whose values are float64 (the public ones are float32)."""
    logits, labels = make(9)
    capped = [0.8, 1.2, softcap or 0.0]

    def function(x):
        found = ops.token_extras_op(x, labels, None, int(shift), -100, capped, False, [True, True, True], True)
        return found[0], found[1]

    assert torch.autograd.gradcheck(function, (logits.double().requires_grad_(),))


def test_only_the_entropy_has_a_gradient_and_only_when_asked(backend, device):
    logits, labels = make(device=device)
    _, extras = fastpref.token_logps(logits.requires_grad_(), labels, extras=EXTRAS)
    assert not any(x.requires_grad for x in extras)
    logps, extras = fastpref.token_logps(logits, labels, extras=EXTRAS, entropy_grad=True)
    assert [x.requires_grad for x in extras] == [True, False, False, False]
    assert logps.requires_grad


def test_extras_and_their_gradient_repeat_bitwise(backend, device):
    logits, labels = make(1300, device=device)

    def call():
        x = logits.clone().requires_grad_()
        logps, extras = fastpref.token_logps(x, labels, extras=EXTRAS, entropy_grad=True)
        (logps + extras.entropy).sum().backward()
        return [logps, *extras, x.grad]

    assert all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


def test_the_operator_passes_opcheck(backend, device):
    logits, labels = make(7, device=device)
    logits, labels = logits[:2, :3].contiguous(), labels[:2, :3].contiguous()
    arguments = (
        logits.requires_grad_(),
        labels,
        labels > 1,
        1,
        -100,
        [0.9, 1.0, 0.0],
        False,
        [True, False, True],
        True,
    )
    torch.library.opcheck(ops.token_extras_op, arguments)


def test_compiles_without_a_graph_break():
    logits, labels = make(50)

    def loss(x):
        values, extras = fastpref.sequence_logps(x, labels, extras=EXTRAS, entropy_grad=True)
        return values.sum() + 0.1 * extras.entropy.sum(), extras

    def run(function):
        x = logits.clone().requires_grad_()
        value, extras = function(x)
        value.backward()
        return [value, *extras, x.grad]

    found = run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for one, other in zip(run(loss), found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"extras": "entropy"}, TypeError, "sequence of names"),
        ({"extras": ("entropie",)}, ValueError, "entropie"),
        ({"entropy_grad": True}, ValueError, "entropy_grad"),
        ({"extras": ("entropy",), "entropy_grad": 1}, TypeError, "entropy_grad"),
        ({"vocab_group": 3}, ValueError, "init_process_group"),
    ],
)
def test_bad_options_say_what_they_wanted(options, error, says):
    logits, labels = make(5)
    for function in (fastpref.token_logps, fastpref.sequence_logps):
        with pytest.raises(error, match=says):
            function(logits, labels, **options)


def test_a_label_outside_the_vocabulary_raises(backend):
    logits, labels = make(5)
    labels[1, 3] = 5
    with pytest.raises(ValueError, match=r"labels\[1, 3\] is 5"):
        fastpref.token_logps(logits, labels, extras=EXTRAS)


def test_a_label_that_rounding_leaves_above_the_maximum_is_the_first_and_has_log_prob_0() -> None:
    """A compiled kernel may make of multiply and add one rounding in one place and two in another."""
    one = torch.ones(1, 2)
    target = torch.tensor([[torch.nextafter(one[0, 0], one[0, 0] + 1).item(), float("nan")]])
    values = token_values(RowStatistics(maximum=one, total=one, target=target), one.bool(), 0, vocab=7)
    assert values.logps[0, 0] == 0
    assert values.is_top1[0, 0]
    assert values.logps[0, 1].isnan()
    assert not values.is_top1[0, 1]
