"""Hugging Face causal LMs: sequence log-probs from the head's input and weight, without logits.

The model's own forward runs, so that adapters, wrappers (PEFT, DDP, FSDP2), auxiliary losses and router outputs stay as
they are; only the head is kept from computing: it hands over the hidden states, and sees a few rows. What the model
does to its logits afterwards is read from its config, and held against the model itself before it is relied on.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastpref.checks import check_bool, check_number, check_tensor, describe
from fastpref.linear import linear_sequence_logps

# Attributes of a config, and what the model does with them to its logits. For a family that is not here nothing is
# done, and the check against the model decides.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISORS = ("logits_scaling",)  # Granite
DIVISORS_THAT_MULTIPLY = ("hyperclovax", "hyperclovax_vision_v2")  # Granite's name, the other way round

PROBED_SEQUENCES = 4
# Rows are checked as they are and stretched: a softcap hardly shows in the small logits of random weights.
PROBE_FACTORS = (1.0, 16.0, 256.0)
INSTEAD = "take sequence_logps(model(...).logits, labels) (in training: logps=logits)"


@dataclasses.dataclass(frozen=True)
class _Transforms:
    """Logits are `softcap·tanh(logit_scale·x / softcap)` of what the head computes."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x * self.logit_scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


@dataclasses.dataclass(frozen=True)
class _HeadCall:
    hidden: Tensor  # (B, T, H), what the model gave to its head
    probes: Tensor  # (1, R, H), what the head got to see of it
    autocast: torch.autocast  # as it was set there: Accelerate enters it in the model's forward only


# The weight and the transforms with which a model was checked.
_checked: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Tensor], _Transforms]] = weakref.WeakKeyDictionary()


def model_logps(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    reduction: str = "sum",
    ignore_index: int = -100,
    temperature: float = 1.0,
    on_empty: str = "zero",
    transforms: Mapping[str, float] | None = None,
    memory_budget: int | str | None = None,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Any]:  # (B,) float32, and with return_outputs the model's outputs
    """The log-probability of each sequence's labels under a causal LM, whose logits are never built.

    Equal, value and gradient, to `sequence_logps(model(**inputs).logits, labels)`. Policy, reference and evaluation are
    all this one call; under `torch.no_grad` it costs the forward alone.

    Args:
        model: a transformers causal LM, also inside PEFT, DistributedDataParallel or FSDP2. Its head must be a plain
            linear layer that owns `weight` (V, H) and perhaps `bias` (V,), and nothing else.
        batch: `labels` (B, T) as a causal LM gets them (position t predicts label t + 1; `ignore_index` where nothing
            is scored), and what the model's forward takes: `input_ids`, `attention_mask`, `position_ids`, ... With
            `output_router_logits=True` in it, a mixture of experts has its `aux_loss` in the outputs.
        reduction, ignore_index, temperature, on_empty, memory_budget: as `linear_sequence_logps` takes them.
        transforms: what the model does to its logits, as `{"logit_scale": a, "softcap": c}` (either may be missing),
            for `c·tanh(a·x / c)`. By default it is read from the model's config. Either way it is checked.
        return_outputs: also return the model's outputs, whose `logits` are None.

    Returns:
        (B,) float32; with `return_outputs` a tuple of them and the model's own output object.

    Raises:
        ValueError, TypeError: arguments that do not fit; a model without a head, or with an encoder; a head with LoRA
            layers, quantised or sharded. Once for each model a few rows go through head and model, and must come out
            as computed here: a mismatch names the model and shows both values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers causal LM (an nn.Module), got {describe(model)}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping with input_ids and labels, got {describe(batch)}")
    if batch.get("labels") is None:
        raise ValueError(f"batch must hold labels (B, T), -100 where nothing is scored; it has {sorted(batch)}")
    labels = check_tensor("batch['labels']", batch["labels"])
    check_bool("return_outputs", return_outputs)

    causal_lm = _unwrap(model)
    head = _active_head(causal_lm)
    applied = _read_transforms(causal_lm) if transforms is None else _check_transforms(transforms)
    weight_checked, how = _checked.get(causal_lm, (None, None))
    with _without_logits(head, labels, ignore_index, weight_checked if how == applied else None) as calls:
        # Without the labels: the model would compute its own loss on them.
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs = model(**{"use_cache": False, **inputs})
    if not calls:
        raise ValueError(
            f"{type(causal_lm).__name__} did not call its output embeddings ({type(head).__name__}) in its forward (a "
            f"compiled model may have it inlined): {INSTEAD}"
        )
    call = calls[0]
    weight, bias = _parameters(head, call.hidden)
    with call.autocast:
        _check_logits(causal_lm, getattr(outputs, "logits", None), call, weight, bias, applied)
        found = linear_sequence_logps(
            call.hidden.to(weight.device),  # a model may be spread over several devices
            weight,
            labels.to(weight.device),
            bias=bias,
            reduction=reduction,
            ignore_index=ignore_index,
            on_empty=on_empty,
            temperature=temperature,
            logit_scale=applied.logit_scale,
            softcap=applied.softcap,
            memory_budget=memory_budget,
        )
    logps = cast(Tensor, found)  # no lengths were asked for
    return (logps, dataclasses.replace(outputs, logits=None)) if return_outputs else logps


def _unwrap(model: Any) -> Any:
    """The causal LM inside DistributedDataParallel and others that keep it in `module`."""
    inner = model
    while not hasattr(inner, "get_output_embeddings") and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(inner).__name__} is an encoder-decoder; model_logps takes decoder-only causal LMs")
    return inner


def _active_head(model: nn.Module) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no output embeddings (get_output_embeddings() gives {describe(head)}): load "
            "the model with AutoModelForCausalLM"
        )
    wrapper: Any = head
    saved = getattr(wrapper, "modules_to_save", None)
    if not isinstance(saved, nn.ModuleDict):
        return head
    # PEFT's wrapper of a head that is trained as a whole: it calls its copy, or the original while adapters are off.
    names = [] if wrapper.disable_adapters else list(wrapper.active_adapters)
    return saved[names[0]] if names and all(name in saved for name in names) else wrapper.original_module


def _read_transforms(model: nn.Module) -> _Transforms:
    """What the model's config says that it does to its logits."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()

    def numbers(names: tuple[str, ...]) -> list[float]:
        return [float(value) for name in names if isinstance(value := getattr(config, name, None), Real)]

    scale = 1.0
    for value in numbers(MULTIPLIERS):
        scale *= value
    for value in numbers(DIVISORS):
        scale = scale * value if getattr(config, "model_type", None) in DIVISORS_THAT_MULTIPLY else scale / value
    caps = [cap for cap in numbers(SOFTCAPS) if cap > 0]
    return _Transforms(scale, caps[0] if caps else None)


