"""In what weights are held, trained and saved: 16 and 32 bits, and fewer (QLoRA)."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from fastpref.cli import main
from fastpref.models import model_logps
from fastpref.options import UsageError
from fastpref.training import TrainConfig, train
from fastpref.training.build import check_trainable, dtype_lines
from fastpref.training.memory.plan import plan_memory
from fastpref.training.prepare import prepare
from fastpref.training.reference.cache import model_digest

Make = Callable[..., Any]
SHAPE = {
    "vocab_size": 302, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
QUANT = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason='needs bitsandbytes: pip install "fastpref[quant]"'
)
PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")


@pytest.fixture
def llama(tmp_path: Path, tokenizer: Any) -> Callable[[torch.dtype], str]:
    """A checkpoint whose weights are in a dtype."""

    def make(dtype: torch.dtype) -> str:
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
        folder = tmp_path / "llama"
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def dtypes(model: Any, *, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad == trained}


@PEFT
@pytest.mark.parametrize(
    ("source", "option", "held"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_adapters_are_trained_in_float32_over_weights_held_as_in_the_checkpoint(
    source: torch.dtype, option: Any, held: torch.dtype, llama: Make, make_config: Make, rows: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = make_config(model=llama(source), lora_rank=4, dtype=option, max_steps=3)
    result = train(config, train_dataset=rows)
    assert dtypes(result.model, trained=False) == {held}
    assert dtypes(result.model, trained=True) == {torch.float32}
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.history[2]["loss"] < result.history[0]["loss"]
    said = "frozen weights are held, and their products made, in bfloat16" in capsys.readouterr().err
    assert said == (held == torch.bfloat16)
    saved = load_file(result.output_dir / "model" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@PEFT
def test_a_16_bit_base_gives_the_losses_of_a_float32_one_up_to_its_rounding_and_holds_half(
    llama: Make, make_config: Make, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    losses, held = [], []
    for dtype in ("auto", "float32"):
        config = make_config(model=llama(torch.bfloat16), lora_rank=4, dtype=dtype, output_dir=str(tmp_path / dtype))
        losses.append([record["loss"] for record in train(config, train_dataset=rows).history])
        run = prepare(TrainConfig(**{**vars(config), "dry_run": True, "output_dir": None}), train_dataset=rows)
        held.append(plan_memory(run).parameters)
    assert losses[0] == pytest.approx(losses[1], abs=4e-3)
    frozen = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**SHAPE)).parameters())
    assert held[1] - held[0] == 2 * frozen


@PEFT
def test_a_reference_model_of_its_own_is_held_as_the_policy_is(
    llama: Make, make_config: Make, rows: list[dict[str, Any]]
) -> None:
    """The same checkpoint under both names is the same function: the loss of step 1 is ln 2 to the last bit."""
    source = llama(torch.bfloat16)
    config = make_config(model=source, reference_model=source, lora_rank=4, max_steps=1)
    assert train(config, train_dataset=rows).history[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)


@PEFT
def test_an_adapter_over_16_bits_resumes_to_the_same_bits(
    llama: Make, make_config: Make, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    options = {"model": llama(torch.bfloat16), "lora_rank": 4, "save_every": 2, "keep_checkpoints": 3}
    whole = train(make_config(**options), train_dataset=rows)
    first = tmp_path / "run" / "checkpoint-2"
    again = train(make_config(**options, resume=str(first), output_dir=str(tmp_path / "again")), train_dataset=rows)
    names = ("run", "again")
    one, other = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in names)
    assert whole.step == again.step == 4
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("source", "option", "saved"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_whole_weights_are_trained_in_float32_and_saved_as_the_checkpoint_was(
    source: torch.dtype, option: Any, saved: torch.dtype, llama: Make, make_config: Make, rows: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = make_config(
        model=llama(source), save_dtype=option, save_every=4, save_best=True, eval_fraction=0.2, max_steps=4
    )
    result = train(config, train_dataset=rows)
    state = result.model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for name in ("model", "best"):
        folder = result.output_dir / name
        tensors = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensors[key], state[key].to(saved)) for key in tensors)
        assert {tensor.dtype for tensor in tensors.values()} == {saved}
        assert json.loads((folder / "config.json").read_text("utf-8"))["dtype"] == str(saved).removeprefix("torch.")
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == saved
    checkpoint = load_file(result.output_dir / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(checkpoint[key], state[key]) for key in checkpoint)
    said = f"the trained model will be saved in {str(saved).removeprefix('torch.')}" in capsys.readouterr().err
    assert said == (saved != torch.float32)


def test_tied_weights_are_saved_once_in_another_dtype_and_an_object_as_it_is(
    make_model: Make, make_config: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    for option, dtype in (("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        config = make_config(save_dtype=option, output_dir=str(tmp_path / option), max_steps=1)
        train(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
        tensors = load_file(tmp_path / option / "model" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert "lm_head.weight" not in tensors


@PEFT
def test_an_adapter_is_saved_as_save_dtype_says(llama: Make, make_config: Make, rows: list[dict[str, Any]]) -> None:
    result = train(
        make_config(model=llama(torch.bfloat16), lora_rank=2, save_dtype="bfloat16", save_every=4), train_dataset=rows
    )
    for name, dtype in (("model", torch.bfloat16), ("checkpoint-4", torch.float32)):
        saved = load_file(result.output_dir / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {dtype}


def test_what_transformers_keeps_in_float32_is_saved_so(
    make_model: Make, make_config: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    model = make_model()
    model._keep_in_fp32_modules_strict = {"ln_f"}
    config = make_config(save_dtype="bfloat16", max_steps=1)
    result = train(config, model=model, tokenizer=tokenizer, train_dataset=rows)
    tensors = load_file(result.output_dir / "model" / "model.safetensors")
    exact = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert exact == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_float16_is_told_that_gradients_vanish_in_it(make_model: Make) -> None:
    model = make_model().half().requires_grad_(False)
    assert any("vanish below 6e-8" in line for line in dtype_lines(model, TrainConfig()))


def test_output_router_logits_is_off_in_the_run_and_on_in_what_is_saved(
    make_config: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": 16, "intermediate_size": 16, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**shape, output_router_logits=True))
    seen: set[bool] = set()
    model.lm_head.register_forward_pre_hook(lambda *_: seen.add(model.config.output_router_logits))
    run = prepare(make_config(max_steps=1, save_every=1), model=model, tokenizer=tokenizer, train_dataset=rows)
    seen.clear()
    from fastpref.training.loop import train_run

    train_run(run)
    assert seen == {False}
    for name in ("model", "checkpoint-1"):
        saved = json.loads((tmp_path / "run" / name / "config.json").read_text("utf-8"))
        assert saved["output_router_logits"] is True
    assert model.config.output_router_logits is True  # the caller's object, given back


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype='bfloat16' says how the weights of config.model are loaded, which is not set"),
        ({"load_in_4bit": True, "lora_rank": 2}, "load_in_4bit=True says how the weights of config.model are loaded"),
    ],
)
def test_how_weights_are_loaded_is_refused_of_an_object(
    options: dict[str, Any], message: str, make_model: Make, make_config: Make, tokenizer: Any,
    rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=message):
        train(make_config(**options), model=make_model(), tokenizer=tokenizer, train_dataset=rows)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be one of auto, bfloat16, float16, float32; got 'int8'"):
        TrainConfig(dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give load_in_4bit or load_in_8bit, not both"):
        TrainConfig(load_in_4bit=True, load_in_8bit=True)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_whole_weights_that_are_quantised_cannot_be_trained(
    option: str, dry_run: bool, llama: Make, make_config: Make, rows: list[dict[str, Any]]
) -> None:
    config = make_config(model=llama(torch.bfloat16), dry_run=dry_run, **{option: True})
    with pytest.raises(ValueError, match=f"{option}: quantised weights cannot be trained: set lora_rank"):
        train(config, train_dataset=rows)


def test_a_quantised_object_is_refused_whatever_quantised_it(make_model: Make) -> None:
    model = make_model()
    check_trainable(model, TrainConfig())
    model.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="GPT2LMHeadModel: quantised weights cannot be trained"):
        check_trainable(model, TrainConfig())


def test_a_weight_packed_in_a_tensor_of_its_own_kind_is_refused_by_name_and_can_be_hashed(make_model: Make) -> None:
    """As torchao's are, which call themselves float32."""
    model = make_model(tie_word_embeddings=False)
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Linear has a TwoTensor, .*in training: logps=logits"):
        model_logps(model, {"input_ids": ids, "labels": ids})
    with pytest.raises(ValueError, match="GPT2LMHeadModel: quantised weights cannot be trained"):
        check_trainable(model, TrainConfig())
    before = model_digest(model, model.state_dict().items())
    weight[0, 0] += 1
    assert model_digest(model, model.state_dict().items()) != before


