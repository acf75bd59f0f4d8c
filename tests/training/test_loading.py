"""What is loaded is what was saved, and the same again when it is saved: class, tensors, processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.cli import main
from fastpref.folders import FolderError
from fastpref.training import TrainConfig, train
from fastpref.training.build import check_causal
from fastpref.training.checkpoints.load import unsaved

Make = Callable[..., Any]
TEXT: dict[str, Any] = {
    "vocab_size": 302, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
QWEN_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen3_5ForConditionalGeneration": (
        "qwen3_5",
        {
            "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_num_key_heads": 2,
            "linear_value_head_dim": 8, "linear_num_value_heads": 2,
            "rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
        },
        {**QWEN_TOWER, "patch_size": 4, "num_position_embeddings": 16},
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
        {**QWEN_TOWER, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]},
    ),
    "Mistral3ForConditionalGeneration": (
        "mistral3", {"model_type": "mistral"},
        {"model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 8, **TOWER},
    ),
    "Gemma3ForConditionalGeneration": (
        "gemma3", {"sliding_window": 64},
        {"model_type": "siglip_vision_model", "num_hidden_layers": 1, "vision_use_head": False, **TOWER},
    ),
    "LlavaForConditionalGeneration": (
        "llava", {"model_type": "llama"},
        {"model_type": "clip_vision_model", "num_hidden_layers": 2, "projection_dim": 16, **TOWER},
    ),
}  # fmt: skip


def vision_model(kind: str) -> Any:
    model_type, text, tower = VISION[kind]
    special = {} if model_type in ("mistral3", "gemma3", "llava") else {"image_token_id": 290, "video_token_id": 291}
    shape = {"text_config": {**TEXT, **text}, "vision_config": tower, "image_token_index": 290, **special}
    if model_type == "gemma3":
        shape["mm_tokens_per_image"] = 4
    torch.manual_seed(0)
    return getattr(transformers, kind)(AutoConfig.for_model(model_type, **shape))


@pytest.fixture
def vision(tmp_path: Path, tokenizer: Any) -> Callable[[str], Path]:
    """A vision-language checkpoint on the disk, with its tokenizer and its processor's file."""

    def make(kind: str) -> Path:
        folder = tmp_path / "vision"
        vision_model(kind).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}', "utf-8")
        return folder

    return make


