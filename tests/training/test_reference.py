"""The reference's log-probs: whose they are, when they are computed, and when they are taken from the cache."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

import fastpref
from fastpref.training import with_reference
from fastpref.training.checkpoints.save import ResumeError
from fastpref.training.data.tokens import Pair
from fastpref.training.prepare import prepare
from fastpref.training.reference import scores as reference
from fastpref.training.reference.cache import model_digest
from fastpref.training.reference.scores import add_reference
from fastpref.training.run import Run

Make = Callable[..., Any]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches of the passes over the data that a test makes."""
    batches: list[Any] = []
    compute = reference.log_probs

    def spy(*args: Any) -> Any:
        assert not torch.is_grad_enabled()
        batch, policy = compute(*args)
        batches.append(batch)
        return batch, policy

    monkeypatch.setattr(reference, "log_probs", spy)
    return batches


@pytest.fixture
def make_run(make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]) -> Make:
    """A prepared run over all 13 rows, without its reference."""

    def make(
        model: Any = None, data: Any = None, held_out: Any = None, resumed: dict[str, Any] | None = None, **options: Any
    ) -> Run:
        run = prepare(
            make_config(**{"max_steps": 13, **options}),
            model=make_model() if model is None else model,
            tokenizer=tokenizer,
            train_dataset=rows if data is None else data,
            eval_dataset=held_out,
        )
        return dataclasses.replace(run, **(resumed or {}))

    return make


@pytest.fixture
def reference_of(make_run: Make) -> Make:
    """The log-probs (N, 2) of a run's pairs, after the digest of what gave them."""

    def run(*args: Any, **options: Any) -> tuple[str | None, list[tuple[float | None, float | None]]]:
        made = make_run(*args, **options)
        try:
            weights = add_reference(made)
        finally:
            made.release()
        return weights, logps_of([*made.pairs, *made.eval_pairs])

    return run


def logps_of(pairs: list[Pair]) -> list[tuple[float | None, float | None]]:
    return [(pair.ref_chosen_logp, pair.ref_rejected_logp) for pair in pairs]


def rows_of(batches: list[Any]) -> list[int]:
    return [row for batch in batches for row in batch.rows]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("reference log-probs")]


def digest_of(model: Any) -> str:
    return model_digest(model, model.state_dict().items())


# The pass


def test_the_values_are_the_initial_models(make_run: Make, make_model: Make) -> None:
    run = make_run(held_out=[{"prompt": "ask", "chosen": " again", "rejected": " the sky"}])
    add_reference(run)
    model = make_model().double().eval()
    for pair in (*run.pairs, *run.eval_pairs):
        for response, found in ((pair.chosen, pair.ref_chosen_logp), (pair.rejected, pair.ref_rejected_logp)):
            ids = torch.from_numpy(response.ids).long()[None]
            labels = ids.clone()
            labels[:, : response.start] = -100
            with torch.no_grad():
                truth = fastpref.reference.sequence_logps(model(ids).logits, labels).item()
            assert found == pytest.approx(truth, rel=2e-6)


def test_the_pass_keeps_no_graph_takes_the_longest_first_and_leaves_the_model_as_it_was(
    make_run: Make, make_model: Make, seen: list[Any]
) -> None:
    model = make_model()
    model.transformer.wte.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = make_run(model.train(), batch_size=1)
    add_reference(run)
    lengths = [max(run.pairs[row].length for row in batch.rows) for batch in seen]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(rows_of(seen)) == list(range(13))
    assert model.training
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"transformer.wte.weight"}
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 3, "layout": "padded"}, {"batch_tokens": 60}])
def test_a_batch_holds_no_more_than_the_documented_multiple_of_a_micro_batch(
    make_run: Make, seen: list[Any], options: dict[str, Any]
) -> None:
    run = make_run(**options)
    add_reference(run)
    sizes = run.layout.sizes(run.pairs)
    size = run.config.batch_size
    longest = sizes.longest_first(range(13))
    largest = max(sizes.of(longest[begin : begin + size]) for begin in range(0, 13, size))
    room = 2 * min(largest, run.config.batch_tokens or largest)
    assert all(len(batch.rows) <= 4 * size for batch in seen)
    assert all(sizes.of(batch.rows) <= room for batch in seen)
    assert max(len(batch.rows) for batch in seen) > (size if run.config.batch_tokens is None else 1)


