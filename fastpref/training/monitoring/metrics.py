"""Metrics: sums on the device, gathered and divided at a logging step; records to metrics.jsonl and callbacks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.losses import KTOOutput, LossSpec
from fastpref.memory import peak
from fastpref.training.checkpoints.durable import SaveError, new_file, writing
from fastpref.training.monitoring.trackers import TENSORBOARD
from fastpref.training.run import Run
from fastpref.training.step import Scored

MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
# Logged where the loss has a penalty, under the loss's name: dpop/penalty is its mean over pairs,
# dpop/active_frac the share of pairs where it is not zero.
PENALTY = ("penalty", "active_frac")
# Of unpaired data: sums over the desirable responses, the undesirable, and all. `logps/chosen` are of the desirable.
UNPAIRED = ("rewards/chosen", "logps/chosen", "rewards/rejected", "logps/rejected", "loss", "kl", "desirable")
COUNTS = ("pairs", "tokens")


def sums_of(scored: Scored) -> Tensor:
    """Sums over a batch's pairs in the order of `sum_names`: one vector, on the device."""
    batch, policy, output = scored
    losses = output.losses.detach()
    if isinstance(output, KTOOutput):
        assert batch.desirable is not None
        rows = [torch.where(label, value.detach(), 0.0) for label in (batch.desirable, ~batch.desirable)
                for value in (output.rewards, *policy)]  # fmt: skip
        rows += [losses, output.kl.expand_as(losses), batch.desirable.to(losses.dtype)]
    else:
        penalty = output.penalty if output.penalty is not None else torch.zeros_like(losses)
        rows = [
            losses,
            output.chosen_rewards,
            output.rejected_rewards,
            (output.chosen_rewards > output.rejected_rewards).to(losses.dtype),
            output.chosen_rewards - output.rejected_rewards,
            *(logps.detach() for logps in policy),
            penalty,
            (penalty != 0).to(losses.dtype),
        ]
    counts = torch.tensor([losses.numel(), batch.tokens], dtype=sums_dtype(losses.device)).to(
        losses.device, non_blocking=True
    )
    return torch.cat([torch.stack(rows).to(counts.dtype).sum(1), counts])


def sum_names(spec: LossSpec) -> list[str]:
    """What is summed over pairs: the means that are logged, with the counts they take."""
    if spec.unpaired:
        return [*UNPAIRED, *COUNTS]
    return [*MEANS, *(f"{spec.penalty_name}/{name}" for name in PENALTY), *COUNTS]


def zero_sums(spec: LossSpec, device: torch.device) -> Tensor:
    return torch.zeros(len(sum_names(spec)), dtype=sums_dtype(device), device=device)


def sums_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # float32 counts tokens exactly to 2**24


