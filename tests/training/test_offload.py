"""Saved activations in CPU memory: the same gradients, what is moved and what stays. The "accelerator" is the CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastpref.training import TrainConfig, train
from fastpref.training.adapters import choose_trained
from fastpref.training.memory import offload
from fastpref.training.memory.offload import ActivationOffload, offloading
from fastpref.training.prepare import prepare
from fastpref.training.step import batch_logps

Make = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=302, max_position_embeddings=64, tie_word_embeddings=False, **shape))


@pytest.fixture
def run(make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    return prepare(make_config(layout="padded"), model=make_model(), tokenizer=tokenizer, train_dataset=rows)


def step(model: Any, run: Any, *, offloaded: bool, logps: str = "linear") -> tuple[list[Tensor], ActivationOffload]:
    """One forward and backward; the gradients, and the context that the forward ran in, or would have."""
    model.train()
    model.zero_grad()
    context = ActivationOffload(model, CPU, smallest=1 if offloaded else 1 << 40)
    with context:
        chosen, rejected = batch_logps(model, run.collate(run.pairs[:4]), TrainConfig(logps=logps), reduction="sum")
    (chosen - rejected).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], context


@pytest.mark.parametrize("logps", ["linear", "logits"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_bitwise_those_without_offloading(
    checkpointing: bool, logps: str, llama: Any, make_model: Make, run: Any
) -> None:
    gpt2 = make_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    for model in (gpt2, llama, choose_trained(make_model(), TrainConfig(freeze_head=True))[0]):
        if checkpointing:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        here, untouched = step(model, run, offloaded=False, logps=logps)
        moved, context = step(model, run, offloaded=True, logps=logps)
        assert untouched.moved_storages == 0
        assert context.moved_storages >= 2  # of every layer its input at least
        assert len(here) == len(moved) > 0
        assert all(torch.equal(a, b) for a, b in zip(here, moved, strict=True))


def test_with_checkpointing_the_inputs_of_the_layers_are_moved(llama: Any, run: Any) -> None:
    (getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable)()
    ids = run.collate(run.pairs[:4]).inputs["input_ids"]
    one_input = ids.numel() * llama.config.hidden_size * 4
    llama.train()
    with ActivationOffload(llama, CPU, smallest=one_input) as context:
        llama.model(input_ids=ids, use_cache=False)
    layers = llama.config.num_hidden_layers
    # And the final norm keeps its input, in float32 and normalised.
    assert layers <= context.moved_storages <= layers + 3
    assert context.moved_bytes == context.moved_storages * one_input


class Saved(nn.Module):
    """x @ W.T three times, then relu: x is saved as three views, W as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2  # not a leaf
        return sum(layer(x).relu() for layer in self.layers)  # type: ignore[return-value]


def test_views_of_a_storage_are_moved_once_and_weights_never() -> None:
    model, x = Saved(), torch.randn(4, 9, 32, requires_grad=True)
    with ActivationOffload(model, CPU, smallest=1) as context:
        out = model(x)
    size = 4 * 9 * 32 * 4
    assert (context.moved_storages, context.moved_bytes) == (1 + 3, 4 * size)  # x, and what each relu gave
    out.sum().backward()
    assert all(layer.weight.grad is not None for layer in model.layers)


@pytest.mark.parametrize("frozen", [False, True])
def test_copies_of_weights_that_autocast_makes_stay(frozen: bool) -> None:
    model, x = Saved(), torch.randn(4, 9, 32, requires_grad=True)
    model.requires_grad_(not frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16), ActivationOffload(model, CPU, smallest=1) as context:
        model(x)
    inputs = 0 if frozen else 3  # only a weight's gradient needs x, which autocast converts for each layer anew
    assert (context.moved_storages, context.moved_bytes) == (inputs + 3, (inputs + 3) * 4 * 9 * 32 * 2)


def test_small_tensors_stay() -> None:
    model, x = Saved(), torch.randn(4, 9, 32, requires_grad=True)
    with ActivationOffload(model, CPU, smallest=4 * 9 * 32 * 4 + 1) as context:
        model(x)
    assert context.moved_storages == 0
    assert offload.SMALLEST == 1 << 20