def _check_transforms(transforms: Mapping[str, float]) -> _Transforms:
    if not isinstance(transforms, Mapping):
        raise TypeError(f"transforms must be a mapping or None, got {describe(transforms)}")
    unknown = sorted(set(transforms) - {"logit_scale", "softcap"})
    if unknown:
        raise ValueError(f"transforms may have logit_scale and softcap, got {', '.join(map(repr, unknown))}")
    for name, value in transforms.items():
        check_number(f"transforms[{name!r}]", value, minimum=0, open_minimum=True)
    return _Transforms(**transforms)


@contextmanager
def _without_logits(
    head: Any, labels: Tensor, ignore_index: int, weight_checked: weakref.ref[Tensor] | None
) -> Iterator[list[_HeadCall]]:
    """The head's forward keeps what it is given in the list; it computes a few rows, or none with a checked weight."""
    calls: list[_HeadCall] = []
    original, own = head.forward, vars(head).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if calls or not (isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[:2] == labels.shape):
            seen = ", ".join(map(describe, [*args, *kwargs.values()])) or "nothing"
            raise ValueError(
                f"the head must be called once, with hidden states (B, T, H) where labels are {tuple(labels.shape)}; "
                f"call {len(calls) + 1} got {seen}. For such a model {INSTEAD}"
            )
        # A head with another weight (resized embeddings, another adapter) is another head. FSDP shows it only here.
        check = weight_checked is None or weight_checked() is not head.weight
        device = hidden.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        probes = _probes(hidden, labels, ignore_index) if check else hidden[:1, :0]
        calls.append(_HeadCall(hidden, probes, torch.autocast(device, dtype=dtype, enabled=enabled)))
        if check:
            return original(probes)
        # No row, but tied to the head's parameters and the backbone, which DDP looks for in the outputs. Autocast
        # would convert the whole weight for it.
        with torch.autocast(device, enabled=False):
            return original(probes.to(head.weight.dtype))

    head.forward = forward
    try:
        yield calls
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _probes(hidden: Tensor, labels: Tensor, ignore_index: int) -> Tensor:  # (1, R, H)
    """The rows that predict the first scored label of a few sequences, as they are and stretched."""
    some = labels[:PROBED_SEQUENCES].to(hidden.device)
    first = (some != ignore_index).int().argmax(-1)
    rows = hidden[torch.arange(len(some), device=hidden.device), (first - 1).clamp(min=0)]
    return torch.cat([rows * factor for factor in PROBE_FACTORS]).unsqueeze(0)


