"""Adapters and a frozen head: what is trained, from where, against which reference, and what is saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason='needs pip install "fastpref[train]"')

from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastpref.training import TrainConfig, train
from fastpref.training.adapters import choose_trained, say_how_to_merge, with_incoming
from fastpref.training.checkpoints.save import load_state
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
    with pytest.raises(ValueError, match="has PEFT adapters, which is trained on with its own rank, and lora_rank=4"):
        with_incoming(given, lora(), say=print)
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


# A model that comes with an adapter


@pytest.fixture
def sft(llama: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """The folder of an adapter that changes its base a lot, with dropout in it; its tokenizer is the base's."""
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    for part in (llama, tokenizer):
        part.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.2}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted_model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    adapted_model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


@pytest.fixture
def run_from(make_config: Make, rows: list[dict[str, Any]], tmp_path: Path) -> Make:
    """A run of three steps at beta 1; what it said beside metrics and result."""

    def make(name: str = "run", *, given: Any = None, **options: Any) -> tuple[Any, list[str]]:
        config = make_config(**{"output_dir": str(tmp_path / name), "beta": 1.0, "max_steps": 3, **options})
        result = train(config, model=given, train_dataset=rows)
        return result, json.loads((result.output_dir / "environment.json").read_text())["notes"]

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 14)[None]).logits


def is_equal_log_probs(record: dict[str, Any]) -> bool:
    return record["loss"] == pytest.approx(math.log(2), abs=2e-6)


