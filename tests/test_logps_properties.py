"""Properties of token_logps and sequence_logps on batches that hypothesis makes up."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastpref
from fastpref import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100


def property_test(torch_examples, triton_examples):
    """Runs a property on both paths; the interpreted kernels get the fewer and smaller examples."""

    def decorate(check):
        def run(backend, device):
            interpreted = backend == "triton" and device == "cpu"
            examples = triton_examples if interpreted else torch_examples
            quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
            rules = settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=quiet)

            @rules
            @given(batch=batches(*((3, 3, 40) if interpreted else (5, 12, 300))), data=st.data())
            def example(batch, data):
                check(batch.to(device), data)

            example()

        run.__name__, run.__doc__, run.__module__ = check.__name__, check.__doc__, check.__module__
        return run

    return decorate


class Batch:
    def __init__(self, logits, labels, mask, upstream, options):
        self.logits, self.labels, self.mask, self.upstream, self.options = logits, labels, mask, upstream, options

    def __repr__(self):
        shape, dtype = tuple(self.logits.shape), self.logits.dtype
        return f"Batch({shape}, {dtype}, {self.options}, labels={self.labels.tolist()}, mask={self.mask})"

    def to(self, device):
        mask = None if self.mask is None else self.mask.to(device)
        tensors = (self.logits.to(device), self.labels.to(device), mask, self.upstream.to(device))
        return Batch(*tensors, self.options)

    def scored(self):
        """(B, T) bool, where the labels stand."""
        return reference.scored_positions(
            self.labels, mask=self.mask, shift=self.options["shift"], ignore_index=IGNORED
        )

    def values(self, **changes):
        arguments = {"logits": self.logits, "labels": self.labels, "mask": self.mask, **self.options, **changes}
        return fastpref.sequence_logps(arguments.pop("logits"), arguments.pop("labels"), **arguments)

    def gradient(self, function=fastpref.sequence_logps, **changes):
        arguments = {"logits": self.logits, "labels": self.labels, "mask": self.mask, **self.options, **changes}
        leaf = arguments.pop("logits").detach().clone().requires_grad_()
        value = function(leaf, arguments.pop("labels"), **arguments)
        return value.detach(), torch.autograd.grad(value, leaf, self.upstream.to(value.dtype))[0]


@st.composite
def batches(draw, max_batch, max_length, max_vocab):
    batch = draw(st.integers(1, max_batch))
    length = draw(st.integers(1, max_length))
    vocab = draw(st.one_of(st.integers(1, 9), st.integers(1, max_vocab)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    spread = draw(st.sampled_from([0.0, 1.0, 6.0]))
    logits = (torch.randn(batch, length, vocab, generator=generator) * spread).to(dtype)
    labels = torch.randint(vocab, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = IGNORED
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.2, 0.8]))
    upstream = torch.randn(batch, generator=generator)
    options = {
        "shift": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["sum", "mean"])),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25])),
        "softcap": draw(st.sampled_from([None, 8.0])),
    }
    return Batch(logits, labels, mask, upstream, options)


@property_test(40, 6)
def test_values_and_gradients_are_as_near_to_float64_as_a_few_roundings(batch, data):
    """A token's error is at most 4 float32 roundings of its largest logit; a gradient is rounded once more."""
    value, grad = batch.gradient()
    double = {"logits": batch.logits.double(), "dtype": torch.float64}
    exact, exact_grad = batch.gradient(reference.sequence_logps, **double)
    eps = torch.finfo(torch.float32).eps
    largest = max(1.0, batch.logits.double().abs().max().item() / batch.options["temperature"])
    count = batch.scored().sum(1).clamp(min=1)
    tokens = torch.ones_like(count) if batch.options["reduction"] == "mean" else count
    assert ((value.double() - exact).abs() <= 4 * eps * tokens * (1 + largest)).all()

    weight = batch.upstream.double().abs()[:, None, None] / batch.options["temperature"]
    in_float32 = 4 * eps * weight * (1 + largest)
    info = torch.finfo(grad.dtype)
    one_rounding = info.eps * (exact_grad.abs() + info.tiny)
    assert ((grad.double() - exact_grad).abs() <= in_float32 + one_rounding).all()


