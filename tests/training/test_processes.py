"""Two processes make the steps of one, whether each holds the whole model (DDP) or half of it (FSDP2).

Gradients, metrics, reference, evaluation, samples and checkpoints, with a tail that leaves one of the processes idle.
One launch for all: this file is its own worker, and the tests look at what it left.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')
pytest.importorskip("accelerate", reason='needs pip install "fastpref[train]"')

from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlavaConfig, LlavaForConditionalGeneration

from fastpref.folders import MARKER, FolderError
from fastpref.training import TrainConfig, loop, train
from fastpref.training.monitoring import gradients

# Steps of 8 pairs and a tail of 5; with clipping, since its norm is over all shards.
SHARED: dict[str, Any] = {
    "adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": 0.5, "loss": "dpop", "progress": False,
    "max_length": 64, "max_steps": 4, "logging_every": 1, "eval_every": 2, "save_every": 2, "sample_prompts": 1,
    "max_new_tokens": 3,
}  # fmt: skip
SUM: dict[str, Any] = {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
LORA = {"lora_rank": 2, "layout": "padded"}
TIMED = {"tokens_per_second", "peak_memory"}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters that this process keeps between steps."""
    held = 0
    for parameter in model.parameters():
        local: Any = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's shard
        local = local.to_local() if hasattr(local, "to_local") else local
        held += local.numel() * local.element_size()
    return held


