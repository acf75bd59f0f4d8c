"""The loop: what a step computes, accumulation, metrics, the reference, evaluation, the options' effects."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM

import fastpref
from fastpref.console import Console
from fastpref.losses import LOSSES, get_loss
from fastpref.training import TrainConfig, loop, train
from fastpref.training.data.collate import Layout, collate
from fastpref.training.data.tokens import tokenize_rows
from fastpref.training.loop import make_optimizer, make_schedule, train_run
from fastpref.training.monitoring import plots
from fastpref.training.prepare import _with_defaults, prepare

Make = Callable[..., Any]
TRAIN_NAMES = {
    "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second", "peak_memory",
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
}  # fmt: skip


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logps(model: Any, batch: Any, reduction: str = "sum") -> torch.Tensor:
    logits = model(**batch.inputs).logits
    return fastpref.reference.sequence_logps(logits, batch.labels, reduction=reduction)


def test_three_steps_are_those_of_a_plain_loop(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """DPO, written out with log_softmax, AdamW and clipping, reaches the same weights."""
    config = make_config(
        batch_size=13, max_steps=3, schedule="constant", max_grad_norm=0.5, beta=0.3, adam_epsilon=1e-2
    )
    result = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)

    model = make_model().eval()
    batch = collate(tokenize_rows(rows, tokenizer, max_length=64).pairs, Layout("padded", 0, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-2)
    with torch.no_grad():
        ref_chosen, ref_rejected = logps(model, batch).chunk(2)
    for step in range(3):
        chosen, rejected = logps(model, batch).chunk(2)
        margins = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -logsigmoid(margins).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        record = result.history[step]
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert record["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-4, abs=1e-6)
        assert record["rewards/accuracies"] == pytest.approx((margins > 1e-6).float().mean().item())
        assert record["logps/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    assert norm > 0.5  # clipping took part
    torch.testing.assert_close(weights(result.model), weights(model), rtol=0, atol=2e-6)


def test_the_first_loss_is_ln_2(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    result = train(make_config(max_steps=1), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert result.history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (3, 3), (1, 8)])
def test_micro_batches_make_the_step_of_one_batch_uneven_tails_included(
    batch_size: int, accumulation: int, make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """13 pairs in steps of 8 (5 in the tail) or 9 (4): the tail's short last micro-batch counts by its pairs."""
    whole = {"batch_size": batch_size * accumulation}
    parts = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    results = [
        # A large epsilon keeps AdamW from blowing rounding up to the size of its step; the clip stays out of it.
        train(
            make_config(
                **sizes,
                adam_epsilon=1.0,
                learning_rate=0.1,
                max_grad_norm=0.0,
                output_dir=make_config().output_dir + name,
            ),
            model=make_model(),
            tokenizer=tokenizer,
            train_dataset=rows,
        )
        for name, sizes in (("whole", whole), ("parts", parts))
    ]
    assert (weights(results[0].model) - weights(make_model())).abs().max() > 1e-2  # the run moved the weights
    torch.testing.assert_close(weights(results[0].model), weights(results[1].model), rtol=0, atol=2e-6)
    for one, many in zip(results[0].history, results[1].history, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "num_tokens", "epoch", "rewards/accuracies"):
            assert one[name] == pytest.approx(many[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_of_the_registry_trains(
    loss: str, make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    config = make_config(loss=loss, max_steps=3, batch_size=13, learning_rate=1e-3, schedule="constant")
    result = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < losses[0]
    spec = get_loss(loss)
    extra = set() if spec.penalty is None else {f"{spec.name}/penalty", f"{spec.name}/active_frac"}
    assert all(set(record) == TRAIN_NAMES | extra for record in result.history)
    assert any(Path(config.output_dir).glob("reference-*.jsonl")) == spec.needs_reference


def test_a_loss_that_does_not_separate_by_pair_refuses_accumulation(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    config = make_config(loss="aot", gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="loss 'aot' compares the pairs of a batch with each other"):
        train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)


def test_history_is_metrics_jsonl_and_sums_run_over_the_steps_between_records(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    each = train(make_config(max_steps=6), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    lines = (each.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == each.history
    config = make_config(max_steps=6, logging_every=4, output_dir=make_config().output_dir + "rare")
    rare = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert [record["step"] for record in rare.history] == [1, 4, 6]
    sizes = [4, 4, 4, 1, 4, 4]
    mean = sum(each.history[i]["logps/chosen"] * sizes[i] for i in (1, 2, 3)) / 9
    assert rare.history[1]["logps/chosen"] == pytest.approx(mean, rel=1e-6)
    assert rare.history[-1]["num_tokens"] == each.history[-1]["num_tokens"]
    assert rare.history[-1]["epoch"] == pytest.approx(1 + 8 / 13)
    pairs = tokenize_rows(rows, tokenizer, max_length=64).pairs
    total = sum(len(pair.chosen.ids) + len(pair.rejected.ids) for pair in pairs)
    assert each.history[3]["num_tokens"] == total


def test_equal_responses_are_not_counted_as_won(make_config: Make, make_model: Make, tokenizer: Any) -> None:
    rows = [{"prompt": "the", "chosen": " sky", "rejected": " sky"}] * 4
    result = train(make_config(max_steps=2), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert [record["rewards/accuracies"] for record in result.history] == [0.0, 0.0]


def test_dropout_is_off_unless_asked_for(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """GPT-2's config has dropout 0.1: with it the first loss is not ln 2."""
    off, on = (
        train(
            make_config(max_steps=1, disable_dropout=disabled, output_dir=str(tmp_path / str(disabled))),
            model=make_model(),
            tokenizer=tokenizer,
            train_dataset=rows,
        )
        for disabled in (True, False)
    )
    assert abs(off.history[0]["loss"] - math.log(2)) < 1e-5 < 1e-4 < abs(on.history[0]["loss"] - math.log(2))


def test_the_references_columns_of_a_dataset_are_taken_as_given(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    given = [{**row, "ref_chosen_logps": -7.0, "ref_rejected_logps": -9.5} for row in rows]
    config = make_config(batch_size=13, max_steps=1)
    record = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=given).history[0]
    assert record["rewards/chosen"] == pytest.approx(0.1 * (record["logps/chosen"] + 7.0), rel=1e-5)
    assert record["rewards/rejected"] == pytest.approx(0.1 * (record["logps/rejected"] + 9.5), rel=1e-5)


def test_warm_up_and_decay_are_recorded_as_they_were_used(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    config = make_config(max_steps=6, warmup_steps=2, learning_rate=0.004)
    result = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    expected = [0.0, 0.002, 0.004, 0.003, 0.002, 0.001]
    assert [record["learning_rate"] for record in result.history] == pytest.approx(expected)


def test_weight_decay_shrinks_matrices_and_leaves_biases_and_norms(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """Equal responses have no gradient but rounding, which a large epsilon keeps from growing to a step."""
    model, before = make_model(), make_model().state_dict()
    same = [{**row, "rejected": row["chosen"]} for row in rows[:4]]
    train(
        make_config(max_steps=1, weight_decay=0.5, learning_rate=0.1, adam_epsilon=1.0),
        model=model,
        tokenizer=tokenizer,
        train_dataset=same,
    )
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.dim() > 1 else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-6, msg=name)


def test_evaluation_has_the_same_metrics_and_samples_are_kept(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    config = make_config(max_steps=3, eval_every=2, sample_prompts=2, max_new_tokens=5, batch_size=13)
    model = make_model()
    result = train(config, model=model, tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows)
    evals = [record for record in result.history if "eval_loss" in record]
    assert [record["step"] for record in evals] == [2, 3]
    assert {name.removeprefix("eval_") for name in evals[0]} == {
        name for name in TRAIN_NAMES if "/" in name or name in ("step", "loss")
    }
    # The third training step starts from the weights that were evaluated after the second, on the same pairs.
    third = next(record for record in result.history if record["step"] == 3)
    assert evals[0]["eval_loss"] == pytest.approx(third["loss"], rel=1e-5)
    assert evals[0]["eval_logps/chosen"] == pytest.approx(third["logps/chosen"], rel=1e-5)

    samples = [json.loads(line) for line in (result.output_dir / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["row"]) for sample in samples] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert samples[3]["prompt"] == rows[1]["prompt"]
    assert samples[3]["chosen"] == rows[1]["chosen"] + "<|end|>"
    ids = tokenizer(rows[1]["prompt"], return_tensors="pt")["input_ids"]
    model.eval()
    for _ in range(5):  # greedy, by hand
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert samples[3]["generated"] == tokenizer.decode(
        ids[0, len(tokenizer(rows[1]["prompt"])["input_ids"]) :].tolist()
    )


def test_a_held_out_share_is_taken_from_the_data(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(max_steps=None, epochs=1.0, batch_size=1, eval_fraction=0.3)
    result = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert result.step == 9
    assert "held out 4 pairs, 9 are left to train on" in capsys.readouterr().err
    assert "eval_loss" in result.history[-1]


def test_bf16_keeps_float32_weights_and_starts_near_ln_2(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """Rows of one length are padded alike for the reference and the policy, so both round alike."""
    same = [{**row, "chosen": " the sky is blue", "rejected": " the sky is green"} for row in rows[:9]]
    config = make_config(precision="bf16", max_steps=2, batch_size=9, gradient_checkpointing=True)
    result = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=same)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert result.history[1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("faster", [True, False])
def test_bf16_that_this_cpu_only_emulates_is_left_out_everywhere_and_a_line_says_so(
    faster: bool,
    make_config: Make,
    make_model: Make,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Reference, steps, evaluation and samples."""
    monkeypatch.setattr("fastpref.training.precision.multiplies_bf16_faster", lambda device: faster)
    seen: set[bool] = set()
    config = make_config(precision="bf16", layout="padded", max_steps=1, sample_prompts=1, max_new_tokens=2)
    run = prepare(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows[:4], eval_dataset=rows[4:6])
    run.model.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    train_run(run)
    assert seen == {faster}
    assert ("precision=bf16 would be slower on this CPU" in capsys.readouterr().err) is not faster


def test_samples_answer_the_first_prompts_that_there_are(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    held_out = [{"prompt": "", "chosen": "blue sky", "rejected": "green sky"}, *rows[:3]]
    config = make_config(max_steps=1, sample_prompts=2, max_new_tokens=2)
    result = train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows, eval_dataset=held_out)
    samples = [json.loads(line) for line in (result.output_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["row"] for sample in samples] == [1, 2]


def test_the_run_folder_holds_curves_events_and_a_model_that_loads(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(loop, "draw", plots.draw)
    result = train(make_config(), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert (result.output_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((result.output_dir / "tensorboard").iterdir())
    loaded = AutoModelForCausalLM.from_pretrained(result.output_dir / "model")
    assert torch.equal(weights(loaded), weights(result.model))
    text = "the sky is 蓝"
    again = AutoTokenizer.from_pretrained(result.output_dir / "model")
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_conversation_without_a_template_takes_the_default_and_says_so(
    make_config: Make, make_model: Make, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": [{"role": "user", "content": "ask"}]}
    row |= {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}  # type: ignore[dict-item]
    train(make_config(max_steps=1), model=make_model(), tokenizer=tokenizer, train_dataset=[row])
    assert "the tokenizer has no chat template: the plain default" in capsys.readouterr().err


@pytest.mark.slow
def test_plots_of_one_record_and_of_many_are_drawn(tmp_path: Path) -> None:
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    for steps in (1, 30):
        history = [{"step": step, **dict.fromkeys(names, 1 / step)} for step in range(1, steps + 1)]
        history.append({"step": steps, **{f"eval_{name}": 0.5 for name in names}})
        plots.plot_curves(history, tmp_path / "curves.png", title="a run")
        assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "loss", "expected"),
    [
        ({}, "dpo", (3e-4, 256, 4)),
        ({"batch_size": 5}, "dpo", (3e-4, 256, 4)),
        ({}, "aot", (3e-4, 256, 1)),
        ({"learning_rate": 1e-5, "max_length": 99, "gradient_accumulation_steps": 2}, "dpo", (1e-5, 99, 2)),
        ({"model_config": {"model_type": "gpt2"}}, "dpo", (3e-4, 1024, 1)),
        ({"model": "a/folder"}, "dpo", (1e-6, 1024, 1)),
    ],
)
def test_what_is_left_open_follows_from_the_model_and_is_said(
    given: dict[str, Any], loss: str, expected: tuple[float, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(main=True, progress=False)
    config = _with_defaults(TrainConfig(loss=loss, **given), get_loss(loss), None, 1, console)
    assert (config.learning_rate, config.max_length, config.gradient_accumulation_steps) == expected
    assert ("random weights, so other defaults" in capsys.readouterr().err) == (expected[0] == 3e-4)


def test_a_model_given_as_an_object_has_the_defaults_of_trained_weights(make_model: Make) -> None:
    console = Console(main=True, progress=False)
    config = _with_defaults(TrainConfig(), get_loss("dpo"), make_model(), 1, console)
    assert (config.learning_rate, config.max_length, config.gradient_accumulation_steps) == (1e-6, 1024, 1)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"dataset": "x.jsonl"}, {}, "config.dataset and the argument train_dataset were both given"),
        ({"tokenizer": "x"}, {}, "a tokenizer object was given, and config.tokenizer too"),
        ({"model": "x"}, {}, "a model object was given, and config.model or config.model_config too"),
        ({}, {"train_dataset": None}, "there is no data: set dataset"),
        ({}, {"train_dataset": []}, "train_dataset is empty"),
        ({}, {"tokenizer": None}, "a tokenizer is needed"),
        ({"max_length": 65}, {}, "max_length=65 is beyond the model's 64 positions: set max_length=64 or less"),
        ({"loss": "dop"}, {}, "dop"),
        ({"eval_every": 2}, {}, "eval_every and sample_prompts need held-out pairs"),
        ({"eval_fraction": 0.99}, {}, "leaves none to train on"),
        ({"chat_template": "{{ messages }}"}, {}, "chat_template was given, but the dataset is plain text"),
        ({"model_config": {"n_layer": 1}}, {"model": None}, "model_config needs a 'model_type'"),
        ({"model_config": {"model_type": "gtp2"}}, {"model": None}, "model_config does not make a model"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_training(
    options: dict[str, Any], arguments: dict[str, Any], message: str,
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    given = {"model": make_model(), "tokenizer": tokenizer, "train_dataset": rows, **arguments}
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        train(make_config(**options), **given)
    assert message in str(raised.value)
    assert not Path(make_config().output_dir).exists()


def test_a_model_with_too_small_a_vocabulary_and_an_object_that_is_none_are_refused(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    message = r"row \d+ of the data has token \d+ \('.*'\), and the model has embeddings of 100 tokens"
    with pytest.raises(ValueError, match=message):
        train(make_config(), model=make_model(vocab_size=100), tokenizer=tokenizer, train_dataset=rows)
    with pytest.raises(TypeError, match="model must be a transformers causal language model, got Linear"):
        train(make_config(), model=torch.nn.Linear(2, 2), tokenizer=tokenizer, train_dataset=rows)
    with pytest.raises(TypeError, match="config must be a TrainConfig, got dict"):
        train({}, model=make_model(), tokenizer=tokenizer, train_dataset=rows)  # type: ignore[arg-type]


def test_a_loss_option_that_the_loss_does_not_take_is_refused(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(TypeError, match="lambda"):
        train(make_config(loss="dpop", loss_options={"lambda": 5.0}), model=make_model(), tokenizer=tokenizer,
              train_dataset=rows)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": "0.1"}, TypeError, "beta must be a number"),
        ({"beta": 0.0}, ValueError, "beta must be a finite number in (0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be a whole number, got 2.0"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ({"epochs": 0}, ValueError, "epochs must be a finite number in (0"),
        ({"precision": "fp16"}, ValueError, "precision must be one of bf16, fp32; got 'fp16'"),
        ({"schedule": "cosin"}, ValueError, "schedule must be one of constant,"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be one of skip, stop"),
        ({"loss_options": "{lam: 5}"}, ValueError, "loss_options is not valid JSON"),
        ({"loss_options": "[1]"}, ValueError, "loss_options must be"),
        ({"model": "a", "model_config": {}}, ValueError, "give model (weights to start from) or model_config"),
        ({"eval_dataset": "a", "eval_fraction": 0.1}, ValueError, "give eval_dataset or eval_fraction, not both"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, ValueError, "give warmup_steps or warmup_ratio, not both"),
        ({"eval_fraction": 1.0}, ValueError, "eval_fraction must be a finite number in [0, 1)"),
        ({"output_dir": ""}, TypeError, "output_dir must be a non-empty string"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
    ],
)
def test_a_bad_option_is_refused_when_the_config_is_made(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        TrainConfig(**options)
    assert message in str(raised.value)


def test_shares_of_steps_are_not_rounded_up_by_a_product_in_floating_point(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """0.07 · 100 and 1.1 · 10 are a little more than 7 and 11."""
    config = make_config(batch_size=1, max_steps=None, epochs=1.1, schedule="linear")
    assert prepare(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows[:10]).steps == 11
    config = make_config(batch_size=1, max_steps=100, warmup_ratio=0.07)
    run = prepare(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    schedule = make_schedule(make_optimizer(run), run)
    for _ in range(7):
        schedule.optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == config.learning_rate


def test_a_routers_auxiliary_loss_is_turned_off_with_a_line(
    make_config: Make, tokenizer: Any, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True}
    config = AutoConfig.for_model("mixtral", **shape, **more, vocab_size=302)
    model = AutoModelForCausalLM.from_config(config)
    result = train(make_config(max_steps=1), model=model, tokenizer=tokenizer, train_dataset=rows)
    said = capsys.readouterr().err
    assert "output_router_logits is set to False" in said
    assert "is not possible" not in said  # shared rows
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
