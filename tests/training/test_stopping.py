"""SIGTERM and Ctrl-C: the step is finished, a checkpoint written, and resuming makes the run that was not stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastpref.cli import main
from fastpref.training import loop, train
from fastpref.training.checkpoints.save import checkpoint_folders
from fastpref.training.monitoring.stopping import Stopped, StopSignals, how_to_go_on
from fastpref.training.reference import scores as reference

Make = Callable[..., Any]
TIMED = ("tokens_per_second", "peak_memory")


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMED} for record in history]


@pytest.fixture
def start(make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> Make:
    def run(**options: Any) -> Any:
        data = {"train_dataset": rows, "eval_dataset": rows[:2]}
        return train(make_config(**{"max_steps": 6, **options}), model=make_model(), tokenizer=tokenizer, **data)

    return run


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Have this process get signals in a training step (counted from 1), just once."""

    def arrange(*signals: signal.Signals, step: int) -> None:
        original, calls = loop.add_gradient, []

        def loss(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == step:
                for number in signals:
                    os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        monkeypatch.setattr(loop, "add_gradient", loss)

    return arrange


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_that_goes_on_to_the_same_bits(
    start: Make, send: Make, number: signal.Signals, tmp_path: Path
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    straight = start(output_dir=str(tmp_path / "straight"), eval_every=3, sample_prompts=1, max_new_tokens=2)
    send(number, step=3)  # an evaluation is due after it, which has to wait
    options = {"eval_every": 3, "sample_prompts": 1, "max_new_tokens": 2}
    result = start(**options)
    assert (result.stopped, result.step) == (number.name, 3)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert [folder.name for folder in checkpoint_folders(result.output_dir)] == ["checkpoint-3"]  # with save_every=0
    assert not (result.output_dir / "model").exists()
    assert [record["step"] for record in result.history] == [1, 2, 3]

    resumed = start(**options, resume=True)
    assert (resumed.stopped, resumed.step) == (None, 6)
    assert untimed(resumed.history) == untimed(straight.history)
    assert all(map(torch.equal, straight.model.parameters(), resumed.model.parameters()))
    samples = [(result.output_dir / "samples.jsonl").read_bytes() for result in (straight, resumed)]
    assert samples[0] == samples[1]


def test_an_evaluation_that_had_to_wait_is_made_once_even_if_it_is_killed_when_resumed(
    start: Make, send: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eval_every": 3, "sample_prompts": 1, "max_new_tokens": 2}
    straight = start(output_dir=str(tmp_path / "straight"), **options)
    send(signal.SIGTERM, step=3)
    stopped = start(**options)
    monkeypatch.setattr(loop, "keep_best", lambda *args: 1 / 0)  # after the record was written
    with pytest.raises(ZeroDivisionError):
        start(**options, resume=True)
    monkeypatch.undo()
    monkeypatch.setattr(loop, "draw", lambda run, history: None)
    assert '"eval_loss"' in (stopped.output_dir / "metrics.jsonl").read_text(encoding="utf-8")
    assert untimed(start(**options, resume=True).history) == untimed(straight.history)


def test_a_second_signal_acts_as_it_would_have_without_a_run(start: Make, send: Make) -> None:
    send(signal.SIGTERM, signal.SIGINT, step=2)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_reference_pass_stops_at_once_and_the_next_run_goes_on(
    start: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    straight = start(output_dir=str(tmp_path / "straight"))
    original, calls = reference.log_probs, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(reference, "log_probs", interrupted)
    result = start(batch_size=1)
    assert (result.stopped, result.step, len(calls)) == ("SIGTERM", 0, 2)
    assert checkpoint_folders(result.output_dir) == []
    again = start()
    assert again.stopped is None
    assert untimed(again.history) == untimed(straight.history)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_says_how_to_go_on_and_exits_as_a_stopped_one_does(
    send: Make, number: signal.Signals, code: int, tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import json

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = '{"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}'
    command = [
        "train", f"--dataset={tmp_path / 'pairs.jsonl'}", f"--tokenizer={tmp_path / 'tokenizer'}",
        f"--model_config={model}", "--max_length=64", "--max_steps=4", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    send(number, step=2)
    assert main(command) == code
    captured = capsys.readouterr()
    folder = tmp_path / "run" / "checkpoint-2"
    said = f"stopped by {number.name} after step 2: the same command with --resume goes on from {folder}"
    assert captured.err.splitlines()[-1] == said
    assert "trained" not in captured.out
    assert main([*command, "--resume"]) == 0


def test_a_run_stopped_before_its_first_checkpoint_here_names_none(tmp_path: Path) -> None:
    said = "stopped by SIGTERM before the first step: the same command starts again"
    assert how_to_go_on("SIGTERM", 0, tmp_path) == said
    assert how_to_go_on("SIGTERM", 5, tmp_path) == said  # resumed from another folder's checkpoint-5


def test_a_signal_just_before_what_it_may_break_off_breaks_it_off_too() -> None:
    with StopSignals(SimpleNamespace(is_main_process=True, num_processes=1)) as signals:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), signals.at_once():
            pytest.fail("it began")


def test_in_another_thread_a_run_leaves_the_handlers_alone(start: Make) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(start(max_steps=1)))
    thread.start()
    thread.join()
    assert results[0].step == 1


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(start: Make, send: Make) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job in the background
    try:
        send(signal.SIGINT, step=1)
        assert start(max_steps=2).stopped is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_stop_after_the_same_step_whichever_of_them_got_the_signal() -> None:
    sums: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(2)

    def process(rank: int, heard: list[str | None]) -> None:
        def reduce(flags: torch.Tensor, how: str) -> torch.Tensor:
            sums[rank] = flags
            barrier.wait(10)
            total = sums[0] + sums[1]
            barrier.wait(10)
            return total

        signals = StopSignals(
            SimpleNamespace(num_processes=2, is_main_process=False, device=torch.device("cpu"), reduce=reduce)
        )
        for step in range(1, 5):
            if step == 2 and rank == 1:
                signals._receive(signal.SIGTERM, None)
            heard.append(signals.agreed())

    heard: list[list[str | None]] = [[], []]
    threads = [threading.Thread(target=process, args=(rank, heard[rank])) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard[0] == heard[1] == [None, None, "SIGTERM", "SIGTERM"]  # known a step later
