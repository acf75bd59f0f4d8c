"""Where metrics go besides metrics.jsonl: Accelerate's trackers, and functions that the caller gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.utils import LoggerType

from fastpref.training import TrainConfig, train
from fastpref.training.arguments import parse_arguments
from fastpref.training.monitoring import trackers

Make = Callable[..., Any]


@pytest.fixture
def start(make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> Make:
    def run(callbacks: Any = (), **options: Any) -> Any:
        data = {"train_dataset": rows, "eval_dataset": rows[:2]}
        config = make_config(**{"max_steps": 3, "logging_every": 1, "save_every": 2, **options})
        return train(config, model=make_model(), tokenizer=tokenizer, callbacks=callbacks, **data)

    return run


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of a TensorBoard folder: by name, (step, value)."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_has_the_numbers_of_metrics_jsonl_and_a_resumed_run_goes_on_in_it(start: Make) -> None:
    pytest.importorskip("tensorboard")
    result = start()
    assert len(list((result.output_dir / "tensorboard").iterdir())) == 1
    resumed = start(max_steps=4, resume="latest")
    found = events(result.output_dir / "tensorboard")
    records = [record for record in resumed.history if "loss" in record]
    for name in ("loss", "rewards/margins", "grad_norm", "learning_rate"):
        assert found[name] == [(record["step"], pytest.approx(record[name])) for record in records]
    held_out = [record for record in resumed.history if "eval_loss" in record]
    assert found["eval_loss"] == [(record["step"], pytest.approx(record["eval_loss"])) for record in held_out]


class Recorder(accelerate_tracking.GeneralTracker):
    """Stands in for a tracker's package."""

    name, requires_logging_directory = "wandb", False
    seen: ClassVar[list[Any]] = []

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.seen.append(("init", project, options))

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.seen.append(("config", values["loss"], values["beta"]))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.seen.append(("log", step, values))

    def finish(self) -> None:
        self.seen.append(("finish",))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    Recorder.seen = []
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    for module in (trackers, accelerate_tracking):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [LoggerType.WANDB])
    return Recorder.seen


def test_a_tracker_gets_the_options_every_record_and_its_end(
    start: Make, recorder: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "skies")
    result = start(report_to=["wandb"], loss="dpop")
    folder = result.output_dir
    assert recorder[:2] == [("init", "skies", {"name": folder.name, "dir": str(folder)}), ("config", "dpop", 0.1)]
    logged = [{"step": step, **values} for kind, step, *rest in recorder[2:-1] for values in rest]
    assert logged == result.history
    assert recorder[-1] == ("finish",)
    assert not (folder / "tensorboard").exists()


def test_a_tracker_ends_with_a_run_that_fails_and_its_error_stands(start: Make, recorder: list[Any]) -> None:
    def stop(step: int, metrics: dict[str, Any]) -> None:
        raise RuntimeError(f"enough at {step}")

    with pytest.raises(RuntimeError, match="enough at 1"):
        start([stop], report_to="wandb")
    assert recorder[-1] == ("finish",)


def test_callbacks_get_each_record_in_order_with_step_and_metrics(start: Make) -> None:
    seen: list[Any] = []
    result = start(
        [lambda step, metrics: seen.append({"step": step, **metrics}), lambda step, metrics: metrics.clear()]
    )
    assert seen == result.history
    assert [record["step"] for record in seen] == [1, 2, 3, 3]


@pytest.mark.parametrize("given", [print, [print, 3], "print", {"a": print}])
def test_callbacks_that_are_no_list_of_functions_are_refused(given: Any, start: Make) -> None:
    with pytest.raises(TypeError, match="callbacks must be a list of functions of step and metrics, got"):
        start(given)


def test_none_writes_no_events_and_all_takes_what_is_installed(start: Make, recorder: list[Any]) -> None:
    assert not (start(report_to="none").output_dir / "tensorboard").exists()
    assert recorder == []
    config = TrainConfig(report_to="all")
    assert trackers.tracker_names(config, say=print) == ["wandb"]


def test_without_tensorboard_a_line_says_so_and_the_run_goes_on(
    start: Make, recorder: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(progress=False).step == 3
    assert "tensorboard is not installed, so there is no event file: pip install" in capsys.readouterr().err
    assert recorder == []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("wand", ValueError, r"report_to must be one of aim, .*; got 'wand'; did you mean 'wandb'"),
        (["wandb", "none"], ValueError, "report_to=wandb none: none and all stand alone"),
        ("trackio", ValueError, r"report_to='trackio' needs the package trackio, which is not installed: pip install"),
        ([], TypeError, "report_to must be a name or a list of names, got"),
        ([3], TypeError, "report_to must be a name or a list of names, got"),
        (3, TypeError, "report_to must be a non-empty string or None, got 3"),
    ],
)
def test_a_tracker_that_there_is_not_is_refused_before_anything_is_loaded(
    given: Any, error: type[Exception], message: str, recorder: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(TrainConfig(report_to=given, model="nowhere", dataset="nowhere", output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_command_and_a_file_take_several(tmp_path: Path) -> None:
    assert parse_arguments(["--report_to", "tensorboard", "wandb"]).report_to == ["tensorboard", "wandb"]
    file = tmp_path / "run.yaml"
    file.write_text("report_to: [tensorboard, wandb]\nbeta: 0.2\n")
    assert parse_arguments([str(file)]).report_to == ["tensorboard", "wandb"]
    assert parse_arguments([str(file), "--report_to", "none"]).report_to == ["none"]
