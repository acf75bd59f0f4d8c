"""The loop's advice: said where a chosen reward falls or a gradient explodes, once, and by healthy runs never."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.losses import get_loss
from fastpref.training import Advice, train
from fastpref.training.data.batches import BatchPlan, Sizes
from fastpref.training.monitoring import advice, gradients
from fastpref.training.monitoring.advice import EXPLODING, FALLING, falling_chosen_reward
from fastpref.training.monitoring.gradients import Norms

Make = Callable[..., Any]

# Steps of 4 of 64 pairs, in one epoch; the spoilt row comes late enough for the run to know what is usual.
PAIRS, STEPS, SPOILT_STEP = 64, 16, 14
SIZES = Sizes(tokens=(1,) * PAIRS, longest=(1,) * PAIRS, widths=None)
STEP = BatchPlan(pairs=PAIRS, per_step=4, batch_size=4, seed=0, sizes=SIZES).step(SPOILT_STEP - 1)
SPOILT = STEP[1]


def pairs(*, spoilt: bool) -> list[dict[str, Any]]:
    """Pairs with answers of a few tokens; the spoilt one rejects what all others prefer, and ten times over."""
    rows = [
        {
            "prompt": f"what is the colour of sky {i}?",
            "chosen": " the sky is blue" + " today" * (i % 3),
            "rejected": f" {i} is green" + " again" * (i % 4),
        }
        for i in range(PAIRS)
    ]
    if spoilt:
        rows[SPOILT]["rejected"] = " the sky is blue today" * 20
    return rows


@pytest.fixture
def start(make_config: Make, make_model: Make, tokenizer: Any) -> Make:
    """A run over `pairs`."""

    def run(*, spoilt: bool = True, **options: Any) -> Any:
        options = {"max_length": 160, "max_steps": STEPS, "learning_rate": 1e-2, "schedule": "constant", **options}
        model = make_model(n_positions=160)
        return train(make_config(**options), model=model, tokenizer=tokenizer, train_dataset=pairs(spoilt=spoilt))

    return run


@pytest.fixture
def falling(make_config: Make, make_model: Make, tokenizer: Any) -> Make:
    """A run whose chosen responses are far below their reference (given) while the margin grows."""
    rows = [{"prompt": "the sky", "chosen": " is blue blue blue blue", "rejected": " is blue blue blue blue blue"}] * 4
    given = [{**row, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for row in rows]

    def run(**options: Any) -> Any:
        config = make_config(max_steps=20, learning_rate=3e-3, schedule="constant", save_every=16, **options)
        return train(config, model=make_model(), tokenizer=tokenizer, train_dataset=given)

    return run


def lines(folder: Path) -> list[Advice]:
    return [Advice(**json.loads(line)) for line in (folder / "advice.jsonl").read_text("utf-8").splitlines()]


def bits(result: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in result.model.parameters()])


# A chosen reward that falls


def records(nats: list[float], *, beta: float = 0.1, fall: float = 0.02) -> list[dict[str, float]]:
    """One of every step: chosen rewards of so many nats, and a loss that falls a little with each."""
    return [
        {"step": step, "loss": 0.693 - fall * step, "rewards/chosen": beta * value, "rewards/margins": beta * step}
        for step, value in enumerate([0.0, *nats], start=1)
    ]


def spoken(nats: list[float], *, loss: str = "dpo", per_step: int = 16, fall: float = 0.02, **options: Any) -> Any:
    """What is said at the first record that anything is said at."""
    arguments = {"beta": 0.1, **options}
    history = records(nats, beta=arguments["beta"], fall=fall)
    found = (
        falling_chosen_reward(history[:end], get_loss(loss), arguments, pairs_per_step=per_step)
        for end in range(1, len(history) + 1)
    )
    return next((text for text in found if text is not None), None)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_a_fall_of_the_chosen_reward_is_told_in_nats_whatever_beta_is(beta: float) -> None:
    text = spoken([-0.23 * step for step in range(30)], beta=beta)
    nats = float(re.search(r"by ([\d.]+) nats each", text)[1])
    assert 0.5 < nats < 2
    assert f"(reward {-beta * nats:.3g})" in text


@pytest.mark.parametrize(
    ("loss", "options", "named", "not_named"),
    [
        ("dpo", {}, ["loss=dpop", "margin_clip in loss_options"], ["smaller margin_clip"]),
        ("dpo", {"margin_clip": 5.0}, ["loss=dpop", "a smaller margin_clip in loss_options"], []),
        ("dpop", {"lam": 1.0}, ["a larger lam", "margin_clip"], ["loss=dpop"]),
        ("ipo", {}, ["loss=dpop", "nats a token"], ["margin_clip"]),
        ("hinge", {}, ["loss=dpop"], ["margin_clip"]),
    ],
)
def test_the_remedies_are_options_that_the_loss_takes(
    loss: str, options: dict[str, Any], named: list[str], not_named: list[str]
) -> None:
    text = spoken([-0.23 * step for step in range(30)], loss=loss, **options)
    assert all(word in text for word in [*named, "a smaller beta", "learning_rate"])
    assert not any(word in text for word in not_named)


@pytest.mark.parametrize("loss", ["sft", "kl_sft", "apo_down", "simpo"])
def test_losses_without_reference_or_that_trade_no_chosen_log_prob_for_a_margin_get_no_advice(loss: str) -> None:
    assert spoken([-5.0] * 30, loss=loss) is None


def test_a_loss_that_does_not_fall_a_dip_and_too_few_pairs_are_no_failure() -> None:
    fallen = [-5.0] * 30
    assert spoken(fallen) is not None
    assert spoken(fallen, fall=-0.001) is None
    assert spoken([-0.3] * 30) is None  # less than half a nat
    dip = records([-3.0] * 12 + [1.0] * 12)
    assert falling_chosen_reward(dip, get_loss("dpo"), {"beta": 0.1}, pairs_per_step=16) is None
    assert spoken(fallen, per_step=2) is None  # 60 pairs
    assert spoken([*fallen, *fallen], per_step=2) is not None


def test_a_short_run_that_rose_before_it_fell_gets_the_advice_by_its_latest_records() -> None:
    """Chosen log-ratios (nats) that DPO gave in 65 steps of 20 pairs, a record of every 5th step."""
    rose_and_fell = [0.1, 0.66, 0.79, 0.29, -0.16, -0.09, -0.34, -0.84, -0.48, -0.77, -0.7, -0.74, -0.98]
    text = spoken(rose_and_fell, per_step=20)
    assert "by 0.752 nats each against the reference in the records of steps 9 to 14 " in text
    assert spoken(rose_and_fell[:-1], per_step=20) is None
    noisy = [value + 0.5 * (-1) ** place for place, value in enumerate(rose_and_fell)]
    assert spoken(noisy, per_step=20) is None  # the latest five are below half a nat too, but so may noise be
    quiet_end = [*[3.0, -3.0] * 4, *[-0.7] * 5]
    assert spoken(quiet_end, per_step=20) is None  # noise counts though the latest have none
    assert spoken([0.0] * 8 + quiet_end[-5:], per_step=20) is not None


def test_the_latest_five_are_not_all_that_is_looked_at_and_a_fall_that_ends_is_none() -> None:
    long_noise = [-1.0, -0.6] * 12
    assert spoken(long_noise[:5]) is None
    assert spoken(long_noise, per_step=40) is not None  # of more records the mean is surer
    ending = [-6.0, -5.9, -6.1, -6.0, -0.4, -0.3, -0.2]
    assert spoken([0.0, 0.1, *ending][:6]) is None
    assert falling_chosen_reward(records(ending), get_loss("dpo"), {"beta": 0.1}, pairs_per_step=16) is None
    loud_end = [0.0, 0.1] * 8 + [-1.0, 4.0, -9.0, 3.0, -6.0]
    assert spoken(loud_end) is None  # the noise of these is their own
    lost = records([-5.0] * 30)
    for record in lost:
        record["rewards/margins"] = -0.1
    assert falling_chosen_reward(lost, get_loss("dpo"), {"beta": 0.1}, pairs_per_step=16) is None


def test_one_bad_step_does_not_silence_the_advice_and_a_short_dip_of_a_long_run_does_not_draw_it() -> None:
    spiky = [(-5.0, -50.0, 300.0)[place % 15 == 7 and 1 + place % 2] for place in range(60)]
    assert spoken(spiky) is not None
    history = records([-5.0] * 20)
    history[12]["loss"] = 8.0
    arguments = {"beta": 0.1}
    assert falling_chosen_reward(history[:17], get_loss("dpo"), arguments, pairs_per_step=16) is None  # 4 since then
    assert falling_chosen_reward(history[:18], get_loss("dpo"), arguments, pairs_per_step=16) is not None
    numbers = random.Random(0)
    dip = [level + numbers.gauss(0, 0.1) for level in [1.0] * 100 + [-1.0] * 10 + [1.0] * 50]
    assert spoken(dip, per_step=20, fall=0.001) is None
    assert spoken(dip[90:], per_step=20, fall=0.001) is not None  # a short run's dip is half of it


def test_single_noisy_pairs_around_a_small_gain_are_no_fall() -> None:
    """Their means of five records go below every threshold of nats."""
    for seed in range(20):
        numbers = random.Random(seed)
        nats = [numbers.gauss(0.2, 6.0) for _ in range(200)]
        assert min(sum(nats[place : place + 5]) / 5 for place in range(len(nats) - 4)) < -0.5
        assert spoken(nats, per_step=1) is None


def test_a_fall_is_said_once_and_a_resumed_run_says_the_same(
    falling: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = falling()
    assert capsys.readouterr().err.count("advice: the loss falls") == 1
    (said,) = straight.advice
    assert said.kind == FALLING
    assert said.step > 16  # what it is judged by lies before the checkpoint
    assert lines(straight.output_dir) == [said]
    assert "what the loop has advised" in (straight.output_dir / "README.md").read_text("utf-8")
    broken, moved = tmp_path / "broken", str(tmp_path / "moved")
    shutil.copytree(straight.output_dir, broken)
    resumed = falling(output_dir=str(broken), resume=True)
    elsewhere = falling(output_dir=moved, resume=str(broken / "checkpoint-16"))
    assert capsys.readouterr().err.count("advice: the loss falls") == 2
    for result in (resumed, elsewhere):
        assert result.advice == [said]
        assert lines(result.output_dir) == [said]


# Gradients that explode


def exploded(norms: list[float], *, loss: float = 1.0, pairs_per_step: int = 16) -> list[int]:
    """Where an explosion is seen, if losses after the first are `loss` higher."""
    watch = Norms(pairs_per_step)
    return [place for place, norm in enumerate(norms) if watch.see(norm, 0.7 + loss * bool(place)) is not None]


def test_a_norm_far_beyond_what_the_run_has_shown_is_an_explosion() -> None:
    assert exploded([1.0] * 20 + [9.0] + [1.0] * 20 + [31.0]) == [41]
    assert exploded([1.0] * 20 + [30.0]) == [20]
    slow = exploded([1.0] * 30 + [1.5**step for step in range(15)])
    assert slow[0] == 30 + math.ceil(math.log(10, 1.5))  # though no step is 3 times the one before
    assert exploded([1.0] * 4 + [100.0] + [1.0] * 40 + [100.0]) == [45]  # not among the first, but when it comes again


def test_norms_that_decay_or_jump_as_they_did_before_are_no_explosion() -> None:
    saturating = [0.8**step for step in range(60)]
    assert exploded(saturating) == []
    assert exploded([*saturating, 2.0, *saturating[30:], 1.5]) == []  # hard pairs: 1000s of times their neighbours
    dpop = [1.2, 21.0, 0.9, 0.9, 20.0, *([0.9] * 9 + [35.0]) * 4]
    assert exploded(dpop) == []
    low_edit = [27.0, 28.0, 6.0, *([0.5] * 9 + [0.01] * 9 + [240.0]) * 3]
    assert exploded(low_edit) != []
    assert exploded(low_edit, loss=-0.4) == []  # saturated: the hard pairs' losses are below the first step's
    assert exploded([*low_edit, 1e4], loss=-0.4) == [len(low_edit)]  # too much for whatever loss
    assert exploded([5.0, 7.0, 4.0, 6.0] * 10 + [96.0], loss=-0.4) == [40]  # no norms of such a spread go so far
    assert exploded([1e-3, 7.0, 4e-2, 6.0] * 10 + [96.0], loss=-0.4) == []
    assert exploded([1.0] * 9 + [1e3]) == []  # nothing is known yet
    assert exploded([1.0] * 30 + [1e3] + [1.0] * 20 + [1e3], pairs_per_step=1) == [51]
    assert exploded([0.0] * 12 + [1.0]) == []  # most steps have no gradient


def test_norms_go_on_from_their_state_as_if_there_had_been_no_break() -> None:
    numbers = random.Random(0)
    steps = [(math.exp(numbers.gauss(0, 0.5)), 0.7) for _ in range(120)]
    steps[15], steps[100] = (40.0, 1.0), (1e4, 0.1)
    straight = Norms(16)
    expected = [straight.see(*step) for step in steps]
    assert [place for place, usual in enumerate(expected) if usual is not None] == [15, 100]
    for cut in (3, 10, 14, 20, 90):
        before, resumed = Norms(16), Norms(16)
        for step in steps[:cut]:
            before.see(*step)
        resumed.load_state(json.loads(json.dumps(before.state())))
        assert [resumed.see(*step) for step in steps[cut:]] == expected[cut:]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"loss": "dpo"}, {"loss": "dpop"}, {"loss": "sft"}, {"loss": "kl_sft"}])
def test_healthy_runs_get_no_advice(start: Make, options: dict[str, Any]) -> None:
    result = start(spoilt=False, **options)
    assert result.advice == []
    assert not (result.output_dir / "advice.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0},
        {"logps": "logits", "layout": "padded", "group_by_length": False},
        {"loss": "aot"},
        {"lora_rank": 4, "learning_rate": 3e-2},
    ],
)
def test_the_row_that_did_it_comes_first_with_its_own_gradients_norm(
    start: Make, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    if "lora_rank" in options:
        pytest.importorskip("peft")
    result = start(**options)
    (said,) = [line for line in result.advice if line.kind == EXPLODING]
    assert capsys.readouterr().err.count("advice: the gradient of step") == 1
    assert said.step == SPOILT_STEP
    norm = result.history[SPOILT_STEP - 1]["grad_norm"]
    assert said.text.startswith(f"the gradient of step {SPOILT_STEP} had the norm {norm:.3g}, ")
    found = re.findall(r"row (\d+): norm ([\d.e+-]+), (loss )?", said.text)
    assert int(found[0][0]) == SPOILT
    assert sorted(int(row) for row, *_ in found) == sorted(STEP)
    assert all(bool(loss) == (options.get("loss") != "aot") for *_, loss in found)  # no loss there is a pair's own
    # The step takes the mean of the rows' gradients, and the others' are small beside this one.
    assert float(found[0][1]) / 4 == pytest.approx(norm, rel=0.3)
    clipped = "was not clipped (max_grad_norm=0)" if "max_grad_norm" in options else "was clipped to max_grad_norm=1"
    assert clipped in said.text
    assert "measured alone with the step's loss derivatives and the weights after that update" in said.text
    assert f"a smaller max_length (row {SPOILT} has 1" in said.text
    assert all(word in said.text for word in ("learning_rate", "warmup_steps", "max_grad_norm"))


@pytest.mark.slow
def test_measuring_leaves_the_run_as_it_was_dropout_included(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"disable_dropout": False, "batch_size": 2, "gradient_accumulation_steps": 2}
    first = start(**options)
    assert [line.kind for line in first.advice] == [EXPLODING]
    monkeypatch.setattr(gradients, "FACTOR", math.inf)
    second = start(**options, output_dir=str(first.output_dir) + "-silent")
    assert second.advice == []
    assert torch.equal(bits(first), bits(second))


@pytest.mark.slow
def test_a_resumed_run_neither_repeats_nor_loses_what_was_said(start: Make, capsys: pytest.CaptureFixture[str]) -> None:
    straight = start(save_every=3)
    (said,) = straight.advice
    for checkpoint, times in ((12, 1), (15, 0)):  # before that step and after it
        capsys.readouterr()
        resumed = start(
            output_dir=f"{straight.output_dir}-{checkpoint}",
            resume=str(straight.output_dir / f"checkpoint-{checkpoint}"),
            save_every=3,
        )
        assert resumed.advice == [said]
        assert lines(resumed.output_dir) == [said]
        assert capsys.readouterr().err.count("advice:") == times
        assert torch.equal(bits(resumed), bits(straight))


def test_where_rows_cannot_be_measured_they_are_listed_by_loss_and_of_many_rows_some_are_measured(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    def explosion(*arguments: Any, now: int) -> str:
        with monkeypatch.context() as patch:
            texts.append(gradients.explosion(*arguments, now=now + 1))
            texts.append(gradients.explosion(*arguments, now=None))
            patch.setattr(gradients, "MEASURED", 2)
            texts.append(gradients.explosion(*arguments, now=now))
            patch.setattr(gradients, "_norms_alone", full)
            return gradients.explosion(*arguments, now=now)

    monkeypatch.setattr(advice, "explosion", explosion)
    result = start()
    late, broken, some = texts
    assert f"and the weights after the update of step {SPOILT_STEP + 1}: row {SPOILT}: norm" in late
    why = "with the largest losses (their gradients were not measured:"
    assert f"{why} a later step is not finite): row {SPOILT}: loss" in broken
    assert "of 2 rows (half by loss, half by length) each measured alone" in some
    assert len(re.findall(r"row \d+: norm", some)) == 2
    assert f"{why} memory did not suffice): row {SPOILT}: loss" in result.advice[0].text
    losses = [float(loss) for loss in re.findall(r"row \d+: loss ([\d.e+-]+)", broken)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4
