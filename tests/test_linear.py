"""linear_token_logps and linear_sequence_logps against the float64 truth, the logits path and each other's options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from acceptance import Triple, no_worse_than_eager
from helpers import slow_interpreted
from torch import Tensor

import fastpref
from fastpref import reference

pytestmark = pytest.mark.numeric
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [  # V, H
    (507, 17, torch.float32),
    (507, 17, torch.bfloat16),
    (507, 17, torch.float16),
    (1, 17, torch.bfloat16),
    (2, 1, torch.float32),
    (2, 17, torch.float16),
    (255, 1, torch.bfloat16),
    (4099, 17, torch.float16),
    (507, 129, torch.float32),
]
# Without the types of what return_lengths adds.
linear_sequence_logps: Any = fastpref.linear_sequence_logps
linear_token_logps: Any = fastpref.linear_token_logps


def make_batch(
    batch: int, length: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: str, *, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """[hidden, weight, bias] with logits of a standard deviation near 3, and labels of which a third is ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, hidden_size, generator=generator)
    weight = torch.randn(vocab, hidden_size, generator=generator) * (3 / hidden_size**0.5)
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(vocab, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.3] = -100
    labels[0, -1] = 0  # something is always scored
    return [x.to(dtype).to(device) for x in (hidden, weight, bias)], labels.to(device)


