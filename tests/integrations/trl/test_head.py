"""add_fast_head beside TRL's add_fused_lm_head: the same outputs for every batch, in one row where that can be."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from fastpref.extras import EXTRAS
from fastpref.integrations.trl import add_fast_head
from fastpref.integrations.trl.head import say
from fastpref.models.segments import NAME

Make = Callable[..., Any]
Inputs = dict[str, Any]
OUTPUTS = ("log_probs", *EXTRAS)
FIELDS = ("loss", "log_probs", "label_mask", "aux_loss", *EXTRAS)


@pytest.fixture(autouse=True)
def say_anew() -> Iterator[None]:
    say.cache_clear()
    yield
    say.cache_clear()


def batch() -> Inputs:
    """Two pairs with common prompts, of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(8)
    input_ids = torch.randint(1, 24, (4, 9), generator=generator)
    input_ids[2, :4], input_ids[3, :5] = input_ids[0, :4], input_ids[1, :5]
    mask, labels = torch.ones_like(input_ids), input_ids.clone()
    for row, (start, end) in enumerate([(3, 9), (5, 8), (3, 7), (5, 6)]):
        mask[row, end:] = input_ids[row, end:] = 0
        labels[row, :start] = labels[row, end:] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def hole(inputs: Inputs) -> None:
    inputs["labels"][0, 5] = -100


def nothing_scored(inputs: Inputs) -> None:
    inputs["labels"][:] = -100


def one_row_empty(inputs: Inputs) -> None:
    inputs["labels"][3] = -100


def no_mask(inputs: Inputs) -> None:
    del inputs["attention_mask"]


def items(inputs: Inputs) -> None:
    inputs["num_items_in_batch"] = 5


def first_token_scored(inputs: Inputs) -> None:
    inputs["labels"][0] = inputs["input_ids"][0]


def odd(inputs: Inputs) -> None:
    for name in ("input_ids", "attention_mask", "labels"):
        inputs[name] = inputs[name][:3]


def gaps(inputs: Inputs) -> None:
    inputs["attention_mask"][0, 1] = 0


def other_labels(inputs: Inputs) -> None:
    inputs["labels"][0, 5] = 1 + inputs["labels"][0, 5] % 23


def padding_scored(inputs: Inputs) -> None:
    inputs["labels"][3, 6] = 0


def positions(inputs: Inputs) -> None:
    inputs["position_ids"] = torch.arange(9).expand(4, -1) + 2


def aligned(inputs: Inputs) -> None:
    inputs["shift_labels"] = inputs.pop("labels").roll(-1, 1)


def aligned_and_nothing_scored(inputs: Inputs) -> None:
    inputs["shift_labels"] = torch.full_like(inputs.pop("labels"), -100)


def compare(model: Any, inputs: Inputs, *, max_length: int | None = None, **options: Any) -> Any:
    """Outputs and gradients of both heads; gives back the model with ours."""
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    add_fused_lm_head(theirs, outputs=OUTPUTS, **options)
    add_fast_head(ours, outputs=OUTPUTS, max_length=max_length, **options)
    expected, found = (m(**inputs, fused_lm_head=True, use_cache=False) for m in (theirs, ours))
    assert isinstance(found, FusedCausalLMOutput)
    for name in FIELDS:
        values = [getattr(output, name) for output in (found, expected)]
        if values[1] is None:
            assert values[0] is None
            continue
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=2e-5)
    weights = torch.rand(expected.log_probs.shape, generator=torch.Generator().manual_seed(1))
    for output in (expected, found):
        (output.loss + (weights * output.log_probs).sum()).backward()
    for (name, x), (_, y) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4, msg=name)
    return ours


@pytest.mark.parametrize("change", [None, hole, one_row_empty, no_mask, items, first_token_scored])
def test_batches_that_go_into_one_row(change: Any, make_llama: Make, caplog: pytest.LogCaptureFixture) -> None:
    inputs = batch()
    if change is not None:
        change(inputs)
    if change is no_mask:
        inputs["labels"] = inputs["input_ids"].clone()
    model = compare(make_llama(), inputs)
    assert model.config._attn_implementation == NAME
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (odd, "a batch does not hold pairs of sequences"),
        (gaps, "a batch's attention_mask has gaps"),
        (other_labels, "a batch's labels are other tokens than its inputs"),
        (padding_scored, "a batch's labels are other tokens than its inputs"),
        (positions, "a batch has position_ids"),
        (nothing_scored, "in a batch nothing is scored"),
        (aligned, None),
        (aligned_and_nothing_scored, None),
    ],
)
def test_batches_that_stay_as_they_are_and_why(
    change: Any, reason: str | None, make_llama: Make, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = batch()
    change(inputs)
    model = compare(make_llama(), inputs)
    assert model.config._attn_implementation == "sdpa"
    model(**inputs, fused_lm_head=True)
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if reason is None else [f"layout=shared is not possible: {reason}. Rows are padded"])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None, "head_dim": 8}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.3}),
    ],
)
def test_what_a_family_does_to_its_logits(kind: str, changes: Any, make_llama: Make) -> None:
    torch.manual_seed(1)
    shape = {**make_llama().config.to_dict(), **changes}
    for name in ("model_type", "architectures", "transformers_version", "dtype", "head_dim"):
        if name not in changes:
            shape.pop(name, None)
    compare(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)), batch(), temperature=0.7)


