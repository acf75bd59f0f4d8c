"""The model and the tokenizer of a run: loaded, built from a config, or taken as given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpref.checks import describe
from fastpref.tables import size_text
from fastpref.training.adapters import (
    adapter_base,
    adapters_wanted,
    choose_trained,
    has_tokenizer,
    is_adapted,
    output_head,
    with_incoming,
)
from fastpref.training.checkpoints.load import keep_differentiable, load_model, loading, save_dtype, unsaved
from fastpref.training.config import TrainConfig
from fastpref.training.data.templates import DEFAULT_CHAT_TEMPLATE, read_chat_template
from fastpref.training.data.tokens import Pair
from fastpref.training.noise import disable_dropout

# A trial model for a CPU: GPT-2's shape, and with its tokenizer almost all of the time goes into the vocabulary.
DEFAULT_MODEL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 2}

Say = Callable[[str], None]


def build_tokenizer(config: TrainConfig, given: Any, *, conversational: bool, say: Say) -> Any:
    """The run's tokenizer, with a chat template where the data is conversational."""
    if given is not None and config.tokenizer is not None:
        raise ValueError("a tokenizer object was given, and config.tokenizer too: give one of the two")
    source = config.tokenizer or config.model
    for name in ("tokenizer", "model", "reference_model"):
        _check_folder(name, getattr(config, name))
    if given is None and source is None:
        raise ValueError("a tokenizer is needed: set tokenizer to a folder or hub name, or set model")
    if given is not None and not (callable(given) and hasattr(given, "save_pretrained")):
        raise TypeError(
            f"tokenizer must be a transformers tokenizer, got {describe(given)}; "
            "PreTrainedTokenizerFast(tokenizer_object=...) wraps one of the package tokenizers"
        )
    if given is None:
        with loading("model" if config.tokenizer is None else "tokenizer", source):
            source = _tokenizer_folder(cast(str, source))
            given = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    tokenizer = given
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
        if not conversational:
            raise ValueError("chat_template was given, but the dataset is plain text: it would not be used")
    elif conversational and tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        say(
            'the tokenizer has no chat template: the plain default ("User: ...", "Assistant: ...") is used, '
            "and saved with the model; chat_template sets another"
        )
    return tokenizer


def build_model(
    config: TrainConfig,
    given: Any,
    tokenizer: Any,
    *,
    max_length: int,
    say: Say,
    trained: bool = True,
    load: Callable[[TrainConfig], Any] | None = None,
) -> Any:
    """The run's model, checked against data and tokenizer.

    Args:
        trained: False for one that is only scored with.
        load: what takes the place of `load_model`.
    """
    model: Any
    for name in ("dtype", "load_in_4bit", "load_in_8bit"):
        if config.model is None and getattr(config, name) not in ("auto", False):
            raise ValueError(
                f"{name}={getattr(config, name)!r} says how the weights of config.model are loaded, which is not set: "
                "set that, or load the object so"
            )
    if trained and not adapters_wanted(config, given):
        check_trainable(None, config)
    if given is not None:
        if config.model is not None or config.model_config is not None:
            raise ValueError("a model object was given, and config.model or config.model_config too: give one")
        if not (isinstance(given, nn.Module) and hasattr(given, "save_pretrained")):
            raise TypeError(f"model must be a transformers causal language model, got {type(given).__name__}")
        model = given
    elif config.model is not None:
        model = (load or load_model)(config)
    elif config.lora_rank:
        raise ValueError(
            f"lora_rank={config.lora_rank} adapts trained weights, and a model with random weights was asked for, of "
            "which the adapter alone would be saved: set model, or leave lora_rank at 0"
        )
    else:
        model = AutoModelForCausalLM.from_config(_model_config(config, tokenizer, max_length, say), dtype=torch.float32)
    model = with_incoming(model, config, say=say)
    _check_positions(model, max_length)
    if config.disable_dropout:
        disable_dropout(model)
    keep_differentiable(model)
    if not trained:
        return model.requires_grad_(False)
    lines = freeze_other_modalities(model)
    model, more = choose_trained(model, config)
    if not is_adapted(model):  # a checkpoint may be quantised itself
        check_trainable(model, config)
    for line in (*lines, *more, *unsaved(model), *dtype_lines(model, config)):
        say(line)
    if config.gradient_checkpointing:
        # transformers 5 renamed it on the way; both recompute without re-entering autograd by default.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)()
    return model


def _tokenizer_folder(source: str) -> str:
    """An adapter may have been saved without the tokenizer, which is its base's then."""
    base = adapter_base(source)
    return source if base is None or has_tokenizer(source) else base


