"""The model and the tokenizer of a run: loaded, built from a config, or taken as given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpref.checks import describe
from fastpref.training.adapters import choose_trained
from fastpref.training.config import TrainConfig
from fastpref.training.data.templates import DEFAULT_CHAT_TEMPLATE, read_chat_template
from fastpref.training.memory.oom import out_of_memory

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
            given = AutoTokenizer.from_pretrained(source)
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


def build_model(config: TrainConfig, given: Any, tokenizer: Any, *, max_length: int, say: Say) -> Any:
    """The run's model, in float32 unless it was given as an object; checked against data and tokenizer."""
    model: Any
    if given is not None:
        if config.model is not None or config.model_config is not None:
            raise ValueError("a model object was given, and config.model or config.model_config too: give one")
        if not (isinstance(given, nn.Module) and hasattr(given, "save_pretrained")):
            raise TypeError(f"model must be a transformers causal language model, got {type(given).__name__}")
        model = given
    elif config.model is not None:
        # Half-precision weights would round most updates away; bf16 is for the products, by autocast.
        with loading("model", config.model):
            model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    elif config.lora_rank:
        raise ValueError(
            f"lora_rank={config.lora_rank} adapts trained weights, and a model with random weights was asked for, of "
            "which the adapter alone would be saved: set model, or leave lora_rank at 0"
        )
    else:
        model = AutoModelForCausalLM.from_config(_model_config(config, tokenizer, max_length, say), dtype=torch.float32)
    _check_fit(model, tokenizer, max_length)
    if config.disable_dropout:
        disable_dropout(model)
    model, lines = choose_trained(model, config)
    for line in lines:
        say(line)
    if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        say("the model has 16-bit weights, which small updates leave as they are: load it in float32")
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False
        say("the router's auxiliary loss is no part of a preference loss: output_router_logits is set to False")
    if config.gradient_checkpointing:
        # transformers 5 renamed it on the way; both recompute without re-entering autograd by default.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)()
    return model


@contextmanager
def loading(name: str, source: str | None) -> Iterator[None]:
    """Whatever a missing or damaged folder makes a loader raise, as an error that names the option and its value."""
    try:
        yield
    except Exception as error:  # KeyError, SafetensorError and plain Exception are among them
        if out_of_memory(error):
            raise
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{name}={source!r} cannot be loaded: {error or type(error).__name__}") from error


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


def _check_fit(model: Any, tokenizer: Any, max_length: int) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if vocabulary < len(tokenizer):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}: take the model's own "
            "tokenizer, or resize the model's embeddings"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise ValueError(
            f"max_length={max_length} is beyond the model's {positions} positions: set max_length={positions} or less"
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in modules and where a module keeps it as a number (attentions do).

    Preference losses compare log-probs with those of a reference; noise in them is noise in the loss. The
    model stays in training mode, which gradient checkpointing asks for.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