def test_a_model_that_cannot_share_rows_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    shape = {"n_layer": 2, "hidden_size": 16, "n_head": 2, "vocab_size": 24}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **shape))
    compare(model, batch())
    add_fast_head(copy.deepcopy(model))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "BloomForCausalLM cannot be given several sequences in a row" in record.getMessage()


def test_a_window_shorter_than_the_longest_sequence_keeps_rows_apart(caplog: pytest.LogCaptureFixture) -> None:
    shape = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **shape, **heads))
    add_fast_head(model, max_length=17)
    assert "window" in caplog.records[0].getMessage()
    add_fast_head(model, max_length=16)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "limit",
    [
        {"sliding_window": 12},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 12},
    ],
    ids=["window", "rotary"],
)
def test_a_batch_longer_than_was_said_stays_as_it_is_where_that_matters(
    limit: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As a collator of one's own makes it, that does not truncate."""
    torch.manual_seed(3)
    shape = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **{**shape, **heads, **limit}))
    before = {
        "input_ids": torch.full((4, 6), 3),
        "attention_mask": torch.ones(4, 6),
        "labels": torch.full((4, 6), -100),
    }
    longer = {name: torch.cat([before[name].long(), value], dim=1) for name, value in batch().items()}
    ours = compare(model, longer, max_length=12)
    assert ours.config._attn_implementation == "sdpa"
    assert "a batch is longer than 12 tokens" in caplog.records[0].getMessage()
    ours(**batch(), fused_lm_head=True)
    assert ours.config._attn_implementation == NAME


def test_only_what_was_asked_for_is_computed(make_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.integrations.trl import head

    asked = []
    real = head.model_token_logps
    monkeypatch.setattr(
        head, "model_token_logps", lambda *a, **options: (asked.append(options["extras"]), real(*a, **options))[1]
    )
    for outputs in (("log_probs",), ("log_probs", "entropy")):
        model = make_llama()
        add_fast_head(model, outputs=outputs)
        found = model(**batch(), fused_lm_head=True)
        assert [name for name in EXTRAS if getattr(found, name) is not None] == list(outputs[1:])
    assert asked == [(), ("entropy",)]


def test_policy_and_reference_share_one_row(make_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.integrations.trl import head

    made = []
    real = head.share_rows
    monkeypatch.setattr(head, "share_rows", lambda *a, **k: (made.append(1), real(*a, **k))[1])
    inputs = batch()
    for model in (make_llama(), make_llama()):
        add_fast_head(model)
        model(**inputs, fused_lm_head=True)
    assert len(made) == 1
    model(**batch(), fused_lm_head=True)
    assert len(made) == 2


def test_the_padded_layout_never_shares(make_llama: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama()
    add_fast_head(model, layout="padded")
    model(**batch(), fused_lm_head=True)
    assert model.config._attn_implementation == "sdpa"
    assert not caplog.records


def test_without_the_flag_the_forward_is_the_models_own(make_llama: Make) -> None:
    inputs = batch()
    expected = make_llama()(**inputs)
    model = make_llama()
    add_fast_head(model)
    model(**inputs, fused_lm_head=True)
    found = model(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert found.loss == expected.loss


def test_inside_distributed_data_parallel(make_llama: Make, tmp_path: Path) -> None:
    """Its gradients are those of the model alone, and every weight gets one."""
    inputs = batch()
    alone, inner = make_llama(), make_llama()
    for model in (alone, inner):
        add_fast_head(model, outputs=OUTPUTS)
    alone(**inputs, fused_lm_head=True).loss.backward()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(inner)
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(**inputs, fused_lm_head=True).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for x, y in zip(inner.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "packed"}, "layout must be one of"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True is not offered"),
        ({"outputs": ("log_probs", "logits")}, "outputs must be one of"),
    ],
)
def test_options_that_do_not_fit_are_named(options: Any, message: str, make_llama: Make) -> None:
    model = make_llama()
    with pytest.raises(ValueError, match=message):
        add_fast_head(model, **options)
    assert "forward" not in vars(model)


def test_no_labels_at_all_are_an_error(make_llama: Make) -> None:
    model = make_llama()
    add_fast_head(model)
    with pytest.raises(ValueError, match="needs labels or shift_labels"):
        model(input_ids=batch()["input_ids"], fused_lm_head=True)