def test_rows_that_are_the_same_are_computed_once(
    reference_of: Make, rows: list[dict[str, Any]], seen: list[Any]
) -> None:
    _, logps = reference_of(data=[*rows[:3], *rows[:3]], held_out=rows[2:3])
    assert sorted(rows_of(seen)) == [0, 1, 2]
    assert logps[:3] == logps[3:6]
    assert logps[6] == logps[2]


def test_only_the_pairs_that_the_run_uses_are_computed(
    reference_of: Make, rows: list[dict[str, Any]], seen: list[Any]
) -> None:
    """Three steps of two pairs out of thirteen, and the held-out ones."""
    held_out = [{**row, "chosen": " ask again"} for row in rows[:5]]
    _, logps = reference_of(held_out=held_out, max_steps=3, batch_size=2)
    assert len(rows_of(seen)) == 6 + 5
    assert sum(values != (None, None) for values in logps) == 6 + 5


def test_a_loss_without_reference_computes_nothing_and_takes_no_reference_model(
    reference_of: Make, seen: list[Any], tmp_path: Path
) -> None:
    weights, logps = reference_of(loss="simpo")
    assert (weights, seen, set(logps)) == (None, [], {(None, None)})
    assert not list((tmp_path / "run").glob("reference*"))
    with pytest.raises(ValueError, match="loss 'simpo' has no reference: leave out reference_model='other'"):
        reference_of(loss="simpo", reference_model="other")


# What is found again


