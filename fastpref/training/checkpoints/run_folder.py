"""The run's folder: which it is and whose, and what it tells: config.json, environment.json, resumed.jsonl, README."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.environment import record
from fastpref.folders import (
    MARKER,
    Claim,
    FolderError,
    Owner,
    belongs_to,
    check,
    claim,
    claim_next,
    claimed,
    next_folder,
)
from fastpref.training.adapters import BASE
from fastpref.training.checkpoints.durable import MANIFEST, new_file, sweep, writing
from fastpref.training.checkpoints.save import checkpoint_folders, named_as_checkpoints
from fastpref.training.config import TrainConfig
from fastpref.training.distributed.processes import on_main
from fastpref.training.monitoring.advice import ADVICE
from fastpref.training.run import Run

COMMAND = "fastpref train"
DEFAULT = Path("runs") / "fastpref"
# Options with which a run that did not finish may start again in its folder, though they differ.
FREE = ("output_dir", "dry_run", "progress")
INPUTS = ("model", "tokenizer", "reference_model", "dataset", "eval_dataset")
CONFIG, ENVIRONMENT, RESUMED, README = "config.json", "environment.json", "resumed.jsonl", "README.md"
# What each file is, in the order in which a reader wants them.
LISTING = {
    "model": "the trained model and its tokenizer, for from_pretrained",
    "best": "the model of the best evaluation",
    BASE: "what the adapter in `model` goes on: its base with the earlier adapter merged into it",
    "curves.png": "loss, rewards, margin and accuracy over the steps",
    "metrics.jsonl": "a record a line, those of evaluations with eval_ before their names",
    ADVICE: "what the loop has advised, once of each kind",
    "samples.jsonl": "answers to held-out prompts at each evaluation, beside the data's own",
    CONFIG: f"every option as it was used; `fastpref train {CONFIG} --output_dir OTHER` runs it again",
    ENVIRONMENT: "versions, hardware and commit of the run's start",
    RESUMED: "a line for each time the run was resumed, with what differed from its start",
    "tensorboard": "the metrics for `tensorboard --logdir .`",
    "checkpoint-*": "where `--resume` goes on",
    "reference*": "log-probs under the reference model, with the key that they are valid for",
}


def claim_folder(config: TrainConfig, accelerator: Any) -> tuple[Path, Claim | None]:
    """The run's folder, and on the main process its claim; a dry run claims nothing, and is refused likewise.

    Without `output_dir` it is a new one, or with `resume` that of the checkpoint.

    Raises:
        FolderError: on every process; nothing has been changed.
        FileNotFoundError: `resume` has no value, and no default folder a checkpoint.
    """
    held: Claim | None = None

    def work() -> Path:
        nonlocal held
        folder, held = _claim(config)
        return folder

    return on_main(accelerator, work, (OSError, ValueError)), held


def _claim(config: TrainConfig) -> tuple[Path, Claim | None]:
    folder, resume = _asked_for(config), config.resume
    goes_on = resume == "latest" or (
        resume is not None and folder is not None and Path(resume).resolve().parent == folder.resolve()
    )
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    owner = Owner(
        COMMAND,
        identity={} if goes_on else options,
        resume=goes_on,
        inputs={f"--{name}": getattr(config, name) for name in INPUTS},
        besides=("reference-*",),  # log-probs by the key that they are valid for: nobody's are replaced
    )
    if folder is not None and (folder / MARKER).is_file() and belongs_to(folder, COMMAND):
        _check_own(folder, goes_on)
    if config.dry_run:
        folder = folder or next_folder(DEFAULT)
        check(folder, owner)
        return folder, None
    held = claim_next(DEFAULT, owner) if folder is None else claim(folder, owner)
    try:
        sweep(held.folder)
        _check_own(held.folder, goes_on)  # again: a checkpoint may have been put back
    except BaseException:
        held.release()
        raise
    return held.folder, held


def _asked_for(config: TrainConfig) -> Path | None:
    """None stands for a new one."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    if config.resume is None:
        return None
    if config.resume != "latest":
        folder = Path(config.resume).parent
        return folder if (folder / MARKER).is_file() else None
    newest = [found[-1] for found in map(checkpoint_folders, claimed(DEFAULT, COMMAND)) if found]
    if not newest:
        raise FileNotFoundError(
            f"resume: there is no checkpoint in {DEFAULT} or its successors: set output_dir, or start without resume"
        )
    return max(newest, key=lambda checkpoint: (checkpoint / MANIFEST).stat().st_mtime_ns).parent


