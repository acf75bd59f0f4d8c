"""`model_logps` of tiny random causal LMs: the values and gradients of their logits, for every way to treat those."""

from __future__ import annotations

import copy
import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance import Triple, no_worse_than_eager
from torch import Tensor, nn

pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')

import transformers

from fastpref import reference
from fastpref.linear import linear_sequence_logps
from fastpref.models import model_logps

pytestmark = pytest.mark.numeric
V = 99
SHAPE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OLD_SHAPE = {
    "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Scales and caps at which a forgotten, inverted or misplaced transform is off by far more than rounding.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": OLD_SHAPE,
    "llama": SHAPE,
    "mistral": SHAPE,
    "mixtral": {**SHAPE, "num_local_experts": 4},
    "qwen2": SHAPE,
    "qwen3": SHAPE,
    "qwen3_moe": {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gemma2": {**SHAPE, "final_logit_softcapping": 1.7},
    "gemma3_text": {**SHAPE, "final_logit_softcapping": 2.3},
    "nanochat": {**SHAPE, "final_logit_softcapping": 1.9},
    "recurrent_gemma": {**SHAPE, "num_hidden_layers": 3, "logits_soft_cap": 1.3, "lru_width": 32},
    "cohere": {**SHAPE, "logit_scale": 0.37},
    "cohere2": {**SHAPE, "logit_scale": 2.3},
    "granite": {**SHAPE, "logits_scaling": 3.1},
    "granitemoe": {**SHAPE, "logits_scaling": 0.6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "hyperclovax": {**SHAPE, "logits_scaling": 0.6},
    "phi": SHAPE,  # its head has a bias
    "phi3": SHAPE,
    "olmo2": SHAPE,
    "gpt_neox": SHAPE,
    "gptj": {**OLD_SHAPE, "rotary_dim": 4},  # likewise
    "opt": {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 24},  # its head is narrower than its layers
    "bloom": {**OLD_SHAPE, "hidden_size": 32},
    "mpt": {"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2, "logit_scale": "inv_sqrt_d_model"},  # not used
}  # fmt: skip


def build(name: str, **changes: Any) -> Any:
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes})
    # The grouped products of experts do not take float64.
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").float()
    with torch.no_grad():  # initial weights give almost the same logits everywhere, and zero biases
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 if parameter.dim() < 2 else parameter * 6)
    return model.eval()


def make_batch(padding: str = "right", seed: int = 3) -> dict[str, Tensor]:
    """Five sequences: one with nothing scored, one whose prompt is scored too, and padding of different lengths."""
    torch.manual_seed(seed)
    lengths = [13, 17, 5, 11, 16]
    batch = {name: torch.zeros(5, 17, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((5, 17), -100)
    for row, length in enumerate(lengths):
        place = slice(17 - length, 17) if padding == "left" else slice(0, length)
        ids = torch.randint(3, V, (length,))
        batch["input_ids"][row, place], batch["attention_mask"][row, place] = ids, 1
        batch["labels"][row, place] = ids
        if row != 4:
            batch["labels"][row, : place.start + 4] = -100
    batch["labels"][3] = -100
    return batch


def of_logits(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return reference.sequence_logps(model(**inputs, use_cache=False).logits, batch["labels"], dtype=dtype)


def of_hidden(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    logps = model_logps(model, batch, **options)
    assert isinstance(logps, Tensor)
    return logps


def gradients(model: nn.Module, logps: Tensor) -> tuple[Tensor, list[str]]:
    """Of an uneven sum of the log-probs: every parameter's, one after the other, and the names of those without."""
    model.zero_grad()
    (logps * torch.tensor([0.3, -1.0, 2.0, 0.7, 1.1], device=logps.device)).sum().backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in parameters.items() if p.grad is None]
    found = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters.values()]
    return torch.cat([gradient.flatten() for gradient in found]), missing


def check_parity(model: nn.Module, padding: str = "right") -> None:
    """Values, and gradients of all parameters, are as near to float64 as those of the model's logits.

    Both go through the same layers, where rounding grows: the 20,000 errors of a gradient are nearly one number.
    """
    exact = copy.deepcopy(model).double()

    def draw(seed: int) -> list[Triple]:
        batch = make_batch(padding, seed)
        truth, eager, ours = of_logits(exact, batch, torch.float64), of_logits(model, batch), of_hidden(model, batch)
        assert ours.dtype == torch.float32
        assert ours[3] == 0
        (true_gradient, _), (eager_gradient, without) = gradients(exact, truth), gradients(model, eager)
        gradient, missing = gradients(model, ours)
        assert missing == without
        assert true_gradient.abs().max() > 0.1
        values = tuple(x.detach() for x in (ours, eager, truth))
        return [values, (gradient, eager_gradient, true_gradient)]

    no_worse_than_eager(draw, draws=2)


# In float64 the attention masks of three families make NaN of left padding: there is no truth to compare with.
CASES = [(name, padding) for name in ARCHITECTURES for padding in ("right", "left")]
CASES = [case for case in CASES if case not in (("bloom", "left"), ("gemma2", "left"), ("mpt", "left"))]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("name", "padding"), CASES)
def test_values_and_gradients_are_those_of_the_logits(name: str, tied: bool, padding: str) -> None:
    model = build(name, tie_word_embeddings=tied)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared == tied
    check_parity(model, padding)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "recurrent_gemma"])
