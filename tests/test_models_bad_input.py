"""What `model_logps` refuses: models whose logits it cannot account for, heads it cannot train, wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason='needs pip install "fastpref[train]"')

from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from fastpref import reference
from fastpref.models import model_logps

V = 99


def config(**changes: Any) -> LlamaConfig:
    shape = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    return LlamaConfig(**{**shape, "num_attention_heads": 4, "tie_word_embeddings": False, **changes})


def build(model_class: type[LlamaForCausalLM] = LlamaForCausalLM, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(5)
    return model_class(config(**changes))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(6)
    ids = torch.randint(0, V, (3, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def after_head(change: Callable[[Tensor], Tensor | None]) -> type[LlamaForCausalLM]:
    """A Llama that does something to its logits."""

    class Changed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = change(outputs.logits)
            return outputs

    return Changed


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: x * 1.001,
    "softcapped far above": lambda x: 30 * torch.tanh(x / 30),
    "shifted at one entry": lambda x: x + nn.functional.one_hot(torch.tensor(41), V) * 0.1,
    "masked at the end": lambda x: x.masked_fill(torch.arange(V) >= V - 1, -torch.inf),
    "made NaN": lambda x: x * torch.nan,
    "permuted": lambda x: x.roll(1, -1),
    "rescaled in the large only": lambda x: x.clamp(-20, 20),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_a_model_that_does_something_unknown_to_its_logits_raises_in_every_call(
    change: Callable[[Tensor], Tensor], batch: dict[str, Tensor]
) -> None:
    """Also where its random weights give logits of 0.1, in which a softcap would not show."""
    model = build(after_head(change))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"Changed does something to its logits .* row \d+, column \d+ .* is \S+ in"
        ):
            model_logps(model, batch)


def test_a_scale_of_two_percent_is_found_out_in_bfloat16(batch: dict[str, Tensor]) -> None:
    """Entry by entry it could be rounding; over a row it cannot."""
    model = build(after_head(lambda x: x * 1.02)).bfloat16()
    with pytest.raises(ValueError, match="does something to its logits"):
        model_logps(model, batch)
    model_logps(build(after_head(lambda x: x)).bfloat16(), batch)


def test_the_message_of_a_mismatch_shows_both_values_and_what_to_do(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="transforms=") as raised:
        model_logps(build(after_head(lambda x: x * 2)), batch)
    text = str(raised.value)
    theirs, ours = (float(text.split(f"{mark} ")[1].split()[0]) for mark in ("check is", "model, and"))
    assert theirs == pytest.approx(2 * ours, rel=1e-4)
    assert "logit_scale=1, softcap=None" in text


def test_transforms_that_are_said_are_applied_and_checked(batch: dict[str, Tensor]) -> None:
    model = build(after_head(lambda x: 1.5 * torch.tanh(0.7 * x / 1.5)))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = reference.sequence_logps(model(**inputs).logits, batch["labels"])
    ours = model_logps(model, batch, transforms={"logit_scale": 0.7, "softcap": 1.5})
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    for wrong in ({"logit_scale": 0.7}, {"softcap": 1.5}, {}, None):  # although the model was checked before
        with pytest.raises(ValueError, match="does something to its logits"):
            model_logps(model, batch, transforms=wrong)


def test_a_check_that_says_nothing_is_made_again(batch: dict[str, Tensor]) -> None:
    """Logits that are all zero agree with every scale: a later call, with weights that tell, still finds it out."""
    model = build(after_head(lambda x: x * 3))
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        assert torch.isfinite(torch.stack([*model_logps(model, batch)])).all()
        model.lm_head.weight.fill_(torch.nan)
        assert torch.isnan(torch.stack([*model_logps(model, batch)])).all()
        model.lm_head.weight.copy_(weight)
    with pytest.raises(ValueError, match="does something to its logits"):
        model_logps(model, batch)


def test_one_sequence_that_is_not_finite_does_not_hide_a_mismatch(batch: dict[str, Tensor]) -> None:
    model = build(after_head(lambda x: x * 3))
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.nan
    batch["input_ids"] = torch.where(batch["input_ids"] == 50, 51, batch["input_ids"])
    batch["input_ids"][0, 0] = 50
    with pytest.raises(ValueError, match="does something to its logits"):
        model_logps(model, batch)


def test_the_check_looks_at_rows_that_are_scored(batch: dict[str, Tensor]) -> None:
    """A prompt token that makes its own row NaN (there are no layers to spread it) does not hide a mismatch."""
    model = build(after_head(lambda x: x * 3), num_hidden_layers=0)
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.nan
    batch["input_ids"] = torch.where(batch["input_ids"] == 50, 51, batch["input_ids"])
    batch["input_ids"][:, :2] = 50
    batch["labels"][:, :3] = -100
    with pytest.raises(ValueError, match="does something to its logits"):
        model_logps(model, batch)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda x: x[..., :-2], f"{V - 2}"),
        (lambda x: nn.functional.pad(x, (0, 3)), f"{V + 3}"),
        (lambda x: None, "None"),
        (lambda x: x.mean(1), "float32 tensor"),
    ],
    ids=["cut", "padded", "withheld", "pooled"],
)
def test_logits_of_another_shape_than_the_head_gave_raise_in_every_call(
    change: Callable[[Tensor], Tensor | None], seen: str, batch: dict[str, Tensor]
) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=f"was to give logits .* gave .*({seen})"):
            model_logps(build(after_head(change)), batch)


def test_a_vocabulary_that_is_cut_after_the_check_raises(batch: dict[str, Tensor]) -> None:
    width = [V]
    model = build(after_head(lambda x: x[..., : width[0]]))
    model_logps(model, batch)
    width[0] = V - 1
    with pytest.raises(ValueError, match="cuts, pads or withholds"):
        model_logps(model, batch)


class NoHead(LlamaForCausalLM):
    def get_output_embeddings(self) -> None:
        return None


class Detour(LlamaForCausalLM):
    """Its logits do not come from the module that it names as its output embeddings."""

    def get_output_embeddings(self) -> nn.Module:
        return self.spare

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.spare = nn.Linear(32, V, bias=False)


class Twice(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class Flat(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.lm_head(self.model(input_ids)[0].flatten(0, 1))


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (NoHead, r"NoHead has no output embeddings .*AutoModelForCausalLM"),
        (Detour, r"Detour did not call its output embeddings \(Linear\).*sequence_logps"),
        (Twice, r"must be called once, .*labels are \(3, 7\); call 2 got a float32 tensor of shape \(3, 7, 32\)"),
        (Flat, r"must be called once, .*\(B, T, H\).*call 1 got a float32 tensor of shape \(21, 32\)"),
    ],
    ids=["missing", "bypassed", "called twice", "called with rows"],
)
def test_a_head_that_is_missing_bypassed_or_called_otherwise_raises(
    model_class: type[LlamaForCausalLM], message: str, batch: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match=message):
        model_logps(build(model_class), batch)


def test_logits_to_keep_would_drop_hidden_states_and_raises(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"labels are \(3, 7\); call 1 got .* \(3, 2, 32\)"):
        model_logps(build(), {**batch, "logits_to_keep": 2})


def test_a_model_without_its_head_raises(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        model_logps(build().model, batch)


def test_an_encoder_decoder_raises(batch: dict[str, Tensor]) -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        model_logps(model, batch)


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, V, bias=False)
        self.scale = nn.Parameter(torch.ones(()))


class Packed(nn.Module):
    """A head of 8-bit integers, as quantisation leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(V * 16, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], V)