@pytest.fixture
def pairs(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", VISION)
def test_a_vision_language_model_trains_on_text_and_keeps_class_tensors_and_processor(
    kind: str, vision: Callable[[str], Path], make_config: Make, rows: list[dict[str, Any]]
) -> None:
    source = vision(kind)
    result = train(make_config(model=str(source), max_steps=2), train_dataset=rows)
    saved = result.output_dir / "model"
    before, after = load_file(source / "model.safetensors"), load_file(saved / "model.safetensors")
    assert type(result.model).__name__ == kind
    assert json.loads((saved / "config.json").read_text("utf-8"))["architectures"] == [kind]
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("embed_tokens" in name for name in changed)
    assert not [name for name in changed if "vision" in name or "visual" in name]
    assert (saved / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    assert abs(result.history[0]["loss"] - 0.6931472) < 1e-5


def test_logits_and_hidden_states_give_a_vision_language_model_the_same_step(
    vision: Callable[[str], Path], make_config: Make, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    source, found = vision("Gemma3ForConditionalGeneration"), []
    for logps in ("linear", "logits"):
        config = make_config(model=str(source), logps=logps, output_dir=str(tmp_path / logps))
        found.append([record["grad_norm"] for record in train(config, train_dataset=rows).history])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_serves_images_is_frozen_and_counted_in_a_dry_run_too(
    vision: Callable[[str], Path], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DDP would wait for gradients of weights that no text reaches."""
    source = vision("LlavaForConditionalGeneration")
    command = ["train", f"--model={source}", f"--dataset={pairs}", f"--output_dir={tmp_path / 'run'}", "--dry_run"]
    assert main([*command, "--max_length=64"]) == 0
    model = vision_model("LlavaForConditionalGeneration")
    text = {id(p): p.numel() for part in (model.get_decoder(), model.lm_head) for p in part.parameters()}
    others = sum(p.numel() for p in model.parameters()) - sum(text.values())
    printed = capsys.readouterr().out
    assert f"{others:,} weights of LlavaForConditionalGeneration serve images or sound" in printed
    assert f"{sum(text.values()):,} parameters are trained, {others:,} frozen" in printed


@pytest.mark.parametrize("dry_run", [False, True])
def test_tensors_that_the_class_does_not_have_are_named_before_training(
    dry_run: bool, make_model: Make, make_config: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    more = {f"mtp.{name}.weight": torch.zeros(2) for name in "abcde"}
    computed = {"transformer.h.0.attn.bias": torch.ones(4)}  # a mask that old versions saved
    save_file({**tensors, **more, **computed}, folder / "model.safetensors", {"format": "pt"})
    train(make_config(model=str(folder), max_steps=1, dry_run=dry_run), tokenizer=tokenizer, train_dataset=rows)
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert f"5 of the checkpoint's {len(tensors) + 6} tensors are no part of GPT2LMHeadModel" in said
    assert "mtp.a.weight, mtp.b.weight, mtp.c.weight and 2 more" in said


def test_the_text_part_of_a_vision_checkpoint_given_as_an_object_is_told_what_it_loses(
    vision: Callable[[str], Path],
) -> None:
    source = vision("Qwen3_5ForConditionalGeneration")
    names = load_file(source / "model.safetensors").keys()
    lost = sum(name.startswith("model.visual.") for name in names)
    part = AutoModelForCausalLM.from_pretrained(source)
    assert type(part).__name__ == "Qwen3_5ForCausalLM"
    assert unsaved(part)[0].startswith(f"{lost} of the checkpoint's {len(names)} tensors are no part of")
    assert unsaved(transformers.Qwen3_5ForConditionalGeneration.from_pretrained(source)) == []


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_checkpoint_without_all_weights_is_refused_with_their_names(
    dry_run: bool, make_config: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A reward model's: its language model head would be random."""
    config = transformers.LlamaConfig(**TEXT)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    config = make_config(model=str(tmp_path / "reward"), dry_run=dry_run)
    with pytest.raises(ValueError, match=r"it lacks lm_head.weight of LlamaForCausalLM, which would be random"):
        train(config, tokenizer=tokenizer, train_dataset=rows)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_masked_language_model_is_refused(
    dry_run: bool, make_config: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    config = make_config(model=str(tmp_path / "bert"), dry_run=dry_run)
    with pytest.raises(ValueError, match="BertForMaskedLM does not predict the next token") as error:
        train(config, tokenizer=tokenizer, train_dataset=rows)
    assert len(str(error.value)) < 300


def test_a_model_object_that_looks_at_later_tokens_is_refused(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT)
    with pytest.raises(ValueError, match="BertLMHeadModel looks at later tokens"):
        train(make_config(), model=transformers.BertLMHeadModel(config), tokenizer=tokenizer, train_dataset=rows)
    config.is_decoder = True
    check_causal(transformers.BertLMHeadModel(config))
    model = make_model().train()
    check_causal(model)
    assert model.training


def test_an_encoder_decoder_object_is_refused(make_config: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    config = transformers.T5Config(vocab_size=302, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder: take a causal"):
        train(make_config(), model=model, tokenizer=tokenizer, train_dataset=rows)


def test_an_encoder_decoder_is_refused_in_one_short_line(
    make_config: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = transformers.T5Config(vocab_size=302, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="T5ForConditionalGeneration does not predict the next token") as error:
        train(make_config(model=str(tmp_path / "t5")), tokenizer=tokenizer, train_dataset=rows)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_tokenizer_may_have_tokens_that_no_text_becomes(
    layout: str, make_model: Make, make_config: Make, make_tokenizer: Make, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Gemma 3 1B and Code Llama ship one more than the model has embeddings; padding with such a token is avoided."""
    results = []
    for name, more in (("own", {}), ("longer", {"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})):
        tokenizer = make_tokenizer(**more)
        assert (len(tokenizer) > 300) == bool(more)
        config = make_config(layout=layout, output_dir=str(tmp_path / name))
        model = make_model(vocab_size=300)
        results.append(train(config, model=model, tokenizer=tokenizer, train_dataset=rows).history[-1]["loss"])
    assert results[0] == results[1]


def test_a_token_of_the_data_without_an_embedding_is_named_with_its_row(
    make_model: Make, make_config: Make, make_tokenizer: Make, rows: list[dict[str, Any]]
) -> None:
    tokenizer = make_tokenizer(additional_special_tokens=["<image>"])
    rows[5]["chosen"] += "<image>"
    message = r"row 5 of the data has token 300 \('<image>'\), and the model has embeddings of 300 tokens"
    with pytest.raises(ValueError, match=message):
        train(make_config(), model=make_model(vocab_size=300), tokenizer=tokenizer, train_dataset=rows)


def test_an_adapter_of_a_vision_language_model_loads_as_the_line_says(
    vision: Callable[[str], Path], make_config: Make, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    source = vision("Qwen3_5ForConditionalGeneration")
    config = make_config(model=str(source), lora_rank=2, lora_target_modules="q_proj", learning_rate=0.1)
    result = train(config, train_dataset=rows)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "to merge it (with PEFT): " in line]
    load = line.split("to merge it (with PEFT): ")[1].split(".merge_and_unload()")[0]
    names = {"PeftModel": peft.PeftModel, "Qwen3_5ForConditionalGeneration": type(result.model.get_base_model())}
    loaded = eval(load, names)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, result.model(input_ids=ids).logits)


CODE = """
from transformers import GPT2Config, GPT2LMHeadModel
class OwnConfig(GPT2Config):
    model_type = "own_gpt"
class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def test_code_of_a_checkpoint_runs_only_on_request_and_is_saved_with_the_model(
    make_model: Make, tokenizer: Any, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "own"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE, encoding="utf-8")
    values = json.loads((folder / "config.json").read_text("utf-8"))
    values |= {"model_type": "own_gpt", "architectures": ["OwnModel"]}
    values["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    command = ["train", f"--model={folder}", f"--dataset={pairs}", f"--output_dir={tmp_path / 'run'}"]
    command += ["--max_length=64", "--max_steps=1", "--no_progress"]
    assert main(command) == 2
    assert "it brings code of its own: read that, and set trust_remote_code to run it" in capsys.readouterr().err
    assert main([*command, "--trust_remote_code"]) == 0
    assert (tmp_path / "run" / "model" / "modeling_own.py").is_file()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("reference_cache", "dangling", "is a link to nothing"),
        ("reference_cache", "dangling/cache", "is a link to nothing"),
        ("reference_cache", "pairs.jsonl", "is a file"),
        ("resume", "nowhere", "resume: 'nowhere' is not a checkpoint folder"),
        ("resume", "latest", "resume: there is no checkpoint in run"),
    ],
)
def test_a_path_that_is_none_is_refused_before_data_or_model_are_read(
    option: str, value: str, message: str, dry_run: bool, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dangling").symlink_to("missing")
    config = TrainConfig(model="missing", dataset="missing", output_dir="run", dry_run=dry_run, **{option: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config)
    assert not Path("run").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no folder that seems writable and is not")
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("option", ["output_dir", "reference_cache"])
def test_a_folder_that_cannot_be_made_is_refused_alike_with_a_dry_run(
    option: str, dry_run: bool, pairs: Path, tmp_path: Path
) -> None:
    options = {"output_dir": str(tmp_path / "run"), option: "/proc/fastpref"}
    with pytest.raises((FolderError, ValueError), match=f"{option}.'/proc/fastpref' cannot be"):
        train(TrainConfig(model="missing", dataset=str(pairs), dry_run=dry_run, **options))
