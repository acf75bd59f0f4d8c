"""Autograd around token_logps and sequence_logps: what is refused, in-place gradients, strides, torch.compile."""

from __future__ import annotations

import pytest
import torch
from helpers import slow_interpreted
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastpref
from fastpref import ops, reference

B, T, V = 2, 5, 37
SECOND_DERIVATIVE = r"no second derivative; use fastpref\.reference\.token_logps"
FORWARD_MODE = "no forward-mode derivative; use reverse mode"
OFFSETS = torch.tensor([0, 3, 3, 10], dtype=torch.int32)


def make(dtype=torch.float32, device="cpu", *, seed=0, vocab=V):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, vocab, generator=generator, dtype=torch.float32) * 3
    labels = torch.randint(vocab, (B, T), generator=generator)
    labels[0, 1] = -100
    return logits.to(dtype).to(device), labels.to(device)


def gradient(logits, labels, upstream=None, *, function=fastpref.sequence_logps, **options):
    x = logits.detach().requires_grad_()
    value = function(x, labels, **options)
    return value.detach(), torch.autograd.grad(value, x, torch.ones_like(value) if upstream is None else upstream)[0]


# What is refused


def test_a_second_derivative_raises_and_names_the_reference(backend, device):
    logits, labels = make(device=device)
    x = logits.requires_grad_()
    (grad,) = torch.autograd.grad(fastpref.sequence_logps(x, labels).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        torch.autograd.functional.hessian(lambda z: fastpref.token_logps(z, labels).sum(), logits.detach())


def test_the_first_derivative_with_create_graph_is_the_usual_one(backend, device):
    logits, labels = make(device=device)
    x = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fastpref.sequence_logps(x, labels).sum(), x, create_graph=True)
    assert torch.equal(grad.detach(), gradient(logits, labels)[1])


