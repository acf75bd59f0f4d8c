"""Checkpoints and resuming: to the same bits, from the initial reference, never from half a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.training import checkpoints, train
from fastpref.training.prepare import ResumeError

Make = Callable[..., Any]
TIMED = ("tokens_per_second", "peak_memory")


def steps(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training records, without what a clock or the process shows."""
    return untimed([record for record in history if "loss" in record])


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMED} for record in history]


@pytest.fixture
def start(make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> Make:
    """Trains on the 13 rows: steps of 4 pairs, so that 3 steps end within the first epoch of 4."""

    def run(model: Any = None, **options: Any) -> Any:
        config = make_config(**{"max_steps": 6, "save_every": 3, **options})
        return train(
            config,
            model=make_model() if model is None else model,
            tokenizer=tokenizer,
            train_dataset=rows,
            eval_dataset=rows[:2],
        )

    return run


@pytest.mark.parametrize("options", [{}, {"disable_dropout": False}, {"loss": "dpop", "logging_every": 2}])
def test_a_resumed_run_ends_with_the_same_bits(start: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    straight = start(**options)
    broken = tmp_path / "broken"  # what a run killed after step 3, and some records later, has left
    shutil.copytree(straight.output_dir, broken)
    shutil.rmtree(broken / "checkpoint-6")
    shutil.rmtree(broken / "model")
    resumed = start(**options, output_dir=str(broken), resume="latest")
    assert resumed.step == 6
    for (name, one), other in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    states = [checkpoints.load_state(folder / "checkpoint-6") for folder in (straight.output_dir, broken)]
    for one, other in zip(
        states[0]["optimizer"]["state"].values(), states[1]["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert untimed(resumed.history) == untimed(straight.history)
    lines = (broken / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == resumed.history


def test_a_checkpoint_in_another_folder_can_be_named(start: Make, tmp_path: Path) -> None:
    straight = start()
    moved = start(output_dir=str(tmp_path / "other"), resume=str(straight.output_dir / "checkpoint-3"))
    assert all(map(torch.equal, straight.model.parameters(), moved.model.parameters()))


def test_a_run_can_be_made_longer(start: Make) -> None:
    short = start(max_steps=3, schedule="constant")
    longer = start(max_steps=6, schedule="constant", resume=True)
    straight = start(max_steps=6, schedule="constant", output_dir=str(short.output_dir) + "-straight")
    assert all(map(torch.equal, straight.model.parameters(), longer.model.parameters()))


def test_the_reference_is_the_initial_model_even_if_the_trained_one_is_given(start: Make, make_model: Make) -> None:
    """Resuming with the model object that a run has trained uses the log-probs stored before its first step."""
    trained = make_model()
    start(model=trained, max_steps=4, schedule="constant")  # an epoch, so the reference of every pair is stored
    resumed = start(model=trained, schedule="constant", resume=True)
    straight = start(schedule="constant", output_dir=str(resumed.output_dir) + "-straight")
    assert steps(resumed.history) == steps(straight.history)


def test_a_lost_reference_is_computed_again_from_the_initial_model_and_from_no_other(
    start: Make, make_model: Make
) -> None:
    trained = make_model()
    first = start(model=trained, max_steps=3, schedule="constant")
    (first.output_dir / "reference.safetensors").unlink()
    with pytest.raises(ResumeError, match="the model given is not the one it started from: give the initial model"):
        start(model=trained, schedule="constant", resume=True)
    resumed = start(schedule="constant", resume=True)
    straight = start(schedule="constant", output_dir=str(resumed.output_dir) + "-straight")
    assert steps(resumed.history) == steps(straight.history)


def test_only_the_newest_checkpoints_stay(start: Make) -> None:
    result = start(max_steps=5, save_every=1, keep_checkpoints=2)
    assert [path.name for path in checkpoints.checkpoint_folders(result.output_dir)] == ["checkpoint-4", "checkpoint-5"]
    names = {path.name for path in (result.output_dir / "checkpoint-5").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "training_state.pt", "rng_0.pt"} <= names


def test_a_save_that_breaks_off_leaves_the_earlier_checkpoint_as_the_newest(
    start: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save, calls = torch.save, []

    def failing(value: Any, path: Any) -> None:
        calls.append(path)
        if "checkpoint-4" in str(path):
            raise OSError("no space left on device")
        save(value, path)

    monkeypatch.setattr(checkpoints.torch, "save", failing)
    with pytest.raises(OSError, match="no space left"):
        start(save_every=2)
    monkeypatch.undo()
    assert calls
    assert [path.name for path in checkpoints.checkpoint_folders(tmp_path / "run")] == ["checkpoint-2"]
    resumed = start(save_every=2, resume=True)
    straight = start(save_every=2, output_dir=str(tmp_path / "straight"))
    assert all(map(torch.equal, straight.model.parameters(), resumed.model.parameters()))


def test_a_folder_with_checkpoints_is_not_overwritten(start: Make) -> None:
    start(max_steps=3)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run: set resume to go on with it"):
        start(max_steps=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.2, "learning_rate": 1e-2}, "beta (was 0.1, is 0.2), learning_rate (was 0.001, is 0.01)"),
        ({"max_length": 12}, "the data"),
        ({"batch_size": 2}, "pairs_per_step (was 4, is 2)"),
        ({"max_steps": 2}, "has made 3 steps already, more than the 2 asked for"),
    ],
)
def test_other_settings_than_the_checkpoints_are_refused_by_name(
    start: Make, options: dict[str, Any], message: str
) -> None:
    start(max_steps=3)
    with pytest.raises(ResumeError) as raised:
        start(resume=True, **options)
    assert message in str(raised.value)


def test_resuming_without_a_checkpoint_is_an_error(start: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="resume: there is no checkpoint in"):
        start(resume=True)
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)  # without its state it is none
    with pytest.raises(FileNotFoundError, match="resume: there is no checkpoint in"):
        start(resume="latest")
    with pytest.raises(FileNotFoundError, match="is not a checkpoint folder"):
        start(resume=str(tmp_path / "run" / "checkpoint-3"))
