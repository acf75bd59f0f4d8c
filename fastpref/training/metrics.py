"""Metrics: sums on the device, gathered and divided at a logging step; records to JSONL and TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastpref.training.console import Console

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
COUNTS = ("pairs", "tokens")


def pair_sums(output: Any, policy_chosen: Tensor, policy_rejected: Tensor, tokens: int) -> Tensor:
    """Sums over a batch's pairs in the order of MEANS, PENALTY and COUNTS: one vector, on the device."""
    losses = output.losses.detach()
    penalty = output.penalty if output.penalty is not None else torch.zeros_like(losses)
    rows = torch.stack(
        [
            losses,
            output.chosen_rewards,
            output.rejected_rewards,
            (output.chosen_rewards > output.rejected_rewards).to(losses.dtype),
            output.chosen_rewards - output.rejected_rewards,
            policy_chosen.detach(),
            policy_rejected.detach(),
            penalty,
            (penalty != 0).to(losses.dtype),
        ]
    )
    counts = torch.tensor([losses.numel(), tokens], dtype=sums_dtype(losses.device)).to(
        losses.device, non_blocking=True
    )
    return torch.cat([rows.to(counts.dtype).sum(1), counts])


def zero_sums(device: torch.device) -> Tensor:
    return torch.zeros(len(MEANS) + len(PENALTY) + len(COUNTS), dtype=sums_dtype(device), device=device)


def sums_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # float32 counts tokens exactly to 2**24


def means(sums: list[float], *, loss_name: str, has_penalty: bool, prefix: str = "") -> dict[str, float]:
    """Sums, already gathered, divided by the number of pairs."""
    names = [*MEANS, *(f"{loss_name}/{name}" for name in PENALTY)] if has_penalty else list(MEANS)
    pairs = sums[-2]
    return {prefix + name: value / pairs for name, value in zip(names, sums, strict=False)}


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated on the GPU, or resident where the run is on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # a dependency of accelerate

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Window:
    """The sums since the last record, on the device, and the seconds spent training in that time."""

    def __init__(self, device: torch.device) -> None:
        self.sums = zero_sums(device)
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


def read_records(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The records of a JSONL file up to a step: later ones belong to steps that will be made again."""
    if not (last_step and path.exists()):
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["step"] <= last_step]


def write_record(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


class MetricLog:
    """The records of a run: `history`; the same in metrics.jsonl and TensorBoard, from the main process."""

    def __init__(self, folder: Path, console: Console, *, start: int) -> None:
        path = folder / "metrics.jsonl"
        self.history = read_records(path, start)
        self._file: Any = None
        self._board: Any = None
        if not console.main:
            return
        self._file = path.open("w", encoding="utf-8")
        for record in self.history:
            write_record(self._file, record)
        if find_spec("tensorboard") is None:
            console.say('tensorboard is not installed, so there is no event file: pip install "fastpref[train]"')
        else:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def add(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if self._file is not None:
            write_record(self._file, record)
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
