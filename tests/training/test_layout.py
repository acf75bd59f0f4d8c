"""Rows of several sequences in the loop: the same run as padded ones, and a line where a model cannot be given them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.logps import token_logps
from fastpref.models import set_attention
from fastpref.training import TrainConfig, step, train
from fastpref.training.data.collate import Layout, collate
from fastpref.training.data.tokens import tokenize_rows

Make = Callable[..., Any]
Rows = list[dict[str, Any]]
STEADY = {"schedule": "constant", "adam_epsilon": 1e-2, "max_grad_norm": 0.5, "beta": 0.3, "batch_size": 5}
SAME_STEPS = {**STEADY, "group_by_length": False}  # padded rows are grouped by default


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("loss", ["dpo", "dpop", "ipo", "simpo"])
def test_every_layout_makes_the_same_run(
    loss: str, make_config: Make, make_model: Make, tokenizer: Any, rows: Rows, tmp_path: Any
) -> None:
    """Records and weights, of losses with and without reference, summed and averaged, with micro-batches and a tail."""
    results = {}
    for layout in ("padded", "packed", "shared"):
        config = make_config(
            **SAME_STEPS, loss=loss, layout=layout, gradient_accumulation_steps=2, output_dir=str(tmp_path / layout)
        )
        parts = {"train_dataset": rows, "eval_dataset": rows[:3]}
        results[layout] = train(config, model=make_model(), tokenizer=tokenizer, **parts)
    expected = results["padded"]
    for layout in ("packed", "shared"):
        found = results[layout]
        for one, other in zip(expected.history, found.history, strict=True):
            assert set(one) == set(other)
            for name in set(one) - {"tokens_per_second", "peak_memory"}:
                assert other[name] == pytest.approx(one[name], rel=2e-4, abs=1e-5), (layout, name)
        torch.testing.assert_close(weights(found.model), weights(expected.model), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_the_cut_into_micro_batches_by_tokens_changes_nothing_but_rounding(
    make_config: Make, make_model: Make, tokenizer: Any, rows: Rows, tmp_path: Any
) -> None:
    found = []
    for batch_tokens in (None, 60, 1):
        config = make_config(**STEADY, batch_tokens=batch_tokens, output_dir=str(tmp_path / str(batch_tokens)))
        found.append(train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows))
    for other in found[1:]:
        torch.testing.assert_close(weights(other.model), weights(found[0].model), rtol=0, atol=2e-5)


def test_the_prompt_stands_in_a_shared_row_once(tokenizer: Any, rows: Rows) -> None:
    pairs = tokenize_rows(rows[:4], tokenizer, max_length=64).pairs
    widths = {
        name: collate(pairs, Layout(name, 0, 64)).inputs["input_ids"].shape for name in ("shared", "packed", "padded")
    }
    both = sum(len(pair.chosen.ids) + len(pair.rejected.ids) for pair in pairs)
    assert widths["packed"] == (1, both)
    assert widths["shared"] == (1, both - sum(pair.shared for pair in pairs))
    assert all(pair.shared >= len(pair.prompt) > 0 for pair in pairs)
    assert widths["padded"][0] == 8


@pytest.mark.slow
def test_pairs_without_a_prompt_make_the_same_run_in_every_layout(
    make_config: Make, make_model: Make, tokenizer: Any, tmp_path: Any
) -> None:
    """Nor a BOS, so that nothing predicts a response's first token; some responses begin alike."""
    rows = [{"prompt": "", "chosen": f"the sky {i}", "rejected": f"{'the' * (i % 2)}green{i}"} for i in range(5)]
    found = []
    for layout in ("padded", "packed", "shared"):
        config = make_config(**SAME_STEPS, layout=layout, output_dir=str(tmp_path / layout))
        found.append(weights(train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows).model))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_reentrant_checkpointing_of_the_callers_model_makes_the_same_run(
    make_config: Make, make_model: Make, tokenizer: Any, rows: Rows, tmp_path: Any
) -> None:
    """GPT-2 hands its mask to a layer by place, and what is checkpointed so is a copy of it."""
    found = []
    for reentrant in (True, False):
        model = make_model()
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
            {"use_reentrant": reentrant}
        )
        model.enable_input_require_grads()
        config = make_config(**SAME_STEPS, output_dir=str(tmp_path / str(reentrant)))
        found.append(weights(train(config, model=model, tokenizer=tokenizer, train_dataset=rows).model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("logps", ["linear", "logits"])
def test_both_paths_of_the_log_probs_read_several_sequences_from_a_row(
    logps: str, make_config: Make, make_model: Make, tokenizer: Any, rows: Rows, tmp_path: Any
) -> None:
    found = []
    for layout in ("shared", "padded"):
        config = make_config(**SAME_STEPS, logps=logps, layout=layout, output_dir=str(tmp_path / layout))
        found.append(weights(train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows).model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)


def test_a_model_that_cannot_be_given_shared_rows_is_named_and_trained_on_padded_ones(
    make_config: Make, tokenizer: Any, rows: Rows, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    """And its steps hold pairs of like lengths, as group_by_length=True makes them."""

    def bloom() -> Any:
        torch.manual_seed(3)
        shape = {"n_layer": 2, "hidden_size": 16, "n_head": 2, "vocab_size": 302}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **shape))

    found = []
    for layout, grouped in (("shared", None), ("padded", True), ("padded", False)):
        config = make_config(
            **STEADY, layout=layout, group_by_length=grouped, output_dir=str(tmp_path / f"{layout}{grouped}")
        )
        found.append(train(config, model=bloom(), tokenizer=tokenizer, train_dataset=rows))
    said = capsys.readouterr().err
    assert said.count("layout=shared is not possible: BloomForCausalLM cannot be given several sequences in a row") == 1
    assert "Rows are padded (layout=padded)" in said
    assert torch.equal(weights(found[0].model), weights(found[1].model))
    assert not torch.equal(weights(found[0].model), weights(found[2].model))


def test_the_model_has_its_own_attention_again_after_the_run(
    make_config: Make, make_model: Make, tokenizer: Any, rows: Rows
) -> None:
    model = make_model()
    before = model.config._attn_implementation
    result = train(make_config(max_steps=1), model=model, tokenizer=tokenizer, train_dataset=rows)
    assert result.model is model
    assert model.config._attn_implementation == before


def test_the_model_has_its_own_attention_again_after_a_run_that_is_refused(
    make_config: Make, make_model: Make, tokenizer: Any, rows: Rows
) -> None:
    train(make_config(max_steps=1, save_every=1), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    model = make_model()
    with pytest.raises(ValueError, match="cannot be resumed with other settings"):
        train(make_config(resume=True, beta=0.5), model=model, tokenizer=tokenizer, train_dataset=rows)
    assert model.config._attn_implementation == make_model().config._attn_implementation


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "wide"}, ValueError, "layout must be one of"),
        ({"attention": "eager"}, ValueError, "attention must be one of"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be at least 1, got 0"),
        ({"group_by_length": 1}, TypeError, "group_by_length"),
        ({"loss": "aot", "batch_tokens": 64}, ValueError, "batch_tokens"),
    ],
)
def test_options_that_do_not_fit_are_named(
    options: dict[str, Any], error: type[Exception], message: str, make_model: Make, tokenizer: Any, rows: Rows
) -> None:
    with pytest.raises(error, match=message):
        train(TrainConfig(**options), model=make_model(), tokenizer=tokenizer, train_dataset=rows)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_logits_of_a_row_of_several_sequences_are_read_where_they_lie(
    layout: str, make_config: Make, make_model: Make, tokenizer: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of (T, V), and no position that would have to predict two tokens."""
    model, made, read = make_model().eval(), [], []
    model.register_forward_hook(lambda module, inputs, outputs: made.append(outputs.logits))

    def spy(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        read.append(logits)
        return token_logps(logits, labels, **options)

    monkeypatch.setattr(step, "token_logps", spy)
    pairs = tokenize_rows(rows, tokenizer, max_length=64).pairs
    set_attention(model)
    batch = collate(pairs, Layout(layout, 0, 64, repeat_last=True))
    assert batch.scored is not None
    found = step.batch_logps(model, batch, make_config(logps="logits"), reduction="sum")
    assert read[0] is made[0]
    predicted = set(zip(batch.scored.source.tolist(), batch.scored.labels.tolist(), strict=True))
    assert len(predicted) == len(set(batch.scored.source.tolist()))
    linear = collate(pairs, Layout(layout, 0, 64))
    expected = step.batch_logps(model, linear, make_config(), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert batch.inputs["input_ids"].shape[1] == sum(Layout(layout, 0, 64, repeat_last=True).tokens(p) for p in pairs)
