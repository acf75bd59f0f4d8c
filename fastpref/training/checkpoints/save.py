"""Checkpoints: what a run needs to go on as if it had never stopped; the best model and the final one."""

from __future__ import annotations

import functools
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastpref.training.adapters import BASE, is_adapted, keeps_merged_base, plain_names
from fastpref.training.checkpoints.durable import (
    MANIFEST,
    WRITE_ERRORS,
    SaveError,
    find_damage,
    new_folder,
    remove_folder,
    writing,
)
from fastpref.training.checkpoints.load import no_bars, source_file
from fastpref.training.distributed.processes import (
    load_model_state,
    load_optimizer_state,
    model_state,
    on_main,
    optimizer_state,
)
from fastpref.training.noise import restored_config
from fastpref.training.run import Run

STATE = "training_state.pt"
OPTIMIZER = "optimizer.pt"
BEST = "best.json"
LOWER_IS_BETTER = ("loss", "rejected", "penalty", "active_frac")  # endings of metrics; of the others more is
SPARE = 1 << 20  # bytes of a saved model beside its weights: config, tokenizer
# What a model that takes images or sound needs beside weights and tokenizer: its processor's files.
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_NAME = re.compile(r"checkpoint-(\d+)")


class ResumeError(ValueError):
    """A checkpoint that this run cannot go on from."""


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; what has no manifest is none."""
    return [path for path in named_as_checkpoints(output_dir) if (path / MANIFEST).is_file()]


def named_as_checkpoints(output_dir: Path) -> list[Path]:
    """What stands under the names of checkpoints, by their steps."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=_step)


def find_checkpoint(resume: str, output_dir: Path, accelerator: Any, *, say: Callable[[str], None]) -> Path:
    """The checkpoint that `resume` names, all its bytes checked: the newest whole one for "latest", else a path.

    Raises:
        FileNotFoundError: there is none.
        ResumeError: it is damaged; the message names the file and the next older checkpoint that is whole.
    """

    def find() -> Path:
        return _find_latest(output_dir, say) if resume == "latest" else _check_named(Path(resume))

    return on_main(accelerator, find, (FileNotFoundError, ResumeError))


def _find_latest(output_dir: Path, say: Callable[[str], None]) -> Path:
    passed_over: list[str] = []
    for folder in reversed(checkpoint_folders(output_dir)):
        damage = find_damage(folder)
        if damage is None:
            for line in passed_over:
                say(f"passing over {line}")
            return folder
        passed_over.append(f"{folder}, which is damaged: {damage}")
    if passed_over:
        raise ResumeError(
            f"resume: no checkpoint in {output_dir} is whole, start the run anew in another output_dir. Damaged are "
            + "; ".join(passed_over)
        )
    raise FileNotFoundError(f"resume: there is no checkpoint in {output_dir}; start the run without resume")


def _check_named(folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"resume: {str(folder)!r} is not a checkpoint folder (it has no {MANIFEST})")
    damage = find_damage(folder)
    if damage is None:
        if not (folder / STATE).is_file():  # the final model, or the best
            raise FileNotFoundError(f"resume: {str(folder)!r} is not a checkpoint folder (it has no {STATE})")
        return folder
    siblings = checkpoint_folders(folder.parent) if _NAME.fullmatch(folder.name) else []
    older = [other for other in siblings if _step(other) < _step(folder) and find_damage(other) is None]
    advice = (
        f"the next older one is whole: resume={str(older[-1])!r}" if older else "there is no older one that is whole"
    )
    raise ResumeError(f"resume: {folder} is damaged: {damage}; {advice}")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def save_checkpoint(run: Run, model: Any, optimizer: Any, state: Mapping[str, Any]) -> Path:
    """Write checkpoint-N for N = state["step"], then delete older ones beyond `keep_checkpoints`.

    Every process calls it with the wrapped model and optimiser, and the main one writes.

    Raises:
        SaveError: on every process; the earlier checkpoints are as they were.
    """
    accelerator, step = run.accelerator, state["step"]
    weights = model_state(accelerator, model)
    optimizer_tensors = optimizer_state(accelerator, model, optimizer)
    rng = gather_object([_rng_state(accelerator.device)])
    folder = run.output_dir / f"checkpoint-{step}"

    def write() -> None:
        with (
            writing(folder, errors=WRITE_ERRORS, needed=_bytes([weights, optimizer_tensors]) + SPARE),
            new_folder(folder) as new,
        ):
            with run.own_config():
                _save_model(new, run.model, run.tokenizer, weights)
            _save(dict(state), new / STATE)
            _save(optimizer_tensors, new / OPTIMIZER)
            for process, values in enumerate(rng):
                _save(values, new / f"rng_{process}.pt")
        # Later ones, of a run that went on from an earlier checkpoint than its last, will be replaced in their turn.
        older = [other for other in checkpoint_folders(run.output_dir) if _step(other) <= step]
        with writing(run.output_dir):
            for other in older[: -run.config.keep_checkpoints]:
                remove_folder(other)

    on_main(accelerator, write, (SaveError,))
    return folder


def save_final_model(output_dir: Path, model: Any, tokenizer: Any) -> None:
    """The model of a single process in `output_dir/model`, for from_pretrained; replaces an earlier one at once."""
    with new_folder(output_dir / "model") as new:
        _save_model(new, model, tokenizer, model.state_dict())


def save_trained_model(run: Run, model: Any) -> None:
    """The trained model in `model`, for from_pretrained; every process calls it, as it does `save_checkpoint`."""
    _save_alone(run, model, "model", {})


