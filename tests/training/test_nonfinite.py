"""Losses and gradients that are not finite stop the run with the rows named, or skip the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.training import NonFiniteError, train
from fastpref.training.checkpoints.save import checkpoint_folders
from fastpref.training.data.batches import BatchPlan, Sizes

Make = Callable[..., Any]
BAD_ROW = 9


@pytest.fixture
def poisoned(make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """A model whose embedding of Z is NaN, and data where only one row holds a Z; its reference is given."""
    model = make_model()
    with torch.no_grad():
        model.transformer.wte.weight = torch.nn.Parameter(model.transformer.wte.weight.clone())  # not the head's
        model.transformer.wte.weight[tokenizer("Z")["input_ids"][0]] = math.nan
    rows = [{**row, "ref_chosen_logps": -40.0, "ref_rejected_logps": -40.0} for row in rows]
    rows[BAD_ROW]["chosen"] = " Z is blue"
    return model, rows


SEED = 6
SIZES = Sizes(tokens=(1,) * 13, longest=(1,) * 13, widths=None)
PLAN = BatchPlan(pairs=13, per_step=4, batch_size=2, seed=SEED, sizes=SIZES)
BAD_STEP = next(step for step in range(1, 5) if BAD_ROW in PLAN.step(step - 1))


def test_the_run_stops_naming_step_rows_and_values_and_keeps_the_checkpoint(
    make_config: Make, tokenizer: Any, poisoned: tuple[Any, list[dict[str, Any]]]
) -> None:
    model, rows = poisoned
    config = make_config(batch_size=2, gradient_accumulation_steps=2, save_every=1, seed=SEED)
    step = BAD_STEP
    assert step > 1  # there is a checkpoint to keep
    with pytest.raises(NonFiniteError) as raised:
        train(config, model=model, tokenizer=tokenizer, train_dataset=rows)
    message = str(raised.value)
    assert message.startswith(f"step {step}: 1 of 4 pairs have values that are not finite")
    assert f"row {BAD_ROW}: loss nan, log-probs nan and " in message
    for row in PLAN.step(step - 1):
        assert f"row {row}: loss " in message
    kept = [path.name for path in checkpoint_folders(Path(config.output_dir))]
    assert kept[-1] == f"checkpoint-{step - 1}"
    assert f"checkpoint-{step - 1}. Look at these rows" in message


def test_resumed_before_the_step_it_stops_there_again_with_the_same_rows_named(
    make_config: Make, tokenizer: Any, poisoned: tuple[Any, list[dict[str, Any]]]
) -> None:
    model, rows = poisoned
    options = {"batch_size": 2, "gradient_accumulation_steps": 2, "save_every": 1, "seed": SEED}
    messages = []
    for resume in (None, True):
        with pytest.raises(NonFiniteError) as raised:
            train(make_config(**options, resume=resume), model=model, tokenizer=tokenizer, train_dataset=rows)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert f"row {BAD_ROW}: loss nan" in messages[1]


def test_told_to_skip_it_leaves_the_step_out_and_goes_on(
    make_config: Make, tokenizer: Any, poisoned: tuple[Any, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = poisoned
    head = model.lm_head.weight.detach().clone()
    config = make_config(batch_size=2, gradient_accumulation_steps=2, on_nonfinite="skip", logging_every=1, seed=SEED)
    result = train(config, model=model, tokenizer=tokenizer, train_dataset=rows)
    assert result.step == 4
    assert f"skipped the update. step {BAD_STEP}: 1 of 4 pairs" in capsys.readouterr().err
    assert not torch.equal(model.lm_head.weight, head)
    assert torch.isfinite(model.lm_head.weight).all()
    assert [record["step"] for record in result.history] == [step for step in range(1, 5) if step != BAD_STEP]
    assert all(math.isfinite(value) for record in result.history for value in record.values())


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_losses_are_finite(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    model = make_model()
    model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        NonFiniteError, match=r"step 1: the gradient has values that are not finite.*row \d+: loss 0\.69"
    ):
        train(make_config(), model=model, tokenizer=tokenizer, train_dataset=rows)
