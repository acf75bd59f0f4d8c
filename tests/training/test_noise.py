"""The first step: noise of training mode is switched off or named, and the start at the reference is checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.training import train
from fastpref.training.checkpoints.save import save_final_model
from fastpref.training.noise import check_start, disable_dropout, restore_config, restored_config

Make = Callable[..., Any]
Rows = list[dict[str, Any]]

SHAPE = {
    "vocab_size": 302, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {**SHAPE, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4}
# By family, with the noise that its config asks for.
NOISY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 302, "n_positions": 64},
    "falcon": {**SHAPE, "attention_dropout": 0.2, "hidden_dropout": 0.2, "num_kv_heads": 1},
    "persimmon": {**SHAPE, "attention_dropout": 0.2, "hidden_dropout": 0.2},
    "mixtral": {**EXPERTS, "router_jitter_noise": 0.2, "attention_dropout": 0.1},
    "phimoe": EXPERTS,
    "minimax": {
        **EXPERTS, "router_jitter_noise": 0.2, "head_dim": 8, "block_size": 16,
        "layer_types": ["full_attention", "linear_attention"],
    },
    "minimax_m2": {**EXPERTS, "router_jitter_noise": 0.2, "head_dim": 8, "rotary_dim": 4},
    "dbrx": {
        "vocab_size": 302, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "resid_pdrop": 0.2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "attn_pdrop": 0.2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.2},
    },
}  # fmt: skip


def build(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **NOISY[family]))
    with torch.no_grad():  # so that logits differ
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture
def first_step(make_config: Make, tokenizer: Any, rows: Rows) -> Make:
    """The loss of a run's first step at beta 1, and what it said."""

    def run(model: Any, *, data: Any = None, **options: Any) -> tuple[float, list[str]]:
        config = make_config(**{"beta": 1.0, "max_steps": 1, "learning_rate": 0.0, **options})
        result = train(config, model=model, tokenizer=tokenizer, train_dataset=rows if data is None else data)
        notes = json.loads((result.output_dir / "environment.json").read_text())["notes"]
        return result.history[0]["loss"], [line for line in notes if "mode computes" in line or "same function" in line]

    return run


@pytest.mark.parametrize("family", NOISY)
def test_the_first_loss_is_that_of_equal_log_probs(family: str, first_step: Make) -> None:
    loss, lines = first_step(build(family))
    assert (loss, lines) == (pytest.approx(math.log(2), abs=2e-6), [])


@pytest.mark.parametrize("family", NOISY)
def test_without_the_option_the_noise_stays(family: str, first_step: Make) -> None:
    """So the families above do have some; nothing is said of what was asked for."""
    loss, lines = first_step(build(family), disable_dropout=False)
    assert abs(loss - math.log(2)) > 1e-3
    assert lines == []


@pytest.mark.parametrize("family", ["falcon", "phimoe"])
def test_what_was_switched_off_is_saved_and_given_back_as_it_came(
    family: str, first_step: Make, tokenizer: Any, tmp_path: Path
) -> None:
    model = build(family)
    before = model.config.to_dict()
    first_step(model)
    noise = {name for name in before if "drop" in name or "jitter" in name}
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert {name: saved[name] for name in noise} == {name: before[name] for name in noise}
    assert {name: getattr(model.config, name) for name in noise} == {name: before[name] for name in noise}


def test_a_checkpoint_is_saved_with_the_dropout_that_its_source_has(
    make_config: Make, tokenizer: Any, rows: Rows, tmp_path: Path
) -> None:
    source = AutoConfig.for_model("falcon", **NOISY["falcon"])
    assert source.attention_dropout > 0
    for part in (AutoModelForCausalLM.from_config(source).bfloat16(), tokenizer):
        part.save_pretrained(tmp_path / "source")
    train(make_config(model=str(tmp_path / "source"), max_steps=1), train_dataset=rows)
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (saved["attention_dropout"], saved["dtype"]) == (source.attention_dropout, "bfloat16")


