"""worker.py as others see it: a question, an answer or none in time, and an end that says why."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


class TimeUp(Exception):
    """There was no answer in time, or none could be expected."""


class Ended(RuntimeError):
    """The process ended before it answered."""

    def __init__(self, code: int, last_words: str) -> None:
        self.by_signal = code < 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        super().__init__(f"its process ended with {how}{': ' if last_words else ''}{last_words}")


class Process:
    """`exact`: what is freed goes back to the system at once, on a CPU, so that peaks are those of single calls.

    `ahead` are modules that it imports while nobody asks.
    """

    def __init__(self, device: str, *, exact: bool = False, ahead: Sequence[str] = ()) -> None:
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in close)
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), device, "exact" if exact and device == "cpu" else "fast", *ahead],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env={**os.environ, **QUIET},
        )

    def ask(self, what: str, seconds: float | None = None, **question: Any) -> dict[str, Any]:
        """The answer of worker.py's method `what`; no time is no limit.

        Raises:
            TimeUp: there is none after `seconds`.
            Ended: the process died of it.
            MemoryError: memory was refused.
            RuntimeError: it ended in another error.
        """
        to_worker, from_worker = self.process.stdin, self.process.stdout
        if to_worker is None or from_worker is None:
            raise RuntimeError("worker.py was started without pipes")
        try:
            print(json.dumps({"what": what, **question}), file=to_worker, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        # A question has one line for an answer: none waits in the buffer behind the pipe.
        if seconds is not None and (seconds <= 0 or not select.select([from_worker], [], [], seconds)[0]):
            raise TimeUp
        line = from_worker.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "refused" in answer:
            raise MemoryError(answer["refused"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _ended(self) -> Ended:
        code = self.process.wait()
        self.said.seek(0)
        lines = self.said.read().strip().splitlines()
        self.close()
        return Ended(code, lines[-1][:200] if lines else "")

    def close(self) -> None:
        """Also one that computes: it is killed."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # a question that it never read
                    continue
        self.said.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
