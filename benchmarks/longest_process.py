"""A longest_worker.py as longest.py sees it: a question, an answer or none in time, and an end that says why."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("longest_worker.py")


class TimeUp(Exception):
    """There was no answer in time, or none could be expected."""


class Ended(Exception):
    """The process ended before it answered."""

    def __init__(self, code: int, last_words: str) -> None:
        self.by_signal = code < 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        super().__init__(f"its process ended with {how}{': ' if last_words else ''}{last_words}")


class Process:
    def __init__(self, device: str) -> None:
        self.device = device
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in close)
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        to_worker, from_worker = self.process.stdin, self.process.stdout
        if to_worker is None or from_worker is None:
            raise RuntimeError("longest_worker.py was started without pipes")
        try:
            print(json.dumps(question), file=to_worker, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        # A question has one line for an answer: none waits in the buffer behind the pipe.
        if seconds <= 0 or not select.select([from_worker], [], [], seconds)[0]:
            raise TimeUp
        line = from_worker.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

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