def values_and_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], labels: Tensor, upstream: Tensor, **options: Any
) -> list[Tensor]:
    """The values, and the gradients of hidden, weight and (where there is one) bias."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = function(*leaves, labels, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def ours(name: str) -> Callable[..., Tensor]:
    def call(hidden: Tensor, weight: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        *bias, labels = rest
        return getattr(fastpref, f"linear_{name}")(hidden, weight, labels, bias=bias[0] if bias else None, **options)

    return call


def plain(name: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The whole of the logits in `dtype`, from the same rounded inputs."""

    def call(hidden: Tensor, weight: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        *bias, labels = rest
        logits = F.linear(hidden.to(dtype), weight.to(dtype), bias[0].to(dtype) if bias else None)
        return getattr(reference, name)(logits, labels, dtype=dtype, **options)

    return call


def compare(
    name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str, *, draws: int, **options: Any
) -> None:
    """Values, dh, dW and dbias against the truth."""

    def draw(seed: int) -> list[Triple]:
        tensors, labels = make_batch(*sizes, dtype, device, seed=seed)
        shape = labels.shape if name == "token_logps" else labels.shape[:1]
        upstream = torch.linspace(-1.5, 2.0, shape.numel(), device=device).view(shape)
        mine = values_and_gradients(ours(name), tensors, labels, upstream, **options)
        assert [x.dtype for x in mine] == [torch.float32, dtype, dtype, dtype]
        eager = values_and_gradients(plain(name, torch.float32), tensors, labels, upstream, **options)
        exact = [x.double() for x in tensors]
        truth = values_and_gradients(plain(name, torch.float64), exact, labels, upstream, **options)
        return list(zip(mine, eager, truth, strict=True))

    no_worse_than_eager(draw, draws)


@pytest.mark.parametrize(("vocab", "hidden_size", "dtype"), SIZES, ids=str)
def test_values_and_gradients_at_any_size(
    vocab: int, hidden_size: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    draws = 3 if vocab > 1000 else 16 if backend == "torch" else 4
    compare("sequence_logps", (3, 7, hidden_size, vocab), dtype, device, draws=draws)


@pytest.mark.parametrize(("batch", "length"), [(7, 3), (1, 1), (1, 2), (1, 13), (5, 1)])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_any_batch_and_length(batch: int, length: int, shift: bool, reduction: str, device: str) -> None:
    sizes = (batch, length, 11, 83)
    compare("sequence_logps", sizes, torch.float32, device, draws=32, shift=shift, reduction=reduction)


@pytest.mark.parametrize(
    ("dtype", "transform"),
    [
        (torch.float32, {"temperature": 1.3, "logit_scale": 2.0, "softcap": 5.0}),
        (torch.bfloat16, {"temperature": 1.3, "logit_scale": 2.0, "softcap": 5.0}),
        (torch.float16, {"temperature": 1.3, "logit_scale": 2.0, "softcap": 5.0}),
        (torch.float32, {"softcap": 5.0}),
        (torch.float32, {"logit_scale": 0.0625}),
        (torch.bfloat16, {"temperature": 0.7}),
    ],
    ids=str,
)
@slow_interpreted
def test_transforms(transform: dict[str, float], dtype: torch.dtype, backend: str, device: str) -> None:
    draws = 16 if backend == "torch" else 6
    compare("sequence_logps", (3, 5, 17, 507), dtype, device, draws=draws, **transform)


@pytest.mark.parametrize("shift", [True, False])
@slow_interpreted
def test_every_token_has_an_upstream_gradient_of_its_own(shift: bool, backend: str, device: str) -> None:
    """Of either sign, zero included; positions that are not scored receive one too, which nobody reads."""
    draws = 16 if backend == "torch" else 4
    compare("token_logps", (3, 9, 13, 141), torch.float32, device, draws=draws, shift=shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_logits_path_gives_the_same_numbers(dtype: torch.dtype, backend: str, device: str) -> None:
    """To the rounding of float32 for values, and of the gradient's dtype."""

    def of_logits(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return fastpref.token_logps(F.linear(hidden.float(), weight.float(), bias.float()), labels, **options)

    tensors, labels = make_batch(3, 8, 17, 507, dtype, device)
    upstream = torch.linspace(-1, 2, 24, device=device).view(3, 8)
    mine = values_and_gradients(ours("token_logps"), tensors, labels, upstream)
    theirs = values_and_gradients(of_logits, tensors, labels, upstream)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=0)
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        # Two roundings of nearly the same number are a unit in the last place apart, where sums cancel a float32 error.
        step = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        torch.testing.assert_close(a, b, rtol=step, atol=1e-6 * b.abs().max().item())


def test_token_values_stand_where_their_labels_stand(backend: str, device: str) -> None:
    (hidden, weight, _), labels = make_batch(3, 6, 17, 41, torch.float32, device)
    labels[1, 2] = 5
    for shift in (True, False):
        values = linear_token_logps(hidden, weight, labels, shift=shift)
        by_hand = (weight.double() @ hidden[1, 2 - shift].double()).log_softmax(-1)[5]
        assert values[1, 2].item() == pytest.approx(by_hand.item(), rel=1e-6)
        unscored = labels == -100
        if shift:
            unscored[:, 0] = True
        assert (values[unscored] == 0).all()
        assert (values[~unscored] < 0).all()


def test_shifting_by_hand_gives_the_same_numbers(backend: str, device: str) -> None:
    (hidden, weight, bias), labels = make_batch(3, 9, 17, 53, torch.bfloat16, device)
    by_itself = linear_sequence_logps(hidden, weight, labels, bias=bias)
    by_hand = linear_sequence_logps(hidden[:, :-1], weight, labels[:, 1:], bias=bias, shift=False)
    assert torch.equal(by_itself, by_hand)


@pytest.mark.parametrize("kind", ["bool", "int", "float"])
def test_mask_is_aligned_with_labels_and_shifts_with_them(kind: str, device: str) -> None:
    (hidden, weight, _), labels = make_batch(2, 8, 17, 37, torch.float32, device)
    mask = torch.rand(2, 8, generator=torch.Generator().manual_seed(2)).to(device) < 0.6
    given = {"bool": mask, "int": mask.long() * 3, "float": mask * -0.5}[kind]
    masked = linear_sequence_logps(hidden, weight, labels, mask=given)
    ignored = linear_sequence_logps(hidden, weight, torch.where(mask, labels, -100))
    assert torch.equal(masked, ignored)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_labels_of_any_integer_dtype_and_another_ignore_index(dtype: torch.dtype, device: str) -> None:
    (hidden, weight, _), labels = make_batch(2, 5, 17, 200, torch.float32, device)
    labels = labels.clamp(min=0)
    labels[:, 2] = 7
    ignored = torch.where(labels == 7, -100, labels)
    wanted = linear_sequence_logps(hidden, weight, ignored)
    assert torch.equal(linear_sequence_logps(hidden, weight, labels.to(dtype), ignore_index=7), wanted)


def test_mean_divides_by_scored_tokens_and_not_by_padding(backend: str, device: str) -> None:
    (hidden, weight, _), labels = make_batch(2, 9, 17, 29, torch.float32, device)
    labels[1, 4:] = -100
    sums, lengths = linear_sequence_logps(hidden, weight, labels, return_lengths=True)
    means = linear_sequence_logps(hidden, weight, labels, reduction="mean")
    assert lengths.tolist() == (labels[:, 1:] != -100).sum(1).tolist()
    torch.testing.assert_close(means, sums / lengths, rtol=2e-7, atol=0)


def test_on_empty_raise_names_the_sequences(device: str) -> None:
    (hidden, weight, _), labels = make_batch(4, 5, 17, 29, torch.float32, device)
    labels[1:3] = -100
    with pytest.raises(ValueError, match=r"sequences \[1, 2\] of 4 have no scored token \(on_empty='raise'\)"):
        linear_sequence_logps(hidden, weight, labels, on_empty="raise")
    assert linear_sequence_logps(hidden, weight, labels)[1:3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_scored_at_all_gives_zeros(dtype: torch.dtype, backend: str, device: str) -> None:
    """Every gradient is written: none is left as memory came."""
    tensors, labels = make_batch(3, 5, 17, 507, dtype, device)
    for filler in (torch.full((200_000,), 7.0, device=device), torch.full((9_000,), 7.0, device=device)):
        del filler  # memory that is used again without being written would show
    upstream = torch.ones(3, device=device)
    found = values_and_gradients(ours("sequence_logps"), tensors, torch.full_like(labels, -100), upstream)
    for x in found:
        assert (x == 0).all()


def test_one_scored_sequence_is_as_if_alone(backend: str, device: str) -> None:
    tensors, labels = make_batch(3, 7, 17, 129, torch.float32, device)
    labels[0] = labels[2] = -100
    upstream = torch.tensor([3.0, -1.5, 2.0], device=device)
    value, dh, dw, db = values_and_gradients(ours("sequence_logps"), tensors, labels, upstream)
    alone = [tensors[0][1:2], *tensors[1:]]
    value1, dh1, dw1, db1 = values_and_gradients(ours("sequence_logps"), alone, labels[1:2], upstream[1:2])
    assert value.tolist() == [0.0, value1.item(), 0.0]
    assert (dh[[0, 2]] == 0).all()
    for together, single in ((dh[1:2], dh1), (dw, dw1), (db, db1)):
        torch.testing.assert_close(together, single, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_batches(shape: tuple[int, int], backend: str, device: str) -> None:
    hidden = torch.zeros(*shape, 17, device=device, requires_grad=True)
    weight = torch.randn(31, 17, device=device, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.long, device=device)
    value = linear_sequence_logps(hidden, weight, labels)
    assert value.tolist() == [0.0] * shape[0]
    dh, dw = torch.autograd.grad(value.sum(), (hidden, weight))
    assert dh.shape == hidden.shape
    assert (dw == 0).all()


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("lengths", [[4, 9, 1, 6], [9, 0, 3, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 9, 1, 9]])
def test_packed_equals_padded(lengths: list[int], reduction: str, shift: bool, device: str) -> None:
    """Empty sequences included, and pairs of very unequal length."""
    tensors, labels = make_batch(4, 9, 17, 67, torch.float32, device)
    for i, n in enumerate(lengths):
        labels[i, n:] = -100
    hidden = tensors[0]
    packed = torch.cat([hidden[i, :n] for i, n in enumerate(lengths)])
    flat = torch.cat([labels[i, :n] for i, n in enumerate(lengths)])
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    upstream = torch.tensor([1.0, -1.0, 2.0, 0.25], device=device)
    options: dict[str, Any] = {"shift": shift, "reduction": reduction}
    wanted = values_and_gradients(ours("sequence_logps"), tensors, labels, upstream, **options)
    found = values_and_gradients(
        ours("sequence_logps"), [packed, *tensors[1:]], flat, upstream, cu_seqlens=offsets, **options
    )
    wanted[1] = torch.cat([wanted[1][i, :n] for i, n in enumerate(lengths)])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    tokens = linear_token_logps(packed, tensors[1], flat, cu_seqlens=offsets, shift=shift)
    padded = linear_token_logps(*tensors[:2], labels, shift=shift)
    cut = torch.cat([padded[i, :n] for i, n in enumerate(lengths)])
    torch.testing.assert_close(tokens, cut, rtol=1e-6, atol=1e-6)


def test_one_row_predicts_two_labels(backend: str, device: str) -> None:
    """The last prompt token predicts both responses' first: gathered twice, its gradient is the sum."""
    (hidden, weight, bias), _ = make_batch(1, 5, 17, 93, torch.float32, device)
    index = torch.tensor([[0, 1, 2], [0, 3, 4]], device=device)
    labels = torch.tensor([[3, 92, 5], [47, 8, 5]], device=device)
    upstream = torch.tensor([1.0, -0.4], device=device)

    def split(name: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda h, w, b, y, **options: name(h[0][index], w, b, y, **options)

    found = values_and_gradients(split(ours("sequence_logps")), [hidden, weight, bias], labels, upstream, shift=False)
    exact = [x.double() for x in (hidden, weight, bias)]
    truth = values_and_gradients(split(plain("sequence_logps", torch.float64)), exact, labels, upstream, shift=False)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_tied_embedding_gets_both_gradients(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(61, 17, generator=generator).to(device)
    labels = torch.randint(61, (2, 7), generator=generator).to(device)

    def gradient(weight: Tensor, function: Callable[..., Tensor]) -> Tensor:
        leaf = weight.clone().requires_grad_()
        function(torch.tanh(leaf[labels]), leaf, labels).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    found = gradient(table, ours("sequence_logps"))
    truth = gradient(table.double(), plain("sequence_logps", torch.float64))
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
