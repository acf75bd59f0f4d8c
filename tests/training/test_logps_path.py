"""`logps=linear` and `logps=logits` make the same run; policy, reference and evaluation take the same of the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fastpref.training import TrainConfig, step, train
from fastpref.training.arguments import parse_arguments
from fastpref.training.checkpoints.save import ResumeError

Make = Callable[..., Any]
NUMBERS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


def capped_model() -> Gemma2ForCausalLM:
    """Logits that are softcapped, which a path without logits has to know of."""
    torch.manual_seed(2)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = Gemma2Config(
        **shape, num_key_value_heads=1, head_dim=8, vocab_size=302, final_logit_softcapping=2.0,
        pad_token_id=0, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def runs(
    make_config: Make, model: Callable[[], Any], tokenizer: Any, rows: list[dict[str, Any]], **options: Any
) -> list[Any]:
    """One run by each path, with an evaluation after every second step."""
    shared = {"eval_every": 2, "learning_rate": 1e-3, "schedule": "constant", "adam_epsilon": 1e-2, **options}
    return [
        train(
            make_config(**shared, logps=path, output_dir=make_config().output_dir + path),
            model=model(), tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows[:5],
        )
        for path in ("linear", "logits")
    ]  # fmt: skip


@pytest.mark.parametrize("loss", ["dpop", "simpo"])
@pytest.mark.parametrize("capped", [False, True], ids=["gpt2", "gemma2"])
def test_both_paths_make_the_same_run(
    capped: bool, loss: str, make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """Losses, gradients, evaluations and weights, to the rounding of log-probs near -100 (1e-5)."""
    model = capped_model if capped else make_model
    linear, logits = runs(make_config, model, tokenizer, rows, loss=loss)
    assert len(linear.history) == len(logits.history) == 6
    for one, other in zip(linear.history, logits.history, strict=True):
        assert set(one) == set(other)
        prefix = "" if "loss" in one else "eval_"
        for name in NUMBERS:
            assert one[prefix + name] == pytest.approx(other[prefix + name], rel=1e-5, abs=2e-5), name
        if not prefix:
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    moved = 0.0
    for one, other, initial in zip(*(m.parameters() for m in (linear.model, logits.model, model())), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
        moved = max(moved, (one - initial).abs().max().item())
    assert moved > 1e-4


@pytest.mark.parametrize("path", ["linear", "logits"])
def test_under_bf16_either_path_starts_at_ln_2(
    path: str, make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """Autocast rounds the head for the policy as it does for the reference."""
    config = make_config(logps=path, precision="bf16", max_steps=2)
    result = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert result.history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert result.history[1]["loss"] < result.history[0]["loss"]


def test_the_default_is_the_linear_path_for_policy_reference_and_evaluation(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, Any]] = []
    model_logps = step.model_logps

    def spy(model: Any, batch: Any, **options: Any) -> Any:
        seen.append((torch.is_grad_enabled(), options["memory_budget"]))
        return model_logps(model, batch, **options)

    monkeypatch.setattr(step, "model_logps", spy)
    monkeypatch.setattr(step, "sequence_logps", None)  # calling it would raise
    config = make_config(batch_size=13, max_steps=2, memory_budget="8MiB")
    train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows[:2])
    # The reference of the training pairs (held-out ones are among them), the check, two steps, an evaluation.
    assert seen == [(with_gradient, "8MiB") for with_gradient in (*[False] * 4, True, True, False)]


def test_a_run_resumes_on_its_own_path_only(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    train(make_config(max_steps=2, save_every=2), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    config = make_config(max_steps=4, resume="latest", logps="logits")
    with pytest.raises(ResumeError, match="logps \\(was 'linear', is 'logits'\\)"):
        train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logps": "hidden"}, ValueError, "logps must be one of linear, logits; got 'hidden'"),
        ({"logps": "logits", "memory_budget": "1GiB"}, ValueError, "memory_budget='1GiB' goes with logps='linear'"),
        ({"memory_budget": "plenty"}, ValueError, "memory_budget must be .*'plenty'"),
        ({"memory_budget": 1.5}, TypeError, "memory_budget must be"),
    ],
)
def test_options_that_do_not_fit_raise(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**options)


def test_the_command_line_takes_both_options() -> None:
    config = parse_arguments(["--logps", "linear", "--memory_budget", "64MiB"])
    assert (config.logps, config.memory_budget) == ("linear", "64MiB")
    assert parse_arguments(["--logps=logits"]).logps == "logits"
    with pytest.raises(ValueError, match="logps must be one of linear, logits; got 'both'"):
        parse_arguments(["--logps=both"])


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "trainable tokens of a tied head"])
def test_what_the_linear_path_refuses_trains_as_its_message_says(
    kind: str, make_config: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """logps=logits: virtual tokens stand before the batch's, and a tied head of which a few rows are trained."""
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    kinds = {
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **options),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **options),
        "trainable tokens of a tied head": lambda: peft.LoraConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6], **options
        ),
    }

    def model() -> Any:
        torch.manual_seed(0)
        shape = {"vocab_size": 302, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
        config = LlamaConfig(**shape, **heads, tie_word_embeddings=kind.startswith("trainable"))
        return peft.get_peft_model(LlamaForCausalLM(config), kinds[kind]())

    with pytest.raises(ValueError, match="in training: logps=logits"):
        train(make_config(layout="padded"), model=model(), tokenizer=tokenizer, train_dataset=rows)
    config = make_config(
        layout="padded", logps="logits", max_steps=8, learning_rate=0.1, output_dir=str(tmp_path / "x")
    )
    history = train(config, model=model(), tokenizer=tokenizer, train_dataset=rows).history
    assert history[0]["grad_norm"] > 0
    assert history[-1]["loss"] < history[0]["loss"]
