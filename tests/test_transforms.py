"""What PyTorch does around a call: compile, autocast, checkpointing, functional_call, torch.func, CUDA graphs.

Each works, or is refused in words. The parts that have tests of their own: compile and autocast of one function
(test_logps_autograd.py, test_linear_compile.py, test_losses_fused.py), checkpointing around the log-probs of a batch
(test_logps_autograd.py, test_linear_autograd.py) and inside a model (test_models.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastpref
from fastpref import reference
from fastpref.losses import PairLogps
from fastpref.parallel import groups

B, T, H, V = 4, 5, 6, 23


def make(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (B, T, H), weight (V, H), labels (B, T) and the reference's log-probs (B,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, H, generator=generator), torch.randn(V, H, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, 2] = -100
    ref = torch.randn(B, generator=generator) * 5 - 15
    return hidden.to(device), weight.to(device), labels.to(device), ref.to(device)


def tiny_model() -> Any:
    transformers = pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": V}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **shape, **drop))


def batch_of(labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": labels.clamp(min=0), "labels": labels}


def loss_of(logps: Tensor, ref: Tensor) -> Tensor:
    return fastpref.preference_loss(*logps.chunk(2), *ref.chunk(2)).loss


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in module.named_parameters() if x.grad is not None}


# torch.compile


@pytest.mark.parametrize("path", [pytest.param("logits", marks=pytest.mark.slow), "linear"])
def test_a_step_with_its_extras_and_entropy_bonus_is_one_graph(path: str, device: str) -> None:
    """Log-probs, extras, loss and bonus compiled with fullgraph=True: the values and gradients of eager."""
    torch.compiler.reset()
    hidden, weight, labels, ref = make(device)

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"extras": ("entropy", "is_top1"), "entropy_grad": True}
        if path == "linear":
            logps, extras = fastpref.linear_sequence_logps(hidden, weight, labels, **options)
        else:
            logps, extras = fastpref.sequence_logps(hidden @ weight.T, labels, **options)
        return loss_of(logps, ref) - 0.1 * extras.entropy.sum(), logps, extras.entropy, extras.is_top1

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, *others = function(*leaves)
        found.append([loss.detach(), *others, *torch.autograd.grad(loss, leaves)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
def test_model_logps_in_compiled_code_runs_outside_of_the_graph_and_a_full_graph_says_why() -> None:
    torch.compiler.reset()
    model, (_, _, labels, ref) = tiny_model(), make()

    def step(batch: dict[str, Tensor]) -> Tensor:
        return loss_of(fastpref.models.model_logps(model, batch), ref)

    expected = gradients(model, step(batch_of(labels)))
    compiled = torch.compile(step, backend="eager")
    for _ in range(2):  # the first call of a model checks its head
        for name, gradient in gradients(model, compiled(batch_of(labels))).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    torch.compiler.reset()  # which would have kept the parts of the same function
    with pytest.raises(RuntimeError, match=r"compile the model, model_logps\(torch\.compile\(model\), batch\)"):
        torch.compile(step, fullgraph=True, backend="eager")(batch_of(labels))


# Autocast


def test_autocast_reaches_the_fused_loss_as_it_does_the_log_probs(device: str) -> None:
    hidden, weight, labels, ref = make(device)
    found = []
    with torch.autocast(device, dtype=torch.bfloat16):
        for fused in (True, False):
            leaves = [x.clone().requires_grad_() for x in (hidden.bfloat16(), weight)]
            if fused:
                loss = fastpref.linear_preference_loss(*leaves, labels, ref).loss
            else:
                loss = loss_of(fastpref.linear_sequence_logps(*leaves, labels), ref)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    (loss, dh, dw), (_, other_dh, other_dw) = found
    assert (loss.dtype, dh.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, found[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(dh, other_dh, rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(dw, other_dw, rtol=1e-4, atol=1e-5)


# torch.utils.checkpoint


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("path", ["logits", "linear", "fused"])
def test_checkpointing_around_the_loss_changes_nothing(path: str, reentrant: bool, device: str) -> None:
    """The bits of all gradients, the head's included, also under an upstream gradient that is not 1."""
    hidden, weight, labels, ref = make(device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden * 1.5
        if path == "fused":
            return fastpref.linear_preference_loss(hidden, weight, labels, ref).loss
        if path == "linear":
            return loss_of(fastpref.linear_sequence_logps(hidden, weight, labels), ref)
        return loss_of(fastpref.sequence_logps(hidden @ weight.T, labels), ref)

    found = []
    for around in (loss, lambda *x: checkpoint(loss, *x, use_reentrant=reentrant)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        found.append(torch.autograd.grad((around(*leaves) * 3.0).sum(), leaves) if not reentrant else None)
        if reentrant:  # which knows backward() alone
            (around(*leaves) * 3.0).sum().backward()
            found[-1] = tuple(x.grad for x in leaves)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_model_logps_changes_nothing(reentrant: bool) -> None:
    """The head takes part again when the forward is made again."""
    model, (_, _, labels, ref) = tiny_model(), make()
    batch = batch_of(labels)

    def loss(anchor: Tensor) -> Tensor:  # the reentrant kind needs an input that requires a gradient
        return loss_of(fastpref.models.model_logps(model, batch), ref) + 0.0 * anchor

    expected = gradients(model, loss(torch.zeros(())))
    anchor = torch.zeros((), requires_grad=True)
    found = gradients(model, checkpoint(loss, anchor, use_reentrant=reentrant))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


# torch.func


class Scores(nn.Module):
    """A module whose forward is a call of ours, as a trainer's wrapper would be."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        if path == "model":
            self.model = tiny_model()
        else:
            self.head = nn.Linear(H, V)

    def forward(self, hidden: Tensor, labels: Tensor) -> Any:
        if self.path == "model":
            return fastpref.models.model_logps(self.model, batch_of(labels))
        if self.path == "linear":
            return fastpref.linear_sequence_logps(hidden, self.head.weight, labels, bias=self.head.bias)
        return fastpref.sequence_logps(self.head(hidden), labels)


@pytest.mark.parametrize("path", ["logits", "linear", "model"])
def test_functional_call_scores_with_the_parameters_that_it_is_given(path: str) -> None:
    """Values and gradients of a copy that owns those parameters; the module itself neither used nor changed."""
    torch.manual_seed(0)
    module, (hidden, _, labels, ref) = Scores(path), make()
    before = module(hidden, labels)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for x in other.parameters():
            x.mul_(1.3)
    expected = other(hidden, labels)
    wanted = gradients(other, loss_of(expected, ref))
    given = {name: x.detach().clone().requires_grad_() for name, x in other.named_parameters()}
    for _ in range(2):  # the first call of a model checks its head
        found = torch.func.functional_call(module, given, (hidden, labels))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        found_gradients = torch.autograd.grad(loss_of(found, ref), list(given.values()))
        for name, gradient in zip(given, found_gradients, strict=True):
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)
    assert all(x.grad is None for x in module.parameters())
    assert torch.equal(module(hidden, labels), before)


def calls() -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of hidden states, of which logits are made where logits are wanted."""
    _, weight, labels, ref = make()
    return {
        "token_logps": lambda h: fastpref.token_logps(h @ weight.T, labels),
        "sequence_logps": lambda h: fastpref.sequence_logps(h @ weight.T, labels),
        "linear_token_logps": lambda h: fastpref.linear_token_logps(h, weight, labels),
        "linear_sequence_logps": lambda h: fastpref.linear_sequence_logps(h, weight, labels),
        "linear_preference_loss": lambda h: fastpref.linear_preference_loss(h, weight, labels, ref).loss,
    }


@pytest.mark.parametrize("transform", ["grad", "vjp", "vmap", "jacrev"])
@pytest.mark.parametrize("name", sorted(calls()))
def test_function_transforms_are_refused_in_words(name: str, transform: str) -> None:
    function, hidden = calls()[name], make()[0]
    transformed: Callable[[Tensor], Any] = {
        "grad": torch.func.grad(lambda h: function(h).sum()),
        "vjp": lambda h: torch.func.vjp(function, h),
        "vmap": lambda h: torch.func.vmap(function)(torch.stack([h, h])),
        "jacrev": torch.func.jacrev(function),
    }[transform]
    with pytest.raises(RuntimeError, match=r"do not go through torch\.func's transforms .* use torch\.autograd\.grad"):
        transformed(hidden)


def test_the_reference_goes_through_function_transforms_as_the_refusal_says() -> None:
    hidden, weight, labels, _ = make()
    logits = hidden @ weight.T

    def values(x: Tensor) -> Tensor:
        return reference.sequence_logps(x, labels)

    leaf = logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(fastpref.sequence_logps(leaf, labels).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: values(x).sum())(logits), wanted, rtol=1e-5, atol=1e-6)
    both = torch.func.vmap(values)(torch.stack([logits, 2 * logits]))
    torch.testing.assert_close(both[1], fastpref.sequence_logps(2 * logits, labels), rtol=1e-5, atol=0)


def test_the_losses_have_a_gradient_under_torch_func_and_say_what_to_take_under_vmap() -> None:
    chosen, rejected, ref_chosen, ref_rejected = torch.linspace(-9, -2, 12).view(4, 3)

    def loss(x: Tensor) -> Tensor:
        return fastpref.preference_loss(x, rejected, ref_chosen, ref_rejected).loss

    leaf = chosen.clone().requires_grad_()
    assert torch.equal(torch.func.grad(loss)(chosen), torch.autograd.grad(loss(leaf), leaf)[0])
    with pytest.raises(NotImplementedError, match=r"for torch\.func\.vmap take the formula, get_loss\(name\)\.formula"):
        torch.func.vmap(loss)(torch.stack([chosen, rejected]))
    formula = fastpref.get_loss("sigmoid").formula
    found = torch.func.vmap(lambda x: formula(PairLogps(x, rejected, ref_chosen, ref_rejected), 0.1))(chosen[None])
    torch.testing.assert_close(found.mean(), loss(chosen), rtol=1e-6, atol=0)


# CUDA graphs


@pytest.mark.parametrize("extras", [(), ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")], ids=["", "extras"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_step_from_logits_looks_at_no_value(
    reduction: str, packed: bool, extras: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has no values: forward, loss and backward outside of the operators."""
    monkeypatch.setenv("FASTPREF_BACKEND", "torch")
    logits = torch.empty(B, T, V, device="meta", requires_grad=True)
    labels, mask = (torch.empty(B, T, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float32))
    options: dict[str, Any] = {"reduction": reduction, "return_lengths": True, "mask": mask, "extras": extras}
    if packed:
        options |= {"cu_seqlens": torch.empty(B + 1, dtype=torch.int32, device="meta"), "mask": mask.flatten()}
        rows, labels = logits.flatten(0, 1), labels.flatten()
    else:
        rows = logits
    logps, lengths, *rest = fastpref.sequence_logps(rows, labels, entropy_grad=bool(extras), **options)
    loss = loss_of(logps, torch.empty(B, device="meta")) + (rest[0].entropy.sum() if extras else 0)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad.shape, lengths.shape) == ((B, T, V), (B,))


@pytest.mark.parametrize("name", sorted(fastpref.LOSSES))
def test_no_loss_looks_at_a_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREF_BACKEND", "torch")
    count = 4 if fastpref.get_loss(name).needs_reference else 2
    logps = [torch.empty(3, device="meta", requires_grad=i < 2) for i in range(count)]
    fastpref.preference_loss(*logps, loss=name).loss.backward()
    assert logps[0].grad is not None


@pytest.mark.parametrize("launcher", ["forward", "backward", "statistics", "reduce", "loss"])
def test_no_launcher_of_a_kernel_looks_at_a_value(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, with a kernel that does nothing but count its launches."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from fastpref.kernels import logps, logps_backward, preference, sequence, statistics

    launches = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: launches.append(grid)

    for module, name in (
        (logps, "token_logps_forward_kernel"),
        (logps_backward, "token_logps_backward_kernel"),
        (statistics, "row_statistics_kernel"),
        (sequence, "sequence_reduce_kernel"),
        (preference, "_margin_loss_kernel"),
    ):
        monkeypatch.setattr(module, name, Kernel())

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    logits, labels, mask = empty(B, T, V), empty(B, T, dtype=torch.int64), empty(B, T, dtype=torch.bool)
    some, offsets = empty(B, T), empty(B + 1, dtype=torch.int32)
    form = {"shape": "sigmoid", "scale": 0.1, "lam": 0.0, "tilt": 0.0, "target": 0.0, "clip": 0.0}
    call: Callable[[], Any] = {
        "forward": lambda: logps.token_logps_forward(logits, labels, mask, 1, -100, 0.7, 2.0, 5.0),
        "backward": lambda: logps_backward.token_logps_backward(
            some, logits, labels, mask, some, some, 1, -100, inplace=True
        ),
        "statistics": lambda: statistics.row_statistics(logits, labels, mask, 1, -100, sums=True),
        "reduce": lambda: sequence.sequence_reduce(
            some.view(1, -1), labels.view(1, -1), None, offsets, shift=1, ignore_index=-100, mean=True
        ),
        "loss": lambda: preference.launch_margin_loss(*[empty(3)] * 4, beta=0.1, **form),  # type: ignore[arg-type]
    }[launcher]
    call()
    assert len(launches) == 1


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("name", ["linear_token_logps", "linear_sequence_logps", "linear_preference_loss"])
@pytest.mark.usefixtures("capturing")
def test_the_linear_path_refuses_to_be_captured(name: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"counts the scored rows on the host, which a CUDA graph cannot record: cap"
    ):
        calls()[name](make()[0])


@pytest.mark.usefixtures("capturing")
def test_what_the_host_has_to_read_refuses_to_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels on the torch path, lengths with on_empty="raise", what ranks agree on."""
    hidden, weight, labels, _ = make()
    monkeypatch.setenv("FASTPREF_BACKEND", "torch")
    with pytest.raises(
        RuntimeError, match="look at labels on the host, which a CUDA graph cannot record: take the Tri"
    ):
        fastpref.sequence_logps(hidden @ weight.T, labels)
    with pytest.raises(RuntimeError, match="on_empty='raise' looks at how many tokens are scored, which a CUDA graph"):
        fastpref.inputs.refuse_empty(torch.ones(2))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "ProcessGroup", object)
    with pytest.raises(
        RuntimeError, match="the ranks of vocab_group agree by what they read on the host, which a CUDA"
    ):
        groups.members("vocab_group", object())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("extras", [(), ("entropy",)], ids=["", "extras"])
def test_a_step_from_logits_is_captured_and_replayed_with_other_data(extras: tuple[str, ...]) -> None:
    """Forward, loss and backward in one CUDA graph: the bits of eager for each batch that is copied in."""
    generator = torch.Generator("cuda").manual_seed(0)
    batches = [
        (
            torch.randn(B, T, 1003, device="cuda", generator=generator, dtype=torch.bfloat16),
            torch.randint(1003, (B, T), device="cuda", generator=generator),
            torch.randn(B, device="cuda", generator=generator),
        )
        for _ in range(3)
    ]
    batches[1][1][0, 2:] = -100

    def step(logits: Tensor, labels: Tensor, ref: Tensor) -> list[Tensor]:
        found = fastpref.sequence_logps(logits, labels, extras=extras, entropy_grad=bool(extras))
        logps, entropy = (found[0], found[1].entropy) if extras else (found, torch.zeros(1, device="cuda"))
        loss = loss_of(logps, ref) - 0.1 * entropy.sum()
        return [loss.detach(), logps.detach(), *torch.autograd.grad(loss, logits)]

    logits, labels, ref = (x.clone() for x in batches[0])
    logits.requires_grad_()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(logits, labels, ref)  # compiles and loads the kernels
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, labels, ref)
    for batch in batches:
        with torch.no_grad():
            for held, new in zip((logits, labels, ref), batch, strict=True):
                held.copy_(new)
        graph.replay()
        eager = step(batch[0].clone().requires_grad_(), *batch[1:])
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    weight = torch.randn(1003, H, device="cuda", requires_grad=True)
    hidden = torch.randn(B, T, H, device="cuda")
    with (
        pytest.raises(RuntimeError, match="counts the scored rows on the host"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fastpref.linear_sequence_logps(hidden, weight, labels)
    torch.cuda.synchronize()
