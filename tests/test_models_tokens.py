"""`model_token_logps`, the extras of both model functions, and `run`: what trainers that log and weigh tokens take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')

import transformers

from fastpref import reference
from fastpref.extras import EXTRAS, TokenExtras
from fastpref.models import ScoredTokens, model_logps, model_token_logps, pack_pairs, set_attention

V = 99


def build(**changes: Any) -> Any:
    """A tiny Gemma 2: its logits are softcapped."""
    torch.manual_seed(7)
    shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 1.7}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**{**shape, **heads, **changes})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 if parameter.dim() < 2 else parameter * 8)
    return model.eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, V, (3, 9))
    labels = ids.masked_fill(torch.arange(9) < torch.tensor([[2], [5], [9]]), -100)  # nothing scored in the last
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def gradient(model: Any, value: Tensor) -> Tensor:
    model.zero_grad()
    value.backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def test_token_logps_and_their_gradient_are_those_of_the_logits(batch: dict[str, Tensor]) -> None:
    model = build()
    found = model_token_logps(model, batch, temperature=1.3)
    expected = reference.token_logps(logits_of(model, batch), batch["labels"], temperature=1.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 2, 27).view(3, 9)
    ours, theirs = (gradient(model, (weights * x).sum()) for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("function", [model_logps, model_token_logps])
def test_extras_are_those_of_the_logits_whatever_was_asked_for(function: Any, batch: dict[str, Tensor]) -> None:
    model = build()
    truth = reference.token_extras(logits_of(model, batch), batch["labels"], temperature=1.3)
    for names in (EXTRAS, EXTRAS[:1], EXTRAS[2:]):
        logps, extras = function(model, batch, temperature=1.3, extras=names)
        assert isinstance(extras, TokenExtras)
        torch.testing.assert_close(logps, function(model, batch, temperature=1.3), rtol=0, atol=0)
        for name, expected in truth._asdict().items():
            value = getattr(extras, name)
            if name not in names:
                assert value is None
                continue
            assert not value.requires_grad
            torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5)


def test_an_entropy_bonus_reaches_every_parameter(batch: dict[str, Tensor]) -> None:
    model = build()
    logps, extras = model_logps(model, batch, extras=["entropy"], entropy_grad=True)
    logits = logits_of(model, batch)
    entropy = reference.token_extras(logits, batch["labels"]).entropy
    assert entropy is not None
    truth = gradient(model, reference.sequence_logps(logits, batch["labels"]).sum() - 3 * entropy.sum())
    found = gradient(model, logps.sum() - 3 * extras.entropy.sum())
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


def test_with_outputs_the_tuple_ends_with_them(batch: dict[str, Tensor]) -> None:
    logps, extras, outputs = model_logps(build(), batch, extras=["is_top1"], return_outputs=True)
    assert logps.shape == (3,)
    assert extras.is_top1.dtype == torch.bool
    assert outputs.logits is None


def test_tokens_of_a_shared_row_come_in_the_order_of_its_labels() -> None:
    torch.manual_seed(7)
    config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    chosen, rejected = (np.array([5, 6, 7, 8, 9]), 2), (np.array([5, 6, 7, 3]), 2)
    apart = [
        (reference.token_logps(logits, ids), reference.token_extras(logits, ids).entropy)
        for ids in (torch.from_numpy(one)[None] for one, _ in (chosen, rejected))
        for logits in (model(input_ids=ids).logits,)
    ]
    set_attention(model)
    row = pack_pairs([chosen], [rejected])
    logps, extras = model_token_logps(model, row.inputs, scored=row.scored, extras=["entropy"])
    for found, place in ((logps, 0), (extras.entropy, 1)):
        expected = torch.cat([values[place][0, 2:] for values in apart])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("function", "shape"), [(model_logps, (2,)), (model_token_logps, (0,))])
def test_a_row_in_which_no_token_is_scored_gives_zeros_and_zero_gradients(function: Any, shape: Any) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    scored = ScoredTokens(nothing, nothing, torch.zeros(3, dtype=torch.int64))
    model = build()
    found, extras = function(model, {"input_ids": torch.arange(5, 9)[None]}, scored=scored, extras=["entropy"])
    assert extras.entropy.shape == (0,)
    torch.testing.assert_close(found, torch.zeros(shape), rtol=0, atol=0)
    assert (gradient(model, found.sum()) == 0).all()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_code_in_the_models_own_forward_passes_what_runs(batch: dict[str, Tensor]) -> None:
    """A forward that was replaced, and calls the one before, with the hooks of `model` entered once."""
    model = build()
    expected, entered, original = model_logps(model, batch), [], model.forward
    model.register_forward_pre_hook(lambda *_: entered.append(1))

    def forward(**inputs: Any) -> Any:
        return model_logps(model, inputs, run=original)

    model.forward = forward
    torch.testing.assert_close(model(**batch), expected, rtol=0, atol=0)
    assert entered == [1]


def test_extras_that_do_not_exist_raise(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"extras must be one of .*entropy.*; got 'perplexity'"):
        model_logps(build(), batch, extras=["perplexity"])
    with pytest.raises(TypeError, match="extras must be a sequence of names"):
        model_token_logps(build(), batch, extras="entropy")
    with pytest.raises(ValueError, match='entropy_grad=True needs "entropy"'):
        model_token_logps(build(), batch, entropy_grad=True)
