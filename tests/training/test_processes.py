"""Two processes make the steps of one: gradients, metrics and reference, with a tail that leaves one of them idle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpref.training import train


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(
    make_config: Callable[..., Any],
    make_model: Callable[..., Any],
    tokenizer: Any,
    rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Steps of 8 pairs and a tail of 5, in micro-batches of 2: the second process has one fewer in the tail."""
    shared = {"adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": 0.0, "loss": "dpop", "progress": False}
    one = train(
        make_config(**shared, batch_size=8, save_every=2),
        model=make_model(),
        tokenizer=tokenizer,
        train_dataset=rows,
        eval_dataset=rows[:3],
    )
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, part in (("train", rows), ("eval", rows[:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    output = tmp_path / "two"
    options: dict[str, Any] = {
        **shared, "model": tmp_path / "model", "tokenizer": tmp_path / "tokenizer", "dataset": tmp_path / "train.jsonl",
        "eval_dataset": tmp_path / "eval.jsonl", "max_length": 64, "max_steps": 4, "logging_every": 1, "save_every": 2,
        "batch_size": 2, "gradient_accumulation_steps": 2, "output_dir": output,
    }  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fastpref.cli", "train"]
    done = subprocess.run(
        [sys.executable, *launch, *(f"--{name}={value}" for name, value in options.items())],
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    two = AutoModelForCausalLM.from_pretrained(output / "model")
    for (name, expected), other in zip(one.model.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(expected.cpu(), other, rtol=0, atol=2e-6, msg=name)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == len(one.history) == 5
    for expected, other in zip(one.history, records, strict=True):
        assert set(expected) == set(other)
        for name in set(expected) - {"tokens_per_second", "peak_memory"}:
            assert other[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert {"rng_0.pt", "rng_1.pt"} <= {path.name for path in (output / "checkpoint-4").iterdir()}