def work(folder: Path, *, only_ddp: bool) -> None:
    """What each of the two processes does: some runs, and for each a file with what cannot be seen from outside."""
    loop.draw = lambda run, history: None  # takes longer than a tiny run
    gradients.FIRST = gradients.PAIRS = 1  # all steps explode
    gradients.FACTOR, gradients.SATURATED, gradients.BEYOND = 1e-9, 0.0, 0.0

    def run(name: str, model: str = "tied", **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        config = TrainConfig(
            model=str(folder / model),
            tokenizer=str(folder / "tokenizer"),
            dataset=str(folder / "train.jsonl"),
            eval_dataset=str(folder / "eval.jsonl"),
            batch_size=2,
            gradient_accumulation_steps=2,
            **{**SHARED, "output_dir": str(folder / name), **options},
        )
        result = train(config)
        facts = {"held": held_bytes(result.model), "advice": [line.text for line in result.advice]}
        (folder / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(facts))

    adapters = (folder / "adapter").exists()  # where PEFT is installed
    run("ddp")
    run("ddp-kto", loss="kto")
    if adapters:
        run("ddp-adapter", model="adapter")
    if only_ddp:
        torch.distributed.destroy_process_group()
        return
    os.chdir(folder)
    for name in ("first", "second"):
        run(name, output_dir=None)
    try:
        run("refused", output_dir="tokenizer")
    except FolderError as error:
        (folder / f"refused-{os.environ['RANK']}.txt").write_text(str(error))
    run("ddp-sum", **SUM)
    run("ddp-vision", model="vision")
    run("ddp-lora", model="sixteen", **LORA)
    os.environ.update(FSDP2)
    run("fsdp2")
    run("fsdp2-kto", loss="kto")
    run("fsdp2-sum", **SUM)
    run("fsdp2-vision", model="vision")
    run("fsdp2-lora", model="sixteen", **LORA)
    run("fsdp2-untied", model="untied")
    run("fsdp2-resumed", resume=str(folder / "fsdp2" / "checkpoint-2"))
    if adapters:
        run("fsdp2-adapter", model="adapter")
        run("fsdp2-merged", model="adapter", adapter="merge", lora_rank=2)
    torch.distributed.destroy_process_group()


def tiny_model(*, tied: bool) -> GPT2LMHeadModel:
    torch.manual_seed(11)
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 302}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied, **shape))
    with torch.no_grad():  # so that logits differ
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def make_adapter(folder: Path) -> None:
    """An adapter on experts and attention that changes its base, in `adapter`; nothing where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return
    import peft
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(11)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**shape, **experts, vocab_size=302, max_position_embeddings=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder / "experts")
    model.name_or_path = str(folder / "experts")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder / "adapter")


def vision_model() -> LlavaForConditionalGeneration:
    """A vision-language model in 16 bits: text reaches half of it, and float32 trains it."""
    torch.manual_seed(11)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**tower, "model_type": "llama", "vocab_size": 302, "num_key_value_heads": 1, "max_position_embeddings": 64}
    vision = {**tower, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "projection_dim": 16}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=290)
    return LlavaForConditionalGeneration(config).to(torch.bfloat16)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., Any]
) -> Path:
    """A folder with the runs of one process and of two; sharded ones only where a test of them was selected."""
    here = [item for item in request.session.items if item.path == request.path]
    only_ddp = not any(item.get_closest_marker("slow") for item in here)
    folder = tmp_path_factory.mktemp("processes")
    rows = [
        {"prompt": f"what is the colour of sky {i}?", "chosen": " blue" + " today" * (i % 4), "rejected": f" {i}" * 3}
        for i in range(13)
    ]
    make_tokenizer().save_pretrained(folder / "tokenizer")
    for name, part in (("train", rows), ("eval", rows[:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    make_adapter(folder)
    alone: dict[str, dict[str, Any]] = {"tied": {"model": "tied"}, "kto": {"model": "tied", "loss": "kto"}}
    if (folder / "adapter").exists():
        alone["adapter"] = {"model": "adapter"}
    if not only_ddp:
        vision_model().save_pretrained(folder / "vision")
        tiny_model(tied=True).to(torch.bfloat16).save_pretrained(folder / "sixteen")
        alone |= {"untied": {"model": "untied"}, "sum": {"model": "tied", **SUM}}
        alone |= {"vision": {"model": "vision"}, "sixteen": {"model": "sixteen", **LORA}}
        if "adapter" in alone:
            alone["merged"] = {**alone["adapter"], "adapter": "merge", "lora_rank": 2}
    for tied in (True, False):
        tiny_model(tied=tied).save_pretrained(folder / ("tied" if tied else "untied"))
    for name, options in alone.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "draw", lambda run, history: None)
            changes = {**SHARED, "batch_size": 8, "output_dir": str(folder / f"one-{name}"), **options}
            train(
                TrainConfig(**{**changes, "model": str(folder / options["model"])}),
                tokenizer=make_tokenizer(),
                train_dataset=rows,
                eval_dataset=rows[:3],
            )
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *(["ddp"] if only_ddp else [])],
        cwd=folder,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def facts(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((runs / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("alone", "name"),
    [
        ("one-tied", "ddp"),
        ("one-kto", "ddp-kto"),
        pytest.param("one-sum", "ddp-sum", marks=pytest.mark.slow),
        pytest.param("one-kto", "fsdp2-kto", marks=pytest.mark.slow),
        pytest.param("one-sum", "fsdp2-sum", marks=pytest.mark.slow),
        pytest.param("one-tied", "fsdp2", marks=pytest.mark.slow),
        pytest.param("one-untied", "fsdp2-untied", marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_steps_of_one(runs: Path, alone: str, name: str) -> None:
    """Losses, gradient norms, counts of tokens and evaluations of each step, the samples, and the final weights."""
    one, two = records(runs / alone), records(runs / name)
    assert len(one) == len(two) == 6
    for expected, other in zip(one, two, strict=True):
        assert set(expected) == set(other)
        for key in set(expected) - TIMED:
            assert other[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
    assert (runs / alone / "samples.jsonl").read_text() == (runs / name / "samples.jsonl").read_text()
    weights, others = (load_file(runs / folder / "model/model.safetensors") for folder in (alone, name))
    assert set(weights) == set(others)
    for key, weight in weights.items():
        torch.testing.assert_close(others[key], weight, rtol=0, atol=2e-6, msg=key)


@pytest.mark.parametrize(
    ("alone", "name"),
    [
        ("one-adapter", "ddp-adapter"),
        pytest.param("one-adapter", "fsdp2-adapter", marks=pytest.mark.slow),
        pytest.param("one-merged", "fsdp2-merged", marks=pytest.mark.slow),
    ],
)
def test_two_processes_start_at_the_adapter_s_reference_and_train_it_as_one(runs: Path, alone: str, name: str) -> None:
    """Of experts too. The first loss is that of equal log-probs; a merged base is saved whole from its shards."""
    pytest.importorskip("peft", reason='needs pip install "fastpref[train]"')
    one, two = ([r["loss"] for r in records(runs / folder) if "loss" in r] for folder in (alone, name))
    assert two[0] == pytest.approx(math.log(2), abs=2e-6)
    assert two[-1] < 0.69
    assert two == pytest.approx(one, rel=1e-5)
    notes = [json.loads((runs / run / "environment.json").read_text())["notes"] for run in (alone, name)]
    assert not [line for line in notes[1] if "should be the same function" in line or "training mode" in line]
    files = ["model/adapter_model.safetensors", *(["base/model.safetensors"] if "merged" in name else [])]
    for file in files:
        weights, others = (load_file(runs / folder / file) for folder in (alone, name))
        assert set(weights) == set(others)
        for key, weight in weights.items():
            torch.testing.assert_close(others[key], weight, rtol=0, atol=2e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("alone", "name"), [("one-vision", "vision"), ("one-sixteen", "lora")])
def test_two_processes_train_a_vision_model_and_an_adapter_over_16_bits_as_one_does(
    launch: str, alone: str, name: str, runs: Path
) -> None:
    for expected, other in zip(records(runs / alone), records(runs / f"{launch}-{name}"), strict=True):
        for key in {"loss", "grad_norm", "eval_loss"} & set(expected):
            assert other[key] == pytest.approx(expected[key], rel=1e-5 if name == "vision" else 1e-2, abs=1e-6), key
    file = "adapter_model" if name == "lora" else "model"
    one, two = (load_file(runs / folder / f"model/{file}.safetensors") for folder in (alone, f"{launch}-{name}"))
    assert {key: (x.shape, x.dtype) for key, x in one.items()} == {key: (x.shape, x.dtype) for key, x in two.items()}


@pytest.mark.slow
def test_a_process_of_two_keeps_half_of_a_sharded_model(runs: Path) -> None:
    (whole, _), halves = facts(runs, "ddp"), facts(runs, "fsdp2")
    assert sum(half["held"] for half in halves) == whole["held"]
    assert max(half["held"] for half in halves) < 0.51 * whole["held"]


@pytest.mark.parametrize(
    "name",
    ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "fsdp2-resumed"))],
)
def test_an_explosion_is_told_alike_with_the_rows_of_both_processes_by_their_losses(runs: Path, name: str) -> None:
    """In the tail, the second step: five rows, of which a process without a pair left has run one again."""
    texts = [[text for text in fact["advice"] if "the gradient of step 2" in text] for fact in facts(runs, name)]
    assert texts[0] == texts[1]
    (text,) = texts[0]
    assert "with the largest losses (their gradients were not measured: the run has several processes)" in text
    listed = re.findall(r"row (\d+): loss ([\d.]+)", text)
    assert len({row for row, _ in listed}) == len(listed) == 5
    assert [float(loss) for _, loss in listed] == sorted((float(loss) for _, loss in listed), reverse=True)


@pytest.mark.slow
def test_a_sharded_run_is_checkpointed_whole_and_resumes_to_the_same_bits(runs: Path) -> None:
    sharded, resumed = runs / "fsdp2", runs / "fsdp2-resumed"
    weights = load_file(sharded / "model/model.safetensors")
    assert all(map(torch.equal, load_file(sharded / "checkpoint-4/model.safetensors").values(), weights.values()))
    assert all(map(torch.equal, load_file(resumed / "model/model.safetensors").values(), weights.values()))
    states = [
        torch.load(folder / "checkpoint-4/optimizer.pt", weights_only=True)["state"] for folder in (sharded, resumed)
    ]
    assert set(states[0]) == set(states[1]) == set(weights)
    for name, moments in states[0].items():
        assert moments["exp_avg"].shape == weights[name].shape
        assert all(torch.equal(value, states[1][name][key]) for key, value in moments.items())
    tail, again = [record for record in records(sharded) if record["step"] > 2], records(resumed)
    for first, second in zip(tail, again, strict=True):
        assert {k: v for k, v in first.items() if k not in TIMED} == {k: v for k, v in second.items() if k not in TIMED}


@pytest.mark.slow
def test_both_processes_of_a_run_have_the_same_new_folder_and_are_refused_alike(runs: Path) -> None:
    assert sorted(path.name for path in (runs / "runs").iterdir()) == ["fastpref", "fastpref-2"]
    for name in ("fastpref", "fastpref-2"):
        assert records(runs / "runs" / name)[-1]["step"] == SHARED["max_steps"]
    refused = [(runs / f"refused-{rank}.txt").read_text() for rank in range(2)]
    assert refused[0] == refused[1]
    assert refused[0].startswith("output_dir 'tokenizer' ")
    assert not (runs / "tokenizer" / MARKER).exists()


def launch(folder: Path, *, only_ddp: bool) -> int:
    """Start two processes with the variables that torchrun sets; forked, so that torch is imported once for both."""
    from torch.distributed import fsdp  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    children = []
    for rank in ("0", "1"):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ.update(RANK=rank, LOCAL_RANK=rank)
        try:
            work(folder, only_ddp=only_ddp)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(launch(Path(sys.argv[1]), only_ddp="ddp" in sys.argv[2:]))