@pytest.mark.parametrize("function", [fastpref.token_logps, fastpref.sequence_logps])
def test_forward_mode_raises(function, backend, device):
    logits, labels = make(device=device)
    with pytest.raises(RuntimeError, match=FORWARD_MODE):
        torch.func.jvp(lambda x: function(x, labels), (logits,), (torch.ones_like(logits),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=FORWARD_MODE):
        function(forward_ad.make_dual(logits, torch.ones_like(logits)), labels)


# The gradient in the logits' own memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"shift": False}, {"softcap": 4.0, "reduction": "mean"}], ids=str)
def test_inplace_gradient_is_bitwise_the_other_and_lies_in_the_logits(options, dtype, backend, device):
    logits, labels = make(dtype, device)
    upstream = torch.tensor([-1.5, 0.25], device=device)
    _, wanted = gradient(logits, labels, upstream, **options)
    leaf = logits.clone().requires_grad_()
    address = leaf.data_ptr()
    fastpref.sequence_logps(leaf, labels, inplace_backward=True, **options).backward(upstream)
    assert torch.equal(leaf.grad, wanted)
    assert leaf.grad.data_ptr() == address
    assert torch.equal(leaf.detach(), wanted)


def test_inplace_writes_zeros_where_nothing_is_scored(backend, device):
    logits, labels = make(device=device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    mask[1, 3:] = False
    leaf = logits.clone().requires_grad_()
    fastpref.sequence_logps(leaf, labels, mask=mask, inplace_backward=True).sum().backward()
    unscored = torch.zeros(B, T, dtype=torch.bool)
    unscored[0, 0] = unscored[1, 2] = unscored[1, 3] = unscored[:, -1] = True  # each predicts the label after it
    assert (leaf.grad[unscored] == 0).all()
    assert (leaf.grad[~unscored] != 0).any(-1).all()


def test_inplace_gradient_of_a_non_leaf_and_of_a_slice(backend, device):
    """The gradient of logits[:, :-1] lies inside the memory of the logits, whose last row it leaves alone."""
    logits, labels = make(device=device)
    leaf = logits.clone().requires_grad_()
    whole = leaf * 1.0
    part = whole[:, :-1]
    addresses = []
    part.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    value = fastpref.sequence_logps(part, labels[:, 1:], shift=False, inplace_backward=True)
    value.sum().backward()
    assert addresses == [whole.data_ptr()]
    assert torch.equal(leaf.grad, gradient(logits, labels)[1])
    assert torch.equal(whole[:, -1].detach(), logits[:, -1])


def test_inplace_packed_gradient_is_bitwise_the_other(backend, device):
    logits, labels = make(device=device)
    packed, flat, offsets = logits.flatten(0, 1), labels.flatten(), OFFSETS.to(device)
    _, wanted = gradient(packed, flat, cu_seqlens=offsets)
    _, inplace = gradient(packed.clone(), flat, cu_seqlens=offsets, inplace_backward=True)
    assert torch.equal(inplace, wanted)


def test_a_second_inplace_backward_raises(backend, device):
    logits, labels = make(device=device)
    value = fastpref.sequence_logps(logits.requires_grad_(), labels, inplace_backward=True).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second backward through token_logps\(inplace_backward=True\)"):
        value.backward()


def test_logits_that_something_else_saved_are_not_silently_overwritten(backend, device):
    logits, labels = make(device=device)
    hidden = logits.requires_grad_() * 1.0
    value = hidden.square().sum() + fastpref.sequence_logps(hidden, labels, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_inplace_refuses_create_graph(backend, device):
    logits, labels = make(device=device)
    before = logits.clone()
    value = fastpref.sequence_logps(logits.requires_grad_(), labels, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="create_graph=True needs the logits again; use inplace_backward=False"):
        value.backward(create_graph=True)
    assert torch.equal(logits.detach(), before)


def test_inplace_refuses_expanded_logits(backend, device):
    logits, labels = make(device=device)
    with pytest.raises(ValueError, match=r"do not share memory, got strides \(0, 37, 1\)"):
        fastpref.sequence_logps(logits[:1].expand(B, T, V), labels, inplace_backward=True)


# Upstream gradients


@pytest.mark.parametrize(
    "upstream", [[1.5, -0.25], [0.0, 3.0], [0.0, 0.0], [-1e4, 1e-4]], ids=["mixed", "one zero", "zero", "wide"]
)
def test_each_sequence_has_its_own_upstream_gradient(upstream, backend, device):
    """Row by row the gradient is the upstream value times that of a sum."""
    logits, labels = make(device=device)
    weights = torch.tensor(upstream, device=device)
    _, grad = gradient(logits, labels, weights)
    _, unit = gradient(logits, labels)
    torch.testing.assert_close(grad, unit * weights[:, None, None], rtol=1e-6, atol=0)
    assert (grad[weights == 0] == 0).all()


@slow_interpreted
def test_upstream_gradients_of_any_strides_do_as_their_contiguous_copies(backend, device):
    logits, labels = make(device=device)
    weights = torch.linspace(-2, 3, B * T, device=device).view(B, T)
    wide = torch.zeros(B, T, 3, device=device)
    wide[..., 1] = weights
    layouts = {
        "stride 0": weights[0, 0].expand(B, T),
        "stride 0 along T": weights[:, :1].expand(B, T),
        "stride 0 along B": weights[:1].expand(B, T),
        "transposed": weights.t().contiguous().t(),
        "strided": wide[..., 1],
    }
    for name, upstream in layouts.items():
        assert not upstream.is_contiguous(), name
        _, grad = gradient(logits, labels, upstream, function=fastpref.token_logps)
        _, wanted = gradient(logits, labels, upstream.contiguous(), function=fastpref.token_logps)
        assert torch.equal(grad, wanted), name


def test_the_sum_of_tokens_has_the_gradient_of_the_sequences(backend, device):
    """`.sum()` hands a gradient of stride 0 to token_logps."""
    logits, labels = make(device=device)
    leaf = logits.clone().requires_grad_()
    fastpref.token_logps(leaf, labels).sum().backward()
    assert torch.equal(leaf.grad, gradient(logits, labels)[1])


def test_the_mask_and_the_labels_receive_no_gradient(backend, device):
    logits, labels = make(device=device)
    mask = torch.ones(B, T, device=device, requires_grad=True)
    assert not fastpref.sequence_logps(logits, labels, mask=mask).requires_grad
    value = fastpref.sequence_logps(logits.requires_grad_(), labels, mask=mask)
    value.sum().backward()
    assert mask.grad is None
    assert labels.grad is None


# Strides of the logits


def strided(kind, logits):
    """`logits` as a view with other strides, which holds NaN wherever it must not be read."""
    if kind == "sliced":
        wide = logits.new_full((B, T + 3, V), float("nan"))
        view = wide[:, 2 : T + 2]
    elif kind == "transposed":
        view = logits.new_full((T, B, V), float("nan")).transpose(0, 1)
    elif kind == "padded vocabulary":
        view = logits.new_full((B, T, V + 27), float("nan"))[..., :V]
    elif kind == "every second row":
        view = logits.new_full((B, 2 * T, V), float("nan"))[:, ::2]
    else:
        raise AssertionError(kind)
    view.copy_(logits)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["sliced", "transposed", "padded vocabulary", "every second row"])
@slow_interpreted
def test_strides_change_nothing(kind, inplace, dtype, backend, device):
    logits, labels = make(dtype, device)
    upstream = torch.tensor([2.0, -0.7], device=device)
    value, grad = gradient(logits, labels, upstream)
    view = strided(kind, logits)
    assert not view.is_contiguous()
    ours, ours_grad = gradient(view, labels, upstream, inplace_backward=inplace)
    assert torch.equal(ours, value)
    assert torch.equal(ours_grad, grad)


def test_an_expanded_batch_does_as_its_copy(backend, device):
    logits, labels = make(device=device)
    expanded = logits[:1].expand(B, T, V)
    value, grad = gradient(expanded.contiguous(), labels)
    ours, ours_grad = gradient(expanded, labels)
    assert torch.equal(ours, value)
    assert torch.equal(ours_grad, grad)
    leaf = logits[:1].clone().requires_grad_()
    fastpref.sequence_logps(leaf.expand(B, T, V), labels).sum().backward()
    assert torch.equal(leaf.grad, grad.sum(0, keepdim=True))


def test_strides_of_labels_and_mask_change_nothing(backend, device):
    logits, labels = make(device=device)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)).to(device) < 0.7
    value, grad = gradient(logits, labels, mask=mask)
    turned_labels, turned_mask = labels.t().contiguous().t(), mask.t().contiguous().t()
    ours, ours_grad = gradient(logits, turned_labels, mask=turned_mask)
    assert torch.equal(ours, value)
    assert torch.equal(ours_grad, grad)
    one_mask = mask[:1].expand(B, T)
    assert torch.equal(
        fastpref.sequence_logps(logits, labels, mask=one_mask),
        fastpref.sequence_logps(logits, labels, mask=one_mask.contiguous()),
    )