def save_merged_base(run: Run, model: Any) -> None:
    """The base that an adapter was merged into, in `base`, for the new adapter on it; every process calls it."""
    folder = run.output_dir / BASE
    if not keeps_merged_base(run.config) or (folder / MANIFEST).is_file():
        return
    plain, weights = plain_names(run.model), model_state(run.accelerator, model)
    named = {base: tensor for name, tensor in weights.items() if (base := plain(name)) is not None}

    def write() -> None:
        room = _bytes(named) + SPARE
        with writing(folder, errors=WRITE_ERRORS, needed=room), new_folder(folder) as new, run.own_config():
            _save_model(new, run.model.get_base_model(), run.tokenizer, named)

    on_main(run.accelerator, write, (SaveError,))


def keep_best(run: Run, model: Any, record: Mapping[str, Any], best: dict[str, Any] | None) -> dict[str, Any] | None:
    """The best value of `best_metric` so far and its step; with save_best this evaluation's model goes to `best`.

    An earlier value of another metric does not count, nor with save_best one whose model was not kept.
    """
    name, keep = run.config.best_metric, run.config.save_best
    counts = best is not None and best["metric"] == name and (best["kept"] or not keep)
    if not _improves(name, record.get(name, math.nan), best["value"] if best is not None and counts else None):
        return best
    best = {"metric": name, "step": record["step"], "value": record[name], "kept": keep}
    if keep:
        _save_alone(run, model, "best", {BEST: {name: best[name] for name in ("metric", "step", "value")}})
    return best


def _improves(name: str, value: float, best: float | None) -> bool:
    if math.isnan(value):
        return False
    return best is None or (value < best if name.endswith(LOWER_IS_BETTER) else value > best)


def _save_alone(run: Run, model: Any, name: str, notes: Mapping[str, Any]) -> None:
    weights, folder = model_state(run.accelerator, model), run.output_dir / name

    def write() -> None:
        saved = weights if run.save_dtype is None else _converted(run.model, weights, run.save_dtype)
        with writing(folder, errors=WRITE_ERRORS, needed=_bytes(saved) + SPARE), new_folder(folder) as new:
            with run.own_config():
                _save_model(new, run.model, run.tokenizer, saved, dtype=run.save_dtype)
            for file, content in notes.items():
                (new / file).write_text(json.dumps(content) + "\n", encoding="utf-8")

    on_main(run.accelerator, write, (SaveError,))


def _converted(model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in another dtype, on the CPU, but those that transformers keeps in float32 and what is frozen."""
    exact = [
        *(model._keep_in_fp32_modules_strict or ()),
        *(model._keep_in_fp32_modules or () if dtype == torch.float16 else ()),
    ]
    names = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad or not is_adapted(model)
    }
    found: dict[tuple[int, torch.Size], Tensor] = {}  # tied weights stay one tensor
    converted = dict(weights)
    for name in names & weights.keys():
        tensor = weights[name]
        if not any(part in name for part in exact):
            converted[name] = found.setdefault((tensor.data_ptr(), tensor.shape), tensor.to("cpu", dtype))
    return converted


def _save_model(
    folder: Path, model: Any, tokenizer: Any, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> None:
    with no_bars(), restored_config(model):
        model.save_pretrained(folder, state_dict=weights)  # of a PEFT model: its adapter
        if dtype is not None and not is_adapted(model):  # transformers has written the model's own
            trained, model.config.dtype = model.config.dtype, dtype
            model.config.save_pretrained(folder)
            model.config.dtype = trained
    tokenizer.save_pretrained(folder)
    for name in () if is_adapted(model) else PROCESSOR:
        if (file := source_file(getattr(model, "name_or_path", ""), name)) is not None:
            shutil.copyfile(file, folder / name)


def _save(value: Any, path: Path) -> None:
    # Through a file of ours, whose OSError says what went wrong; torch's own only that something did.
    with path.open("wb") as file:
        torch.save(value, file)


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`, on the CPU."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def load_checkpoint(run: Run, model: Any, optimizer: Any, folder: Path) -> None:
    """Put weights, optimiser state and random states back; the wrapped model keeps its identity, dtype and device."""
    random_state = _read_rng(folder, run.accelerator)
    _load_weights(run, model, folder)
    # Mapped, no process of many holds the whole of it; on a CPU the optimiser would go on using the file's pages.
    mapped = run.accelerator.device.type != "cpu"
    optimizer_tensors = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=mapped)
    load_optimizer_state(run.accelerator, model, optimizer, optimizer_tensors)
    _set_rng(random_state, run.accelerator.device)


def _load_weights(run: Run, model: Any, folder: Path) -> None:
    if is_adapted(run.model):
        from peft import load_peft_weights, set_peft_model_state_dict

        for name in run.model.peft_config:
            adapter = folder if name == "default" else folder / name
            found: Any = set_peft_model_state_dict(run.model, load_peft_weights(str(adapter), device="cpu"), name)
            if found.unexpected_keys:
                raise ResumeError(f"{adapter} has weights that the model's adapter lacks: {found.unexpected_keys[:3]}")
        return
    # By way of a second model: save_pretrained may shard, rename and leave out tied weights, and undoes it itself.
    widest = functools.reduce(torch.promote_types, (p.dtype for p in run.model.parameters()))  # rounds none of them
    with no_bars():
        loaded = type(run.model).from_pretrained(folder, dtype=widest)
    load_model_state(run.accelerator, model, loaded.state_dict())


def _rng_state(device: torch.device) -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    # The global generators are what libraries draw from.
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    kind, keys, *rest = numpy_state
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def _read_rng(folder: Path, accelerator: Any) -> dict[str, Any]:
    path = folder / f"rng_{accelerator.process_index}.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no random state for process {accelerator.process_index}: resume with as many "
            "processes as the run was started with"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _set_rng(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "device" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)


def _bytes(value: Any) -> int:
    """Bytes of all tensors in a nested state; shared ones count once."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