@PEFT
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_error_names_the_extra(
    llama: Make, make_config: Make, rows: list[dict[str, Any]]
) -> None:
    config = make_config(model=llama(torch.bfloat16), load_in_4bit=True, lora_rank=2)
    with pytest.raises(ImportError, match=r'need bitsandbytes: pip install "fastpref\[quant\]"'):
        train(config, train_dataset=rows)


@PEFT
@QUANT
@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_on_quantised_weights_has_the_gradients_of_one_on_what_they_stand_for(
    option: str, llama: Make, make_config: Make, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Against a base put back to 32 bits; after evaluations too, in which some CPUs lay quantised weights out anew."""
    source = llama(torch.bfloat16)
    options = {"lora_rank": 4, "max_steps": 3, "max_grad_norm": 0.0, "eval_fraction": 0.2, "eval_every": 1}
    config = make_config(model=source, dtype="float32", **{option: True}, **options)
    quantised = train(config, train_dataset=rows)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    bits = transformers.BitsAndBytesConfig(**(four if option == "load_in_4bit" else {"load_in_8bit": True}))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=bits, dtype=torch.float32)
    model.dequantize(torch.float32)
    model.save_pretrained(tmp_path / "plain")
    config = make_config(model=str(tmp_path / "plain"), tokenizer=source, output_dir=str(tmp_path / "other"), **options)
    plain = train(config, train_dataset=rows)
    tolerance = 1e-4 if option == "load_in_4bit" else 2e-2  # which rounds activations to 8 bits
    for record, other in zip(quantised.history, plain.history, strict=True):
        for name in ("loss", "grad_norm"):
            if name in record:
                assert record[name] == pytest.approx(other[name], rel=tolerance)


@PEFT
@QUANT
@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_a_dry_run_counts_quantised_weights_as_they_are_held(
    option: str, llama: Make, make_config: Make, rows: list[dict[str, Any]]
) -> None:
    options = {"model": llama(torch.bfloat16), "lora_rank": 4, option: True}
    run = prepare(make_config(**options), train_dataset=rows)
    held = sum(t.nbytes for name, t in run.model.state_dict().items() if "quant_map" not in name)
    run.release()
    dry = prepare(make_config(**options, dry_run=True, output_dir=None), train_dataset=rows)
    assert plan_memory(dry).parameters == pytest.approx(held, rel=0.02)


@PEFT
@QUANT
def test_a_reference_model_is_quantised_as_the_policy_is(
    llama: Make, make_config: Make, rows: list[dict[str, Any]]
) -> None:
    source = llama(torch.bfloat16)
    config = make_config(model=source, reference_model=source, lora_rank=4, load_in_4bit=True, max_steps=1)
    assert train(config, train_dataset=rows).history[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)


@PEFT
@QUANT
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_a_checkpoint_that_is_quantised_itself_takes_an_adapter_and_nothing_else(
    option: str, dry_run: bool, llama: Make, make_config: Make, tokenizer: Any, rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:  # fmt: skip
    bits = transformers.BitsAndBytesConfig(**{option: True})
    model = AutoModelForCausalLM.from_pretrained(llama(torch.bfloat16), quantization_config=bits, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bits")
    options = {"model": str(tmp_path / "bits"), "max_steps": 1, "dry_run": dry_run}
    result = train(make_config(**options, lora_rank=2), tokenizer=tokenizer, train_dataset=rows)
    assert result.step == (0 if dry_run else 1)
    with pytest.raises(ValueError, match="LlamaForCausalLM: quantised weights cannot be trained: set lora_rank"):
        train(make_config(**options, output_dir=str(tmp_path / "x")), tokenizer=tokenizer, train_dataset=rows)


@PEFT
@QUANT
def test_from_the_command_line_qlora_trains_saves_its_adapter_and_resumes(
    llama: Make, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [
        "train", f"--model={llama(torch.bfloat16)}", f"--dataset={pairs}", "--load_in_4bit", "--lora_rank=4",
        "--max_length=64", "--max_steps=4", "--save_every=2", "--no_progress",
    ]  # fmt: skip
    assert main([*command, f"--output_dir={tmp_path / 'run'}"]) == 0
    first = tmp_path / "run" / "checkpoint-2"
    assert main([*command, f"--output_dir={tmp_path / 'again'}", f"--resume={first}"]) == 0
    names = ("run", "again")
    one, other = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in names)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_quantised_weights_are_not_sharded(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpref.training.prepare.is_sharded", lambda accelerator: True)
    with pytest.raises(UsageError, match="quantised weights cannot be sharded here: take DDP"):
        train(make_config(model="missing", dataset="missing", load_in_4bit=True, lora_rank=2))