def test_the_transform_in_the_config_matters(name: str) -> None:
    """The parity above would not hold without it: the model with none has other log-probs."""
    model, batch = build(name), make_batch()
    head = model.get_output_embeddings()
    hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    bare = reference.sequence_logps(head(hidden), batch["labels"])
    assert (bare - of_hidden(model, batch)).abs().max() > 1


@pytest.mark.parametrize("name", ["llama", "phi", "mixtral"])
def test_lora_on_the_backbone_trains_as_on_logits(name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=3, init_lora_weights=False)
    model = peft.get_peft_model(build(name), config).eval()
    assert not model.get_output_embeddings().weight.requires_grad
    check_parity(model)
    with model.disable_adapter(), torch.no_grad():  # the reference of an adapter is the model without it
        base = of_hidden(model, make_batch())
    torch.testing.assert_close(base, of_logits(build(name), make_batch()).detach(), rtol=1e-5, atol=0)
    assert (base - of_hidden(model, make_batch())).abs().max() > 0.1


def test_a_head_that_peft_trains_as_a_whole_gets_its_gradient() -> None:
    """And while adapters are off, the original head computes."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=3, init_lora_weights=False)
    model = peft.get_peft_model(build("llama", tie_word_embeddings=False), config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)  # of the copy in training
    check_parity(model)
    trained = dict(model.named_parameters())["base_model.model.lm_head.modules_to_save.default.weight"]
    assert trained.grad is not None
    assert trained.grad.abs().max() > 0
    with model.disable_adapter(), torch.no_grad():
        base = of_hidden(model, make_batch())
    torch.testing.assert_close(base, of_logits(build("llama"), make_batch()).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_auxiliary_loss_of_experts_is_in_the_outputs_with_its_gradient(name: str) -> None:
    model, batch = build(name), make_batch()
    _, outputs = model_logps(model, {**batch, "output_router_logits": True}, return_outputs=True)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    expected = model(**inputs, output_router_logits=True).aux_loss
    torch.testing.assert_close(outputs.aux_loss, expected, rtol=0, atol=0)
    outputs.aux_loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_outputs_are_the_models_own_and_hold_no_logits() -> None:
    model, batch = build("llama"), make_batch()
    logps, outputs = model_logps(model, {**batch, "output_hidden_states": True}, return_outputs=True)
    assert type(outputs).__name__ == "CausalLMOutputWithPast"
    assert outputs.logits is None
    assert outputs.loss is None
    assert "logits" not in outputs
    assert len(outputs.hidden_states) == 3
    torch.testing.assert_close(logps, of_hidden(model, batch), rtol=0, atol=0)


def test_nothing_is_cached_unless_the_batch_says_so() -> None:
    model, batch = build("llama"), make_batch()
    assert model.config.use_cache
    _, outputs = model_logps(model, batch, return_outputs=True)
    assert outputs.past_key_values is None
    _, outputs = model_logps(model, {**batch, "use_cache": True}, return_outputs=True)
    assert outputs.past_key_values is not None


def test_what_else_the_forward_takes_reaches_it() -> None:
    model, batch = build("gpt2"), make_batch()
    positions = {"position_ids": torch.arange(17).flip(0).expand(5, 17)}
    expected = of_logits(model, {**batch, **positions})
    torch.testing.assert_close(of_hidden(model, {**batch, **positions}), expected, rtol=1e-5, atol=0)
    assert (expected - of_logits(model, batch)).abs().max() > 0.1


def test_options_mean_what_they_mean_for_sequence_logps() -> None:
    model, batch = build("gemma2"), make_batch()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = reference.sequence_logps(logits, batch["labels"], reduction="mean", temperature=1.7)
    batch["labels"][batch["labels"] == -100] = -7
    for budget in (None, "256KiB"):
        ours = of_hidden(model, batch, reduction="mean", temperature=1.7, ignore_index=-7, memory_budget=budget)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"\[3\] of 5 have no scored token"):
        of_hidden(model, batch, ignore_index=-7, on_empty="raise")


def test_logits_are_never_built_and_the_check_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's own product sees a few rows in the first call, later ones do without; a new weight is a new head."""
    model, batch = build("llama"), make_batch()
    rows = []
    linear = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        if self is model.lm_head:
            rows.append(x.shape[-2])
        return linear(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    for _ in range(3):
        of_hidden(model, batch)
    assert rows == [12]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    of_hidden(model, batch)
    assert rows == [12, 12]
    assert "forward" not in vars(model.lm_head)


def test_a_failing_forward_leaves_the_head_as_it_was() -> None:
    model, batch = build("llama"), make_batch()
    with pytest.raises(IndexError, match="out of range"):
        of_hidden(model, {**batch, "input_ids": batch["input_ids"] + V})
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(of_hidden(model, batch), of_logits(model, batch), rtol=1e-5, atol=0)


def test_outputs_without_names_raise_and_say_why() -> None:
    model, batch = build("llama"), make_batch()
    with pytest.raises(ValueError, match=r"gave a tuple, not an output with logits: drop return_dict=False"):
        of_hidden(model, {**batch, "return_dict": False})


def test_a_head_whose_weight_accelerate_brings_for_its_forward() -> None:
    """Offloaded parameters are on the meta device everywhere else."""
    from accelerate import cpu_offload

    model, batch = build("llama"), make_batch()
    with torch.no_grad():
        expected = of_logits(model, batch)
        offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
        for _ in range(2):
            torch.testing.assert_close(of_hidden(offloaded, batch), expected, rtol=1e-5, atol=0)
    assert model.lm_head.weight.is_meta


def test_two_threads_are_never_given_each_others_scores() -> None:
    """While one scores, the other may call the model itself; to score it has to wait, and is told so."""
    model, batch = build("llama"), make_batch()
    expected, found = of_logits(model, batch), []

    def other() -> None:
        found.append(of_logits(model, batch))
        with pytest.raises(RuntimeError, match="another thread is scoring with this model"):
            of_hidden(model, batch)
        found.append(True)

    def meanwhile(*_: Any) -> None:
        thread = threading.Thread(target=other)
        handle.remove()
        thread.start()
        thread.join()

    handle = model.model.layers[0].register_forward_pre_hook(meanwhile)
    torch.testing.assert_close(of_hidden(model, batch), expected, rtol=1e-5, atol=0)
    assert len(found) == 2
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(of_hidden(model, batch), expected, rtol=1e-5, atol=0)


def test_a_call_inside_of_another_on_the_same_model_is_its_own() -> None:
    model, batch, inner = build("llama"), make_batch(), []
    other = {name: x.flip(0) for name, x in batch.items()}
    expected = of_logits(model, batch)

    def nested(*_: Any) -> None:
        handle.remove()
        inner.append(of_hidden(model, other))

    handle = model.model.layers[0].register_forward_pre_hook(nested)
    torch.testing.assert_close(of_hidden(model, batch), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(inner[0], expected.flip(0), rtol=1e-5, atol=0)


def test_without_gradient_there_is_none_and_train_mode_is_fine() -> None:
    model, batch = build("llama").train(), make_batch()
    with torch.no_grad():
        without = of_hidden(model, batch)
    assert not without.requires_grad
    torch.testing.assert_close(without, of_hidden(model, batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_bfloat16_weights_round_no_worse_than_their_logits(name: str) -> None:
    """The logits are rounded to bfloat16 once more than what is summed here."""
    model = build(name).bfloat16()
    head, config = model.get_output_embeddings(), model.config
    scale, cap = getattr(config, "logit_scale", 1.0), getattr(config, "final_logit_softcapping", None)

    @torch.no_grad()
    def draw(seed: int) -> list[Triple]:
        batch, seen = make_batch(seed=seed), []
        ours, eager = of_hidden(model, batch), of_logits(model, batch)
        handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        handle.remove()
        logits = seen[0].double() @ head.weight.double().T
        truth = reference.sequence_logps(logits, batch["labels"], logit_scale=scale, softcap=cap, dtype=torch.float64)
        return [(ours, eager, truth)]

    no_worse_than_eager(draw, draws=4)


@pytest.mark.parametrize("where", ["around", "in the model's forward only"])
def test_the_head_is_taken_under_autocast_as_it_was_set_where_the_head_is(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate leaves autocast with the model's forward; and no call but the first computes with the head."""
    model, batch = build("llama"), make_batch()
    full = of_logits(model, batch)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast:
        rounded = of_logits(model, batch)
    seen: list[tuple[str, bool]] = []

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(("ours", torch.is_autocast_enabled("cpu")))
        return linear_sequence_logps(*args, **options)

    monkeypatch.setattr("fastpref.models.api.linear_sequence_logps", spy)
    plain_head = model.lm_head.forward

    def head(x: Tensor) -> Tensor:
        seen.append(("head's product", torch.is_autocast_enabled("cpu")))
        return plain_head(x)

    monkeypatch.setattr(model.lm_head, "forward", head)
    if where == "around":
        with autocast:
            found = [of_hidden(model, batch) for _ in range(2)]
    else:
        monkeypatch.setattr(model, "forward", autocast(model.forward))
        found = [of_hidden(model, batch) for _ in range(2)]
    assert seen == [("head's product", True), ("ours", True), ("ours", True)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert not torch.is_autocast_enabled("cpu")
    assert (found[0] - full).abs().max() > 1e-3  # the layers' products were made in bfloat16
    assert (found[0] - rounded).abs().max() <= 2 * (rounded - full).abs().max().item()


def test_a_wrapper_that_keeps_the_model_in_module_is_called_itself(tmp_path: Path) -> None:
    """DDP reduces gradients of what its own forward was called for, head included."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model, batch = build("llama", tie_word_embeddings=False), make_batch()
        expected = gradients(model, of_logits(model, batch))[0].clone()
        for unused in (False, True):
            wrapped = nn.parallel.DistributedDataParallel(build("llama", tie_word_embeddings=False),
                                                          find_unused_parameters=unused)  # fmt: skip
            for _ in range(2):  # the second without the check
                ours, missing = gradients(wrapped, of_hidden(wrapped, batch))
                assert not missing
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, batch = build("llama").train(), make_batch()
    plain = gradients(model, of_hidden(model, batch))[0]
    # transformers 5 renamed it on the way.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    torch.testing.assert_close(gradients(model, of_hidden(model, batch))[0], plain, rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_for_every_batch() -> None:
    """The head's place in the compiled graph is retraced once, for the calls after the check."""
    model, batch = build("llama"), make_batch()
    compiled = torch.compile(model, backend="eager")
    for step in range(4):
        batch["input_ids"] = batch["input_ids"].roll(step, 0)
        ours = gradients(model, of_hidden(compiled, batch))[0]
        expected = gradients(model, of_logits(model, batch))[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit", ["head in the root", "head alone", "one unit for all"])
@pytest.mark.parametrize("reshard", [False, None, True])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_under_fsdp_trains_however_it_is_sharded(
    tied: bool, reshard: bool | None, unit: str, tmp_path: Path
) -> None:
    """With `reshard` its weight is there in its forward, gone after it, and gathered again for its gradient."""
    from torch.distributed.fsdp import fully_shard

    if tied and unit == "head alone":
        pytest.skip("a weight belongs to one unit")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model, batch = build("llama", tie_word_embeddings=tied), make_batch()
        expected, _ = gradients(model, of_logits(model, batch))
        if unit != "one unit for all":
            for layer in model.model.layers:
                fully_shard(layer)
        if unit == "head alone":
            fully_shard(model.lm_head, reshard_after_forward=bool(reshard))
        fully_shard(model, reshard_after_forward=reshard)
        for _ in range(2):
            model.zero_grad()
            logps = of_hidden(model, batch)
            if reshard:
                assert hasattr(model.lm_head.weight, "full_tensor")
            gradients(model, logps)
            found = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_every_option_of_the_linear_path_that_makes_sense_here_is_an_option() -> None:
    theirs = set(inspect.signature(linear_sequence_logps).parameters)
    ours = set(inspect.signature(model_logps).parameters)
    # Labels carry the mask and come unshifted; packing is the model's affair; the rest is read from the model, and who
    # splits a model's vocabulary or sequences has a head and hidden states to call the linear path with.
    left_out = {"hidden", "weight", "bias", "labels", "mask", "shift", "cu_seqlens", "return_lengths",
                "logit_scale", "softcap", "vocab_group", "context_group", "context_layout"}  # fmt: skip
    assert theirs - ours == left_out
