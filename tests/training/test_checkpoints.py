"""Checkpoints and resuming: to the same bits, from the initial reference, never from half a folder."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fastpref.folders import MARKER, FolderError
from fastpref.training import loop, train
from fastpref.training.checkpoints import durable
from fastpref.training.checkpoints import save as checkpoints
from fastpref.training.checkpoints.durable import SaveError
from fastpref.training.checkpoints.save import ResumeError
from fastpref.training.monitoring.metrics import keep_records

Make = Callable[..., Any]
TIMED = ("tokens_per_second", "peak_memory")


def steps(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training records, without what a clock or the process shows."""
    return untimed([record for record in history if "loss" in record])


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMED} for record in history]


def hidden(folder: Path) -> list[str]:
    """What was to be renamed or deleted."""
    return [path.name for path in folder.glob(".*") if path.name != MARKER]


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
    states = [torch.load(folder / "checkpoint-6" / "optimizer.pt") for folder in (straight.output_dir, broken)]
    for one, other in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert untimed(resumed.history) == untimed(straight.history)
    lines = (broken / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == resumed.history


def test_a_checkpoint_in_another_folder_can_be_named(start: Make, tmp_path: Path) -> None:
    straight = start()
    moved = start(output_dir=str(tmp_path / "other"), resume=str(straight.output_dir / "checkpoint-3"))
    assert all(map(torch.equal, straight.model.parameters(), moved.model.parameters()))


def test_runs_are_not_mixed_up_in_a_folder(start: Make, tmp_path: Path) -> None:
    checkpoint = str(start().output_dir / "checkpoint-3")
    other = str(tmp_path / "other")
    moved = start(output_dir=other, resume=checkpoint)
    assert [record["step"] for record in steps(moved.history)] == [4, 5, 6]
    with pytest.raises(FolderError, match="holds checkpoints of an earlier run"):
        start(output_dir=other, resume=checkpoint)
    third = str(tmp_path / "third")
    start(output_dir=third, learning_rate=1e-2, save_every=0)
    with pytest.raises(FolderError, match="holds an earlier run"):
        start(output_dir=third, resume=checkpoint)


@pytest.mark.slow
def test_weights_of_several_dtypes_come_back_as_they_were(start: Make, make_model: Make) -> None:
    def mixed() -> Any:
        model = make_model().to(torch.bfloat16)
        model.transformer.ln_f.float()
        return model

    options = {"max_steps": 3, "precision": "bf16", "learning_rate": 1e-2}
    first = start(mixed(), **options).model
    resumed = start(mixed(), resume=True, **options).model
    assert all(map(torch.equal, first.parameters(), resumed.parameters()))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_lost_reference_is_computed_again_from_the_initial_model_and_from_no_other(
    start: Make, make_model: Make
) -> None:
    trained = make_model()
    first = start(model=trained, max_steps=3, schedule="constant")
    for stored in first.output_dir.glob("reference-*.jsonl"):
        stored.unlink()
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


@pytest.mark.slow
def test_a_save_that_fails_stops_the_run_with_the_room_and_the_earlier_checkpoint_named(
    start: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save = torch.save

    def failing(value: Any, file: Any) -> None:
        save(value, file)
        if "checkpoint-4" in file.name and "optimizer" in file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.torch, "save", failing)
    with pytest.raises(SaveError) as raised:
        start(save_every=2)
    monkeypatch.undo()
    run = tmp_path / "run"
    message = str(raised.value)
    assert message.startswith(f"{run / 'checkpoint-4'} could not be written: No space left on device. It needs about ")
    assert re.search(r"about \d+\.\d MiB, and [\d,]+\.\d MiB are free there", message)
    assert message.endswith(f"The newest checkpoint is {run / 'checkpoint-2'}; mend that and go on with resume")
    assert hidden(run) == []
    resumed = start(save_every=2, resume=True)
    straight = start(save_every=2, output_dir=str(tmp_path / "straight"))
    assert all(map(torch.equal, straight.model.parameters(), resumed.model.parameters()))


def test_a_disk_with_too_little_room_is_noticed_before_anything_is_written(
    start: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 1 << 20)
    monkeypatch.setattr(durable, "new_folder", lambda folder: pytest.fail("writing began"))
    with pytest.raises(SaveError, match=r"there is too little room. It needs about 1\.\d MiB, and 1\.0 MiB are free"):
        start()
    assert hidden(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("fastpref.training.loop.add_reference", "a file in"),
        ("fastpref.training.monitoring.metrics.write_record", "metrics.jsonl"),
        ("fastpref.training.monitoring.evaluate.write_record", "samples.jsonl"),
        ("torch.utils.tensorboard.SummaryWriter.add_scalar", "tensorboard"),
        ("fastpref.training.loop.draw", "curves.png"),
        ("transformers.GPT2LMHeadModel.save_pretrained", "best"),
    ],
)
def test_whatever_cannot_be_written_is_named(
    start: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, name: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(target, full)
    with pytest.raises(SaveError) as raised:
        start(max_steps=2, save_every=0, sample_prompts=1, max_new_tokens=2, save_best=True)
    what = f"{name} {tmp_path / 'run'}" if name == "a file in" else str(tmp_path / "run" / name)
    assert str(raised.value).startswith(f"{what} could not be written: No space left on device. ")
    assert str(raised.value).endswith("No checkpoint had been written; mend that and start again")
    assert hidden(tmp_path / "run") == []


def damaged(folder: Path, name: str, how: str) -> str:
    """Damage a file of a checkpoint; what is said of it."""
    path = folder / name
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-1])
        return f"{name} has {len(content) - 1} bytes of {len(content)}"
    if how == "lost":
        path.unlink()
        return f"{name} is missing"
    place = len(content) * 2 // 3
    path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    return f"{name} has changed since it was written"