def _parameters(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The head's weight (V, H) and bias, if these are all it has."""
    name, parameters = type(head).__name__, dict(head.named_parameters())
    weight = parameters.get("weight")
    if weight is None or not set(parameters) <= {"weight", "bias"}:
        raise ValueError(
            "the head must own weight, and perhaps bias, and nothing else, or its other parameters would not be "
            f"trained; {name} has {', '.join(parameters) or 'none'}. Leave lm_head out of LoRA's target_modules and of "
            f"quantisation (modules_to_save trains it as a whole), or {INSTEAD}"
        )
    if hasattr(weight, "full_tensor") or weight.numel() == 0:
        raise ValueError(
            f"the head's weight is sharded (here {tuple(weight.shape)}): keep it gathered from forward to backward "
            "(FSDP2: reshard_after_forward=False for the root module; DeepSpeed: ZeRO stage 2; or leave the head "
            f"unsharded), or {INSTEAD}"
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.shape[1:] != hidden.shape[-1:]:
        raise ValueError(
            f"the head's weight must be (V, {hidden.shape[-1]}) in float32, bfloat16 or float16, for hidden states of "
            f"{describe(hidden)}; {name} has {describe(weight.data)}. Leave the head out of quantisation "
            f"(llm_int8_skip_modules), or {INSTEAD}"
        )
    return weight, parameters.get("bias")


@torch.no_grad()
def _check_logits(
    model: nn.Module, logits: Any, call: _HeadCall, weight: Tensor, bias: Tensor | None, transforms: _Transforms
) -> None:
    """Hold the model's logits of the rows that its head saw against ours; a check that says nothing is made again."""
    name, wanted = type(model).__name__, (*call.probes.shape[:-1], weight.shape[0])
    advice = f'say what it does to them with transforms={{"logit_scale": ..., "softcap": ...}}, or {INSTEAD}'
    if not isinstance(logits, Tensor) or logits.shape != wanted:
        raise ValueError(
            f"{name} was to give logits {wanted} for the rows that its head saw, and gave {describe(logits)}: it cuts, "
            f"pads or withholds them. For such a model {INSTEAD}"
        )
    if not call.probes.shape[1]:
        return
    product = linear(call.probes.to(weight.device), weight, bias)
    want, limits = transforms(product.float()), torch.finfo(product.dtype)
    got, size = logits.to(want.device).float(), want.abs().amax(-1, keepdim=True)
    # A row of zeros agrees with every scale, and one that overflows with nothing.
    largest = torch.maximum(product.float().abs().amax(-1, keepdim=True), size)
    tells = (size > 0) & (largest < limits.max / 4)
    # The model rounds a few times, in its own precision.
    near = (got - want).abs() <= max(4 * limits.eps, 1e-5) * size
    # Its roundings average out over a row, what it multiplies by does not.
    ratio = (got * want).sum(-1, keepdim=True) / want.square().sum(-1, keepdim=True)
    near &= (ratio - 1).abs() <= max(limits.eps, 1e-5)
    wrong = (tells & ~near).nonzero().tolist()
    if wrong:
        _, row, column = wrong[0]
        raise ValueError(
            f"{name} does something to its logits that is not known: row {row}, column {column} of the check is "
            f"{got[0, row, column]:.6g} in the model, and {want[0, row, column]:.6g} computed with "
            f"logit_scale={transforms.logit_scale:g}, softcap={transforms.softcap}: {advice}"
        )
    if tells.any():
        _checked[model] = (weakref.ref(weight), transforms)
