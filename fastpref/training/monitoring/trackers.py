"""Experiment trackers, through Accelerate: TensorBoard where it is installed, or those that `report_to` names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

from accelerate.tracking import GeneralTracker, TensorBoardTracker, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from fastpref.checks import check_choice
from fastpref.training.checkpoints.durable import SaveError, writing
from fastpref.training.config import TrainConfig
from fastpref.training.run import Run

TENSORBOARD, NONE, ALL = "tensorboard", "none", "all"
PROJECT = "fastpref"  # or WANDB_PROJECT


def tracker_names(config: TrainConfig, *, say: Callable[[str], None]) -> list[str]:
    """The trackers of a run: those that `report_to` names, by default TensorBoard where it is installed.

    Raises:
        ValueError: one is unknown, or its package is not installed.
    """
    installed = [LoggerType(name).value for name in get_available_trackers()]
    if config.report_to is None:
        if TENSORBOARD not in installed:
            say('tensorboard is not installed, so there is no event file: pip install "fastpref[train]"')
        return [name for name in installed if name == TENSORBOARD]
    asked = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    if len(asked) > 1 and (NONE in asked or ALL in asked):
        raise ValueError(f"report_to={' '.join(asked)}: {NONE} and {ALL} stand alone")
    for name in asked:
        check_choice("report_to", name, [*LoggerType.list(), NONE])
        if name not in (*installed, NONE, ALL):
            raise ValueError(f"report_to={name!r} needs the package {name}, which is not installed: pip install {name}")
    if asked == [ALL]:
        return installed
    return [name for name in dict.fromkeys(asked) if name != NONE]


@contextmanager
def tracking(run: Run) -> Iterator[None]:
    """The run's trackers, started on the main process; they get what `accelerator.log` is given.

    A resumed run goes on in its TensorBoard folder; of the others it is a run of its own.
    """
    accelerator, folder = run.accelerator, run.output_dir
    events = TensorBoardTracker(TENSORBOARD, folder, purge_step=run.kept + 1 if run.kept else None)
    chosen: list[str | GeneralTracker] = [events if name == TENSORBOARD else name for name in run.trackers]
    accelerator.log_with = filter_trackers(chosen, folder)  # the constructor's: there was no folder yet
    accelerator.project_configuration.logging_dir = str(folder)
    named = {"name": folder.name}
    with writing(folder / TENSORBOARD):
        accelerator.init_trackers(
            os.environ.get("WANDB_PROJECT", PROJECT),
            init_kwargs={"wandb": {**named, "dir": str(folder)}, "trackio": named},
        )
    options = {name: value for name, value in dataclasses.asdict(run.config).items() if value is not None}
    for tracker in accelerator.trackers:
        if tracker is not events:  # its table of hyperparameters is a folder of its own; config.json lies beside it
            tracker.store_init_configuration(options)
    failed = True
    try:
        yield
        failed = False
    finally:
        # What fails on the way out of an error has the same cause, and must not hide it.
        with suppress(SaveError) if failed else nullcontext(), writing(folder / TENSORBOARD):
            for tracker in accelerator.trackers:
                tracker.finish()