def _check_own(folder: Path, goes_on: bool) -> None:
    """Raise FolderError where a run that is to start again has checkpoints, or somebody's files lie where it writes."""
    if not goes_on and checkpoint_folders(folder):
        raise FolderError(
            f"output_dir {str(folder)!r} holds checkpoints of an earlier run: set resume to go on with it, or give "
            "another folder"
        )
    replaced = [folder / "model", folder / "best", folder / BASE, *named_as_checkpoints(folder)]
    foreign = [path.name for path in replaced if path.exists() and not (path / MANIFEST).exists() and not _empty(path)]
    readme = folder / README
    if readme.exists() and LISTING["model"] not in readme.read_text(encoding="utf-8", errors="replace"):
        foreign.append(README)
    if foreign:
        raise FolderError(
            f"output_dir {str(folder)!r} holds {', '.join(foreign)}, which {COMMAND} did not write and would replace: "
            "move that away"
        )


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def describe_run(run: Run) -> None:
    """Write config.json and environment.json; a resumed run keeps them and notes what has changed in resumed.jsonl."""
    if not run.accelerator.is_main_process:
        return
    folder, config, here = run.output_dir, dataclasses.asdict(run.config), environment(run.accelerator)
    if run.state is not None and _read(folder / CONFIG) and _read(folder / ENVIRONMENT):
        note = {
            "step": run.state["step"],
            "date": here["date"],
            "config": _changes(folder / CONFIG, config, besides=("resume",)),
            "environment": _changes(folder / ENVIRONMENT, here, besides=("date", "notes")),
        }
        earlier = (folder / RESUMED).read_text("utf-8", errors="replace") if (folder / RESUMED).is_file() else ""
        _write(folder / RESUMED, f"{earlier}{json.dumps(note, ensure_ascii=False)}\n")
        return
    _write_json(folder / CONFIG, {**config, "resume": None})
    _write_json(folder / ENVIRONMENT, {**here, "notes": run.console.said})


def environment(accelerator: Any) -> dict[str, Any]:
    """What the run was made with, and how it is distributed."""
    here = Path.cwd()
    return {
        **record(folder=here),
        "device": str(accelerator.device.type),
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "folder": str(here),  # that relative paths in the options start from
    }


def write_listing(run: Run, history: Sequence[dict[str, Any]]) -> None:
    """README.md: what the run was, and what each file in its folder is; called when it ends."""
    if not run.accelerator.is_main_process:
        return
    folder = run.output_dir
    found = {name: sorted(path.name for path in folder.glob(name)) for name in LISTING}
    names = [(", ".join(paths), LISTING[name]) for name, paths in found.items() if paths]
    width = max(len(name) for name, _ in names)
    last = history[-1] if history else {}
    shown = [name for name in last if name.endswith(("loss", "margins", "accuracies"))]
    values = ", ".join(f"{name} {last[name]:.4f}" for name in shown)
    lines = [
        f"# {folder.name}",
        "",
        f"{run.spec.name}, {len(run.pairs):,} pairs, {run.steps:,} steps of {run.plan.per_step} pairs; "
        f"at the end: {values}",
        "",
        *(f"    {name:<{width}}  {text}" for name, text in names),
    ]
    _write(folder / README, "\n".join(lines) + "\n")


def _changes(path: Path, now: dict[str, Any], *, besides: tuple[str, ...]) -> dict[str, list[Any]]:
    """What differs from a file, by name as [then, now]."""
    then = _read(path)
    plain = json.loads(json.dumps(now))
    names = [name for name in {**then, **plain} if name not in besides]
    return {name: [then.get(name), plain.get(name)] for name in names if then.get(name) != plain.get(name)}


def _read(path: Path) -> dict[str, Any]:
    """What `_write_json` wrote; nothing where the file is gone, or not JSON any more."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    with writing(path), new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
