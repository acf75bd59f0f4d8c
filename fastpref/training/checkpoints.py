"""Checkpoints: what a run needs to go on as if it had never stopped, in a folder that appears at once."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from fastpref.training.prepare import Run

STATE = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


def find_checkpoint(resume: str, output_dir: Path) -> Path:
    """The checkpoint that `resume` names: the newest of the run for "latest", else a path."""
    if resume == "latest":
        folders = checkpoint_folders(output_dir)
        if not folders:
            raise FileNotFoundError(f"resume: there is no checkpoint in {output_dir}; start the run without resume")
        return folders[-1]
    if not (Path(resume) / STATE).is_file():
        raise FileNotFoundError(f"resume: {resume!r} is not a checkpoint folder (it has no {STATE})")
    return Path(resume)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars that transformers draws when it writes or reads weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    yield
    if shown:
        transformers_logging.enable_progress_bar()


def _save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    with _no_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(run: Run, step: int, state: dict[str, Any]) -> Path:
    """Write checkpoint-`step`, then delete all but the newest `keep_checkpoints`.

    It is written under another name and renamed when complete, so that a run killed meanwhile leaves no half
    of one.
    """
    accelerator = run.accelerator
    folder = run.output_dir / f"checkpoint-{step}"
    temporary = run.output_dir / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        _remove(temporary)
        temporary.mkdir(parents=True)
        _save_model(temporary, run.model, run.tokenizer)
        torch.save(state, temporary / STATE)
    accelerator.wait_for_everyone()
    torch.save(_rng_state(accelerator.device), temporary / f"rng_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _remove(folder)
        temporary.rename(folder)
        for old in checkpoint_folders(run.output_dir)[: -run.config.keep_checkpoints]:
            _remove(old)
    accelerator.wait_for_everyone()
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`, on the CPU."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def load_weights(model: Any, folder: Path) -> None:
    """Put the checkpoint's weights into `model`, which keeps its identity, dtype and device."""
    # By way of a second model: save_pretrained may shard, rename and leave out tied weights, and undoes all
    # that itself.
    with _no_bars():
        loaded = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())


def load_rng(folder: Path, accelerator: Any) -> None:
    path = folder / f"rng_{accelerator.process_index}.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no random state for process {accelerator.process_index}: resume with as many "
            "processes as the run was started with"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "device" in state and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], accelerator.device)


def save_final_model(output_dir: Path, model: Any, tokenizer: Any) -> Path:
    """The trained model in `output_dir/model`, for from_pretrained; replaces an earlier one at once."""
    folder, temporary, old = output_dir / "model", output_dir / ".model.tmp", output_dir / ".model.old"
    _remove(temporary)
    _save_model(temporary, model, tokenizer)
    _remove(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    _remove(old)
    return folder


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
