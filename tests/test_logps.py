"""token_logps and sequence_logps against the float64 truth, on the torch path and on the Triton kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from acceptance import no_worse_than_eager
from helpers import slow_interpreted

import fastpref
from fastpref import reference

pytestmark = pytest.mark.numeric
VOCABS = [31, 1, 2, 127, 129, 255, 507, 32000, 50257, 151936]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_batch(batch, length, vocab, dtype, device, *, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(batch, length, vocab, generator=generator) * spread).to(dtype).to(device)
    labels = torch.randint(vocab, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.3] = -100
    labels[0, -1] = 0  # something is always scored
    return logits, labels.to(device)


def value_and_grad(function, logits, labels, upstream, **options):
    x = logits.detach().clone().requires_grad_()
    value = function(x, labels, **options)
    (value * upstream.to(value.dtype)).sum().backward()
    return value.detach(), x.grad


def compare(name, sizes, dtype, device, *, draws, spread=4.0, **options):
    """Values and gradients of logits of `sizes` (B, T, V) against the truth."""

    def draw(seed):
        logits, labels = make_batch(*sizes, dtype, device, seed=seed, spread=spread)
        shape = labels.shape if name == "token_logps" else labels.shape[:1]
        upstream = torch.linspace(-1.5, 2.0, shape.numel(), device=device).view(shape)
        ours = value_and_grad(getattr(fastpref, name), logits, labels, upstream, **options)
        twin = getattr(reference, name)
        eager = value_and_grad(twin, logits, labels, upstream, dtype=torch.float32, **options)
        truth = value_and_grad(twin, logits.double(), labels, upstream, dtype=torch.float64, **options)
        assert ours[0].dtype == torch.float32
        assert ours[1].dtype == dtype
        return list(zip(ours, eager, truth, strict=True))

    no_worse_than_eager(draw, draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values_and_gradients_at_any_vocabulary_size(vocab, dtype, backend, device):
    batch, length, draws = (3, 7, 8) if vocab < 1000 else (1, 3, 1)
    if backend == "triton" and vocab < 1000:
        length, draws = 4, 2
    compare("sequence_logps", (batch, length, vocab), dtype, device, draws=draws)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (1, 13), (5, 1), (7, 3)])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@slow_interpreted
def test_any_batch_and_length(batch, length, shift, reduction, backend, device):
    options = {"shift": shift, "reduction": reduction, "draws": 32 if backend == "torch" else 8}
    compare("sequence_logps", (batch, length, 83), torch.float32, device, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "transform",
    [
        {"temperature": 0.7},
        {"logit_scale": 0.0625},
        {"softcap": 30.0},
        {"temperature": 1.3, "logit_scale": 2.0, "softcap": 5.0},
        {"softcap": 0.5},
    ],
    ids=str,
)
@slow_interpreted
def test_transforms(transform, dtype, backend, device):
    draws = 8 if backend == "torch" else 3
    compare("sequence_logps", (3, 5, 507), dtype, device, draws=draws, spread=8.0, **transform)


@pytest.mark.parametrize("shift", [True, False])
def test_token_values_stand_where_their_labels_stand(shift, backend, device):
    draws = 10 if backend == "torch" else 3
    compare("token_logps", (3, 6, 41), torch.float32, device, draws=draws, shift=shift)
    logits, labels = make_batch(3, 6, 41, torch.float32, device)
    labels[1, 2] = 5
    ours = fastpref.token_logps(logits, labels, shift=shift)
    by_hand = logits[1, 2 - shift].double().log_softmax(-1)[5]
    assert ours[1, 2].item() == pytest.approx(by_hand.item(), rel=1e-6)
    unscored = labels == -100
    if shift:
        unscored[:, 0] = True
    assert (ours[unscored] == 0).all()


def test_shifting_by_hand_gives_the_same_numbers(backend, device):
    logits, labels = make_batch(3, 9, 53, torch.bfloat16, device)
    by_itself = fastpref.sequence_logps(logits, labels)
    by_hand = fastpref.sequence_logps(logits[:, :-1], labels[:, 1:], shift=False)
    assert torch.equal(by_itself, by_hand)


@pytest.mark.parametrize("kind", ["bool", "int", "float"])
def test_mask_is_aligned_with_labels_and_shifts_with_them(kind, backend, device):
    logits, labels = make_batch(2, 8, 37, torch.float32, device)
    mask = torch.rand(2, 8, generator=torch.Generator().manual_seed(2)).to(device) < 0.6
    weight = {"bool": mask, "int": mask.long() * 3, "float": mask * -0.5}[kind]
    masked = fastpref.sequence_logps(logits, labels, mask=weight)
    ignored = fastpref.sequence_logps(logits, torch.where(mask, labels, -100))
    assert torch.equal(masked, ignored)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16])
def test_labels_of_few_bits_wrap_neither_ignore_index_nor_the_vocabulary(dtype, backend, device):
    logits, labels = make_batch(2, 6, 300, torch.float32, device)
    labels.remainder_(100)
    labels[0, 2] = 100 if dtype == torch.int8 else 156  # 156 is −100, and 300 is 44, in 8 bits
    assert torch.equal(fastpref.token_logps(logits, labels.to(dtype)), fastpref.token_logps(logits, labels))
    assert torch.equal(reference.token_logps(logits, labels.to(dtype)), reference.token_logps(logits, labels))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64], ids=str)
def test_labels_of_any_integer_dtype(dtype, backend, device):
    logits, labels = make_batch(2, 5, 200, torch.float32, device)
    labels = labels.clamp(min=0)
    wanted = fastpref.sequence_logps(logits, labels, ignore_index=7)
    assert torch.equal(fastpref.sequence_logps(logits, labels.to(dtype), ignore_index=7), wanted)


def test_mean_divides_by_scored_tokens_and_not_by_padding(backend, device):
    logits, labels = make_batch(2, 9, 29, torch.float32, device)
    labels[1, 4:] = -100
    sums, lengths = fastpref.sequence_logps(logits, labels, return_lengths=True)
    means = fastpref.sequence_logps(logits, labels, reduction="mean")
    assert lengths.tolist() == (labels[:, 1:] != -100).sum(1).tolist()
    torch.testing.assert_close(means, sums / lengths, rtol=2e-7, atol=0)


def test_nothing_to_score_is_zero_with_zero_gradient(backend, device):
    logits, labels = make_batch(3, 5, 31, torch.float32, device)
    labels[1] = -100
    for reduction in ("sum", "mean"):
        value, grad = value_and_grad(
            fastpref.sequence_logps, logits, labels, torch.ones(3, device=device), reduction=reduction
        )
        assert value[1] == 0
        assert (grad[1] == 0).all()
        assert (grad[0] != 0).any()


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (0, 0, 7)])
def test_empty_batches(shape, backend, device):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    value = fastpref.sequence_logps(logits, torch.zeros(shape[:2], dtype=torch.long, device=device))
    assert value.tolist() == [0.0] * shape[0]
    value.sum().backward()
    assert logits.grad.shape == shape


def pack(logits, labels, lengths):
    pieces = [(x[:n], y[:n]) for x, y, n in zip(logits, labels, lengths, strict=True)]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=logits.device)
    return torch.cat([x for x, _ in pieces]), torch.cat([y for _, y in pieces]), offsets


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("lengths", [[4, 9, 1, 6], [9, 0, 3, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
@slow_interpreted
def test_packed_is_bitwise_padded(lengths, reduction, shift, backend, device):
    """Empty sequences, first, in the middle and last, included."""
    logits, labels = make_batch(4, 9, 67, torch.bfloat16, device)
    for i, n in enumerate(lengths):
        labels[i, n:] = -100
    packed_logits, packed_labels, offsets = pack(logits, labels, lengths)
    upstream = torch.tensor([1.0, -1.0, 2.0, 0.25], device=device)
    options = {"shift": shift, "reduction": reduction}
    padded, dpadded = value_and_grad(fastpref.sequence_logps, logits, labels, upstream, **options)
    packed, dpacked = value_and_grad(
        fastpref.sequence_logps, packed_logits, packed_labels, upstream, cu_seqlens=offsets, **options
    )
    assert torch.equal(packed, padded)
    assert torch.equal(dpacked, pack(dpadded, labels, lengths)[0])


def test_packed_tokens_do_not_score_across_a_boundary(backend, device):
    logits, labels = make_batch(1, 10, 19, torch.float32, device)
    labels = labels.clamp(min=0)[0]
    offsets = torch.tensor([0, 4, 10], device=device)
    tokens = fastpref.token_logps(logits[0], labels, cu_seqlens=offsets)
    assert tokens[0] == 0
    assert tokens[4] == 0
    assert (tokens[[1, 2, 3, 5, 6, 7, 8, 9]] != 0).all()


def test_the_same_call_twice_is_bitwise_equal(backend, device):
    logits, labels = make_batch(3, 11, 1031, torch.bfloat16, device)
    upstream = torch.tensor([0.3, -1.7, 2.2], device=device)
    first = value_and_grad(fastpref.sequence_logps, logits, labels, upstream)
    second = value_and_grad(fastpref.sequence_logps, logits, labels, upstream)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("vocab", [97, 4099, 17001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@slow_interpreted
def test_a_sequence_alone_is_bitwise_the_sequence_in_a_batch(vocab, dtype, backend, device):
    """Whatever the other sequences hold, wherever it stands among them, and however it is padded."""
    logits, labels = make_batch(5, 6, vocab, dtype, device)
    together = fastpref.sequence_logps(logits, labels)
    alone = torch.cat([fastpref.sequence_logps(logits[i : i + 1], labels[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)
    turned = fastpref.sequence_logps(logits.flip(0).contiguous(), labels.flip(0).contiguous()).flip(0)
    assert torch.equal(together, turned)
    padded_logits = torch.cat([logits, torch.full_like(logits, 9.0)], 1)
    padded_labels = torch.cat([labels, torch.full_like(labels, -100)], 1)
    assert torch.equal(together, fastpref.sequence_logps(padded_logits, padded_labels))
    left_logits, left_labels = padded_logits.roll(6, 1), padded_labels.roll(6, 1)
    left_labels[:, 6] = -100  # it was the first label: nothing predicted it
    assert torch.equal(together, fastpref.sequence_logps(left_logits, left_labels))


def test_equal_policy_and_reference_differ_by_exactly_zero(backend, device):
    logits, labels = make_batch(4, 6, 130, torch.bfloat16, device)
    policy = fastpref.sequence_logps(logits.clone().requires_grad_(), labels)
    with torch.no_grad():
        reference_ = fastpref.sequence_logps(logits, labels)
    assert torch.equal(policy.detach(), reference_)


@pytest.mark.parametrize("offsets", [[0, 4, 11], [0, 7, 4], [-2, 4, 10]])
def test_offsets_that_a_gpu_does_not_check_give_nan_and_read_nothing_else(offsets, kernels_run, device):
    from fastpref.kernels import sequence as kernels

    logps = torch.arange(1.0, 11.0, device=device).unsqueeze(0)
    labels = torch.zeros(1, 10, dtype=torch.long, device=device)
    cu_seqlens = torch.tensor(offsets, device=device)
    values, _ = kernels.sequence_reduce(logps, labels, None, cu_seqlens, shift=0, ignore_index=-100, mean=False)
    expected = [sum(range(a + 1, b + 1)) if 0 <= a <= b <= 10 else float("nan") for a, b in itertools.pairwise(offsets)]
    torch.testing.assert_close(values.cpu(), torch.tensor(expected, dtype=torch.float32), equal_nan=True)
