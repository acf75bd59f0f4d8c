"""LoRA and a frozen head: what is trained, what is refused, and that checkpointing changes no gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason='needs pip install "fastpref[train]"')

from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fastpref.training import TrainConfig, train
from fastpref.training.adapters import choose_trained, say_how_to_merge
from fastpref.training.config import LEARNING_RATE, LORA_LEARNING_RATE
from fastpref.training.data.collate import Batch
from fastpref.training.prepare import prepare
from fastpref.training.step import batch_logps

Make = Callable[..., Any]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Untied, with nn.Linear layers, where GPT-2 is tied and has Conv1D."""
    torch.manual_seed(3)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=302, max_position_embeddings=64, tie_word_embeddings=False, **shape))


def lora(**options: Any) -> TrainConfig:
    return TrainConfig(**{"lora_rank": 4, **options})


def adapted(model: Any) -> set[str]:
    """The names of the modules with LoRA layers."""
    return {name.partition("base_model.model.")[2] for name, m in model.named_modules() if hasattr(m, "lora_A")}


def test_all_linear_is_every_linear_layer_but_the_head(llama: Any, make_model: Make) -> None:
    model, lines = choose_trained(llama, lora())
    assert {name.rpartition(".")[2] for name in adapted(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained:,} weights are trained" in lines[0]
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    model, _ = choose_trained(make_model(), lora())
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"c_attn", "c_proj", "c_fc"}


def test_gpt2_layers_are_adapted_without_a_warning(make_model: Make, recwarn: pytest.WarningsRecorder) -> None:
    choose_trained(make_model(), lora())
    assert not [str(warning.message) for warning in recwarn if "fan_in_fan_out" in str(warning.message)]


def test_alpha_is_twice_the_rank_unless_it_is_given(make_model: Make) -> None:
    assert choose_trained(make_model(), lora())[0].active_peft_config.lora_alpha == 8
    assert choose_trained(make_model(), lora(lora_alpha=3.0))[0].active_peft_config.lora_alpha == 3.0


def test_named_modules_alone_get_an_adapter(llama: Any) -> None:
    model, _ = choose_trained(llama, lora(lora_target_modules="layers.1.self_attn.q_proj, down_proj"))
    assert adapted(model) == {
        "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("q_proj,query", "'query' matches no module of LlamaForCausalLM; its linear layers are down_proj, gate_proj"),
        ("proj", "'proj' matches no module"),  # the end of a name is not a name
        ("q_proj,,", "'' matches no module"),
        ("lm_head", "'lm_head' is the head .lm_head., which stays without an adapter: leave it out"),
    ],
)
def test_names_that_cannot_be_adapted_are_refused(llama: Any, names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_trained(llama, lora(lora_target_modules=names))


def test_embeddings_tied_to_the_head_get_no_adapter(make_model: Make) -> None:
    """Merging it would change the head, which the adapter left alone in training."""
    with pytest.raises(ValueError, match=r"'wte' is the head .transformer.wte., which .*, as does what is tied to it"):
        choose_trained(make_model(), lora(lora_target_modules="wte"))


def test_a_peft_model_is_taken_as_it_is_and_lora_rank_with_it_is_an_error(make_model: Make) -> None:
    given = get_peft_model(make_model(), LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True))
    with pytest.raises(ValueError, match="has PEFT adapters already, and lora_rank=4"):
        choose_trained(given, lora())
    model, lines = choose_trained(given, TrainConfig())
    assert model is given
    assert lines == []
    for parameter in given.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen: load the adapter with is_trainable=True"):
        choose_trained(given, TrainConfig())


@pytest.mark.parametrize("options", [{"lora_alpha": 8.0}, {"lora_target_modules": "q_proj"}])
def test_loras_options_without_a_rank_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* goes with lora_rank, which is 0"):
        TrainConfig(**options)


def test_random_weights_get_no_adapter(make_config: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="lora_rank=4 adapts trained weights, and a model with random weights"):
        prepare(make_config(lora_rank=4), tokenizer=tokenizer, train_dataset=rows)


