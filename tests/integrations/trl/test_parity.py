"""FastPrefDPOTrainer beside TRL's own: loss, metrics and gradients, of 10 steps for each loss type."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from fastpref.integrations.trl import FastPrefDPOTrainer
from fastpref.models.segments import NAME

Make = Callable[..., Any]
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


@pytest.fixture(scope="module")
def both(make_both: Make, make_llama: Make) -> Any:
    """Built once, with what the heads can be asked for; the options of the loss are the trainers' attributes."""
    return make_both(lambda: make_llama(num_hidden_layers=1), use_weighting=True, label_smoothing=0.1)


@pytest.fixture
def switched(both: Any) -> Any:
    """Sets attributes of both trainers, and puts back what was there."""
    changed = [(trainer, dict(vars(trainer)), copy.deepcopy(trainer.model.state_dict())) for trainer in both]

    def switch(**options: Any) -> Any:
        for trainer in both:
            assert set(options) <= set(vars(trainer))
            vars(trainer).update({"use_weighting": False, **options})
        return both

    yield switch
    for trainer, before, weights in changed:
        vars(trainer).update(before)
        trainer.model.load_state_dict(weights)


def test_every_loss_type(switched: Make, same_steps: Make) -> None:
    same_steps(*switched(loss_weights=[1.0]), losses=LOSSES)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
        {"ld_alpha": 0.3},
        {"ld_alpha": 0.0, "loss_types": ["ipo"]},
        {"use_weighting": True},
        {"use_weighting": True, "ld_alpha": 0.5, "loss_types": ["robust", "ipo"], "loss_weights": [0.5, 2.0]},
        {"label_smoothing": 0.3, "loss_types": ["exo_pair", "robust", "aot"], "loss_weights": [1.0, 1.0, 1.0]},
    ],
    ids=str,
)
def test_mixes_divergences_and_weightings(options: dict[str, Any], switched: Make, same_steps: Make) -> None:
    same_steps(*switched(**options), steps=2)


def test_the_shared_layout_is_what_those_steps_ran_on(switched: Make, same_steps: Make) -> None:
    theirs, ours = switched()
    same_steps(theirs, ours, steps=1)
    assert ours.model.config._attn_implementation == ours.ref_model.config._attn_implementation == NAME
    assert theirs.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_on_either_end(mode: str, switched: Make, same_steps: Make, monkeypatch: Any) -> None:
    """With keep_end some rows begin within the response."""
    theirs, ours = switched()
    cut = DataCollatorForPreference(pad_token_id=0, max_length=9 if mode == "keep_start" else 4, truncation_mode=mode)
    monkeypatch.setattr(theirs, "data_collator", cut)
    same_steps(theirs, ours, steps=4)


def pad_left(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    assert any(shifts)
    return {
        name: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        for name, value in batch.items()
    }


def test_padding_on_the_left(switched: Make, same_steps: Make) -> None:
    same_steps(*switched(), steps=4, change=pad_left)


def gpt2() -> Any:
    torch.manual_seed(2)
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 24}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=1, **shape))


