"""Runs on single responses with a label (kto): rows, the KL estimate, steps that do not depend on how they are cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastpref.losses import get_loss
from fastpref.training import train
from fastpref.training.checkpoints.save import ResumeError
from fastpref.training.data.tokens import Response
from fastpref.training.data.unpaired import MismatchedRows, fit_rows
from fastpref.training.monitoring import gradients
from fastpref.training.monitoring.nonfinite import NonFiniteError
from fastpref.training.prepare import prepare

Make = Callable[..., Any]
KTO = get_loss("kto")
# AdamW's epsilon is so large that rounding is not blown up to a whole step.
FIXED: dict[str, Any] = {"loss": "kto", "group_by_length": False, "adam_epsilon": 1.0, "learning_rate": 0.1}


@pytest.fixture
def unpaired() -> list[dict[str, Any]]:
    """13 responses of different lengths, 8 of them desirable."""
    return [
        {
            "prompt": f"what is the colour of sky {i}?",
            "completion": " the sky is blue" + " today" * (i % 4) if i % 3 else f" {i}" * (1 + i % 5) + " green",
            "label": bool(i % 3),
        }
        for i in range(13)
    ]


@pytest.fixture
def start(make_config: Make, make_model: Make, tokenizer: Any, unpaired: list[dict[str, Any]], tmp_path: Path) -> Make:
    def run(name: str = "run", data: Any = None, model: Any = None, **options: Any) -> Any:
        config = make_config(output_dir=str(tmp_path / name), **{**FIXED, **options})
        given = unpaired if data is None else data
        model = make_model() if model is None else model
        return train(config, model=model, tokenizer=tokenizer, train_dataset=given, eval_dataset=given[:5])

    return run


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def logps(model: Any, responses: list[Response]) -> torch.Tensor:
    """Each response's log-prob, a row at a time, from the model's logits."""
    found = []
    for ids, start in responses:
        tokens = torch.from_numpy(ids).long()[None]
        every = F.log_softmax(model(tokens).logits[0, :-1], -1).gather(-1, tokens[0, 1:, None])[:, 0]
        found.append(every[max(start, 1) - 1 :].sum())
    return torch.stack(found)


def test_a_step_is_ktos_loss_with_one_estimate_over_all_its_mismatched_pairs(
    start: Make, make_config: Make, make_model: Make, tokenizer: Any, unpaired: list[dict[str, Any]]
) -> None:
    options = {"batch_size": 3, "gradient_accumulation_steps": 2, "beta": 0.5, "max_grad_norm": 0.0,
               "loss_options": {"desirable_weight": 1.5, "undesirable_weight": 0.5}, "learning_rate": 1.0}  # fmt: skip
    result = start(**options, max_steps=2, save_every=1)
    assert result.history[0]["loss"] == pytest.approx(0.5 * (1.5 * 4 + 0.5 * 2) / 6, rel=0.3)
    assert result.history[0]["kl"] == pytest.approx(0, abs=1e-4)

    config = make_config(**{**FIXED, **options}, output_dir=str(result.output_dir) + "-again", max_steps=2)
    run = prepare(config, model=make_model(), tokenizer=tokenizer, train_dataset=unpaired)
    run.release()
    pairs = [run.pairs[index] for index in run.plan.step(1)]
    label = torch.tensor([bool(unpaired[pair.row]["label"]) for pair in pairs])
    reference = make_model().eval()
    policy = type(reference).from_pretrained(result.output_dir / "checkpoint-1").eval()
    with torch.no_grad():
        responses = [pair.rejected for pair in pairs]
        kl = (logps(policy, responses) - logps(reference, responses)).mean().clamp(min=0)
        known = logps(reference, [pair.chosen for pair in pairs])
    ratio = logps(policy, [pair.chosen for pair in pairs]) - known
    u = 0.5 * (ratio - kl)
    loss = torch.where(label, 1.5 * (1 - torch.sigmoid(u)), 0.5 * (1 - torch.sigmoid(-u))).mean()
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(policy.parameters())))
    record = next(record for record in result.history if record["step"] == 2 and "loss" in record)
    expected = {
        "loss": loss, "kl": kl, "grad_norm": norm, "rewards/chosen": 0.5 * ratio[label].mean(),
        "rewards/rejected": 0.5 * ratio[~label].mean(), "logps/chosen": (ratio + known)[label].mean(),
        "logps/rejected": (ratio + known)[~label].mean(),
    }  # fmt: skip
    assert {name: record[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-3, abs=1e-4
    )
    assert record["kl"] > 0.01
    assert record["rewards/margins"] == pytest.approx(record["rewards/chosen"] - record["rewards/rejected"])
    assert "rewards/accuracies" not in record


@pytest.mark.parametrize(
    "cut",
    [
        {"layout": "padded", "logps": "logits", "batch_size": 2, "gradient_accumulation_steps": 4},
        {"layout": "packed", "batch_size": 1, "gradient_accumulation_steps": 8},
        {"layout": "shared", "logps": "logits", "batch_size": 8, "batch_tokens": 40},
        {"layout": "shared", "batch_size": 8, "auto_batch": True},
        {"layout": "padded", "batch_size": 8, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_step_does_not_depend_on_how_it_is_cut_or_laid_out(start: Make, cut: dict[str, Any]) -> None:
    whole, other = start("whole", batch_size=8), start("other", **cut)
    for a, b in zip(whole.history, other.history, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "eval_loss", "eval_kl", "kl", "rewards/margins", "grad_norm"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name
    torch.testing.assert_close(weights(other.model), weights(whole.model), rtol=1e-3, atol=1e-5)


def test_a_resumed_run_reaches_the_same_bits_and_other_labels_are_refused(
    start: Make, unpaired: list[dict[str, Any]]
) -> None:
    straight = start("straight")
    start(save_every=2)
    checkpoint = str(straight.output_dir.parent / "run" / "checkpoint-2")
    again = start("again", resume=checkpoint)
    assert torch.equal(weights(again.model), weights(straight.model))
    with pytest.raises(ResumeError, match="cannot be resumed with other settings than its own: the data"):
        start("other", data=[{**row, "label": not row["label"]} for row in unpaired], resume=checkpoint)
    with pytest.raises(ResumeError, match="the data"):  # other mismatched responses are another estimate
        start("other", resume=checkpoint, seed=1)


def test_pairs_are_taken_apart_and_messages_are_rows_too(
    start: Make, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    result = start(data=rows, progress=False)
    said = capsys.readouterr().err
    assert (
        "dataset: 13 desirable and 13 undesirable responses, the two of each pair (row i as dataset's rows 2i" in said
    )
    assert {"rewards/chosen", "rewards/rejected", "kl"} <= result.history[-1].keys() | result.history[-2].keys()
    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["chosen"]}],
            "label": 1,
        }
        for row in rows
    ]
    result = start("messages", data=messages)
    assert "rewards/chosen" in result.history[0]
    assert "rewards/rejected" not in result.history[0]  # there are none


def test_a_mismatched_response_is_that_of_another_prompt_and_each_is_taken_once(unpaired: list[dict[str, Any]]) -> None:
    unpaired = [{**row, "completion": f"{row['completion']} {i}"} for i, row in enumerate(unpaired)]
    given = {row["prompt"]: row["completion"] for row in unpaired}
    for seed in range(20):
        found = fit_rows(unpaired, KTO, "dataset", seed=seed, say=print)
        assert isinstance(found, MismatchedRows)
        assert found.desirable == [row["label"] for row in unpaired]
        assert [(row["prompt"], row["chosen"]) for row in found] == list(given.items())
        assert sorted(row["rejected"] for row in found) == sorted(given.values())
        assert not any(row["rejected"] == row["chosen"] for row in found)
    pairs = [{"prompt": f"{i}", "chosen": f"{i} good", "rejected": f"{i} bad"} for i in range(5)]
    for seed in range(20):
        found = fit_rows(pairs, KTO, "dataset", seed=seed, say=print)
        assert all(row["rejected"].split()[0] != row["prompt"] for row in found)  # not of the same pair


def test_a_dry_run_samples_and_the_readme_call_things_by_their_names(
    start: Make, unpaired: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = start(dry_run=True).dry_run
    assert set(report.lengths) == {"prompt", "response", "mismatched response", "longer sequence"}
    assert report.memory.micro_batch[0] == 4
    assert "\nmismatched response: " in capsys.readouterr().out
    result = start(sample_prompts=1, max_new_tokens=2, save_best=True, best_metric="eval_kl")
    sample = json.loads((result.output_dir / "samples.jsonl").read_text().splitlines()[0])
    assert sample["completion"].startswith(unpaired[0]["completion"])
    assert (sample["label"], {"chosen", "rejected"} & sample.keys()) == (False, set())


def test_exploding_and_broken_steps_name_rows_with_their_one_log_prob(
    start: Make, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "FIRST", 1)
    monkeypatch.setattr(gradients, "PAIRS", 1)
    monkeypatch.setattr(gradients, "FACTOR", 1e-9)
    monkeypatch.setattr(gradients, "SATURATED", 0.0)
    monkeypatch.setattr(gradients, "BEYOND", 0.0)
    (said,) = start().advice
    assert "(their gradients were not measured: the loss is of unpaired data): row " in said.text
    assert ", log-prob -" in said.text
    broken = make_model()
    with torch.no_grad():
        broken.transformer.wpe.weight[60] = torch.nan  # beyond all responses: only the reference of none reads it
        broken.transformer.wpe.weight[12] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"The batch, with the log-probs of its responses: row \d+: loss nan, log-pr"
    ):
        start("broken", model=broken)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"label": None},
            ValueError,
            "row 3 has no 'label', which loss 'kto' needs; its columns are prompt, completion",
        ),
        ({"label": "good"}, TypeError, r"row 3: label must be true \(desirable\) or false, got 'good'"),
        ({"label": 0.5}, TypeError, r"row 3: label must be true \(desirable\) or false, got 0.5"),
        ({"completion": None}, ValueError, "row 3 has no 'completion', which loss 'kto' needs"),
        ({"prompt": None}, ValueError, "row 3 has no 'prompt', which loss 'kto' needs"),
    ],
)
def test_rows_that_do_not_fit_are_named(
    change: dict[str, Any], error: type[Exception], message: str, unpaired: list[dict[str, Any]], start: Make
) -> None:
    unpaired[3].update(change)
    with pytest.raises(error, match=message):
        start(data=unpaired)


def test_data_and_loss_that_do_not_go_together_are_refused(
    start: Make, unpaired: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> None:
    message = (
        r"dataset holds single responses \(prompt, completion, label\), and loss 'sigmoid' compares two: set loss=k"
    )
    with pytest.raises(ValueError, match=message):
        start(loss="sigmoid")
    with pytest.raises(ValueError, match="the KL estimate of 'kto' needs at least 2 responses, got 1"):
        start(data=unpaired[:1])
    with pytest.raises(
        ValueError, match="row 0: ref_chosen_logps cannot be used: kto needs mismatched responses scored"
    ):
        start(data=[{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows])
    with pytest.raises(
        ValueError, match="row 0 has no 'prompt', which loss 'kto' needs; its columns are chosen, reject"
    ):
        start(data=[{name: row[name] for name in ("chosen", "rejected")} for row in rows])
    with pytest.raises(
        ValueError, match=r"best_metric must be one of eval_loss, eval_kl, .*got 'eval_rewards/accuracies'"
    ):
        start(best_metric="eval_rewards/accuracies")