def test_dropout_is_off_in_the_config_but_while_it_is_saved(tokenizer: Any, tmp_path: Path) -> None:
    model = build("falcon")
    disable_dropout(model)
    disable_dropout(model)  # as a model that is trained twice
    assert model.config.attention_dropout == 0.0
    with restored_config(model):
        assert model.config.attention_dropout == 0.2
    assert model.config.attention_dropout == 0.0
    save_final_model(tmp_path, model, tokenizer)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attention_dropout"] == 0.2
    restore_config(model)
    assert model.config.attention_dropout == 0.2


class Shaken(nn.Module):
    """Noise under no name that is known."""

    def __init__(self, inner: nn.Module, *, random: bool) -> None:
        super().__init__()
        self.inner, self.random = inner, random

    def forward(self, *args: Any, **options: Any) -> Any:
        found = self.inner(*args, **options)
        if not self.training:
            return found
        return found * (1 + 0.3 * torch.randn_like(found)) if self.random else found * 1.5


@pytest.mark.parametrize(
    ("random", "where"),
    [
        (True, r"random numbers are drawn in transformer\.h\.0\.mlp \(Shaken\) and 1 more"),
        (False, "no random number is drawn"),
    ],
)
def test_noise_of_an_unknown_kind_is_named_before_the_first_step(
    random: bool, where: str, first_step: Make, tmp_path: Path
) -> None:
    model = build("gpt2")
    for block in model.transformer.h:
        block.mlp = Shaken(block.mlp, random=random)
    loss, lines = first_step(model)
    assert abs(loss - math.log(2)) > 1e-3
    pair = r"\((-[\d.]+), (-[\d.]+)\)"
    noise = re.fullmatch(
        "training mode computes something else than evaluation mode, with dropout switched off: of row \\d+ the "
        f"log-probs \\(chosen, rejected\\) are {pair} in evaluation, {pair} and {pair} in training mode; {where}. "
        "The loss has this noise in it",
        lines[0],
    )
    assert noise is not None
    assert (noise[3] == noise[5]) is not random
    apart = re.fullmatch(
        "at the first step policy and reference should be the same function, and are not: of row \\d+ the log-probs "
        f"are {pair} and {pair} \\(chosen, rejected\\); the loss of 2 pairs is ([\\d.]+), where equal log-probs give "
        "0.6931",
        lines[1],
    )
    assert apart is not None
    assert abs(float(apart[5]) - math.log(2)) > 1e-3
    _, lines = first_step(model, loss="simpo", output_dir=str(tmp_path / "simpo"))  # a loss without reference
    assert len(lines) == 1
    _, lines = first_step(model, loss=["sigmoid", "sft"], output_dir=str(tmp_path / "sum"))  # sums and means of tokens
    assert "should be the same function" in lines[1]


def test_a_reference_that_was_asked_for_is_not_held_against_the_policy(
    first_step: Make, make_model: Make, rows: Rows, tmp_path: Path
) -> None:
    other = make_model(n_layer=1)
    other.save_pretrained(tmp_path / "other")
    loss, lines = first_step(make_model(), reference_model=str(tmp_path / "other"))
    assert abs(loss - math.log(2)) > 1e-3
    columns = [{**row, "ref_chosen_logps": -7.0, "ref_rejected_logps": -9.5} for row in rows]
    _, more = first_step(make_model(), data=columns, output_dir=str(tmp_path / "columns"))
    assert lines == more == []


def test_the_check_leaves_the_model_and_the_random_numbers_as_they_were(
    make_config: Make, make_model: Make, tokenizer: Any, rows: Rows
) -> None:
    from fastpref.training.prepare import prepare

    run = prepare(make_config(loss="simpo"), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    before, state = {name: t.clone() for name, t in run.model.state_dict().items()}, torch.get_rng_state()
    run.model.eval()
    check_start(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert not run.model.training
    assert not any(module._forward_hooks for module in run.model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
    run.release()