@pytest.mark.parametrize("how", ["cut", "lost", "flipped"])
def test_every_file_of_a_checkpoint_is_checked_and_the_next_older_one_named(
    start: Make, how: str, tmp_path: Path
) -> None:
    result = start(max_steps=2, save_every=1)
    old, new = checkpoints.checkpoint_folders(result.output_dir)
    names = [path.name for path in new.iterdir() if path.name != durable.MANIFEST]
    assert {"model.safetensors", "optimizer.pt", "training_state.pt", "rng_0.pt", "tokenizer.json"} <= set(names)
    for name in names:
        content = (new / name).read_bytes()
        said = damaged(new, name, how)
        assert (durable.find_damage(new) or "").startswith(said)
        (new / name).write_bytes(content)
        assert durable.find_damage(new) is None
    said = damaged(new, "model.safetensors", how)
    with pytest.raises(ResumeError) as raised:
        start(max_steps=2, resume=str(new))
    assert f"{new} is damaged: {said}" in str(raised.value)
    assert str(raised.value).endswith(f"the next older one is whole: resume={str(old)!r}")


def test_no_bit_of_the_manifest_can_change_unnoticed(start: Make) -> None:
    folder = start(max_steps=1, save_every=1).output_dir / "checkpoint-1"
    content = (folder / durable.MANIFEST).read_bytes()
    for place in range(len(content)):
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        (folder / durable.MANIFEST).write_bytes(changed)
        found = durable.find_damage(folder)
        try:
            same = json.loads(changed) == json.loads(content)  # another white space
        except ValueError:
            same = False
        assert (found is None) == same, changed[place - 20 : place + 20]