# The operators


@pytest.mark.parametrize("transform", [[1.0, 1.0, 0.0], [0.7, 1.3, 2.5]], ids=["plain", "softcap"])
@pytest.mark.parametrize("shift", [0, 1])
def test_gradcheck_of_the_torch_path_in_float64(shift, transform, monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "torch")
    logits, labels = make(torch.float64, vocab=7)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) < 0.8
    # The row maxima and sums that come with them are not differentiable: gradcheck sees the log-probs alone.
    assert torch.autograd.gradcheck(
        lambda x: ops.token_logps_op(x, labels, mask, shift, -100, transform, False)[0],
        (logits.requires_grad_(),),
        rtol=1e-7,
        atol=1e-8,
    )


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_the_reduction_in_float64(packed, mean, monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "torch")
    _, labels = make()
    logps = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    offsets = None
    if packed:
        labels, logps, offsets = labels.view(1, -1), logps.view(1, -1), OFFSETS
    scored = labels != -100
    assert torch.autograd.gradcheck(
        # Positions that are not scored receive a gradient that nobody reads.
        lambda x: ops.sequence_reduce_op(torch.where(scored, x, 0), labels, None, offsets, 0, -100, mean)[0],
        (logps.requires_grad_(),),
    )


@pytest.mark.parametrize("name", ["forward", "softcap", "backward", "backward_", "reduce", "reduce packed"])
@slow_interpreted
def test_operators_pass_opcheck(name, backend, device):
    logits, labels = make(device=device, vocab=7)
    mask, offsets = labels > 2, OFFSETS.to(device)
    _, row_max, row_sum = ops.token_logps_op(logits, labels, mask, 1, -100, [1.0, 1.0, 0.0], False)
    grad = torch.randn(B, T, device=device)
    saved = (logits.clone(), labels, mask, row_max, row_sum, 1, -100, [1.0, 1.0, 0.0])
    flat = (grad.view(1, -1).clone().requires_grad_(), labels.view(1, -1), mask.view(1, -1), offsets)
    operator, arguments = {
        "forward": (ops.token_logps_op, (logits.clone().requires_grad_(), labels, None, 0, 3, [1.0, 1.0, 0.0], False)),
        "softcap": (ops.token_logps_op, (logits.clone().requires_grad_(), labels, mask, 1, -100, [0.7, 2, 3], False)),
        "backward": (ops.token_logps_backward_op, (grad, *saved)),
        "backward_": (ops.token_logps_backward_inplace_op, (grad, *saved)),
        "reduce": (ops.sequence_reduce_op, (grad.clone().requires_grad_(), labels, mask, None, 1, -100, True)),
        "reduce packed": (ops.sequence_reduce_op, (*flat, 0, -100, False)),
    }[name]
    if name == "forward":
        arguments[1][0, 1] = 3
    torch.library.opcheck(operator, arguments)


# torch.compile, autocast, checkpointing, memory

COMPILED = {
    "padded": {},
    "mean, lengths, mask": {
        "reduction": "mean",
        "return_lengths": True,
        "mask": torch.arange(B * T).view(B, T) % 4 < 3,
    },
    "packed": {"cu_seqlens": OFFSETS},
    "packed mean, softcap": {"cu_seqlens": OFFSETS, "reduction": "mean", "softcap": 5.0, "return_lengths": True},
}


