"""The examples run without network: the loop in bare torch learns, and each configuration trains a model."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="the train extra is not installed")

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE = EXAMPLES / "bare_torch.py"


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


@pytest.mark.parametrize("name", ["full", "lora", "dpop"])
def test_a_configuration_trains_by_the_method_that_it_is_named_after(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key is an option, the first loss is ln 2, and a change of the weights, or an adapter, is saved."""
    for needed in ("accelerate", "peft", "yaml"):
        pytest.importorskip(needed, reason="the train extra is not installed")
    from safetensors.torch import load_file

    from fastpref import cli

    monkeypatch.setattr("fastpref.training.loop.draw", lambda run, history: None)  # takes longer than a tiny run
    tokenizer = runpy.run_path(str(Path(__file__).parent / "training" / "conftest.py"))["byte_tokenizer"]()
    shape = {"vocab_size": 302, "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 1024}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    for part in (transformers.GPT2LMHeadModel(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"sky {i}?", "chosen": " blue", "rejected": f" green {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    options = ["--model", tmp_path / "model", "--dataset", tmp_path / "pairs.jsonl", "--output_dir", run]
    assert cli.main(["train", str(EXAMPLES / f"{name}.yaml"), *map(str, options)]) == 0
    used = json.loads((run / "config.json").read_text())
    assert (used["loss"], used["lora_rank"]) == ("dpop" if name == "dpop" else "dpo", 16 if name == "lora" else 0)
    assert used["loss_options"] == ({"lam": 5.0} if name == "dpop" else {})
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931472, rel=1e-5)
    if name == "lora":
        assert (run / "model" / "adapter_model.safetensors").is_file()
    else:
        before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run / "model"))
        assert any(not after[key].equal(before[key]) for key in before)