def dtype_lines(model: Any, config: TrainConfig) -> list[str]:
    """What the weights are held and saved in, where that is not float32 throughout."""
    lines, saved = [], save_dtype(config, model)
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize == 2}
    names = ", ".join(sorted(_name(kind) for kind in kinds))
    if any(p.requires_grad and p.dtype in kinds for p in model.parameters()):
        lines.append("the model has 16-bit weights, which small updates leave as they are: load it in float32")
    elif kinds:
        lines.append(f"frozen weights are held, and their products made, in {names}; dtype=float32 is exact")
    if (config.load_in_4bit or config.load_in_8bit) and is_quantised(model):
        rest = sum(p.nbytes for p in model.parameters() if not p.requires_grad and p.is_floating_point())
        lines.append(
            f"{size_text(rest)} of the frozen weights are not quantised: bitsandbytes takes linear layers alone"
        )
    if torch.float16 in kinds:
        lines.append("gradients that pass through float16 weights vanish below 6e-8: dtype=bfloat16 has the range")
    if saved is not None and any(p.requires_grad and p.dtype != saved for p in model.parameters()):
        whose = f"as {config.model} is" if config.save_dtype == "auto" else "as save_dtype says"
        lines.append(f"the trained model will be saved in {_name(saved)}, {whose}; save_dtype=float32 rounds nothing")
    return lines


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_quantised(model: Any) -> bool:
    """Whether weights of the model are held in fewer than 16 bits."""
    return getattr(model.config, "quantization_config", None) is not None or any(
        not p.is_floating_point() or p.dtype.itemsize < 2 or hasattr(p, "__tensor_flatten__")  # torchao's
        for p in model.parameters()
    )


def check_trainable(model: Any, config: TrainConfig) -> None:
    """ValueError for weights that are quantised, or will be: norms and embeddings alone would be trained."""
    asked = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(config, name)), None)
    if asked or (model is not None and is_quantised(model)):
        raise ValueError(
            f"{asked or type(model).__name__}: quantised weights cannot be trained: set lora_rank to train an adapter "
            "on them, or load the model unquantised"
        )


def silence_router(model: Any) -> list[Any]:
    """Turn a router's auxiliary loss off; the configs in which it was on."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    found = [config for config in configs if getattr(config, "output_router_logits", False)]
    for config in found:
        config.output_router_logits = False
    return found


def freeze_other_modalities(model: Any) -> list[str]:
    """Freeze what text does not reach in a model of several modalities, of which DDP would wait for gradients."""
    text = model.config.get_text_config()
    if text is model.config or is_adapted(model):
        return []
    parts = [part for part in (model.get_decoder(), output_head(model)) if part is not None]
    reached = {id(p) for part in parts for p in part.parameters()}
    others = [p for p in model.parameters() if id(p) not in reached and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    count = sum(p.numel() for p in others)
    return (
        [f"{count:,} weights of {type(model).__name__} serve images or sound: they stay as they are"] if count else []
    )


def _check_folder(name: str, source: str | None) -> None:
    """A path that does not exist is no hub name, and the hub's own error would talk about that."""
    if source is not None and Path(source).expanduser().is_absolute() and not Path(source).exists():
        raise FileNotFoundError(f"{name}: there is no folder {source!r}")


def _model_config(config: TrainConfig, tokenizer: Any, max_length: int, say: Say) -> Any:
    if isinstance(config.model_config, dict):
        values = dict(config.model_config)
        if "model_type" not in values:
            raise ValueError("model_config needs a 'model_type', for instance 'gpt2' or 'llama'")
    else:
        values = {**DEFAULT_MODEL, "n_positions": max(1024, max_length)}
        say(
            "no model was given: training a small GPT-2-shaped one from random weights "
            f"({', '.join(f'{key}={value}' for key, value in values.items() if key != 'model_type')}), for a "
            "trial; --model starts from trained weights"
        )
    values.setdefault("vocab_size", len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(name, getattr(tokenizer, name))
    model_type = values.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"model_config does not make a model: {error}") from error


def check_vocabulary(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> None:
    """ValueError for a token of the data that the model has no embedding of.

    The tokenizer itself may be longer: those of Gemma 3 1B and of Code Llama hold tokens that text never becomes.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= vocabulary or not pairs:
        return
    token, row = max((max(int(ids.max()) for ids, _ in (pair.chosen, pair.rejected)), pair.row) for pair in pairs)
    if token >= vocabulary:
        raise ValueError(
            f"row {row} of the data has token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), and the model has "
            f"embeddings of {vocabulary} tokens: take the model's own tokenizer, or resize the model's embeddings"
        )


def padding_id(model: Any, tokenizer: Any) -> int:
    """A token that the model has an embedding of, to fill rows up with: the tokenizer's own where that is one."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None and token < vocabulary), 0)


def _check_positions(model: Any, max_length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise ValueError(
            f"max_length={max_length} is beyond the model's {positions} positions: set max_length={positions} or less"
        )


@torch.no_grad()
def check_causal(model: Any) -> None:
    """ValueError where the model's logits depend on later tokens: what it gives are no log-probs of next tokens."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder: take a causal language model")
    if model.device.type == "meta":
        return
    vocabulary, was = model.get_input_embeddings().weight.shape[0], model.training
    ids = torch.arange(16, device=model.device).view(2, 8) % vocabulary
    ids[1, :4] = ids[0, :4]
    model.eval()
    try:
        first, second = model(input_ids=ids, use_cache=False).logits[:, -8:-4].float()
    finally:
        model.train(was)
    # Rows of one batch round alike, but for experts, and LLM.int8, whose outliers are those of the batch.
    floating = all(p.is_floating_point() for p in model.parameters())
    tolerance = max(1e-4, 16 * torch.finfo(model.dtype).eps) if floating else 0.1
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise ValueError(
            f"{type(model).__name__} looks at later tokens (its logits change with them), as a masked language model "
            "does: take a causal one (of BERT's family, one whose config has is_decoder=true)"
        )