def test_resume_passes_over_a_damaged_checkpoint_and_says_so(
    start: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = start(max_steps=6, save_every=2)
    broken = tmp_path / "broken"
    shutil.copytree(straight.output_dir, broken)
    said = damaged(broken / "checkpoint-6", "optimizer.pt", "flipped")
    resumed = start(max_steps=6, save_every=2, output_dir=str(broken), resume=True)
    assert f"passing over {broken / 'checkpoint-6'}, which is damaged: {said}" in capsys.readouterr().err
    assert all(map(torch.equal, straight.model.parameters(), resumed.model.parameters()))
    assert durable.find_damage(broken / "checkpoint-6") is None  # made again
    for folder in checkpoints.checkpoint_folders(broken):
        damaged(folder, "rng_0.pt", "cut")
    with pytest.raises(ResumeError, match=r"no checkpoint in .* is whole.*checkpoint-6, which.*checkpoint-4, which"):
        start(max_steps=6, output_dir=str(broken), resume=True)


def test_what_a_killed_run_left_is_cleared_away_or_put_back(start: Make, tmp_path: Path) -> None:
    run = start(max_steps=3).output_dir
    content = {path.name: path.read_bytes() for path in (run / "checkpoint-3").iterdir()}
    (run / "checkpoint-3").rename(run / ".checkpoint-3.fastpref-old")  # about to be replaced
    shutil.copytree(run / "model", run / ".model.fastpref-old")  # was replaced
    for name in (".checkpoint-6.fastpref-new", ".checkpoint-2.fastpref-gone"):
        (run / name).mkdir()
        (run / name / "model.safetensors").write_bytes(b"half")
    (run / ".metrics.jsonl.fastpref-new").write_text("half")
    start(max_steps=3, resume=True)
    assert {path.name: path.read_bytes() for path in (run / "checkpoint-3").iterdir()} == content
    assert hidden(run) == []


def test_hidden_files_of_others_stay_as_they_are(start: Make, tmp_path: Path) -> None:
    run = start(max_steps=3).output_dir
    mine = [run / name for name in (".bashrc.old", ".notes.new", ".cache.gone")]
    for path in mine:
        path.write_text("mine")
    start(max_steps=3, resume=True)
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_a_second_run_in_the_folder_of_one_that_is_saving_leaves_that_alone(start: Make) -> None:
    run = start(max_steps=3).output_dir
    half = run / ".checkpoint-6.fastpref-new"
    half.mkdir()
    with pytest.raises(FolderError, match="holds checkpoints of an earlier run"):
        start(max_steps=6)
    assert half.is_dir()


def test_a_checkpoint_that_is_written_again_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint-1"

    def write(text: str) -> None:
        with durable.new_folder(folder) as new:
            (new / "a").write_text(text)

    write("one")
    rename, calls = os.rename, []

    def breaking(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(*args)

    monkeypatch.setattr(os, "rename", breaking)
    with pytest.raises(KeyboardInterrupt):
        write("two")
    monkeypatch.undo()
    durable.sweep(tmp_path)
    assert (folder / "a").read_text() == "one"
    assert durable.find_damage(folder) is None
    assert hidden(tmp_path) == []
    write("three")
    assert (folder / "a").read_text() == "three"
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_a_torn_line_of_the_metrics_is_made_again_and_no_other(start: Make, tmp_path: Path) -> None:
    straight = start(max_steps=6, output_dir=str(tmp_path / "straight"))
    run = start(max_steps=3, schedule="linear").output_dir
    shutil.rmtree(run)
    shutil.copytree(straight.output_dir, run)
    shutil.rmtree(run / "checkpoint-6")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:-20])
    assert untimed(start(max_steps=6, resume=True).history) == untimed(straight.history)
    for end in (0, 1, 9, 100, len(lines[3]) - 2, len(lines[3]) - 1):  # what a kill may have left of the last one
        (run / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2] + lines[3][:end])
        assert keep_records(run / "metrics.jsonl", start=4) == [json.loads(line) for line in lines[:3]]
        assert (run / "metrics.jsonl").read_bytes() == b"".join(lines[:3])
    garbage = b'\xff\n[1]\n5\n{"step": null}\n{"step": "1", "loss": 1}\n'  # whatever somebody has done to the file
    (run / "metrics.jsonl").write_bytes(lines[0] + garbage + lines[1])
    assert keep_records(run / "metrics.jsonl", start=4) == [json.loads(line) for line in lines[:2]]