@pytest.mark.parametrize("name", COMPILED)
@slow_interpreted
def test_compiled_without_graph_breaks_is_bitwise_eager(name, backend, device):
    torch.compiler.reset()
    logits, labels = make(device=device)
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in COMPILED[name].items()}
    if "cu_seqlens" in options:
        logits, labels = logits.flatten(0, 1), labels.flatten()

    def call(x):
        result = fastpref.sequence_logps(x, labels, **options)
        return result if isinstance(result, tuple) else (result,)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        value, *lengths = function(leaf)
        (value * torch.linspace(-1, 2, len(value), device=device)).sum().backward()
        results.append((value.detach(), leaf.grad, *lengths))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(compiled, eager)


def test_one_compiled_graph_serves_every_length(backend, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, y: fastpref.sequence_logps(x, y), fullgraph=True, backend=counter)
    logits, labels = make(device=device)
    for length in (5, 4, 3):
        x, y = logits[:, :length].contiguous(), labels[:, :length].contiguous()
        eager = fastpref.sequence_logps(x, y)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(y, 1)
        assert torch.equal(compiled(x, y), eager)
    assert counter.frame_count == 1


def test_inplace_under_a_full_graph_raises_and_elsewhere_runs_outside_the_graph(backend, device):
    torch.compiler.reset()
    logits, labels = make(device=device)

    def call(x):
        return fastpref.sequence_logps(x * 1.0, labels, inplace_backward=True)

    with pytest.raises(RuntimeError, match=r"inplace_backward=True does not go through torch\.compile"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(logits)
    torch.compiler.reset()
    leaf = logits.clone().requires_grad_()
    value = torch.compile(call, backend="aot_eager")(leaf).sum()
    value.backward(retain_graph=True)
    assert torch.equal(leaf.grad, gradient(logits, labels)[1])
    with pytest.raises(RuntimeError, match="a second backward"):
        value.backward()


def test_autocast_changes_nothing(backend, device):
    logits, labels = make(device=device)
    value, grad = gradient(logits, labels)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, ours_grad = gradient(logits, labels)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, value)
    assert torch.equal(ours_grad, grad)


@pytest.mark.parametrize("reentrant", [False, True])
@slow_interpreted
def test_checkpointing_changes_nothing(reentrant, backend, device):
    logits, labels = make(device=device)

    def head(x):
        return fastpref.sequence_logps(x * 1.5, labels)

    plain, kept = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    head(plain).sum().backward()
    checkpoint(head, kept, use_reentrant=reentrant).sum().backward()
    assert torch.equal(kept.grad, plain.grad)


def largest_allocation(function):
    """Bytes that the greediest operator inside `function` allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return max(event.self_cpu_memory_usage for event in profiler.events())


def test_no_float32_tensor_of_the_size_of_the_logits_is_made(monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "torch")
    logits = torch.randn(2, 600, 1000, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    labels = torch.randint(1000, (2, 600), generator=torch.Generator().manual_seed(7))
    whole = logits.numel() * 4
    assert largest_allocation(lambda: gradient(logits, labels)) < whole / 16
    plain = largest_allocation(lambda: gradient(logits, labels, function=reference.sequence_logps))
    assert plain >= whole, "the measurement does not see the allocations it is for"


def test_a_label_out_of_range_on_a_cpu_raises_with_its_place(backend):
    logits, labels = make()
    labels[1, 3] = V
    with pytest.raises(ValueError, match=rf"labels\[1, 3\] is {V}, outside \[0, V={V}\)"):
        fastpref.sequence_logps(logits, labels)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 3] = False
    assert torch.isfinite(fastpref.sequence_logps(logits, labels, mask=mask)).all()


@pytest.mark.slow
def test_one_dynamic_graph_serves_every_length_and_temperature():
    compiled = torch.compile(
        lambda x, y, t: fastpref.sequence_logps(x, y, temperature=t), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length, temperature in ((5, 1.0), (7, 0.7), (9, 1.3)):
        logits = torch.randn(2, length, 11, generator=torch.Generator().manual_seed(length)).requires_grad_()
        labels = torch.randint(11, (2, length), generator=torch.Generator().manual_seed(length))
        traced = compiled(logits, labels, temperature)
        eager = fastpref.sequence_logps(logits, labels, temperature=temperature)
        assert torch.equal(traced, eager)
        traced_grad, eager_grad = (torch.autograd.grad(value.sum(), logits)[0] for value in (traced, eager))
        assert torch.equal(traced_grad, eager_grad)