def test_freeze_head_leaves_the_head_and_says_so_of_tied_embeddings(make_model: Make, llama: Any) -> None:
    _, lines = choose_trained(llama, TrainConfig(freeze_head=True))
    assert lines == []
    assert {name for name, p in llama.named_parameters() if not p.requires_grad} == {"lm_head.weight"}
    tied = make_model()
    _, lines = choose_trained(tied, TrainConfig(freeze_head=True))
    assert lines == ["freeze_head: the input embeddings are tied to the head, so they are frozen too"]
    assert {name for name, p in tied.named_parameters() if not p.requires_grad} == {"transformer.wte.weight"}


def test_freeze_head_and_an_adapter_that_trains_the_head_contradict_each_other(llama: Any) -> None:
    options = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="the model's adapter trains the head"):
        choose_trained(get_peft_model(llama, options), TrainConfig(freeze_head=True))


@pytest.mark.parametrize("option", [{"freeze_head": True}, {"lora_rank": 4}])
def test_a_frozen_head_takes_two_products_where_a_trained_one_takes_three_or_more(
    option: dict[str, Any], make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fastpref.linear import tokens

    plans: list[Any] = []
    made = tokens.plan_tokens

    def plan(*args: Any, **kwargs: Any) -> Any:
        plans.append(made(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(tokens, "plan_tokens", plan)
    for place, changes in enumerate(({}, option)):
        config = make_config(max_steps=1, **changes, output_dir=f"{make_config().output_dir}{place}")
        train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
        assert plans[0].name == "forward"  # the reference
        assert (plans[-1].name, plans[-1].products) == ("frozen", 2) if changes else plans[-1].products >= 3
        plans.clear()


def gradients(make_model: Make, batch: Batch, *, checkpointing: bool, **options: Any) -> dict[str, torch.Tensor]:
    config = TrainConfig(gradient_checkpointing=checkpointing, **options)
    torch.manual_seed(1)
    model, _ = choose_trained(make_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at first, and with them A's gradient is zero
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()
    chosen, rejected = batch_logps(model, batch, config, reduction="sum")
    (chosen - rejected).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("options", [{"lora_rank": 4}, {"freeze_head": True}])
def test_checkpointing_gives_every_trained_weight_the_same_gradient(
    options: dict[str, Any], make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """Though with LoRA nothing that goes into the first layer requires a gradient."""
    run = prepare(make_config(layout="padded"), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    batch = run.collate(run.pairs[:3])
    small = lambda: make_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # noqa: E731
    plain = gradients(small, batch, checkpointing=False, **options)
    again = gradients(small, batch, checkpointing=True, **options)
    assert plain.keys() == again.keys()
    assert len(plain) >= 16
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, again[name]), name


def test_a_lora_run_trains_the_adapter_alone_saves_it_and_says_how_to_merge_it(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    config = make_config(model=str(base), lora_rank=4, learning_rate=None, max_steps=3, gradient_checkpointing=True)
    result = train(config, tokenizer=tokenizer, train_dataset=rows)
    lines = " ".join(capsys.readouterr().err.split())
    assert f"adapters bear more than weights do: learning_rate={LORA_LEARNING_RATE:g}" in lines
    assert LORA_LEARNING_RATE > LEARNING_RATE
    assert f"holds the adapter alone, that of {base}; to merge it" in lines
    assert not list((result.output_dir / "model").glob("model*.safetensors"))
    start = dict(make_model().named_parameters())
    for name, parameter in result.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, start[name.replace("base_layer.", "")]), name
    assert any(p.abs().max() > 0 for name, p in result.model.named_parameters() if "lora_B" in name)
    # What the line says to do.
    merged = AutoPeftModelForCausalLM.from_pretrained(result.output_dir / "model").merge_and_unload()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, result.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_line_on_merging_names_no_base_that_was_never_saved(make_model: Make, tmp_path: Path) -> None:
    lines: list[str] = []
    model, _ = choose_trained(make_model(), lora())
    say_how_to_merge(model, tmp_path, say=lines.append)
    assert f'PeftModel.from_pretrained(base, "{tmp_path}").merge_and_unload()' in lines[0]
    assert isinstance(model, PeftModel)
    say_how_to_merge(make_model(), tmp_path, say=lines.append)
    assert len(lines) == 1