def test_the_random_states_of_python_and_numpy_come_back_too(start: Make) -> None:
    random.seed(3)
    np.random.seed(4)  # noqa: NPY002
    start(max_steps=3)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    start(max_steps=3, resume=True)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "values", "steps"),
    [
        ("eval_loss", [3.0, 2.0, 2.0, math.nan, 1.0, 4.0], [1, 2, 5]),
        ("eval_rewards/rejected", [3.0, 4.0, 2.0, 2.0, 5.0, 1.0], [1, 3, 6]),
        ("eval_rewards/margins", [3.0, 2.0, 4.0, 4.0, math.inf, math.nan], [1, 3, 5]),
    ],
)
def test_the_best_model_is_that_of_the_best_evaluation(
    start: Make, monkeypatch: pytest.MonkeyPatch, metric: str, values: list[float], steps: list[int]
) -> None:
    given, saved, original = iter(values), [], checkpoints._save_alone
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda run: {**evaluate(run), metric: next(given)})

    def noted(run: Any, model: Any, name: str, notes: Any) -> None:
        original(run, model, name, notes)
        if name == "best":
            saved.append(notes["best.json"]["step"])
            state = type(model).from_pretrained(run.output_dir / "best").state_dict()
            assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())

    monkeypatch.setattr(checkpoints, "_save_alone", noted)
    result = start(eval_every=1, save_every=1, save_best=True, best_metric=metric)
    assert saved == steps
    best = {"metric": metric, "step": steps[-1], "value": values[steps[-1] - 1]}
    assert json.loads((result.output_dir / "best" / "best.json").read_text()) == best
    assert checkpoints.load_state(result.output_dir / "checkpoint-6")["best"] == {**best, "kept": True}
    assert AutoTokenizer.from_pretrained(result.output_dir / "best").eos_token == "<|end|>"


def test_the_best_value_is_in_the_checkpoint_of_a_run_that_keeps_no_model_of_it(start: Make) -> None:
    result = start(eval_every=1, save_every=1)
    losses = {record["step"]: record["eval_loss"] for record in result.history if "eval_loss" in record}
    step = min(losses, key=losses.__getitem__)
    best = {"metric": "eval_loss", "step": step, "value": losses[step], "kept": False}
    assert checkpoints.load_state(result.output_dir / "checkpoint-6")["best"] == best
    assert not (result.output_dir / "best").exists()


@pytest.mark.slow
def test_the_best_value_counts_after_resuming(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"eval_every": 1, "save_best": True, "schedule": "constant"}
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda run: {**evaluate(run), "eval_loss": 1.0})
    run = start(max_steps=3, **options).output_dir
    monkeypatch.setattr(loop, "evaluate", lambda run: {**evaluate(run), "eval_loss": 2.0})
    start(max_steps=4, resume=True, **options)
    assert json.loads((run / "best" / "best.json").read_text())["step"] == 1


@pytest.mark.parametrize("before", [{"save_best": False}, {"best_metric": "eval_rewards/rejected"}])
def test_a_best_value_counts_only_if_it_is_of_this_metric_and_its_model_was_kept(
    start: Make, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any]
) -> None:
    options = {"eval_every": 1, "save_best": True, "schedule": "constant"}
    evaluate, best = loop.evaluate, {"eval_loss": 0.1, "eval_rewards/rejected": 0.1}
    monkeypatch.setattr(loop, "evaluate", lambda run: {**evaluate(run), **best})
    run = start(max_steps=3, **{**options, **before}).output_dir
    best["eval_loss"] = 0.2
    start(max_steps=4, resume=True, **options)
    written = json.loads((run / "best" / "best.json").read_text())
    assert written == {"metric": "eval_loss", "step": 4, "value": 0.2}


def test_a_run_that_goes_on_in_another_folder_has_its_best_model_there(
    start: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"eval_every": 1, "save_best": True}
    evaluate, values = loop.evaluate, iter([1.0] * 6 + [2.0] * 3)
    monkeypatch.setattr(loop, "evaluate", lambda run: {**evaluate(run), "eval_loss": next(values)})
    first = start(**options).output_dir
    moved = start(**options, output_dir=str(tmp_path / "other"), resume=str(first / "checkpoint-3"))
    assert json.loads((moved.output_dir / "best" / "best.json").read_text())["step"] == 4


