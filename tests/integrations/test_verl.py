"""verl's functions, against a statement of what they compute (a split vocabulary: tests/parallel/test_verl.py)."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from fastpref.integrations.verl import entropy_from_logits, linear_cross_entropy, logprobs_from_logits


def stated(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probs of the labels, and −Σ p·log p of each row."""
    p = logits.softmax(-1)
    return p.gather(-1, labels[..., None])[..., 0].log(), torch.special.entr(p).sum(-1)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, 31, generator=generator)).to(dtype)
    return logits, torch.randint(31, shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (12,), (2, 3, 4)], ids=str)
def test_log_probs_and_gradients_from_logits(shape: tuple[int, ...], inplace: bool, dtype: torch.dtype) -> None:
    logits, labels = rows(*shape, dtype=dtype)
    leaf, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ours = leaf * 1  # a model's output: no leaf, and nothing else reads it
    values, (truth, _) = logprobs_from_logits(ours, labels, inplace), stated(theirs, labels)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), truth, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(values, leaf, upstream)
    (true_grad,) = torch.autograd.grad(truth, theirs, upstream.double())
    torch.testing.assert_close(grad.double(), true_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if inplace:
        assert torch.equal(ours, grad), "the gradient took the logits' memory"
    else:
        assert torch.equal(ours, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (12,), (2, 3, 4)], ids=str)
def test_entropies_and_their_gradients_from_logits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = rows(*shape, dtype=dtype)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    values, (_, truth) = entropy_from_logits(ours), stated(theirs, labels)
    assert values.dtype == torch.float32
    assert values.shape == shape
    torch.testing.assert_close(values.double(), truth, rtol=2e-6, atol=1e-6)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(values, ours, upstream)
    (true_grad,) = torch.autograd.grad(truth, theirs, upstream.double())
    torch.testing.assert_close(grad.double(), true_grad, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_an_impossible_token_adds_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 1.0, -torch.inf]], requires_grad=True)
    values = entropy_from_logits(logits)
    torch.testing.assert_close(values, torch.tensor([2.0, 1.0]).log())
    values.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(2, 3))


def head(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 8, generator=generator).to(dtype)
    weight = torch.randn(29, 8, generator=generator).to(dtype)
    return hidden, weight, torch.randint(29, shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "Mean"])
@pytest.mark.parametrize("shape", [(2, 5), (11,)], ids=str)
def test_log_probs_entropies_and_gradients_from_hidden_states(
    shape: tuple[int, ...], reduction: str, dtype: torch.dtype
) -> None:
    hidden, weight, labels = head(*shape, dtype=dtype)
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logps, entropy = linear_cross_entropy(*ours, labels, 0.7, reduction)
    true_logps, true_entropy = stated(theirs[0].flatten(0, -2) @ theirs[1].T / 0.7, labels.flatten())
    true_logps = {"none": true_logps, "sum": true_logps.sum(), "Mean": true_logps.mean()}[reduction]
    assert logps.dtype == entropy.dtype == torch.float32
    # A product of bfloat16 operands is exact in float32, so that only the sums differ.
    torch.testing.assert_close(logps.double(), true_logps, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), true_entropy, rtol=2e-6, atol=2e-6)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(logps.shape, generator=generator), torch.randn(entropy.shape, generator=generator)
    grads = torch.autograd.grad((logps, entropy), ours, upstream)
    true_grads = torch.autograd.grad((true_logps, true_entropy), theirs, [x.double() for x in upstream])
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        step = torch.finfo(dtype).eps * true_grad.abs().max().item()
        torch.testing.assert_close(grad.double(), true_grad, rtol=0, atol=8 * step)


def test_an_ignored_label_has_value_and_entropy_0_and_no_gradient() -> None:
    hidden, weight, labels = head(6)
    labels[2] = -100
    hidden[2] = torch.nan
    hidden.requires_grad_()
    logps, entropy = linear_cross_entropy(hidden, weight, labels)
    (logps + entropy).sum().backward()
    assert (logps[2].item(), entropy[2].item()) == (0, 0)
    assert (hidden.grad[2] == 0).all()
    assert torch.isfinite(torch.cat([logps, entropy, hidden.grad.flatten()])).all()


def test_arguments_stand_where_the_original_has_them() -> None:
    def defaults(function: object) -> dict[str, object]:
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}  # type: ignore[arg-type]

    empty = inspect.Parameter.empty
    assert defaults(logprobs_from_logits) == {"logits": empty, "labels": empty, "inplace_backward": True}
    assert defaults(entropy_from_logits) == {"logits": empty}
    assert list(defaults(linear_cross_entropy).items()) == [
        ("hidden", empty),
        ("weight", empty),
        ("labels", empty),
        ("temperature", 1.0),
        ("reduction", "none"),
        ("dist_process_group", None),
    ]


def test_bad_input_is_named() -> None:
    hidden, weight, labels = head(2, 5)
    with pytest.raises(ValueError, match="reduction must be one of mean, none, sum; got 'average'"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "average")
    with pytest.raises(ValueError, match="labels its shape without H"):
        linear_cross_entropy(hidden, weight, labels.T)
    with pytest.raises(ValueError, match="temperature must be"):
        linear_cross_entropy(hidden, weight, labels, -1.0)
    with pytest.raises(ValueError, match=r"dist_process_group needs torch\.distributed\.init_process_group"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "none", object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logits must have a floating-point dtype"):
        entropy_from_logits(labels)
    with pytest.raises(ValueError, match="labels must have the shape"):
        logprobs_from_logits(torch.zeros(2, 5, 7), labels[:1])
