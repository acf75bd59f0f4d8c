"""Rows that hold several sequences: an architecture that takes them gives the values and gradients of single ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from acceptance import Triple, no_worse_than_eager
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')

from transformers import AutoConfig, AutoModelForCausalLM

from fastpref import model_logps
from fastpref.models import ScoredTokens, Segment, pack_pairs, segments, set_attention, shared_length, why_not_packed

pytestmark = pytest.mark.numeric
VOCAB = 97
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2 = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LIKE_LLAMA = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "phi3", "olmo2", "granite", "cohere", "glm4",
    "qwen3_moe", "starcoder2",
)  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(LIKE_LLAMA, SMALL),
    "gpt2": GPT2,
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_moe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({**SMALL}, "recurrent layers"),
    "qwen3_next": ({**SMALL, "num_experts": 2, "num_experts_per_tok": 1}, "recurrent layers"),
    "bloom": ({"n_layer": 2, "hidden_size": 32, "n_head": 4, "vocab_size": VOCAB}, "attention cannot be replaced"),
    "mpt": ({"n_layers": 2, "d_model": 32, "n_heads": 4, "vocab_size": VOCAB}, "attention cannot be replaced"),
    "gemma2": (SMALL, "softcap=50.0"),
    "mistral": ({**SMALL, "sliding_window": 32}, "sliding_window=32) below max_length=64"),
}
Sequence = tuple[np.ndarray, int]


def build(kind: str, **changes: Any) -> Any:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **changes), dtype=torch.float32)
    with torch.no_grad():  # attention of initial weights is almost uniform, and would hide a wrong mask
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()


def make_pairs(seed: int = 3) -> tuple[list[Sequence], list[Sequence]]:
    """Responses that begin alike, borders that differ, one that is the other's beginning, nothing in common."""
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return generator.integers(1, VOCAB, count).astype(np.int32)

    prompts = [tokens(9), tokens(5), tokens(4), tokens(6)]
    same = tokens(3)
    chosen = [
        (np.concatenate([prompts[0], same, tokens(7)]), 9),
        (np.concatenate([prompts[1], tokens(4)]), 5),
        (np.concatenate([prompts[2], same]), 4),
        (tokens(6), 5),
    ]
    rejected = [
        (np.concatenate([prompts[0], same, tokens(2)]), 9),
        (np.concatenate([prompts[1], tokens(11)]), 4),
        (np.concatenate([prompts[2], same, tokens(5)]), 4),
        (tokens(8), 1),
    ]
    return chosen, rejected


def in_float64(model: Any) -> Any:
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # the grouped products of experts do not take float64
    return exact


def own_rows(model: Any, sequences: list[Sequence]) -> Tensor:  # (S,)
    """The truth: each sequence through the model by itself."""
    found = []
    for ids, start in sequences:
        row = torch.from_numpy(ids).long()[None]
        logps = model(input_ids=row).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(1, row[0, 1:, None])[start - 1 :].sum())
    return torch.stack(found)