class Eight(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(V, 32).to(torch.float8_e4m3fn), requires_grad=False)


class Buffers(Packed):
    def __init__(self) -> None:
        super().__init__()
        del self.weight
        self.register_buffer("qweight", torch.zeros(4))


class Emptied(Packed):
    """As ZeRO-3 leaves a weight outside of the module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Scaled, r"would not be trained; Scaled has weight, scale\. Leave lm_head out"),
        (Packed, r"must be \(V, 32\) in float32.*Packed has a uint8 tensor.*Leave the head out of quantisation"),
        (Eight, r"in float32, bfloat16 or float16.*Eight has a float8_e4m3fn tensor of shape \(99, 32\)"),
        (Buffers, r"Buffers has none"),
        (Emptied, r"weight is sharded \(here \(0,\)\)"),
    ],
    ids=["another parameter", "quantised", "float8", "buffers", "emptied"],
)
def test_a_head_that_is_more_or_other_than_a_linear_layer_raises(
    head: type[nn.Module], message: str, batch: dict[str, Tensor]
) -> None:
    model = build()
    model.lm_head = head()
    with pytest.raises(ValueError, match=message):
        model_logps(model, batch)


def test_lora_on_the_head_raises_and_says_what_trains_it(batch: dict[str, Tensor]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    with pytest.raises(ValueError, match=r"has base_layer\.weight, lora_A.*target_modules.*modules_to_save"):
        model_logps(model, batch)


def test_a_head_that_computes_something_else_than_its_weight_says_raises(batch: dict[str, Tensor]) -> None:
    class Normed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, nn.functional.normalize(self.weight))

    model = build()
    model.lm_head = Normed(32, V, bias=False)
    with pytest.raises(ValueError, match="does something to its logits"):
        model_logps(model, batch)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no model": ({"model": "llama"}, TypeError, "model must be a transformers causal LM"),
    "a batch that is no mapping": ({"batch": [1]}, TypeError, "batch must be a mapping"),
    "no labels": ({"batch": {"input_ids": torch.zeros(1, 2)}}, ValueError, r"must hold labels .*has \['input_ids'\]"),
    "labels in a list": ({"labels": [[1, 2]]}, TypeError, r"batch\['labels'\] must be a torch.Tensor"),
    "shorter labels": ({"labels": torch.zeros(3, 6, dtype=torch.long)}, ValueError, r"labels are \(3, 6\)"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be"),
    "budget": ({"memory_budget": "lots"}, ValueError, "memory_budget must be"),
    "return_outputs": ({"return_outputs": 1}, TypeError, "return_outputs must be True or False"),
    "transforms' type": ({"transforms": 2.0}, TypeError, "transforms must be a mapping"),
    "transforms' names": ({"transforms": {"scale": 2.0}}, ValueError, "may have logit_scale and softcap, got 'scale'"),
    "transforms' values": ({"transforms": {"logit_scale": -1.0}}, ValueError, r"transforms\['logit_scale'\] must be"),
    "transforms' types": ({"transforms": {"softcap": "30"}}, TypeError, r"transforms\['softcap'\] must be a number"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments_that_do_not_fit_raise(
    changes: dict[str, Any], error: type[Exception], message: str, batch: dict[str, Tensor]
) -> None:
    changes = dict(changes)
    model = changes.pop("model") if "model" in changes else build()
    given = changes.pop("batch", batch)
    if "labels" in changes:
        given = {**batch, "labels": changes.pop("labels")}
    with pytest.raises(error, match=message):
        model_logps(model, given, **changes)


def test_a_label_outside_the_vocabulary_raises_on_a_cpu(batch: dict[str, Tensor]) -> None:
    batch["labels"][1, 3] = V
    with pytest.raises(ValueError, match=rf"{V}"):
        model_logps(build(), batch)