def saved_as_advised(result: Any) -> torch.Tensor:
    """The logits of what the last line of a run says to load."""
    folder = result.output_dir / "model"
    if (folder / "adapter_config.json").exists():
        return logits(AutoPeftModelForCausalLM.from_pretrained(folder))
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def test_an_adapter_is_trained_on_against_the_model_with_it(sft: Path, run_from: Make) -> None:
    before = logits(AutoPeftModelForCausalLM.from_pretrained(sft))
    result, notes = run_from(model=str(sft), learning_rate=1e-2)
    assert is_equal_log_probs(result.history[0])
    assert result.history[-1]["loss"] < 0.6
    assert "the reference is the model as it came, its adapter (default) included" in notes
    assert torch.equal(saved_as_advised(result), logits(result.model))
    assert not torch.allclose(saved_as_advised(result), before, atol=1e-2)
    assert result.model.active_peft_config.r == 3
    settings = json.loads((result.output_dir / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(sft.parent / "base")


@pytest.mark.parametrize("rank", [0, 2])
def test_an_adapter_is_merged_and_what_goes_on_top_is_saved_with_its_base(sft: Path, run_from: Make, rank: int) -> None:
    result, notes = run_from(model=str(sft), adapter="merge", lora_rank=rank, learning_rate=1e-2)
    assert is_equal_log_probs(result.history[0])
    assert any("adapter=merge: the adapter (default) is merged into its base" in line for line in notes)
    torch.testing.assert_close(saved_as_advised(result), logits(result.model), rtol=0, atol=1e-5)
    if not rank:
        assert all(parameter.requires_grad for parameter in result.model.parameters())
        assert not (result.output_dir / "base").exists()
        return
    base = AutoModelForCausalLM.from_pretrained(result.output_dir / "base")
    start = AutoPeftModelForCausalLM.from_pretrained(sft).merge_and_unload()
    assert torch.equal(logits(base), logits(start))
    assert any(f"the merged base is saved in {result.output_dir / 'base'}" in line for line in notes)
    assert "`model` goes on" in (result.output_dir / "README.md").read_text()


def test_a_merged_run_goes_on_where_it_stopped(sft: Path, run_from: Make, tmp_path: Path) -> None:
    options = {"model": str(sft), "adapter": "merge", "lora_rank": 2, "learning_rate": 1e-2}
    whole, _ = run_from("whole", **options, save_every=2)
    rest, _ = run_from("rest", **options, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(logits(rest.model), logits(whole.model))
    assert torch.equal(saved_as_advised(rest), logits(whole.model))
    with pytest.raises(ValueError, match=r"adapter \(was 'merge', is 'continue'\)"):
        run_from("other", model=str(sft), learning_rate=1e-2, resume=str(tmp_path / "whole" / "checkpoint-2"))


def test_a_checkpoint_from_before_the_option_is_resumed(
    sft: Path, run_from: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(sft.parent / "base"), "lora_rank": 2, "learning_rate": 1e-2}
    whole, _ = run_from("whole", **options, save_every=2)

    def older(folder: Path) -> dict[str, Any]:
        state = load_state(folder)
        del state["settings"]["adapter"]
        return state

    monkeypatch.setattr("fastpref.training.prepare.load_state", older)
    rest, _ = run_from("rest", **options, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(logits(rest.model), logits(whole.model))


def test_a_run_on_an_adapter_computes_its_reference_again_from_the_adapter_alone(
    sft: Path, run_from: Make, tmp_path: Path
) -> None:
    """Where the stored log-probs are gone: from the adapter that was given, and from no other."""
    options = {"model": str(sft), "learning_rate": 1e-2, "save_every": 2}
    whole, _ = run_from("whole", **options)
    for path in (tmp_path / "whole").glob("reference-*"):
        path.unlink()
    rest, _ = run_from("rest", **options, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(logits(rest.model), logits(whole.model))
    for path in (tmp_path / "rest").glob("reference-*"):
        path.unlink()
    trained = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "whole" / "model", is_trainable=True)
    with pytest.raises(ValueError, match="the model given is not the one it started from"):
        run_from(
            "other", given=trained, learning_rate=1e-2, tokenizer=str(tmp_path / "base"),
            resume=str(tmp_path / "whole" / "checkpoint-2"),
        )  # fmt: skip


def test_an_adapter_is_a_reference_model(sft: Path, run_from: Make) -> None:
    """Of the policy that it is itself, with equal log-probs, and of its base, with others."""
    same, _ = run_from("same", model=str(sft), reference_model=str(sft))
    assert is_equal_log_probs(same.history[0])
    other, notes = run_from("other", model=str(sft.parent / "base"), reference_model=str(sft), lora_rank=2)
    assert not is_equal_log_probs(other.history[0])
    assert not [line for line in notes if "should be the same function" in line]  # another was asked for


def test_a_trained_peft_model_from_python_is_its_own_reference(sft: Path, run_from: Make) -> None:
    tokenizer = str(sft.parent / "base")
    given = AutoPeftModelForCausalLM.from_pretrained(sft, is_trainable=True)
    result, _ = run_from(given=given, tokenizer=tokenizer, learning_rate=1e-2)
    assert is_equal_log_probs(result.history[0])
    assert torch.equal(saved_as_advised(result), logits(result.model))
    merged, _ = run_from("merged", given=result.model, tokenizer=tokenizer, adapter="merge", lora_rank=2)
    assert is_equal_log_probs(merged.history[0])


@pytest.mark.parametrize("name", ["ref", "reference"])
def test_an_adapter_of_that_name_is_the_reference_and_is_not_trained(sft: Path, run_from: Make, name: str) -> None:
    """As TRL takes it. Here it is another adapter than the policy's: the first loss is not that of equal log-probs."""
    given = AutoPeftModelForCausalLM.from_pretrained(sft, is_trainable=True)
    given.add_adapter(name, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = {key: value.clone() for key, value in given.state_dict().items() if f".{name}." in key}
    given.set_adapter("default")
    expected = logits(given)
    result, notes = run_from(given=given, tokenizer=str(sft.parent / "base"), learning_rate=0.0)
    assert f"the reference is the model's adapter {name!r}, the policy its 'default'" in notes
    assert not is_equal_log_probs(result.history[0])
    assert not [line for line in notes if "should be the same function" in line]
    assert before
    assert all(torch.equal(result.model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(logits(result.model), expected)  # the policy's adapter is the active one again
    assert {key.split(".")[-2] for key, p in result.model.named_parameters() if p.requires_grad} == {"default"}
    given.set_adapter(name)
    alone, _ = run_from("alone", given=given, tokenizer=str(sft.parent / "base"))
    assert is_equal_log_probs(alone.history[0])  # it is the policy itself


def test_an_adapter_under_another_name_is_saved_where_the_line_says(sft: Path, capsys: Any, run_from: Make) -> None:
    base = AutoModelForCausalLM.from_pretrained(sft.parent / "base")
    given = PeftModel.from_pretrained(base, sft, adapter_name="policy", is_trainable=True)
    result, _ = run_from(given=given, tokenizer=str(sft.parent / "base"))
    folder = result.output_dir / "model" / "policy"
    assert f'from_pretrained("{folder}")' in "".join(capsys.readouterr().err.split("\n"))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), logits(result.model))


def test_a_tokenizer_that_was_always_longer_than_the_embeddings_changes_no_shape(
    sft: Path, run_from: Make, llama: Any, tokenizer: Any
) -> None:
    """Models ship so; one more row would be one more entry of each softmax."""
    vocabulary = llama.config.vocab_size
    tokenizer.add_tokens([f"<unused{number}>" for number in range(vocabulary + 1 - len(tokenizer))])
    assert len(tokenizer) == vocabulary + 1
    tokenizer.save_pretrained(sft)
    result, _ = run_from(model=str(sft))
    assert result.model.get_input_embeddings().weight.shape[0] == vocabulary


def test_tokens_that_the_adapter_added_come_with_it(sft: Path, run_from: Make, tokenizer: Any) -> None:
    """Trained embeddings longer than the base's, which PEFT saves with the adapter."""
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    base = AutoModelForCausalLM.from_pretrained(sft.parent / "base")
    base.resize_token_embeddings(len(tokenizer))
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    grown = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options))
    for part in (grown, tokenizer):
        part.save_pretrained(sft.parent / "grown")
    result, _ = run_from(model=str(sft.parent / "grown"), learning_rate=1e-2)
    assert is_equal_log_probs(result.history[0])
    assert result.model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 303
    assert torch.equal(saved_as_advised(result), logits(result.model))


def test_a_longer_tokenizer_alone_leaves_the_base_s_embeddings_as_they_are(sft: Path, tokenizer: Any) -> None:
    """As of models that ship more tokens than rows; the adapter has no embeddings."""
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(sft)
    base = AutoModelForCausalLM.from_pretrained(sft.parent / "base")
    model = with_incoming(base, TrainConfig(model=str(sft)), say=print)
    assert model.get_input_embeddings().weight.shape[0] == 302 < len(tokenizer)


def test_what_cannot_be_meant_with_an_adapter_is_refused_in_a_line(
    sft: Path, run_from: Make, make_model: Make, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="sft' is an adapter, which is trained on with its own rank, and lora_rank=4"):
        run_from(model=str(sft), lora_rank=4)
    base = str(sft.parent / "base")
    with pytest.raises(ValueError, match=r"adapter='merge' goes with a model that is an adapter; .*base is none"):
        run_from(model=base, adapter="merge")
    by_transformers = AutoModelForCausalLM.from_pretrained(sft)
    with pytest.raises(ValueError, match="transformers has loaded adapters into the model, and lora_rank=4"):
        run_from(given=by_transformers, tokenizer=base, lora_rank=4)
    with pytest.raises(ValueError, match="all are frozen: load the adapter with is_trainable=True"):
        run_from(given=by_transformers, tokenizer=base)
    settings = json.loads((sft / "adapter_config.json").read_text())
    for value, message in ((str(tmp_path / "gone"), "and there is no such folder"), (None, "names no base")):
        (sft / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": value}))
        with pytest.raises((ValueError, OSError), match=f"{message}: set base_model_name_or_path"):
            run_from(model=str(sft), tokenizer=base)


def test_an_adapter_s_folder_that_cannot_be_read_is_named(sft: Path, run_from: Make) -> None:
    (sft / "adapter_config.json").write_text("{")
    for tokenizer in (None, str(sft.parent / "base")):
        with pytest.raises(ValueError, match=r"model='.*sft' cannot be loaded: Expecting property name"):
            run_from(model=str(sft), tokenizer=tokenizer)


def test_a_dry_run_has_the_adapters_shapes(sft: Path, make_config: Make, rows: Any, capsys: Any) -> None:
    for name, options, trained in (("continue", {}, 432), ("merge", {"adapter": "merge", "lora_rank": 2}, 992)):
        config = make_config(model=str(sft), dry_run=True, output_dir=str(sft.parent / name), **options)
        assert train(config, train_dataset=rows).dry_run.memory.trained == trained
        assert f"{trained:,} parameters are trained" in capsys.readouterr().out
        assert not (sft.parent / name).exists()


# Experts and other layers

SHAPE = {
    "vocab_size": 302, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {**SHAPE, "num_key_value_heads": 2, "num_experts_per_tok": 2}
QWEN = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "phimoe": {**EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**QWEN, "head_dim": 8},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 24},
    "deepseek_v3": {
        **EXPERTS, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "qk_nope_head_dim": 4,
    },
    "mamba": {name: SHAPE[name] for name in SHAPE if name not in ("intermediate_size", "num_attention_heads")},
}  # fmt: skip


def build(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_experts_get_adapters_and_routers_none(family: str) -> None:
    """Dense layers and shared experts beside them too, which PEFT takes for old names of the experts."""
    model, lines = choose_trained(build(family), lora())
    assert "it reaches 99% of the model's matrix weights (embeddings and head apart)" in lines[0]
    assert len(lines) == 1
    names = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert any(".experts.base_layer.lora_A" in name for name in names)
    assert any(".experts.lora_A" in name for name in names)
    assert not [name for name in names if {"gate", "router", "shared_expert_gate"} & set(name.split("."))]
    if family == "deepseek_v3":
        assert {part for name in names for part in ("shared_experts", "layers.0.mlp.up_proj") if part in name} == {
            "shared_experts", "layers.0.mlp.up_proj",
        }  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_adapters_of_experts_are_trained_saved_resumed_and_trained_on(
    family: str, run_from: Make, tokenizer: Any, tmp_path: Path
) -> None:
    for part in (build(family), tokenizer):
        part.save_pretrained(tmp_path / "base")
    options = {"model": str(tmp_path / "base"), "lora_rank": 2, "learning_rate": 1e-2, "save_every": 2}
    whole, _ = run_from("whole", **options)
    assert is_equal_log_probs(whole.history[0])
    assert all(p.abs().max() > 0 for name, p in whole.model.named_parameters() if "lora_B" in name)
    assert torch.equal(saved_as_advised(whole), logits(whole.model))
    rest, _ = run_from("rest", **options, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(logits(rest.model), logits(whole.model))
    more, _ = run_from("more", model=str(tmp_path / "whole" / "model"))
    assert is_equal_log_probs(more.history[0])
    torch.testing.assert_close(saved_as_advised(whole), logits(whole.model.merge_and_unload()), rtol=0, atol=1e-4)


def test_less_than_half_is_said_in_words(run_from: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = build("mixtral")
    _, lines = choose_trained(model, lora(lora_target_modules="q_proj,v_proj"))
    assert "it reaches 9% of the model's matrix weights" in lines[0]
    assert lines[1] == (
        "LoRA reaches less than half of the model's matrix weights, 1,024 of 11,392: the largest that it leaves out is "
        "model.layers.0.mlp.experts.gate_up_proj; lora_target_modules names what gets an adapter"
    )


def test_experts_are_named_as_modules_are() -> None:
    model, _ = choose_trained(build("mixtral"), lora(lora_target_modules="gate_up_proj"))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 4
    assert all(".experts." in name for name in names)
    for names_given, message in (("gate", "which chooses experts: leave it out"), ("w1", "'w1' matches no module")):
        with pytest.raises(ValueError, match=message):
            choose_trained(build("mixtral"), lora(lora_target_modules=names_given))


def test_mamba_gets_adapters_where_they_are_seen() -> None:
    model, lines = choose_trained(build("mamba"), lora())
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"in_proj"}
    assert "LoRA reaches less than half of the model's matrix weights" in lines[1]
    with pytest.raises(ValueError, match="out_proj, whose weight Mamba's kernels read themselves, without an adapter"):
        choose_trained(build("mamba"), lora(lora_target_modules="out_proj"))


def test_a_vision_tower_gets_no_adapter() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**SHAPE)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **vision}
    )
    model, lines = choose_trained(LlavaForConditionalGeneration(config), lora())
    assert all("language_model" in name for name in adapted(model))
    assert len(adapted(model)) == 14
    assert "it reaches 61% of the model's matrix weights" in lines[0]