def test_a_tensor_that_is_changed_in_place_between_two_uses_is_moved_as_it_was_at_each() -> None:
    """Autograd would refuse it without hooks; here each use gets back what it saw."""
    x, model = torch.randn(6, 7, requires_grad=True), nn.Linear(1, 1)
    with ActivationOffload(model, CPU, smallest=1) as context:
        y = x * 1
        first = y.square()
        y.mul_(3)
        second = y.square()
    assert context.moved_storages == 2
    (first + second).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() + 18 * x.detach(), rtol=1e-6, atol=1e-6)


def test_strides_and_offsets_come_back_as_they_were() -> None:
    base = torch.randn(10, 12, requires_grad=True)
    seen: list[Tensor] = []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a.sum() + b.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            seen.extend(ctx.saved_tensors)
            return torch.ones_like(seen[0]), torch.ones_like(seen[1])

    whole = base * 1
    a, b = whole[3:9, 2:7].t(), whole[:, ::3]
    with ActivationOffload(nn.Linear(1, 1), CPU, smallest=1) as context:
        out = Keep.apply(a, b)
    assert (context.moved_storages, context.moved_bytes) == (1, 10 * 12 * 4)
    out.backward()
    for got, want in zip(seen, (a, b), strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
        assert got.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()  # from the copy
    assert seen[0].untyped_storage().data_ptr() == seen[1].untyped_storage().data_ptr()  # one storage came back


@pytest.mark.slow
def test_the_copies_live_no_longer_than_the_graph() -> None:
    model, x = Saved(), torch.randn(4, 9, 32, requires_grad=True)
    with ActivationOffload(model, CPU, smallest=1) as context:
        made: list[weakref.ref[Any]] = []
        move = context._move

        def noted(tensor: Tensor) -> Any:
            found = move(tensor)
            made.append(weakref.ref(found))
            return found

        context._move = noted  # type: ignore[method-assign]
        out = model(x)
    assert sum(ref() is not None for ref in made) == len(made) == 4
    out.sum().backward()
    gc.collect()
    assert not any(ref() for ref in made)


def test_what_head_and_loss_save_stays(llama: Any, run: Any) -> None:
    """Backward begins with it: hidden states, tiles or logits would come back at once."""
    batch = run.collate(run.pairs[:4])
    with ActivationOffload(llama, CPU, smallest=1) as whole:
        llama.model(**batch.inputs, use_cache=False)
    _, linear = step(llama, run, offloaded=True)
    _, logits = step(llama, run, offloaded=True, logps="logits")
    assert linear.moved_bytes == logits.moved_bytes == whole.moved_bytes > 0
    assert not llama.lm_head._forward_pre_hooks


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_run_that_offloads_reaches_bitwise_the_same_weights(
    layout: str, llama: Any, make_config: Make, tokenizer: Any, rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    contexts: list[ActivationOffload] = []

    def always(config: TrainConfig, model: Any, device: torch.device) -> Any:
        if not torch.is_grad_enabled():
            return nullcontext()
        contexts.append(ActivationOffload(model, device, smallest=1))
        return contexts[-1]

    start = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    weights = []
    for name in ("plain", "offloaded"):
        llama.load_state_dict(start)
        if name == "offloaded":
            monkeypatch.setattr("fastpref.training.step.offloading", always)
        config = make_config(layout=layout, max_steps=2, output_dir=f"{make_config().output_dir}-{name}")
        train(config, model=llama, tokenizer=tokenizer, train_dataset=rows)
        weights.append({key: value.clone() for key, value in llama.state_dict().items()})
    assert len(contexts) == 2
    assert all(context.moved_storages > 10 for context in contexts)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in start)


def test_the_option_turns_it_on_and_a_run_on_the_cpu_refuses_it(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    config = make_config(offload_activations=True)
    assert isinstance(offloading(config, make_model(), CPU), ActivationOffload)
    assert not isinstance(offloading(make_config(), make_model(), CPU), ActivationOffload)
    with pytest.raises(ValueError, match=r"offload_activations moves .* and this run is on the CPU: leave it out"):
        prepare(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