def test_a_best_metric_that_no_evaluation_gives_is_an_error_before_training(start: Make) -> None:
    with pytest.raises(ValueError, match=r"best_metric must be one of eval_loss, .*got 'loss'"):
        start(save_best=True, best_metric="loss")
    with pytest.raises(ValueError, match="best_metric must be one of"):
        start(save_best=True, best_metric="eval_dpop/penalty")
    start(max_steps=1, loss="dpop", save_best=True, best_metric="eval_dpop/penalty")


def test_without_held_out_pairs_there_is_no_best_model(make_config: Make, make_model: Make, tokenizer: Any) -> None:
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    with pytest.raises(ValueError, match="save_best needs held-out pairs: set eval_dataset or eval_fraction"):
        train(make_config(save_best=True), model=make_model(), tokenizer=tokenizer, train_dataset=[row])


@pytest.mark.slow
def test_of_an_adapter_only_its_weights_are_saved_and_a_run_resumes_with_them(
    start: Make, make_model: Make, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")

    def adapted() -> Any:
        torch.manual_seed(5)
        return peft.get_peft_model(make_model(), lora)

    straight = start(model=adapted(), output_dir=str(tmp_path / "straight"), save_best=True)
    start(model=adapted(), max_steps=3, schedule="constant", output_dir=str(tmp_path / "constant"))
    broken = tmp_path / "broken"
    shutil.copytree(straight.output_dir, broken)
    shutil.rmtree(broken / "checkpoint-6")
    resumed = start(model=adapted(), output_dir=str(broken), save_best=True, resume=True)
    assert all(map(torch.equal, straight.model.state_dict().values(), resumed.model.state_dict().values()))
    for name in ("checkpoint-6", "best", "model"):
        names = {path.name for path in (broken / name).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names
        assert "model.safetensors" not in names
    loaded = peft.PeftModel.from_pretrained(make_model(), broken / "checkpoint-6")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key


def test_a_folder_with_checkpoints_is_not_overwritten(start: Make) -> None:
    start(max_steps=3)
    with pytest.raises(FolderError, match="holds checkpoints of an earlier run: set resume to go on with it"):
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


def test_a_model_with_other_weights_than_the_checkpoints_is_refused(start: Make, make_model: Make) -> None:
    start(max_steps=3)
    with pytest.raises(ResumeError, match=r"model \(was '28 weights, 28 of them trained', is '16 weights, 16"):
        start(make_model(n_layer=1), resume=True)
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    with pytest.raises(ResumeError, match=r"model \(was '28 weights, 28 of them trained', is '32 weights, 4 of"):
        start(peft.get_peft_model(make_model(), lora), resume=True)


def test_resuming_without_a_checkpoint_is_an_error(start: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="resume: there is no checkpoint in"):
        start(resume=True)
    assert not (tmp_path / "run").exists()
    model = start(max_steps=1).output_dir / "model"
    (tmp_path / "run" / "checkpoint-3").mkdir()  # without its state it is none
    with pytest.raises(FileNotFoundError, match="resume: there is no checkpoint in"):
        start(resume="latest")
    with pytest.raises(FileNotFoundError, match="is not a checkpoint folder"):
        start(resume=str(tmp_path / "run" / "checkpoint-3"))
    with pytest.raises(FileNotFoundError, match=r"model' is not a checkpoint folder \(it has no training_state.pt"):
        start(resume=str(model))


def test_an_output_folder_that_is_a_file_or_is_deleted_is_named(
    start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for dry_run in (False, True):
        with pytest.raises(FolderError, match=r"output_dir .*file' is a file: give a folder"):
            start(output_dir=str(tmp_path / "file"), dry_run=dry_run)
    run = tmp_path / "run"
    monkeypatch.setattr(loop, "draw", lambda *given: (shutil.rmtree(run), (run / "curves.png").write_bytes(b"")))
    with pytest.raises(SaveError, match=r"curves.png could not be written: No such file .* MiB are free there"):
        start(max_steps=1)
