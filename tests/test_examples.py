"""The example runs as the README says, without network, and what it prints shows that it learns."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="the train extra is not installed")

EXAMPLE = Path(__file__).parents[1] / "examples" / "bare_torch.py"


def steps(printed: str) -> tuple[list[float], list[float]]:
    """Losses and rewards of the chosen, a step each."""
    found = re.findall(r"^step \d+ loss (\S+) reward of the chosen (\S+)$", printed, re.MULTILINE)
    return [float(loss) for loss, _ in found], [float(reward) for _, reward in found]


def test_it_starts_at_ln_2_and_its_loss_falls_while_the_chosen_response_gains() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    losses, rewards = steps(done.stdout)
    assert len(losses) == 20
    assert (losses[0], rewards[0]) == (0.6931, 0.0)
    assert losses[-1] < 0.5 * losses[0]
    assert rewards[-1] > 0.1


def test_it_takes_a_model_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"vocab_size": 302, "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 32}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bare_torch.py", "--model", str(tmp_path), "--steps", "2"])
    model = runpy.run_path(str(EXAMPLE))["model"]
    losses, _ = steps(capsys.readouterr().out)
    assert losses[0] == 0.6931
    assert len(losses) == 2
    assert model.config.n_embd == 16


def test_it_is_as_short_as_the_readme_says() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 40