def means(sums: Sequence[float], spec: LossSpec, *, prefix: str = "") -> dict[str, float]:
    """Sums, already gathered, divided by the number of pairs; of unpaired data by those of the label."""
    named = dict(zip(sum_names(spec), sums, strict=True))
    pairs = named["pairs"]
    if not spec.unpaired:
        names = MEANS if spec.penalty_name is None else list(named)[: -len(COUNTS)]
        return {prefix + name: named[name] / pairs for name in names}
    found = {name: named[name] / pairs for name in ("loss", "kl")}
    for label, count in (("chosen", named["desirable"]), ("rejected", pairs - named["desirable"])):
        if count:  # a record may hold none
            found |= {name: named[name] / count for name in (f"rewards/{label}", f"logps/{label}")}
    if {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return {prefix + name: value for name, value in found.items()}


def check_best(name: str, spec: LossSpec, *, save_best: bool, eval_pairs: int) -> None:
    """ValueError unless an evaluation gives the metric that says which model is the best."""
    names = list(means([*[1.0] * (len(sum_names(spec)) - len(COUNTS)), 2.0, 2.0], spec, prefix="eval_"))
    if name not in names:
        raise ValueError(f"best_metric must be one of {', '.join(names)} with loss {spec.name!r}, got {name!r}")
    if save_best and not eval_pairs:
        raise ValueError("save_best needs held-out pairs: set eval_dataset or eval_fraction")


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated on the GPU, or resident where the run is on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak()


def progress_note(history: Sequence[dict[str, Any]]) -> str:
    """Rate, loss and margin of the last record of training, for the bar."""
    last = next((record for record in reversed(history) if "tokens_per_second" in record), None)
    if last is None:
        return ""
    margin = f"  margin {last['rewards/margins']:.4f}" if "rewards/margins" in last else ""
    return f"{last['tokens_per_second']:,.0f} tokens/s  loss {last['loss']:.4f}{margin}"


class Window:
    """The sums since the last record, on the device, and the seconds spent training in that time."""

    def __init__(self, spec: LossSpec, device: torch.device) -> None:
        self.sums = zero_sums(spec, device)
        self._carried = 0.0
        self._since = time.perf_counter()

    def seconds(self) -> float:
        return self._carried + time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: evaluation, saving."""
        self._carried = self.seconds()
        yield
        self._since = time.perf_counter()

    def state(self, accelerator: Any) -> dict[str, Any]:
        """For a checkpoint between two records."""
        return {"sums": accelerator.reduce(self.sums.clone(), "sum").cpu(), "seconds": self.seconds()}

    def load_state(self, state: dict[str, Any], accelerator: Any) -> None:
        if accelerator.is_main_process:  # the sums are over all processes: one of them carries them on
            self.sums.copy_(state["sums"])
        self._carried, self._since = state["seconds"], time.perf_counter()

    def close(self, accelerator: Any) -> tuple[list[float], float]:
        """Sums over all processes, and seconds; the window starts anew. This waits for the device."""
        sums = accelerator.reduce(self.sums, "sum").tolist()
        seconds = self.seconds()
        self.sums.zero_()
        self._carried, self._since = 0.0, time.perf_counter()
        return sums, seconds


def keep_records(path: Path, *, start: int, evaluated: bool = True, cut: bool = True) -> list[dict[str, Any]]:
    """The records of the first `start` steps in a JSONL file, which is cut down to them.

    Later ones belong to steps that will be made again, and so do evaluations and samples after step `start` itself, if
    it is still to be `evaluated`. What a kill left of a line goes too.
    """
    before = path.read_bytes() if path.exists() else b""
    kept, records = [], []
    for line in before.splitlines(keepends=True) if start else []:
        try:
            record = json.loads(line)
            step, of_training = record["step"], "loss" in record
            earlier = step < start or (step == start and (evaluated or of_training))
        except (ValueError, TypeError, KeyError):  # torn
            continue
        if line.endswith(b"\n") and earlier:
            kept.append(line)
            records.append(record)
    after = b"".join(kept)
    if cut and before != after:
        with writing(path), new_file(path) as new:
            new.write_bytes(after)
    return records


def write_record(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


class MetricLog(AbstractContextManager["MetricLog"]):
    """The records of a run: `history`; the same in metrics.jsonl, from the main process, to trackers and callbacks.

    Raises:
        SaveError: a record could not be written.
    """

    def __init__(self, run: Run, *, evaluated: bool = True) -> None:
        self._run, self._path = run, run.output_dir / "metrics.jsonl"
        main = run.accelerator.is_main_process
        self.history = keep_records(self._path, start=run.kept, evaluated=evaluated, cut=main)
        self._file: Any = None
        if main:
            with writing(self._path):
                self._file = self._path.open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if self._file is not None:
            with writing(self._path):
                write_record(self._file, record)
        step, metrics = record["step"], {name: value for name, value in record.items() if name != "step"}
        with writing(self._path.with_name(TENSORBOARD)):  # its writer is a thread: it may be the record before this one
            self._run.accelerator.log(metrics, step=step)
        for callback in self._run.callbacks:
            callback(step, dict(metrics))

    def sync(self) -> None:
        """Put the records on the disk, as the checkpoint that follows them will be."""
        if self._file is not None:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What fails on the way out of an error has the same cause, and must not hide it.
        with nullcontext() if error is None else suppress(SaveError), writing(self._path):
            if self._file is not None:
                self._file.close()
