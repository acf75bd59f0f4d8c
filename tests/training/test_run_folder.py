"""What a run folder tells: options that run again, versions without secrets, notes of a resumed run, live progress."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref import console
from fastpref.console import Bar, Console, progress_note
from fastpref.training import TrainConfig, loop, plots, train
from fastpref.training.arguments import parse_arguments
from fastpref.training.run_folder import as_options

Make = Callable[..., Any]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "dpop", "loss_options": {"lam": 2.5}, "disable_dropout": False, "progress": False, "epochs": 0.5},
        {"model_config": {"model_type": "gpt2", "layer_types": ["a", None]}, "learning_rate": 3e-7, "save_best": True},
        {
            "chat_template": "{{ messages }}\n '\"$",
            "output_dir": "a folder/--x",
            "memory_budget": "1GiB",
            "max_steps": 3,
        },
        {"group_by_length": False, "auto_batch": True, "lora_rank": 4, "lora_alpha": 0.5, "batch_tokens": 7},
    ],
)
def test_options_written_to_a_file_are_the_options_read_from_it(changes: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**changes)
    (tmp_path / "config.json").write_text(json.dumps(as_options(config)), encoding="utf-8")
    assert parse_arguments([str(tmp_path / "config.json")]) == config


def test_a_run_writes_its_options_as_used_its_environment_and_a_listing(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("FASTPREF_VALIDATE", "0")
    result = train(make_config(), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    config = parse_arguments([str(result.output_dir / "config.json")])
    assert (config.learning_rate, config.gradient_accumulation_steps, config.max_steps) == (1e-3, 1, 4)
    text = (result.output_dir / "environment.json").read_text(encoding="utf-8")
    assert "secret" not in text
    found = json.loads(text)
    assert found["variables"].items() >= {"FASTPREF_VALIDATE": "0"}.items()
    assert set(found["variables"]) <= set(fastpref_variables())
    assert re.fullmatch(r"\d+\.\d+\..*", found["versions"]["torch"])
    assert (found["device"], found["processes"]) == ("cpu", 1)
    listing = (result.output_dir / "README.md").read_text(encoding="utf-8")
    shown = {path.name for path in result.output_dir.iterdir() if path.name != "README.md"}
    assert {name for name in shown if name not in listing} == set()
    assert f"4 steps of 4 pairs; at the end: loss {result.history[-1]['loss']:.4f}" in listing
    assert [path.name for path in result.output_dir.iterdir() if path.name.startswith(".")] == []


def fastpref_variables() -> tuple[str, ...]:
    from fastpref.environment import VARIABLES

    return VARIABLES


def test_a_resumed_run_keeps_the_options_of_its_start_and_notes_what_has_changed(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    options: dict[str, Any] = {"save_every": 2, "schedule": "constant"}
    first = train(make_config(**options), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    before = {name: read(first.output_dir / name) for name in ("config.json", "environment.json")}
    config = make_config(**options, max_steps=5, resume=True, logging_every=2)
    train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert {name: read(first.output_dir / name) for name in before} == before
    (note,) = [json.loads(line) for line in (first.output_dir / "resumed.jsonl").read_text().splitlines()]
    assert note["step"] == 4
    assert note["config"] == {"max_steps": [4, 5], "logging_every": [1, 2]}
    assert note["environment"] == {}


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_description_is_written_anew(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], text: str
) -> None:
    options: dict[str, Any] = {"save_every": 2, "schedule": "constant"}
    folder = train(make_config(**options), model=make_model(), tokenizer=tokenizer, train_dataset=rows).output_dir
    (folder / "config.json").write_text(text)
    again = make_config(**options, max_steps=5, resume=True)
    train(again, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert read(folder / "config.json")["max_steps"] == 5


def test_the_listing_does_not_claim_the_best_model_of_an_earlier_run(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    for save_best in (True, False):
        config = make_config(max_steps=1, save_best=save_best)
        folder = train(
            config, model=make_model(), tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows[:2]
        ).output_dir
        assert ("the best evaluation" in (folder / "README.md").read_text()) == save_best


def test_curves_are_drawn_during_the_run_when_it_is_time_and_not_at_every_step(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(loop, "draw", lambda run, history: drawn.append(history[-1]["step"]))
    train(make_config(), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert drawn == [4]
    evaluating = make_config(output_dir=make_config().output_dir + "-evaluating", eval_every=1)
    train(evaluating, model=make_model(), tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows[:2])
    assert drawn == [4, 4]
    monkeypatch.setattr(plots, "REFRESH_SECONDS", 0.0)
    config = make_config(output_dir=make_config().output_dir + "often")
    train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert drawn[2] == 1
    assert drawn[-1] == 4


def test_the_time_left_of_a_resumed_run_counts_what_it_does_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 900 of 1000 in hand, two seconds a step: not a thousandth of that."""
    now = [50.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    bar = Bar("train", 1000, done=900, unit="step")
    assert (bar.eta, bar.count) == ("", "900/1,000 steps (90%)")
    for _ in range(4):
        now[0] += 2.0
        bar.advance(tokens=100)
    assert bar.eta == "eta 3:12"
    assert bar.note == "50 tokens/s"
    now[0] += 10.0  # a slow one is in the mean of the last fifty, and no longer
    bar.advance(note="slow")
    assert str(bar) == "train: 905/1,000 steps (90%)  eta 5:42  slow"
    for _ in range(console.RECENT):
        now[0] += 1.0
        bar.advance()
    assert bar.eta == "eta 0:45"


def lines_of(monkeypatch: pytest.MonkeyPatch, *, progress: bool = True, every: float = 0.05) -> tuple[Console, Any]:
    monkeypatch.setattr(console, "FIRST_LINE_SECONDS", every)
    monkeypatch.setattr(console, "LINE_SECONDS", every)
    out = io.StringIO()
    return Console(main=True, progress=progress, out=out), out


def wait_for(out: io.StringIO, text: str) -> None:
    end = time.perf_counter() + 60
    while text not in out.getvalue():
        assert time.perf_counter() < end, out.getvalue()
        time.sleep(0.01)


def test_without_a_terminal_a_line_shows_that_a_long_step_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, out = lines_of(monkeypatch)
    with shown.bar("train", 10, unit="step") as bar:
        wait_for(out, "train: 0/10 steps (0%)\n")  # nothing has advanced yet
        bar.advance(3, note="loss 0.5")
        wait_for(out, "train: 3/10 steps (30%)  eta ")
        with shown.bar("evaluation", 4) as inner:
            inner.advance()
            wait_for(out, "evaluation: 1/4 (25%)")
            said = out.getvalue().count("train:")
            time.sleep(0.2)
            assert out.getvalue().count("train:") <= said + 1  # of two bars the inner one speaks
    said = out.getvalue()
    time.sleep(0.15)
    assert out.getvalue() == said
    assert "loss 0.5" in said


def test_a_line_that_was_said_puts_off_the_next_and_progress_off_silences_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    shown, out = lines_of(monkeypatch)
    with shown.bar("train", 10):
        shown.say("a record")
        time.sleep(0.3)  # several times as long as it waits; by its clock no time has passed since the line
        assert "train:" not in out.getvalue()
        now[0] += 1.0
        wait_for(out, "train:")
    shown, out = lines_of(monkeypatch, progress=False)
    with shown.bar("train", 10) as bar:
        bar.advance()
        time.sleep(0.2)
    assert out.getvalue() == ""


def test_in_a_terminal_bars_may_be_nested_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = io.StringIO()
    shown = Console(main=True, progress=True, out=out)
    for _ in range(2):
        with shown.bar("train", 4, done=1, unit="step") as bar:
            bar.advance(note="1,234 tokens/s")
            with shown.bar("evaluation", 2, unit="pair") as inner:
                inner.advance()
                shown.say("a line")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert text.count("a line") == 2
    assert re.search(r"train +\S+ 2/4 steps \(50%\) +(eta \d:\d\d +)?1,234 tokens/s", text)
    assert re.search(r"evaluation +\S+ 1/2 pairs \(50%\)", text)


def test_the_note_of_a_bar_is_the_last_training_record() -> None:
    record = {"tokens_per_second": 1234.4, "loss": 0.5, "rewards/margins": 0.25}
    assert progress_note([]) == ""
    assert progress_note([record, {"eval_loss": 3.0}]) == "1,234 tokens/s  loss 0.5000  margin 0.2500"
