"""A training_worker.py as training.py and training_longest.py see it: a question, and an answer or none in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases_training import TrainingCase
from .longest_process import TimeUp

WORKER = Path(__file__).with_name("training_worker.py")
QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_once(
    provider: str, case: TrainingCase, folder: Path, device: str, *, within: int | None, seconds: float | None
) -> dict[str, Any]:
    """The worker's answer, `fits` false where a signal ended it under a limit.

    Raises:
        TimeUp: it took longer than `seconds`.
        RuntimeError: the run ended in an error that is not about memory, or memory was refused without a limit.
    """
    question = {
        "provider": provider,
        "case": asdict(case),
        "folder": str(folder),
        "device": device,
        "within": within,
    }
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        try:
            done = subprocess.run(
                [sys.executable, str(WORKER)],
                input=json.dumps(question) + "\n",
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                timeout=seconds,
                env={**os.environ, **QUIET},
            )
        except subprocess.TimeoutExpired:
            raise TimeUp from None
        said.seek(0)
        last_words = (said.read().strip().splitlines() or [""])[-1][:200]
    if not done.stdout:
        how = f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"code {done.returncode}"
        answer: dict[str, Any] = {"fits": False, "why": f"its process ended with {how}: {last_words}"}
        if done.returncode >= 0 or within is None:
            raise RuntimeError(answer["why"])
        return answer
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    if not answer["fits"] and within is None:
        raise RuntimeError(f"out of memory: {answer['why']}")
    return answer
