"""Runs with a sum of losses: the loss of the first step, steps that do not depend on how they are cut, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.training import TrainConfig, train
from fastpref.training.arguments import parse_arguments
from fastpref.training.checkpoints.save import ResumeError

Make = Callable[..., Any]
RPO: dict[str, Any] = {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}


@pytest.fixture
def start(make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path) -> Make:
    def run(name: str = "run", data: Any = None, **options: Any) -> Any:
        config = make_config(output_dir=str(tmp_path / name), **options)
        given = rows if data is None else data
        return train(config, model=make_model(), tokenizer=tokenizer, train_dataset=given, eval_dataset=given[:5])

    return run


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_first_step_is_ln_2_and_the_share_of_the_chosen_responses_cross_entropy(start: Make) -> None:
    alone = start("sft", loss="sft", max_steps=1, batch_size=13)
    both = start(**RPO, max_steps=1, batch_size=13)
    expected = math.log(2) + 0.2 * alone.history[0]["loss"]
    assert both.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert both.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "cut",
    [
        {"layout": "padded", "logps": "logits", "batch_size": 2, "gradient_accumulation_steps": 4},
        {"layout": "packed", "batch_size": 4, "gradient_accumulation_steps": 2},
        {"layout": "shared", "batch_size": 8, "batch_tokens": 60},
    ],
)
def test_a_sums_step_does_not_depend_on_how_it_is_cut_or_laid_out(start: Make, cut: dict[str, Any]) -> None:
    # AdamW's epsilon is so large that rounding is not blown up to a whole step.
    fixed = {**RPO, "group_by_length": False, "adam_epsilon": 1.0, "learning_rate": 0.1}
    whole, other = start("whole", **fixed, batch_size=8), start("other", **fixed, **cut)
    for a, b in zip(whole.history, other.history, strict=True):
        for name in ("loss", "eval_loss", "rewards/margins", "grad_norm"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    torch.testing.assert_close(weights(other.model), weights(whole.model), rtol=1e-3, atol=1e-5)


def test_a_penalty_goes_by_the_name_of_its_loss(start: Make) -> None:
    result = start(loss=["dpop", "sft"], loss_options={"lam": 2.0}, best_metric="eval_dpop/penalty", save_best=True)
    assert {"dpop/penalty", "dpop/active_frac"} <= set(result.history[0])


def test_a_resumed_sum_reaches_the_same_bits_and_other_weights_are_refused(start: Make) -> None:
    straight = start("straight", **RPO)
    start(**RPO, max_steps=4, save_every=2)
    other = {**RPO, "loss_weights": [1.0, 0.3]}
    with pytest.raises(ResumeError, match=r"loss_weights \(was \[1.0, 0.2\], is \[1.0, 0.3\]\)"):
        start(**other, resume="latest")
    again = start("again", **RPO, resume=str(straight.output_dir.parent / "run" / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(straight.model))


def test_the_command_and_a_file_take_several_losses(tmp_path: Path) -> None:
    config = parse_arguments(["--loss", "sigmoid", "sft", "--loss_weights", "1", "0.2"])
    assert (config.loss, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.2])
    assert parse_arguments(["--loss", "dpop"]).loss == "dpop"
    file = tmp_path / "run.yaml"
    file.write_text("loss: [sigmoid, sft]\nloss_weights: [1, 0.2]\n")
    config = parse_arguments([str(file), "--beta", "0.2"])
    assert (config.loss, config.loss_weights, config.beta) == (["sigmoid", "sft"], [1.0, 0.2], 0.2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_weights": []}, TypeError, "loss_weights must be a list of numbers, got"),
        ({"loss_weights": 0.2}, TypeError, "loss_weights must be a list of numbers, got 0.2"),
        ({"loss_weights": [1.0, "a"]}, TypeError, "loss_weights must be a number, got 'a'"),
        ({"loss_weights": [1.0, 0.0]}, ValueError, r"loss_weights must be .*\(0, inf\), got 0.0"),
        ({"loss": []}, TypeError, "loss must be a name or a list of names, got"),
    ],
)
def test_weights_that_are_none_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**{"loss": ["sigmoid", "sft"], **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "loss_weights must be 2 numbers, one for each loss",
        ),
        ({"loss": "sigmoid", "loss_weights": [1.0]}, "goes with several losses, and loss is 'sigmoid' alone"),
        ({"loss": ["aot", "sft"], "gradient_accumulation_steps": 2}, r"'aot \+ sft' compares the pairs of a batch"),
    ],
)
def test_a_sum_that_the_loop_cannot_train_is_refused_before_the_data(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**options, dataset="nowhere", output_dir=str(tmp_path / "run")))
