"""The head of a causal LM: kept from computing, its parameters found, and what the model does to its logits afterwards.

The transforms are read from the model's config, and held against the model itself before they are relied on.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastpref.checks import check_number, describe

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
class Transforms:
    """Logits are `softcap·tanh(logit_scale·x / softcap)` of what the head computes."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x * self.logit_scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


@dataclasses.dataclass
class HeadCall:
    """What the head's one call left."""

    weight: Tensor | None = None  # (V, H)
    scores: tuple[Any, ...] = ()  # what `score` gave
    logits: Tensor | None = (
        None  # (1, R, V), of the rows that are checked: what the head's weight and bias make of them
    )
    checked: bool = False  # whether there are such rows
    thread: int = dataclasses.field(default_factory=threading.get_ident)


# The weight and the transforms with which a model was checked.
checked: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Tensor], Transforms]] = weakref.WeakKeyDictionary()
# The call that scores with a head now.
_scoring: weakref.WeakKeyDictionary[nn.Module, HeadCall] = weakref.WeakKeyDictionary()


def unwrap(model: Any) -> Any:
    """The causal LM inside DistributedDataParallel and others that keep it in `module`."""
    inner = model
    while not hasattr(inner, "get_output_embeddings") and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(inner).__name__} is an encoder-decoder; model_logps takes decoder-only causal LMs")
    return inner


def active_head(model: nn.Module) -> Any:
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


def read_transforms(model: nn.Module) -> Transforms:
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
    return Transforms(scale, caps[0] if caps else None)


def check_transforms(transforms: Mapping[str, float]) -> Transforms:
    if not isinstance(transforms, Mapping):
        raise TypeError(f"transforms must be a mapping or None, got {describe(transforms)}")
    unknown = sorted(set(transforms) - {"logit_scale", "softcap"})
    if unknown:
        raise ValueError(f"transforms may have logit_scale and softcap, got {', '.join(map(repr, unknown))}")
    for name, value in transforms.items():
        check_number(f"transforms[{name!r}]", value, minimum=0, open_minimum=True)
    return Transforms(**transforms)


class _Attach(torch.autograd.Function):
    """Logits that nobody differentiates, made to hang on the scores: their gradients by way of it are zeros.

    Whoever looks at the model's outputs then finds the head's parameters and the backbone behind them: DDP, which
    searches for parameters without a gradient; FSDP2 and ZeRO-3, which gather a weight again when the gradient of a
    module's output arrives, and so before the scores' own backward reads that weight.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *scores: Tensor) -> Tensor:
        ctx.like = [(score.shape, score.dtype, score.device) for score in scores]
        return logits.clone()  # FSDP2 warns of views, and a model may write into its logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


class _Through(torch.autograd.Function):
    """Scores as they are, which wait in the backward for whatever watches the model's outputs; see _Attach."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *scores: Tensor) -> Any:
        ctx.like = logits.shape, logits.dtype, logits.device
        return tuple(score.view_as(score) for score in scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), *grads


def through(logits: Tensor, scores: tuple[Any, ...]) -> tuple[Any, ...]:
    """`scores`, those with a gradient tied to the model's `logits`."""
    tied = [score for score in scores if isinstance(score, Tensor) and score.requires_grad]
    if not (tied and logits.requires_grad):
        return scores
    after = iter(_Through.apply(logits, *tied))
    return tuple(next(after) if isinstance(x, Tensor) and x.requires_grad else x for x in scores)


