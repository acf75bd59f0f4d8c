"""SIGTERM and Ctrl-C: noticed at once, obeyed at the end of a step, by all processes after the same one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal came while there was nothing to save; no `except Exception` on its way is meant for it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def how_to_go_on(stopped: str, step: int, output_dir: Path) -> str:
    """The line that the command line ends a stopped run with."""
    folder = output_dir / f"checkpoint-{step}"
    if not folder.is_dir():  # of step 0 there is none, and one to resume from may be in another folder
        return f"stopped by {stopped} before the first step: the same command starts again"
    return f"stopped by {stopped} after step {step}: the same command with --resume goes on from {folder}"


def exit_code(stopped: str) -> int:
    """What a shell says of a command that this signal has ended, so that `train && next` does not go on."""
    return 128 + signal.Signals[stopped]


class _Flags(NamedTuple):
    values: Tensor  # (S,) on the CPU: on how many processes each of SIGNALS has come
    ready: torch.cuda.Event | None  # when they are there


class StopSignals:
    """Between `with`, the first SIGTERM or Ctrl-C is kept for `agreed`; a second one acts as it would have before.

    Handlers are only put in place in the main thread, and never for a signal that the process was started to ignore.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._handlers: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None
        self._at_once = False
        self._asked: _Flags | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: installed by another language, not to be put back
                    self._handlers[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._put_back()
        if self._at_once:
            raise Stopped(self._received.name)
        if self._accelerator.is_main_process:
            # Past Python's buffers, whose lock the interrupted code may hold.
            line = f"\n{self._received.name}: stopping with a checkpoint after this step; once more stops at once\n"
            os.write(2, line.encode())

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Code that a signal may break off anywhere: raises Stopped."""
        self._at_once = True
        try:
            if self._received is not None:  # it came before this began
                raise Stopped(self._received.name)
            yield
        finally:
            self._at_once = False

    def agreed(self) -> str | None:
        """The signal to stop for after this step, the same on every process; each must ask as often.

        With several processes it is what they knew when they asked the last time: so a GPU's queue never runs empty
        for it, since what is waited for was queued a step ago.
        """
        if self._accelerator.num_processes == 1:
            return None if self._received is None else self._received.name
        asked, self._asked = self._asked, self._ask()
        if asked is None:
            return None
        if asked.ready is not None:
            asked.ready.synchronize()
        counts = asked.values.tolist()
        return next((number.name for number, count in zip(SIGNALS, counts, strict=True) if count), None)

    def _ask(self) -> _Flags:
        device = self._accelerator.device
        flags = torch.zeros(len(SIGNALS), device=device)
        if self._received is not None:
            flags[SIGNALS.index(self._received)].fill_(1)
        counts = self._accelerator.reduce(flags, "sum")
        if device.type != "cuda":
            return _Flags(counts.cpu(), None)
        values = torch.empty(len(SIGNALS), pin_memory=True)
        values.copy_(counts, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return _Flags(values, ready)
