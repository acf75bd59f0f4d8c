"""A dry run: what it says is what the run would do, nothing is written or loaded, and broken input is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import core_model_loading

from fastpref.cli import main
from fastpref.training import train
from fastpref.training.data.tokens import Pair, Response
from fastpref.training.memory import dry_run as dry_run_module
from fastpref.training.memory.dry_run import CONTINUED, DryRun, piece, pieces, show_pair
from fastpref.training.memory.plan import plan_memory
from fastpref.training.prepare import prepare
from fastpref.training.step import batch_logps

Make = Callable[..., Any]


@pytest.fixture
def found(make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> Callable[..., DryRun]:
    """The report of a run with the options given."""

    def make(**changes: Any) -> DryRun:
        model = changes.pop("given", None) or make_model()
        result = train(make_config(dry_run=True, **changes), model=model, tokenizer=tokenizer, train_dataset=rows)
        assert (result.step, result.history) == (0, [])
        assert result.dry_run is not None
        return result.dry_run

    return make


def test_nothing_is_written_and_the_model_given_stays_as_it_is(
    found: Callable[..., DryRun], make_config: Make, make_model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = make_model(), make_model()
    found(given=model, gradient_checkpointing=True, freeze_head=True)
    assert not Path(make_config().output_dir).exists()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == dict.fromkeys(
        dict(model.named_parameters()), True
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert model.transformer.drop.p == other.transformer.drop.p == 0.1
    assert not model.transformer.gradient_checkpointing
    printed = capsys.readouterr().out
    assert "dataset: 13 pairs of 13 rows" in printed
    assert "dry run: nothing was trained, and nothing was written" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": None, "epochs": 3.0, "batch_size": 2, "eval_fraction": 0.2, "eval_every": 4, "save_every": 5},
        {"max_steps": 7, "logging_every": 3, "gradient_accumulation_steps": 2},
        {"max_steps": 1},
        {"max_steps": 6, "logging_every": 6, "eval_fraction": 0.2},
    ],
)
def test_the_schedule_foretold_is_the_one_that_comes(
    options: dict[str, Any], found: Callable[..., DryRun], make_config: Make, make_model: Make, tokenizer: Any,
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    saved: list[int] = []
    monkeypatch.setattr("fastpref.training.loop.save_checkpoint", lambda run, *rest: saved.append(1))
    schedule = found(**options).schedule
    result = train(make_config(**options), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert schedule["steps"] == result.step
    assert schedule["metric records"] == sum("loss" in record for record in result.history)
    assert schedule["evaluations"] == sum("eval_loss" in record for record in result.history)
    assert schedule["checkpoints"] == len(saved)


def test_lengths_are_those_of_the_data(
    found: Callable[..., DryRun], tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    lengths = found().lengths
    prompts = sorted(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
    chosen = sorted(len(tokenizer(row["chosen"])["input_ids"]) + 1 for row in rows)  # and its end
    for name, values in (("prompt", prompts), ("chosen response", chosen)):
        assert lengths[name] == (values[0], values[6], values[12], values[12])


def test_parameters_gradients_and_state_are_those_of_the_run(
    found: Callable[..., DryRun], make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    model = make_model()
    memory = found().memory
    size = sum(p.numel() * 4 for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert (memory.parameters, memory.gradients) == (size + buffers, size)
    assert memory.optimizer == 2 * size
    frozen = found(freeze_head=True).memory
    head = model.lm_head.weight.numel()
    assert (frozen.frozen, frozen.gradients) == (head, size - 4 * head)
    assert frozen.head_gradient == 0 < memory.head_gradient == 4 * head


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_estimated_within_a_quarter_of_what_a_real_forward_keeps(
    layout: str, checkpointing: bool, make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """Without checkpointing; with it the estimate has one layer computed again besides, which comes in backward."""
    model = make_model(n_embd=32, n_layer=4)
    config = make_config(layout=layout, batch_size=8, max_steps=None, gradient_checkpointing=checkpointing)
    run = prepare(config, model=model, tokenizer=tokenizer, train_dataset=rows)
    run.model.train()
    plan = plan_memory(run)
    largest = max(
        (batch for step in range(2) for batch in run.plan.micro_batches(run.plan.step(step))), key=run.plan.sizes.of
    )
    batch = run.collate([run.pairs[index] for index in largest])
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    backbone = model.transformer
    inputs = {name: value for name, value in batch.inputs.items() if layout == "shared" or name == "input_ids"}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = backbone(**inputs, use_cache=False)[0]
    assert hidden.requires_grad
    assert plan.micro_batch[:2] == (len(largest), batch.inputs["input_ids"].numel())
    assert plan.kept is not None
    assert plan.kept_checkpointed is not None
    if checkpointing:
        layer = plan.kept // 4
        assert plan.kept_checkpointed - layer == 4 * hidden.numel() * 4
    else:
        assert 0.75 * sum(kept.values()) <= plan.kept <= 1.25 * sum(kept.values())
        assert plan.kept_checkpointed < plan.kept


def test_scored_positions_are_those_of_the_largest_micro_batch(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    for layout in ("padded", "packed", "shared"):
        config = make_config(layout=layout, batch_size=13, max_steps=1)
        run = prepare(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
        responses = [response for pair in run.pairs for response in (pair.chosen, pair.rejected)]
        assert plan_memory(run).micro_batch[2] == sum(len(ids) - start for ids, start in responses)
        run.release()


def test_a_forward_that_needs_numbers_leaves_the_activations_open(
    found: Callable[..., DryRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(self: Any, *args: Any, input_ids: Any, **kwargs: Any) -> Any:
        return self.wte(input_ids[:, : int(input_ids.sum())])

    monkeypatch.setattr("transformers.GPT2Model.forward", forward)
    report = found(layout="padded")
    assert (report.memory.kept, report.fits) == (None, None)
    assert "activations are not known: the forward does not run on shapes alone (" in capsys.readouterr().out


def test_what_does_not_fit_is_said_with_what_helps(
    found: Callable[..., DryRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = found()
    assert report.fits
    need = report.memory.total(checkpointing=False)
    checkpointed = report.memory.total(checkpointing=True)
    assert need is not None
    assert checkpointed is not None
    for room, fits in ((need - 1, True), (checkpointed - 1, False)):
        monkeypatch.setattr(dry_run_module, "available_memory", lambda *rest, room=room: (room, "here"))
        capsys.readouterr()
        assert found().fits is False
        printed = capsys.readouterr().out
        assert "DOES NOT FIT. What to change, the cheapest first: auto_batch (" in printed
        assert ("with gradient_checkpointing it fits" in printed) is fits


def test_gradients_of_earlier_micro_batches_are_there_while_activations_are(found: Callable[..., DryRun]) -> None:
    memory = found(batch_size=4, gradient_accumulation_steps=2).memory
    once = replace(memory, accumulates=False, kept=10**9)
    assert memory.accumulates
    more = replace(once, accumulates=True).total(checkpointing=False)
    assert more is not None
    assert more - (once.total(checkpointing=False) or 0) == memory.gradients


def test_scored_tokens_are_marked_token_by_token(tokenizer: Any) -> None:
    ids = tokenizer("the sky\nis blue", return_tensors="np")["input_ids"][0].astype(np.int32)
    ids = np.append(ids, np.int32(tokenizer.eos_token_id))
    start = len(tokenizer("the sky\n")["input_ids"])
    pair = Pair(7, ids[:start], Response(ids, start), Response(ids[: start + 1], start))
    lines = show_pair(pair, tokenizer, max_length=64, color=False)
    pieces = [piece(tokenizer, token) for token in ids.tolist()]
    assert lines[0].startswith("the first pair (row 7)")
    assert lines[1] == f"chosen: {len(ids)} tokens, {len(ids) - start} scored"
    assert lines[2] == f"{'│'.join(pieces[:start])}⟦{'│'.join(pieces[start:])}⟧"
    assert lines[2].replace("│", "").replace("⟦", "").replace("⟧", "") == "the sky\\nis blue<|end|>"
    assert lines[4].endswith(f"⟦{pieces[start]}⟧")
    colored = show_pair(pair, tokenizer, max_length=64, color=True)[2]
    assert colored.count("\x1b[32m") == len(ids) - start
    assert f"\x1b[32m{pieces[-1]}\x1b[39m" in colored


def test_long_ones_are_cut_in_the_middle_and_their_border_stays(tokenizer: Any) -> None:
    ids = np.full(300, tokenizer("a")["input_ids"][0], dtype=np.int32)
    line = show_pair(Pair(0, ids[:100], Response(ids, 100), Response(ids, 100)), tokenizer, max_length=300, color=False)
    prompt, answer = line[2].split("⟦")
    assert prompt == "│".join(["a"] * 16 + [" ... 60 tokens ... "] + ["a"] * 24)
    assert answer == "│".join(["a"] * 40 + [" ... 144 tokens ... "] + ["a"] * 16) + "⟧"
    assert line[1] == "chosen: 300 tokens, 200 scored, at max_length=300"


def test_a_token_of_half_a_character_and_an_empty_prompt_are_shown(tokenizer: Any) -> None:
    first, *_ = ids = tokenizer("蓝")["input_ids"]
    assert len(ids) > 1
    assert piece(tokenizer, first) == f"<{tokenizer.convert_ids_to_tokens(first)}>"
    whole = np.array([*tokenizer("the")["input_ids"], tokenizer.eos_token_id], dtype=np.int32)
    pair = Pair(0, whole[:0], Response(whole, 0), Response(whole, 0))
    shown = show_pair(pair, tokenizer, max_length=64, color=False)
    assert shown[1] == f"chosen: {len(whole)} tokens, {len(whole) - 1} scored"  # nothing predicts the first
    assert shown[2].startswith(f"{piece(tokenizer, int(whole[0]))}⟦")


@pytest.fixture
def command(
    tmp_path: Path, tokenizer: Any, make_model: Make, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """A dry run from the command line, of a model whose weights must not be loaded."""
    tokenizer.save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    copy = core_model_loading._materialize_copy

    def load(tensor: Any, device: Any = None, dtype: Any = None) -> Any:
        assert torch.device(device).type == "meta", "weights were loaded"
        return copy(tensor, device, dtype)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", load)
    return [
        "train", "--dry_run", f"--model={tmp_path / 'model'}", f"--dataset={tmp_path / 'pairs.jsonl'}",
        "--max_length=64", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def test_from_the_command_line_no_weights_are_loaded_and_all_parts_are_printed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    printed = capsys.readouterr().out
    for part in ("weights: ", "GPT2LMHeadModel, 2 layers, H = 16, V = 302, tied head", "data: 13 pairs",
                 "schedule: 1.00 epochs", "memory of a process, estimated", "log-probs: ",
                 "logits of all positions would be", "available: ", "⟦", "<|end|>⟧"):  # fmt: skip
        assert part in printed
    assert max(map(len, printed.split("the first pair")[0].splitlines())) <= 160
    assert not (tmp_path / "run").exists()
    assert "trained" not in printed.replace("are trained", "").replace("was trained", "")


def test_lora_is_counted_without_weights(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    assert main([*command, "--lora_rank=2"]) == 0
    # c_attn 16 -> 48, c_proj 16 -> 16, c_fc 16 -> 64, c_proj 64 -> 16, in two layers
    assert f"{2 * 2 * (64 + 32 + 80 + 80):,} parameters are trained" in capsys.readouterr().out


def damage_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damage_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 100)


def damage_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (damage_cut, "file not fully covered"),
        (damage_header, "header too large"),
        (damage_index, "model-00001-of-00002.safetensors"),
    ],
)
def test_weights_that_cannot_be_read_are_named_with_exit_code_2(
    damage: Callable[[Path], None], message: str, command: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(tmp_path / "model")
    assert main(command) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"fastpref train: error: model='{tmp_path / 'model'}' cannot be loaded: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_real_step_takes_the_head_memory_that_was_counted_for_the_same_rows(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """The plan that is printed is the one that the linear path makes for the batch."""
    from fastpref.linear import plan as planner

    made: list[str] = []
    original = planner.plan_tokens
    config = make_config(batch_size=13, max_steps=1)
    run = prepare(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    foretold = plan_memory(run).head_plan

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        made.append(found.describe)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastpref.linear.tokens.plan_tokens", spy)
        batch_logps(run.model, run.collate(run.pairs), config, reduction="sum")
    assert foretold in made


def test_a_character_of_several_tokens_is_shown_as_itself(tokenizer: Any) -> None:
    """Bytes are this tokenizer's tokens for Chinese and for emoji: their names would tell nobody anything."""
    ids = tokenizer("a 好😊")["input_ids"]
    shown = pieces(tokenizer, ids)
    assert len(shown) == len(ids)
    assert [text for text in shown if text != CONTINUED][-2:] == ["好", "😊"]
    assert shown.count(CONTINUED) == 2 + 3
    assert pieces(tokenizer, ids[:-1])[-3:] == [piece(tokenizer, token) for token in ids[-4:-1]]
