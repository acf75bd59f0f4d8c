"""Out of memory: the message has the sizes and what to change, and comes from allocators as they are."""

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

from fastpref.training import MemoryLimitError, train
from fastpref.training.memory.oom import explained, out_of_memory
from fastpref.training.prepare import prepare

Make = Callable[..., Any]
CUDA = (
    "CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.12 GiB is free."
)


@pytest.fixture
def run(make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    def make(**changes: Any) -> Any:
        return prepare(make_config(**changes), model=make_model(), tokenizer=tokenizer, train_dataset=rows)

    return make


def message(run: Any, doing: str = "step 7", pairs: int = 3, error: BaseException | None = None, **how: Any) -> str:
    with pytest.raises(MemoryLimitError) as caught, explained(run, doing, run.pairs[:pairs], **how):
        raise torch.OutOfMemoryError(CUDA) if error is None else error
    return str(caught.value)


def test_the_message_has_the_sizes_of_batch_model_and_budget(run: Any) -> None:
    ready = run(memory_budget="64MiB", layout="padded")
    pairs = ready.pairs[:3]
    text = message(ready, work="step")
    longest = max(pair.length for pair in pairs)
    assert text.startswith("out of memory in step 7: 3 pairs, ")
    padded = -(-longest // 8) * 8  # as rows are
    assert f"{6 * padded:,} tokens (layout padded), longest sequence {longest}" in text
    weights = sum(p.numel() for p in ready.model.parameters()) * 4 / 2**10
    assert f"H = 16, V = 302, 2 layers; weights {weights:.1f} KiB, gradients {weights:.1f} KiB" in text
    assert f"optimiser {2 * weights:.1f} KiB, log-probs up to 64.00 MiB (memory_budget)" in text
    assert "could not get 4.00 GiB more, with " in text
    assert " resident and " in text


def test_what_to_change_is_listed_by_cost_and_only_where_it_is_not_set(run: Any) -> None:
    advice = message(run(logps="logits"), work="step").partition("cheapest first: ")[2]
    assert [part.split(" (")[0] for part in advice.split("; ")] == [
        "logps=linear", "auto_batch", "gradient_checkpointing", "lora_rank", "a smaller max_length",
    ]  # fmt: skip
    set_already = {"memory_budget": "64MiB", "gradient_checkpointing": True, "auto_batch": True, "lora_rank": 2}
    advice = message(run(**set_already, output_dir=run().config.output_dir), work="step")
    assert advice.endswith("cheapest first: a smaller max_length (now 64)")
    advice = message(run(), pairs=1, work="step").partition("cheapest first: ")[2]
    assert advice.startswith("gradient_checkpointing (every layer computed twice); a smaller memory_budget; lora_rank")


def test_a_forward_alone_and_the_optimiser_have_remedies_of_their_own(run: Any) -> None:
    advice = message(run(), doing="an evaluation").partition("cheapest first: ")[2]
    assert [part.split(" (")[0] for part in advice.split("; ")] == [
        "a smaller batch_size", "a smaller memory_budget", "lora_rank", "a smaller max_length",
    ]  # fmt: skip
    advice = message(run(), pairs=0, work="update").partition("cheapest first: ")[2]
    assert advice == "lora_rank (the weights then need no gradients and no optimiser state)"
    adapted = message(run(lora_rank=2), pairs=0, work="update").partition("cheapest first: ")[2]
    assert adapted == "a smaller model, or more processes that share it (FSDP)"


def test_offloading_is_advised_where_there_is_an_accelerator(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = run()

    class OnGpu:
        device = torch.device("cuda:0")

    monkeypatch.setattr(ready, "accelerator", OnGpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "; offload_activations; lora_rank" in message(ready, work="step")
    ready.config.offload_activations = True
    assert "offload_activations" not in message(ready, work="step")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(CUDA), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_allocators_errors_are_told_from_others(error: Exception, expected: bool, run: Any) -> None:
    assert out_of_memory(error) is expected
    kind = MemoryLimitError if expected else type(error)
    with pytest.raises(kind) as caught, explained(run(), "step 1"):
        raise error
    assert (caught.value.__cause__ if expected else caught.value) is error


@pytest.mark.parametrize(
    ("place", "doing"), [("step", "step 3: 4 pairs"), ("evaluation", "an evaluation: 1 pair, "), ("update", "the opt")]
)
def test_a_run_names_where_it_was_and_the_checkpoint_that_is_left(
    place: str, doing: str, make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError(CUDA)
        return original(*args, **kwargs)

    modules = {"step": "fastpref.training.loop", "evaluation": "fastpref.training.monitoring.evaluate"}
    names = {"step": "add_gradient", "evaluation": "score", "update": "step"}
    target, name = torch.optim.AdamW if place == "update" else sys.modules[modules[place]], names[place]
    original = getattr(target, name)
    monkeypatch.setattr(target, name, fails)
    config = make_config(save_every=1, eval_every=2 if place == "evaluation" else None)
    with pytest.raises(MemoryLimitError) as caught:
        train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows[:9])
    assert f"out of memory in {doing}" in str(caught.value)
    left = {"step": 2, "evaluation": 1, "update": 2}[place]
    assert str(caught.value).endswith(f"The newest checkpoint is {config.output_dir}/checkpoint-{left}")


def test_the_reference_pass_is_named_before_any_checkpoint(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr("fastpref.training.reference.scores.log_probs", fails)
    with pytest.raises(MemoryLimitError, match=r"out of memory in the reference pass: .*No checkpoint had been writ"):
        train(make_config(), model=make_model(), tokenizer=tokenizer, train_dataset=rows)


LIMITED = """
import resource, sys
import torch
import fastpref.training.loop as loop
from fastpref.cli import main

torch.set_num_threads(1)
gradient = loop._Loop.gradient

def limited(self, step):
    if step == 2:  # from here on 8 MiB more, of which the logits want a multiple
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), resource.RLIM_INFINITY))
    return gradient(self, step)

loop._Loop.gradient = limited
loop.draw = lambda run, history: None
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by RLIMIT_AS")
def test_the_cpus_own_allocator_error_ends_the_command_with_one_line_and_code_1(
    make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    """With logits of 2 x 8 x 64 x 10,000 floats, 39 MiB."""
    make_model(vocab_size=10_000).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    long = [{"prompt": f"{i} " * 15, "chosen": " blue" * 20, "rejected": " green" * 20} for i in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    options = {
        "model": tmp_path / "model", "dataset": tmp_path / "data.jsonl", "max_length": 64, "batch_size": 8,
        "save_every": 1, "logps": "logits", "layout": "padded", "progress": False, "output_dir": tmp_path / "run",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *(f"--{name}={value}" for name, value in options.items())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stderr[-3000:]
    assert last.startswith("fastpref train: error: out of memory in step 2: 8 pairs, "), done.stderr[-3000:]
    assert "What to change, the cheapest first: logps=linear" in last
    assert last.endswith(f"The newest checkpoint is {tmp_path / 'run' / 'checkpoint-1'}")
    assert (tmp_path / "run" / "checkpoint-1" / "training_state.pt").is_file()
