"""A checkpoint as transformers writes it: loaded as the class that it was saved as, its dtype, its tensors' names."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from fastpref.training.adapters import adapter_base, adapters_wanted, is_adapted
from fastpref.training.config import TrainConfig
from fastpref.training.memory.oom import out_of_memory

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
# Ends of the names of what old versions of transformers saved, and newer ones compute.
COMPUTED = ("inv_freq", "attn.bias", "attention.bias", "masked_bias", "position_ids")
SHOWN = 3  # names in a message


def load_model(config: TrainConfig, *, device: str | None = None, weights: bool = True) -> Any:
    """`config.model`, or the base of the adapter that this is, in the class that it was saved as.

    Args:
        device: "meta" reads the headers of the weights' files and nothing else.
        weights: False builds it from its config alone, on the device; so does "meta" where a checkpoint is quantised.
    """
    source, trust = cast(str, config.model), config.trust_remote_code
    quantised = config.load_in_4bit or config.load_in_8bit
    if quantised and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError('load_in_4bit and load_in_8bit need bitsandbytes: pip install "fastpref[quant]"')
    # Half-precision weights would round most updates away; bf16 is for the products, by autocast.
    dtype = config.dtype if config.dtype != "auto" or adapters_wanted(config, None) or quantised else "float32"
    with loading("model", source):
        source = adapter_base(source) or source
        whole = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        kind = model_class(whole)
        options: dict[str, Any] = {"dtype": dtype}
        if quantised and device is None:
            options["quantization_config"] = _quantisation(config, whole)
        if not weights or (device == "meta" and getattr(whole, "quantization_config", None) is not None):
            with torch.device(device or "cpu"):
                options = {"dtype": _dtype_of(whole) if dtype == "auto" else getattr(torch, dtype)}
                if hasattr(kind, "from_config"):
                    return kind.from_config(whole, trust_remote_code=trust, **options)
                return kind._from_config(whole, **options)
        model, found = kind.from_pretrained(
            source, device_map=device, output_loading_info=True, trust_remote_code=trust, **options
        )
        if found["missing_keys"]:
            raise ValueError(
                f"it lacks {_some(found['missing_keys'])} of {type(model).__name__}, which would be random: take a "
                "language model's checkpoint"
            )
    return model


def model_class(config: Any) -> Any:
    """The class that a checkpoint was saved as, be it a vision-language model's; ValueError where it predicts no text.

    The auto class for causal language models would load the text part alone of some, and know nothing of others.
    """
    name = (config.architectures or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False) or name.endswith("ForMaskedLM"):
        raise ValueError(f"{name} does not predict the next token from those before: take a causal language model")
    named = getattr(transformers, name, None)  # None where the checkpoint brings its own code
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate():
        return named
    autos: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    code = getattr(config, "auto_map", None) or {}
    for auto in autos:
        if type(config) in auto._model_mapping or auto.__name__ in code:
            return auto
    raise ValueError(f"{name} is no class of transformers {transformers.__version__} that writes text")


def _quantisation(config: TrainConfig, whole: Any) -> Any:
    """What bitsandbytes is told."""
    held = _dtype_of(whole) if config.dtype == "auto" else getattr(torch, config.dtype)
    # Of every product another line would say that its input is converted.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.precision == "bf16" else held,
    )


def keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from laying weights out for products without a backward, as in evaluations on some CPUs.

    The gradient of every later step would silently stop at them.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # which undoes it where it has been done


def _dtype_of(config: Any) -> torch.dtype:
    """What a checkpoint's config says of its weights; float32 where it says nothing."""
    dtype = config.dtype or config.get_text_config().dtype or "float32"
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def save_dtype(config: TrainConfig, model: Any) -> torch.dtype | None:
    """In what the trained model is saved; None for what it is trained in: an adapter, an object, random weights."""
    if config.save_dtype != "auto":
        return getattr(torch, config.save_dtype)
    if config.model is None or is_adapted(model):
        return None
    return _dtype_of(AutoConfig.from_pretrained(model.name_or_path, trust_remote_code=config.trust_remote_code))


def unsaved(model: Any) -> list[str]:
    """A line that names the tensors of the checkpoint that the saved model will lack; none where it lacks none."""
    if is_adapted(model) or getattr(model, "is_quantized", False):  # of which an adapter is saved, if anything
        return []
    names = tensor_names(getattr(model, "name_or_path", ""))
    if not names:
        return []
    state = model.state_dict().items()
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state}
    lost = names - revert_weight_conversion(model, empty).keys()
    lost = {name for name in lost if not name.endswith(COMPUTED)}
    if not lost:
        return []
    return [
        f"{len(lost)} of the checkpoint's {len(names)} tensors are no part of {type(model).__name__}, and the saved "
        f"model will be without them: {_some(lost)}"
    ]


def tensor_names(source: str) -> set[str]:
    """The names of a checkpoint's tensors, in a folder or the hub's cache; empty where it has none here."""
    for name in (SAFETENSORS, TORCH):
        if (index := source_file(source, f"{name}{INDEX}")) is not None:
            return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if (file := source_file(source, name)) is None:
            continue
        if name == TORCH:
            return set(torch.load(file, map_location="meta", weights_only=True))
        with safe_open(file, "pt") as tensors:
            return set(tensors.keys())
    return set()


def source_file(source: str, name: str) -> Path | None:
    """A file of a model's folder, or of the hub's local cache; None where it is in neither."""
    path = Path(source).expanduser() / name
    if not source or path.parent.is_dir():
        return path if source and path.is_file() else None
    try:
        cached = try_to_load_from_cache(source, name)
    except HFValidationError:  # no name of the hub's
        return None
    return Path(cached) if isinstance(cached, str) else None


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the bars that transformers draws when it writes or reads weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def loading(name: str, source: str | None) -> Iterator[None]:
    """Whatever a missing or damaged folder makes a loader raise, as an error that names the option and its value."""
    try:
        yield
    except Exception as error:  # KeyError, SafetensorError and plain Exception are among them
        if out_of_memory(error):
            raise
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        reason = (
            f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        )
        if "trust_remote_code" in reason:
            reason = "it brings code of its own: read that, and set trust_remote_code to run it"
        raise kind(f"{name}={source!r} cannot be loaded: {reason}") from error