@contextmanager
def without_logits(
    head: Any,
    shape: tuple[int, ...],
    probed: Callable[[], Tensor],
    weight_checked: weakref.ref[Tensor] | None,
    score: Callable[[Tensor, Tensor, Tensor | None], tuple[Any, ...]],
) -> Iterator[HeadCall]:
    """The head gives `score(hidden, weight, bias)`, and logits of a few rows, or of none with a checked weight.

    All of it inside the head's own forward: that is where a sharded weight is whole, and where autocast is as it was
    set for the model. `shape` is (B, T), `probed` gives the flat positions of the rows that are checked.
    """
    call, times = HeadCall(), 0
    around = _scoring.setdefault(head, call)  # a call in whose forward this one is made, or this one
    if around.thread != call.thread:
        raise RuntimeError("another thread is scoring with this model: let one call end before the next, under a lock")
    _scoring[head] = call
    # Inside of Accelerate's hooks, which bring an offloaded weight.
    place = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    original, own = getattr(head, place), vars(head).get(place)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal times
        # Another thread, or a call inside of this one, means the head itself. Compiled code cannot ask.
        if not torch.compiler.is_compiling() and (
            threading.get_ident() != call.thread or _scoring.get(head) is not call
        ):
            return original(*args, **kwargs)
        times += 1
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if times > 1 or not (isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[:2] == shape):
            seen = ", ".join(map(describe, [*args, *kwargs.values()])) or "nothing"
            raise ValueError(
                f"the head must be called once, with hidden states (B, T, H) where labels are {tuple(shape)}; "
                f"call {times} got {seen}. For such a model {INSTEAD}"
            )
        weight, bias = head_parameters(head, hidden)
        hidden = hidden.to(weight.device)  # a model may be spread over several devices
        # A head with another weight (resized embeddings, another adapter) is another head. FSDP shows it only here.
        call.checked = weight_checked is None or weight_checked() is not head.weight
        call.weight = weight
        if call.checked:
            with torch.no_grad():
                probes = _stretched(hidden.flatten(0, 1)[probed().to(hidden.device)])
                call.logits, shown = linear(probes, weight, bias), original(probes)
        else:
            shown = hidden.new_empty(1, 0, len(weight))
        call.scores = score(hidden, weight, bias)
        return _Attach.apply(shown, *(x for x in call.scores if isinstance(x, Tensor) and x.requires_grad))

    setattr(head, place, forward)
    try:
        yield call
    finally:
        delattr(head, place)
        if own is not None:
            setattr(head, place, own)
        if around is call:
            del _scoring[head]
        else:
            _scoring[head] = around


def first_scored(labels: Tensor, ignore_index: int) -> Tensor:  # (R,) int64
    """The flat positions of the rows that predict the first scored label of a few sequences, of labels (B, T)."""
    some = labels[:PROBED_SEQUENCES]
    first = (some != ignore_index).int().argmax(-1)
    return torch.arange(len(some), device=labels.device) * labels.shape[1] + (first - 1).clamp(min=0)


def _stretched(rows: Tensor) -> Tensor:  # (1, 3·R, H)
    return torch.cat([rows * factor for factor in PROBE_FACTORS]).unsqueeze(0)


def head_parameters(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
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
            f"the head's weight is sharded (here {tuple(weight.shape)}) even in its own forward. Under FSDP2 and "
            "ZeRO-3 it is whole there: pass the model that was wrapped (the engine, the FSDP module), no part of it. "
            "A tensor-parallel head is not: take its input and linear_sequence_logps(hidden, weight, labels, "
            f"vocab_group=...), or {INSTEAD}"
        )
    packed = hasattr(weight, "__tensor_flatten__")  # torchao's weights call themselves float32
    held = f"a {type(weight).__name__}, {describe(weight.data)}" if packed else describe(weight.data)
    if packed or not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.shape[1:] != hidden.shape[-1:]:
        raise ValueError(
            f"the head's weight must be (V, {hidden.shape[-1]}) in float32, bfloat16 or float16, for hidden states of "
            f"{describe(hidden)}; {name} has {held}. Leave the head out of quantisation "
            f"(llm_int8_skip_modules), or {INSTEAD}"
        )
    return weight, parameters.get("bias")


@torch.no_grad()
def check_logits(model: nn.Module, logits: Any, call: HeadCall, transforms: Transforms) -> None:
    """Hold the model's logits of the rows that its head saw against ours; a check that says nothing is made again."""
    assert call.weight is not None
    product = call.logits if call.logits is not None else call.weight.new_empty(1, 0, len(call.weight))
    name, wanted = type(model).__name__, product.shape
    advice = f'say what it does to them with transforms={{"logit_scale": ..., "softcap": ...}}, or {INSTEAD}'
    if not isinstance(logits, Tensor) or logits.shape != wanted:
        raise ValueError(
            f"{name} was to give logits {tuple(wanted)} for the rows that its head saw, and gave {describe(logits)}: "
            f"it cuts, pads or withholds them. For such a model {INSTEAD}"
        )
    if not call.checked:
        return
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
        checked[model] = (weakref.ref(call.weight), transforms)
