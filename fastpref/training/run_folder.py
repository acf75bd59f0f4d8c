"""What a run folder tells of its run: config.json, environment.json, resumed.jsonl, and a README that lists all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.environment import record
from fastpref.training.advice import ADVICE
from fastpref.training.config import TrainConfig
from fastpref.training.durable import new_file, writing
from fastpref.training.prepare import Run

CONFIG, ENVIRONMENT, RESUMED, README = "config.json", "environment.json", "resumed.jsonl", "README.md"
# What each file is, in the order in which a reader wants them.
LISTING = {
    "model": "the trained model and its tokenizer, for from_pretrained",
    "best": "the model of the best evaluation",
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


def describe_run(run: Run) -> None:
    """Write config.json and environment.json; a resumed run keeps them and notes what has changed in resumed.jsonl."""
    if not run.accelerator.is_main_process:
        return
    folder, config, here = run.output_dir, as_options(run.config), environment(run.accelerator)
    if run.state is None:
        (folder / RESUMED).unlink(missing_ok=True)  # of an earlier run in this folder
    elif _read(folder / CONFIG) and _read(folder / ENVIRONMENT):
        note = {
            "step": run.state["step"],
            "date": here["date"],
            "config": _changes(folder / CONFIG, config, besides=("resume",)),
            "environment": _changes(folder / ENVIRONMENT, here, besides=("date",)),
        }
        earlier = (folder / RESUMED).read_text("utf-8", errors="replace") if (folder / RESUMED).is_file() else ""
        _write(folder / RESUMED, f"{earlier}{json.dumps(note, ensure_ascii=False)}\n")
        return
    _write_json(folder / CONFIG, {**config, "resume": None})
    _write_json(folder / ENVIRONMENT, here)


def as_options(config: TrainConfig) -> dict[str, Any]:
    """Every option by name, as `fastpref train FILE` reads it."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


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
    if not run.config.save_best:
        found["best"] = []  # if it is there, of another run in this folder
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