def gradients(model: Any, values: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (values * torch.linspace(-1, 1.3, len(values), device=values.device)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(model: Any, chosen: list[Sequence], rejected: list[Sequence], **options: Any) -> Tensor:
    row = pack_pairs(chosen, rejected, **options)
    found = model_logps(model, row.inputs, scored=row.scored)
    assert isinstance(found, Tensor)
    return found


def check_values(model: Any, **options: Any) -> None:
    """Packed rows are as near to float64 as rows of their own. `model` has its own attention still."""
    own, exact = copy.deepcopy(model), in_float64(model)
    set_attention(model, options.get("attention", "sdpa"))

    @torch.no_grad()
    def draw(seed: int) -> list[Triple]:
        chosen, rejected = make_pairs(seed)
        eager, truth = (own_rows(each, [*chosen, *rejected]) for each in (own, exact))
        return [
            (packed(model, chosen, rejected, share_prefix=share, **options), eager, truth) for share in (True, False)
        ]

    no_worse_than_eager(draw, draws=2)


@pytest.mark.parametrize("kind", SERVED)
def test_values_and_gradients_are_those_of_rows_of_their_own(kind: str) -> None:
    model = build(kind, **SERVED[kind])
    assert why_not_packed(model, max_length=64) is None
    own, exact = copy.deepcopy(model), in_float64(model)
    set_attention(model)

    def whole(model: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        return values.detach(), torch.cat([value.flatten() for value in gradients(model, values).values()])

    def draw(seed: int) -> list[Triple]:
        chosen, rejected = make_pairs(seed)
        eager, truth = (whole(each, own_rows(each, [*chosen, *rejected])) for each in (own, exact))
        found: list[Triple] = []
        for share_prefix in (True, False):
            ours = whole(model, packed(model, chosen, rejected, share_prefix=share_prefix))
            found += zip(ours, eager, truth, strict=True)
        return found

    no_worse_than_eager(draw, draws=1)


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_that_cannot_be_served_is_refused_by_name(kind: str) -> None:
    options, reason = REFUSED[kind]
    model = build(kind, **options)
    before = model.config._attn_implementation
    why = why_not_packed(model, max_length=64)
    assert why is not None
    assert why.startswith(f"{type(model).__name__} cannot be given several sequences in a row")
    assert reason in why
    assert model.config._attn_implementation == before


def test_a_window_as_long_as_the_longest_sequence_hides_nothing() -> None:
    model = build("mistral", **SMALL, sliding_window=32)
    assert why_not_packed(model, max_length=32) is None
    check_values(model)  # 83 tokens together, 19 at most in one


@pytest.mark.parametrize("beyond", [False, True])
def test_rotary_positions_that_change_with_the_longest_sequence_are_served_up_to_that_length(beyond: bool) -> None:
    """A pair beside a longer one would have another value than alone."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rotary = {"rope_type": "longrope", **factors, "rope_theta": 1e4, "factor": 4.0}
    original = 18 if beyond else 19  # of 19 tokens at most
    positions = {"original_max_position_embeddings": original, "max_position_embeddings": 64}
    model = build(
        "phi3", **SMALL, **positions, rope_parameters={**rotary, "original_max_position_embeddings": original}
    )
    chosen, rejected = make_pairs()
    why = why_not_packed(model, max_length=19)
    assert (why is not None and "longer than 18 tokens (rope_type=longrope), and max_length=19" in why) is beyond
    if beyond:
        set_attention(model)
        want = own_rows(model, [*chosen, *rejected])
        assert not torch.allclose(packed(model, chosen, rejected), want, rtol=1e-4, atol=0)
    else:
        check_values(model)


def test_the_trial_finds_what_no_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose layers take in the token before, and one that takes no positions."""
    model = build("llama", **SMALL)
    layer = model.model.layers[0].mlp
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: plain(x + 0.1 * pad(x, (0, 0, 1, -1))))
    why = why_not_packed(model, max_length=64)
    assert why is not None
    assert "logits differ by" in why
    monkeypatch.undo()
    assert why_not_packed(model, max_length=64) is None
    inner = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **inputs: inner(**{**inputs, "position_ids": None}))
    why = why_not_packed(model, max_length=64)
    assert why is not None
    assert "logits differ by" in why


def test_another_pair_in_the_row_changes_nothing_bitwise() -> None:
    """Rows of one length, so that every product has one shape: the other pairs' tokens do not reach a pair's value."""
    model = build("qwen3", **SMALL)
    set_attention(model)
    chosen, rejected = make_pairs()
    before = packed(model, chosen, rejected)
    others = [
        (ids if place == 1 else (ids * 7 + 5) % (VOCAB - 1) + 1, start) for place, (ids, start) in enumerate(chosen)
    ]
    other_rejected = [
        (ids if place == 1 else (ids * 7 + 5) % (VOCAB - 1) + 1, start) for place, (ids, start) in enumerate(rejected)
    ]
    after = packed(model, others, other_rejected)
    assert torch.equal(before[[1, 5]], after[[1, 5]])
    changed = [place for place in range(8) if place not in (1, 5)]
    assert (before[changed] != after[changed]).all()


def test_no_gradient_reaches_another_pairs_tokens() -> None:
    model = build("llama", **SMALL)
    set_attention(model)
    chosen, rejected = make_pairs()
    row = pack_pairs(chosen, rejected)
    embedded = model.get_input_embeddings()(row.inputs["input_ids"]).detach().requires_grad_()
    inputs = {name: value for name, value in row.inputs.items() if name != "input_ids"}
    logps = model_logps(model, {**inputs, "inputs_embeds": embedded}, scored=row.scored)
    assert isinstance(logps, Tensor)
    (logps[1] + logps[5]).backward()
    reached = embedded.grad[0].abs().sum(-1) > 0  # type: ignore[index]
    first = len(chosen[0][0]) + len(rejected[0][0]) - shared_length(chosen[0][0], rejected[0][0])
    mine = len(chosen[1][0]) + len(rejected[1][0]) - shared_length(chosen[1][0], rejected[1][0])
    inside = torch.zeros_like(reached)
    inside[first : first + mine] = True
    assert not reached[~inside].any()
    # All but the last token of each response, which predicts nothing.
    assert reached[inside].sum() == mine - 2


def test_gradient_checkpointing_finds_the_segments_again_in_backward() -> None:
    chosen, rejected = make_pairs()
    model = build("qwen3", **SMALL).train()
    set_attention(model)
    want = gradients(model, packed(model, chosen, rejected))
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    found = gradients(model, packed(model, chosen, rejected))
    assert all(torch.equal(found[name], value) for name, value in want.items())


def test_a_copy_of_the_mask_has_its_segments_still() -> None:
    """As a batch has that went to another device, or came from another process."""
    model = build("qwen3", **SMALL)
    set_attention(model)
    row = pack_pairs(*make_pairs())
    copied = {name: value.clone() for name, value in row.inputs.items()}
    assert not hasattr(copied["attention_mask"], "segments")
    assert torch.equal(
        model_logps(model, copied, scored=row.scored),  # type: ignore[arg-type]
        model_logps(model, row.inputs, scored=row.scored),  # type: ignore[arg-type]
    )


def test_without_segments_the_model_is_as_before() -> None:
    """Padded batches and generation go through the same attention function."""
    model = build("qwen3", **SMALL)
    rows = torch.randint(1, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(rows)
    seen[1, 6:] = 0
    logits = model(input_ids=rows, attention_mask=seen).logits
    answer = model.generate(rows[:1], max_new_tokens=5, do_sample=False)
    set_attention(model)
    assert torch.equal(model(input_ids=rows, attention_mask=seen).logits, logits)
    assert torch.equal(model.generate(rows[:1], max_new_tokens=5, do_sample=False), answer)


def dense_mask(segments: list[Segment]) -> torch.Tensor:  # (1, 1, T, T) bool, true where a query sees a key
    """The definition: what attention over the segments must equal."""
    length = segments[-1].end
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in segments:
        mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        mask[start:end, prefix_start:prefix_end] = True
    return mask[None, None]


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_attention_by_segments_is_attention_under_their_mask(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "CHUNK", chunk)
    parts = [Segment(0, 12), Segment(12, 19, 0, 5), Segment(19, 20), Segment(20, 31), Segment(31, 34, 20, 31)]
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 34, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(1, 2, 34, 8, generator=generator, requires_grad=True) for _ in range(2))
    upstream = torch.randn(1, 34, 4, 8, generator=generator)
    mask = dense_mask(parts)
    want = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4, enable_gqa=True).transpose(1, 2)
    expected = torch.autograd.grad((want * upstream).sum(), (query, key, value))
    got, _ = segments.segment_attention(
        torch.nn.Identity(), query, key, value, segments.segment_mask(parts), scaling=0.4
    )
    found = torch.autograd.grad((got * upstream).sum(), (query, key, value))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.slow  # FlexAttention is compiled
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch compiles FlexAttention for AVX2 and newer only"
)
def test_flex_attention_sees_what_sdpa_sees() -> None:
    """Without gradients: FlexAttention has no backward on a CPU."""
    model = build("qwen3", **SMALL)
    check_values(model, attention="flex")
    assert "FlexAttention has no backward on a CPU" in str(why_not_packed(model, max_length=64, attention="flex"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "error", "message"),
    [
        ([], [], ValueError, "at least 1; got 0 and 0"),
        ([(np.arange(3), 1)], [], ValueError, "got 1 and 0"),
        ([(np.arange(3), 0)], [(np.arange(3), 1)], ValueError, r"chosen\[0\].* in \[1, 3\], got 0"),
        ([(np.arange(3), 1)], [(np.arange(3), 4)], ValueError, r"rejected\[0\].* in \[1, 3\], got 4"),
        ([(np.arange(3.0), 1)], [(np.arange(3), 1)], TypeError, r"chosen\[0\] must hold token ids .* got float64"),
        ([(np.zeros((1, 3), int), 1)], [(np.arange(3), 1)], TypeError, r"shape \(1, 3\)"),
        ([np.arange(3)], [(np.arange(3), 1)], TypeError, r"chosen\[0\] must be \(token ids, index of the first"),
        ([(np.arange(3), True)], [(np.arange(3), 1)], TypeError, "must be an index, got True"),
    ],
)
def test_sequences_that_do_not_fit_are_named(
    chosen: list[Any], rejected: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pack_pairs(chosen, rejected)


def test_scored_tokens_are_checked() -> None:
    model = build("llama", **SMALL)
    row = pack_pairs(*make_pairs())
    source, labels, cu_seqlens = row.scored
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: model_logps(model, row.inputs, scored=(1, 2)), TypeError, "scored must be a ScoredTokens"),  # type: ignore[arg-type]
        (lambda: model_logps(model, {**row.inputs, "labels": row.inputs["input_ids"]}, scored=row.scored), ValueError,
         "labels in the batch or scored, not both"),
        (lambda: model_logps(model, row.inputs, scored=ScoredTokens(source[:-1], labels, cu_seqlens)), ValueError,
         "scored.source and scored.labels must be"),
        (lambda: model_logps(model, row.inputs, scored=ScoredTokens(source, labels, None)), TypeError,  # type: ignore[arg-type]
         "scored.cu_seqlens must be a torch.Tensor, got None"),
        (lambda: model_logps(model, row.inputs, scored=ScoredTokens(source + 9, labels, cu_seqlens)), ValueError,
         r"scored.source must be in \[0, \d+\), flat positions"),
        (lambda: model_logps(model, row.inputs, scored=ScoredTokens(source - 9, labels, cu_seqlens)), ValueError,
         "scored.source must be in"),
        (lambda: set_attention(model, "eager"), ValueError, "attention must be one of"),
        (lambda: set_attention(torch.nn.Linear(2, 2)), TypeError, "model must be a transformers model, got Linear"),
        (lambda: why_not_packed(model, max_length=64, attention="eager"), ValueError, "attention must be one of"),
        (lambda: model_logps(model, {"position_ids": source}, scored=row.scored), ValueError, "must hold input_ids"),
    ]  # fmt: skip
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_on_a_gpu_values_and_gradients_are_those_of_rows_of_their_own(attention: str) -> None:
    """Where a prefix is causal to the lower right, and FlexAttention is compiled and has a backward."""
    model = build("qwen3", **{**SMALL, "hidden_size": 64, "head_dim": 16}).cuda()
    chosen, rejected = make_pairs()
    want = own_rows(model.cpu(), [*chosen, *rejected])
    want_gradients = gradients(model, want)
    model.cuda()
    assert why_not_packed(model, max_length=64, attention=attention) is None
    set_attention(model, attention)
    got = packed(model, chosen, rejected, attention=attention, device="cuda")
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
    for name, value in gradients(model, got).items():
        expected = want_gradients[name]
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item(), msg=name)
