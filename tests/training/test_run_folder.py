"""What a run folder tells: options that run again, versions without secrets, notes of a resumed run, live progress."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref.folders import MARKER
from fastpref.training import TrainConfig, loop, train
from fastpref.training.arguments import parse_arguments
from fastpref.training.monitoring import plots
from fastpref.training.monitoring.metrics import progress_note

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
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
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
    shown = {path.name for path in result.output_dir.iterdir() if path.name not in ("README.md", MARKER)}
    assert {name for name in shown if name not in listing} == set()
    assert f"4 steps of 4 pairs; at the end: loss {result.history[-1]['loss']:.4f}" in listing
    assert [path.name for path in result.output_dir.glob(".*")] == [MARKER]


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


def test_the_note_of_a_bar_is_the_last_training_record() -> None:
    record = {"tokens_per_second": 1234.4, "loss": 0.5, "rewards/margins": 0.25}
    assert progress_note([]) == ""
    assert progress_note([record, {"eval_loss": 3.0}]) == "1,234 tokens/s  loss 0.5000  margin 0.2500"