def test_a_second_run_computes_nothing_and_has_the_same_bits(
    reference_of: Make, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = reference_of()
    seen.clear()
    assert reference_of() == first
    assert seen == []
    assert said(capsys) == []


def test_runs_share_a_cache_folder(reference_of: Make, seen: list[Any], tmp_path: Path) -> None:
    shared = str(tmp_path / "cache")
    first = reference_of(reference_cache=shared, output_dir=str(tmp_path / "one"))
    seen.clear()
    # Nothing of how a run trains or lays out its batches changes its reference.
    options = {"learning_rate": 0.5, "seed": 3, "gradient_checkpointing": True, "layout": "padded"}
    assert reference_of(reference_cache=shared, output_dir=str(tmp_path / "two"), **options) == first
    assert seen == []
    assert not list((tmp_path / "two").glob("reference*"))


def test_a_cache_that_is_a_file_is_refused_before_anything_is_computed(
    reference_of: Make, seen: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match=r"reference_cache must be a folder, or the name of a new one; '.*cache' is a"):
        reference_of(reference_cache=str(tmp_path / "cache"))
    assert seen == []


def test_an_interrupted_pass_goes_on_where_it_stopped(
    reference_of: Make,
    seen: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    whole = reference_of(batch_size=1, output_dir=str(tmp_path / "whole"))
    seen.clear()
    counted = reference.log_probs

    def stopping(*args: Any, **options: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        return counted(*args, **options)

    monkeypatch.setattr(reference, "log_probs", stopping)
    with pytest.raises(KeyboardInterrupt):
        reference_of(batch_size=1)
    done = rows_of(seen)
    assert 2 <= len(done) < 13
    monkeypatch.setattr(reference, "log_probs", counted)
    seen.clear()
    assert reference_of(batch_size=1) == whole
    assert sorted(rows_of(seen) + done) == list(range(13))
    assert said(capsys) == [
        f"reference log-probs: {len(done)} of 13 pairs are in the cache, {13 - len(done)} to compute"
    ]


def test_a_resumed_run_uses_what_it_stored_and_takes_it_along_to_another_folder(
    reference_of: Make, make_model: Make, seen: list[Any], tmp_path: Path
) -> None:
    weights, logps = reference_of()
    trained = make_model()
    with torch.no_grad():
        trained.lm_head.weight.add_(0.1)
    seen.clear()
    resumed = {"checkpoint": tmp_path / "run" / "checkpoint-3", "state": {"initial_weights": weights}}
    other = {"resumed": resumed, "output_dir": str(tmp_path / "other")}
    assert reference_of(trained, **other) == (weights, logps)
    for path in (tmp_path / "run").glob("reference-*"):
        path.unlink()
    assert reference_of(trained, **other) == (weights, logps)
    assert seen == []


def test_a_resumed_run_computes_what_is_gone_from_its_own_reference_and_from_no_other(
    reference_of: Make, make_model: Make, seen: list[Any], tmp_path: Path
) -> None:
    weights, logps = reference_of()
    for path in (tmp_path / "run").glob("reference-*"):
        path.unlink()
    seen.clear()
    resumed = {"checkpoint": tmp_path / "run" / "checkpoint-3", "state": {"initial_weights": weights}}
    trained = make_model()
    with torch.no_grad():
        trained.lm_head.weight.add_(0.1)
    with pytest.raises(ResumeError, match="the model given is not the one it started from: give the initial model"):
        reference_of(trained, resumed=resumed)
    assert seen == []
    assert reference_of(resumed=resumed) == (weights, logps)
    assert len(rows_of(seen)) == 13


# What is not


def changed_model(make_model: Make) -> Any:
    model = make_model()
    with torch.no_grad():
        model.transformer.h[1].ln_1.bias[3] += 1e-3
    return model


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"loss": "ipo"}, "of another run, with reduction=sum (not mean)"),
        ({"logps": "logits"}, "of another run, with logps=linear (not logits)"),
        ({"model": changed_model}, "of another run, with other weights or another model config"),
        ({"data": [{"prompt": "ask", "chosen": " again", "rejected": " the"}]}, "of another run, with other data"),
    ],
)
def test_a_stale_cache_is_computed_again_and_a_line_says_what_differs(
    reference_of: Make,
    make_model: Make,
    seen: list[Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    change: dict[str, Any],
    line: str,
) -> None:
    reference_of()
    options = {name: value(make_model) if callable(value) else value for name, value in change.items()}
    expected = reference_of(**options, output_dir=str(tmp_path / "fresh"))
    seen.clear()
    capsys.readouterr()
    assert reference_of(**options) == expected
    assert len(rows_of(seen)) == len(expected[1])
    assert said(capsys) == [f"reference log-probs are computed: those in {tmp_path / 'run'} are {line}"]


def test_bfloat16_has_a_cache_of_its_own(
    reference_of: Make, seen: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where autocast does something, that is; elsewhere it is float32 and may be taken as such."""
    reference_of()
    seen.clear()
    monkeypatch.setattr("fastpref.training.precision.multiplies_bf16_faster", lambda device: False)
    reference_of(precision="bf16")
    assert seen == []
    monkeypatch.setattr("fastpref.training.precision.multiplies_bf16_faster", lambda device: True)
    reference_of(precision="bf16")
    assert len(rows_of(seen)) == 13
    assert "with precision=fp32 (not bf16)" in said(capsys)[0]


def test_pairs_that_another_max_length_leaves_as_they_are_are_found(
    make_run: Make, reference_of: Make, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    limit = sorted(pair.length for pair in make_run().pairs)[6]
    _, logps = reference_of(max_length=64)
    seen.clear()
    _, cut = reference_of(max_length=limit)
    computed = rows_of(seen)
    assert 0 < len(computed) < 13
    assert [row for row in range(13) if logps[row] != cut[row]] == sorted(computed)
    assert said(capsys) == [
        f"reference log-probs: {13 - len(computed)} of 13 pairs are in the cache, {len(computed)} to compute; "
        f"it was written with max_length=64 (not {limit})"
    ]


def test_another_tokenizer_and_another_template_are_named(
    make_config: Make, make_model: Make, make_tokenizer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "the sky?"}]
    rows = [{"prompt": turns, "chosen": [answer("blue")], "rejected": [answer("green")]}]

    def run(**options: Any) -> list[str]:
        config = make_config(**{"chat_template": TEMPLATE, **options})
        run = prepare(config, model=make_model(), tokenizer=make_tokenizer(bos="<s>"), train_dataset=rows)
        add_reference(run)
        return said(capsys)

    assert run() == []
    assert run(chat_template=TEMPLATE.replace("::", ";"))[0].endswith("of another run, with another chat template")
    other = make_tokenizer(bos="<s>", additional_special_tokens=["<pad>"])
    config = make_config(chat_template=TEMPLATE.replace("::", "!"))
    add_reference(prepare(config, model=make_model(), tokenizer=other, train_dataset=rows))
    assert said(capsys)[0].endswith("of another run, with another tokenizer, another chat template")


TEMPLATE = "{% for message in messages %}{{ message.role }}::{{ message.content }} {% endfor %}"


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# Damage


def test_damage_in_a_runs_cache_is_computed_again(
    reference_of: Make, seen: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    expected = reference_of()
    (path,) = (tmp_path / "run").glob("reference-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    lost = json.loads(lines[6])["row"]
    path.write_text("".join([*lines[:6], lines[6].replace("ref_chosen_logps", "ref_chosen_logp"), *lines[7:]]))
    seen.clear()
    assert reference_of() == expected
    assert rows_of(seen) == [lost]
    assert said(capsys) == [
        f"reference log-probs: 1 damaged line of {path} not used (1 with a wrong checksum)",
        "reference log-probs: 12 of 13 pairs are in the cache, 1 to compute",
    ]
    seen.clear()
    assert reference_of() == expected
    assert (seen, said(capsys)) == ([], [])  # what was lost is there again
    path.write_text("{" + path.read_text())
    seen.clear()
    assert reference_of() == expected
    assert len(rows_of(seen)) == 13
    assert "the first line of" in said(capsys)[0]
    assert path.with_name(path.name + ".damaged").exists()
    seen.clear()
    assert reference_of() == expected
    assert seen == []
    assert said(capsys) == []


# Which model it is


def test_the_digest_is_of_weights_and_of_what_the_config_does_with_them(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    first = digest_of(model)
    model.save_pretrained(tmp_path)
    assert digest_of(type(model).from_pretrained(tmp_path)) == first
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    assert digest_of(model.train()) == first
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nextafter(model.lm_head.weight[0, 0], torch.tensor(9.0))
    assert digest_of(model) != first
    assert digest_of(make_model().bfloat16()) != first
    assert digest_of(make_model(activation_function="relu")) != first


def test_the_same_weights_with_another_rotary_scaling_are_another_model() -> None:
    shape = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}

    def build(theta: float) -> str:
        torch.manual_seed(0)
        rope = {"rope_type": "default", "rope_theta": theta}
        return digest_of(LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, rope_parameters=rope)))

    assert build(1e4) == build(1e4) != build(1e6)


def test_weights_are_hashed_in_parts_and_shown(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.console import Console
    from fastpref.training.reference import cache as reference_key

    model, bars, console = make_model(n_embd=64, vocab_size=20_000), [], Console(progress=False)
    whole = digest_of(model)

    @contextmanager
    def shown(title: str, total: int) -> Any:
        with console.bar(title, total) as bar:
            yield bar
            bars.append(str(bar))

    monkeypatch.setattr(reference_key, "CHUNK", 100_000)
    monkeypatch.setattr(reference_key, "BAR_FROM", 1 << 20)
    assert model_digest(model, model.state_dict().items(), bar=shown) == whole
    assert len(bars) == 1
    assert "(100%)" in bars[0]
    monkeypatch.setattr(reference_key, "BAR_FROM", 1 << 40)
    assert model_digest(model, model.state_dict().items(), bar=shown) == whole
    assert len(bars) == 1


@pytest.mark.slow
def test_a_reference_model_of_its_own_is_used_and_then_freed(
    reference_of: Make,
    make_model: Make,
    tokenizer: Any,
    seen: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    other = make_model(n_layer=1)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    expected = reference_of(other, output_dir=str(tmp_path / "as policy"))
    loaded: list[Any] = []
    load = reference._load

    def spy(run: Any) -> Any:
        model = load(run)
        loaded.extend([weakref.ref(model), *map(weakref.ref, model.parameters())])
        return model

    monkeypatch.setattr(reference, "_load", spy)
    gc.disable()  # nor may it take a collection that happens to come
    try:
        assert reference_of(reference_model=str(tmp_path / "other")) == expected
        assert len(loaded) > 10
        assert all(ref() is None for ref in loaded)
    finally:
        gc.enable()
    assert reference_of() != expected
    seen.clear()
    assert reference_of(reference_model=str(tmp_path / "other")) == expected
    assert seen == []


@pytest.mark.slow
def test_loading_a_reference_model_draws_no_random_number(
    make_run: Make, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "other")
    run = make_run(reference_model=str(tmp_path / "other"))
    before = torch.get_rng_state()
    add_reference(run)
    assert torch.equal(before, torch.get_rng_state())


def test_a_reference_model_that_does_not_fit_is_refused_by_name(
    reference_of: Make, make_model: Make, make_tokenizer: Make, tmp_path: Path
) -> None:
    def message(name: str) -> str:
        with pytest.raises((ValueError, OSError)) as raised:
            reference_of(reference_model=str(tmp_path / name))
        return str(raised.value)

    make_model(vocab_size=100).save_pretrained(tmp_path / "small")
    make_model(n_positions=32).save_pretrained(tmp_path / "short")
    make_model().save_pretrained(tmp_path / "foreign")
    foreign = make_tokenizer()
    foreign.add_tokens(["<new>"])
    vocabulary = json.loads(foreign.backend_tokenizer.to_str())
    swapped = vocabulary["model"]["vocab"]
    swapped["a"], swapped["b"] = swapped["b"], swapped["a"]
    make_tokenizer().save_pretrained(tmp_path / "foreign")
    (tmp_path / "foreign" / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "embeddings of 100 tokens" in message("small")
    assert "max_length=64 is beyond the model's 32 positions" in message("short")
    assert "another vocabulary than the run's tokenizer ('a' is" in message("foreign")
    assert message("none") == f"reference_model: there is no folder {str(tmp_path / 'none')!r}"
    for name in ("small", "short", "foreign"):
        assert message(name).startswith(f"reference_model={str(tmp_path / name)!r}: ")


def test_a_resumed_run_has_the_reference_model_of_its_start() -> None:
    from fastpref.training.run import FIXED_ON_RESUME

    assert "reference_model" in FIXED_ON_RESUME


def lora_policy(make_model: Make, *, fresh: bool = False, modules_to_save: list[str] | None = None) -> Any:
    """Frozen in part, and unless fresh with a B that is not zero; a head that is trained as a whole has moved."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "init_lora_weights": fresh}
    model = make_model(tie_word_embeddings=False)
    policy = peft.get_peft_model(model, peft.LoraConfig(r=2, modules_to_save=modules_to_save, **options))
    if modules_to_save:
        with torch.no_grad():
            policy.get_output_embeddings().weight.add_(0.5)
    next(p for name, p in policy.named_parameters() if "lora_A" in name).requires_grad_(False)
    return policy


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_a_policy_with_an_adapter_is_the_reference_as_it_came(
    reference_of: Make, make_model: Make, seen: list[Any], tmp_path: Path, modules_to_save: list[str] | None
) -> None:
    """Under a key of its own; and afterwards what was trained before is trained, and nothing else."""
    base = reference_of(make_model(tie_word_embeddings=False))
    policy = lora_policy(make_model, modules_to_save=modules_to_save)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    ids = torch.arange(9)[None]
    adapted = policy.eval()(ids).logits
    seen.clear()
    found = reference_of(policy)
    assert sorted(rows_of(seen)) == list(range(13))
    assert found[0] != base[0]
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
    assert torch.equal(policy.eval()(ids).logits, adapted)
    if not modules_to_save:
        merged = reference_of(policy.merge_and_unload().requires_grad_(True), output_dir=str(tmp_path / "merged"))
        assert torch.tensor(found[1]).numpy() == pytest.approx(torch.tensor(merged[1]).numpy(), rel=1e-4)


def test_a_fresh_adapter_is_found_under_the_bases_own_key(
    reference_of: Make, make_model: Make, seen: list[Any]
) -> None:
    expected = reference_of(make_model(tie_word_embeddings=False))
    seen.clear()
    assert reference_of(lora_policy(make_model, fresh=True)) == expected
    assert reference_of(make_model(tie_word_embeddings=False), lora_rank=3) == expected
    assert seen == []


def test_the_digest_is_of_the_active_adapter_and_of_how_it_is_scaled(make_model: Make) -> None:
    policy = lora_policy(make_model)
    first = digest_of(policy)
    policy.add_adapter("other", copy.deepcopy(policy.peft_config["default"]))
    assert digest_of(policy) == first  # it is not the active one
    policy.set_adapter("other")
    other = digest_of(policy)
    assert other != first
    policy.peft_config["other"].lora_alpha = 99
    assert digest_of(policy) not in (first, other)
    policy.set_adapter("default")
    policy.peft_config["default"].base_model_name_or_path = "elsewhere"
    assert digest_of(policy) == first
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if "lora_B.default" in name)[0, 0] += 1e-3
    assert digest_of(policy) != first


def test_an_adapter_that_transformers_added_counts_too(reference_of: Make, make_model: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    base = reference_of()
    policy = make_model()
    try:  # transformers may ask for a newer PEFT than the one installed
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"{error}; PEFT {peft.__version__} is installed")
    policy.add_adapter(peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
    found = reference_of(policy, output_dir=str(tmp_path / "fresh"))
    assert found[0] != base[0]
    assert found[1] != base[1]


# Columns


def test_columns_of_the_dataset_are_taken_as_they_are(
    reference_of: Make, rows: list[dict[str, Any]], seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{**row, "ref_chosen_logps": -7.0 - n, "ref_rejected_logps": -9.5} for n, row in enumerate(rows)]
    held_out = [{**rows[0], "prompt": "ask"}]
    weights, logps = reference_of(data=given, held_out=held_out)
    assert logps[:13] == [(-7.0 - n, -9.5) for n in range(13)]
    assert (len(rows_of(seen)), weights is None) == (1, False)  # the held-out row has none
    assert said(capsys)[0].startswith("reference log-probs are taken from the dataset's columns; they must be the sum")
    with pytest.raises(ValueError, match="reference_model='other' would not be used: the dataset has the columns"):
        reference_of(data=given, reference_model="other")


def test_a_list_gets_the_columns_that_training_used(
    make_config: Make, make_model: Make, make_run: Make, tokenizer: Any, rows: list[dict[str, Any]], seen: list[Any]
) -> None:
    """Also after the run: nothing is computed again. A row without room for its responses is left out."""
    data = [*rows[:4], {**rows[4], "prompt": "the sky is blue" * 40}, *rows[5:]]
    run = make_run(data=data)
    add_reference(run)
    (run.output_dir / "checkpoint-4").mkdir()
    run.release()
    seen.clear()
    found = with_reference(
        make_config(eval_fraction=0.5, max_steps=1), model=make_model(), tokenizer=tokenizer, train_dataset=data
    )
    assert seen == []
    assert [{k: v for k, v in row.items() if not k.startswith("ref_")} for row in found] == data[:4] + data[5:]
    assert [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in found] == logps_of(run.pairs)
    again = make_run(data=found)
    add_reference(again)
    assert logps_of(again.pairs) == logps_of(run.pairs)
    assert "ref_chosen_logps" not in data[0]


def test_a_dataset_gets_the_columns_that_training_used(
    make_config: Make, make_model: Make, make_run: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    data = datasets.Dataset.from_list(rows)
    found = with_reference(make_config(), model=make_model(), tokenizer=tokenizer, train_dataset=data)
    run = make_run(data=data)
    add_reference(run)
    assert isinstance(found, datasets.Dataset)
    assert found.column_names == ["prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps"]
    assert list(zip(found["ref_chosen_logps"], found["ref_rejected_logps"], strict=True)) == logps_of(run.pairs)
    assert {str(found.features[name].dtype) for name in found.column_names[3:]} == {"float32"}
    same = with_reference(make_config(), model=make_model(), tokenizer=tokenizer, train_dataset=found)
    assert same.to_list() == found.to_list()


def test_a_model_that_is_given_for_the_columns_stays_as_it_is(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    model = make_model()
    before = (repr(model), model.config._attn_implementation, model.training, list(model.state_dict()))
    config = make_config(lora_rank=2, lora_alpha=3.0, gradient_checkpointing=True)
    found = with_reference(config, model=model, tokenizer=tokenizer, train_dataset=rows)
    assert len(found) == 13
    assert (repr(model), model.config._attn_implementation, model.training, list(model.state_dict())) == before
    assert "Dropout(p=0.1" in before[0]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_file_named_in_the_config_gets_columns_too(
    make_config: Make, make_model: Make, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(dataset=str(tmp_path / "data.jsonl"))
    found = with_reference(config, model=make_model(), tokenizer=tokenizer)
    given = with_reference(make_config(), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    assert found == given
    with pytest.raises(ValueError, match="loss 'simpo' needs no reference: there are no log-probs to add"):
        with_reference(make_config(loss="simpo"), model=make_model(), tokenizer=tokenizer, train_dataset=rows)
    with pytest.raises(ValueError, match=r"config\.dataset and the argument train_dataset were both given"):
        with_reference(config, model=make_model(), tokenizer=tokenizer, train_dataset=rows)