@pytest.mark.slow
def test_a_model_of_learned_positions_padded_on_either_side(make_both: Make, same_steps: Make) -> None:
    """On the left TRL counts positions from the padding on: such a batch stays as it is. GPT-2's head is tied, too."""
    theirs, ours = make_both(gpt2)
    same_steps(theirs, ours, steps=2, change=pad_left)
    assert ours.model.config._attn_implementation == "sdpa"
    same_steps(theirs, ours, steps=3)
    assert ours.model.config._attn_implementation == NAME


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, make_both: Make, same_steps: Make) -> None:
    """TRL's default: the layers run again in the backward, and see the same segments."""
    theirs, ours = make_both(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for trainer in (theirs, ours):
        trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        trainer.model.enable_input_require_grads()
    same_steps(theirs, ours, steps=3)


def test_reference_log_probs_computed_in_advance(make_both: Make, same_steps: Make) -> None:
    theirs, ours = make_both(precompute_ref_log_probs=True, ld_alpha=0.5)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert ours.train_dataset[name] == pytest.approx(theirs.train_dataset[name], rel=1e-4)
    assert ours.ref_model.config._attn_implementation == "sdpa"
    same_steps(theirs, ours, steps=3)


def test_lora_on_a_plain_model_and_its_reference_with_adapters_off(make_both: Make, same_steps: Make) -> None:
    peft = pytest.importorskip("peft", reason='needs pip install "fastpref[trl]"')
    parts = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    theirs, ours = make_both(reference=None, parts=parts)
    assert ours.ref_model is None
    same_steps(theirs, ours, steps=4)
    assert ours.model.get_base_model().config._attn_implementation == NAME


@pytest.mark.slow
def test_an_adapter_trained_already_is_its_own_reference(make_both: Make, make_llama: Make, same_steps: Make) -> None:
    peft = pytest.importorskip("peft", reason='needs pip install "fastpref[trl]"')

    def adapted() -> Any:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(make_llama(), config)

    theirs, ours = make_both(adapted, reference=None)
    assert "ref" in ours.model.peft_config
    same_steps(theirs, ours, steps=3)


@pytest.mark.slow
def test_prompt_tuning_prepends_virtual_tokens(make_both: Make, same_steps: Make) -> None:
    """Embeddings come in place of ids, so that rows stay as they are."""
    peft = pytest.importorskip("peft", reason='needs pip install "fastpref[trl]"')
    parts = {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    same_steps(*make_both(reference=None, parts=parts), steps=3)


def mixture() -> Any:
    torch.manual_seed(4)
    shape = {
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4,
        "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **shape))


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_a_mixture_of_experts_with_and_without_its_auxiliary_loss(
    coefficient: float, make_both: Make, same_steps: Make
) -> None:
    """The auxiliary loss is about all positions, so that rows stay as they are for it."""
    theirs, ours = make_both(mixture, router_aux_loss_coef=coefficient)
    same_steps(theirs, ours, steps=3)
    assert ours.model.config._attn_implementation == ("sdpa" if coefficient else NAME)


@pytest.mark.slow
def test_whole_runs_with_evaluations_log_the_same(make_both: Make, make_llama: Make, rows: list[Any]) -> None:
    """`train()` itself: clipping, AdamW, schedule, accumulation, the reference synchronised, evaluation."""
    import datasets

    parts = {"eval_dataset": datasets.Dataset.from_list(rows[:5])}
    options = {"eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 2, "adam_epsilon": 1e-2}
    synchronised = {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 6}
    theirs, ours = make_both(parts=parts, loss_type=["sigmoid", "sft"], **options, **synchronised)
    for trainer in (theirs, ours):
        trainer.train()
    assert len(ours.state.log_history) == len(theirs.state.log_history) == 9
    for found, expected in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert list(found) == list(expected)
        for name in set(expected) - {name for name in expected if "second" in name or "runtime" in name}:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    assert "eval_rewards/margins" in ours.state.log_history[3]
    assert ours.model.config._attn_implementation == "sdpa"
    assert ours.ref_model.config._attn_implementation == "sdpa"


def test_evaluation_that_wants_logits_gets_them(make_both: Make, rows: list[Any]) -> None:
    import datasets

    seen: list[Any] = []

    def compute_metrics(found: Any) -> dict[str, float]:
        seen.append(torch.as_tensor(found.predictions))
        return {"own": float(len(found.predictions))}

    parts = {"compute_metrics": compute_metrics, "eval_dataset": datasets.Dataset.from_list(rows[:4])}
    theirs, ours = make_both(parts=parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL gives this up in its next major version
        expected, found = theirs.evaluate(), ours.evaluate()
    assert ours.ref_model.config._attn_implementation == "sdpa"
    assert set(found) == set(expected)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)


def test_autocast_to_bfloat16(make_both: Make) -> None:
    """Both round, each in its own places: to the precision of bfloat16 the losses are the same."""
    theirs, ours = make_both(bf16=True, max_steps=3)
    found = []
    for trainer in (theirs, ours):
        trainer.train()
        found.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=2e-2)


def test_generation_runs_on_the_models_own_attention(make_trainer: Make, make_llama: Make) -> None:
    """Between two steps too; and the step after it is as it was."""
    trainer = make_trainer(FastPrefDPOTrainer, model=make_llama(attn_implementation="eager"))
    batch = next(iter(trainer.get_train_dataloader()))
    prompt = batch["input_ids"][:1, :4]
    expected = make_llama(attn_implementation="eager").generate(prompt, max_new_tokens=5, do_sample=False)
    first = trainer.compute_loss(trainer.model, batch).item()
    assert trainer.model.config._attn_implementation == NAME
    found = trainer.model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert trainer.model.config._attn_implementation == "eager"
    assert torch.equal(found, expected)
    assert trainer.compute_loss(trainer.model, batch).item() == first


@pytest.mark.slow
def test_two_trainers_one_after_the_other_on_one_model(make_trainer: Make, make_llama: Make) -> None:
    model = make_llama()
    first = make_trainer(FastPrefDPOTrainer, model=model)
    batch = next(iter(first.get_train_dataloader()))
    loss = first.compute_loss(model, batch).item()
    second = make_trainer(FastPrefDPOTrainer, model=model, reference=first.ref_model)
    assert second.compute_loss(model, batch).item() == loss == first.compute_loss(model, batch).item()


def test_a_copy_of_the_model_computes_with_its_own_weights(make_trainer: Make) -> None:
    trainer = make_trainer(FastPrefDPOTrainer)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"labels": batch["input_ids"]}
    other = copy.deepcopy(trainer.model)
    before = trainer.model(**inputs, fused_lm_head=True).log_probs
    torch.nn.init.normal_(other.lm_head.weight)
    assert torch.equal(trainer.model(**inputs, fused_lm_head=True).log_probs, before)
    assert not torch.allclose(other(**inputs, fused_lm_head=True).log_probs, before)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_plain_forward_beside_the_loss_leaves_checkpointed_rows_their_attention(
    reentrant: bool, make_both: Make, same_steps: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a derived trainer adds a term of its own: both forwards run again in the one backward."""
    pair = make_both(gradient_checkpointing=True)
    for trainer in pair:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        trainer.model.enable_input_require_grads()
        theirs = trainer.compute_loss

        def with_more(model: Any, batch: Any, theirs: Any = theirs) -> Any:
            loss = theirs(model, batch)
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            return loss + 0.1 * model(**inputs, labels=batch["input_ids"]).loss

        monkeypatch.setattr(trainer, "compute_loss", with_more)
    same_steps(*pair, steps=2)


def test_a_plain_trainer_made_afterwards_has_trls_own_head(make_trainer: Make) -> None:
    make_trainer(FastPrefDPOTrainer)
    plain = make_trainer(DPOTrainer)
    assert not hasattr(plain.model, "fastpref_heads")