@property_test(40, 6)
def test_ignored_positions_added_anywhere_change_nothing(batch, data):
    """Right or left of a sequence, whatever their logits are."""
    size = data.draw(st.integers(1, 5))
    noise = torch.full_like(batch.logits[:, :1], float("nan")).expand(-1, size, -1)
    ignored = torch.full_like(batch.labels[:, :1], IGNORED).expand(-1, size)
    masked = None if batch.mask is None else torch.ones_like(batch.mask[:, :1]).expand(-1, size)
    labels = batch.labels.clone()
    left = data.draw(st.booleans())
    if left and batch.options["shift"]:
        labels[:, 0] = IGNORED  # nothing predicted it
    value, grad = batch.gradient(labels=labels)

    def add(tensor, extra):
        return None if tensor is None else torch.cat([extra, tensor] if left else [tensor, extra], 1)

    changed = {"logits": add(batch.logits, noise), "labels": add(labels, ignored), "mask": add(batch.mask, masked)}
    ours, ours_grad = batch.gradient(**changed)
    assert torch.equal(ours, value)
    inner = slice(size, None) if left else slice(None, -size)
    assert torch.equal(ours_grad[:, inner], grad)
    assert (ours_grad[:, :size] if left else ours_grad[:, -size:]).count_nonzero() == 0


@property_test(40, 6)
def test_packed_is_bitwise_padded(batch, data):
    count, length = batch.labels.shape
    lengths = data.draw(st.lists(st.integers(0, length), min_size=count, max_size=count))
    inside = torch.arange(length, device=batch.labels.device) < batch.labels.new_tensor(lengths)[:, None]
    value, grad = batch.gradient(labels=torch.where(inside, batch.labels, IGNORED))
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ours, ours_grad = batch.gradient(
        logits=batch.logits[inside],
        labels=batch.labels[inside],
        mask=None if batch.mask is None else batch.mask[inside],
        cu_seqlens=offsets.to(batch.labels.device),
    )
    assert torch.equal(ours, value)
    assert torch.equal(ours_grad, grad[inside])


@property_test(40, 6)
def test_permuting_sequences_permutes_values_and_gradients(batch, data):
    order = torch.tensor(data.draw(st.permutations(range(len(batch.labels)))), device=batch.labels.device)
    value, grad = batch.gradient()
    turned = Batch(
        batch.logits[order],
        batch.labels[order],
        None if batch.mask is None else batch.mask[order],
        batch.upstream[order],
        batch.options,
    )
    ours, ours_grad = turned.gradient()
    assert torch.equal(ours, value[order])
    assert torch.equal(ours_grad, grad[order])


@property_test(40, 6)
def test_gradient_rows_sum_to_zero_where_scored_and_are_zero_elsewhere(batch, data):
    """Σ_v (onehot − p) = 0, without a softcap; each element is off by at most one rounding in its own precision."""
    batch.options["softcap"] = None
    _, grad = batch.gradient()
    rows = torch.zeros_like(batch.labels, dtype=torch.bool)
    shift = int(batch.options["shift"])
    rows[:, : rows.shape[1] - shift] = batch.scored()[:, shift:]
    assert grad[~rows].count_nonzero() == 0
    wide = grad.double()
    info = torch.finfo(grad.dtype)
    vocab = grad.shape[-1]
    weight = batch.upstream.double().abs()[:, None] * batch.options["logit_scale"] / batch.options["temperature"]
    largest = 1 + batch.logits.double().abs().max().item()
    limit = (
        info.eps * wide.abs().sum(-1)
        + vocab * info.eps * info.tiny
        + 4 * torch.finfo(torch.float32).eps * weight * largest
    )
    assert (wide.sum(-1).abs() <= limit).all()


@property_test(25, 4)
def test_the_same_call_twice_and_in_place_is_bitwise_equal(batch, data):
    value, grad = batch.gradient()
    for inplace in (False, True):
        ours, ours_grad = batch.gradient(inplace_backward=inplace)
        assert torch.equal(ours, value)
        assert torch.equal(ours_grad, grad)


@property_test(25, 4)
def test_values_are_the_sums_of_tokens_and_lengths_count_them(batch, data):
    options = {key: value for key, value in batch.options.items() if key != "reduction"}
    tokens = fastpref.token_logps(batch.logits, batch.labels, mask=batch.mask, **options)
    scored = batch.scored()
    assert tokens[~scored].count_nonzero() == 0
    sums, lengths = batch.values(reduction="sum", return_lengths=True)
    assert torch.equal(lengths, scored.sum(1))
    torch.testing.assert_close(sums.double(), tokens.double().sum(1), rtol=1.2e-7, atol=0)
    means = batch.values(reduction="mean").double()
    torch.testing.assert_close(means, tokens.double().sum(1) / lengths.clamp(min=1), rtol=1.2e-7, atol=0)
