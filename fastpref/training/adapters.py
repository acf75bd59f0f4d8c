"""Adapters (PEFT): which the run starts with, which it makes, and what else of the model is trained."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from fastpref.training.config import ALL_LINEAR, TrainConfig

Say = Callable[[str], None]

REFERENCES = ("reference", "ref")  # names of an adapter that is the reference; TRL's is "ref"
BASE = "base"  # the run folder's, with the base that an adapter was merged into
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Parts of the names of modules that choose experts: what they give is no matrix product alone.
ROUTERS = ("gate", "router", "shared_expert_gate")
# Layers of a Mamba mixer, whose kernels read the weights: an adapter beside them would not be seen.
MAMBA_READS = ("out_proj", "x_proj", "dt_proj", "conv1d")


def is_adapted(model: Any) -> bool:
    """Whether the model is one of PEFT's; without importing PEFT, which such a model has done."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapters_wanted(config: TrainConfig, given: Any) -> bool:
    """Whether the run trains adapters: its own, or those of the model that it was given or that it names."""
    incoming = is_adapted(given) or (config.model is not None and adapter_base(config.model) is not None)
    return config.lora_rank > 0 or (incoming and config.adapter == "continue")


def active_adapters(model: Any) -> list[str]:
    """The names of the adapters that the model computes with, PEFT's own or those that transformers has put in."""
    if is_adapted(model):
        return list(model.active_adapters)
    return list(model.active_adapters()) if getattr(model, "_hf_peft_config_loaded", False) else []


def adapter_base(source: str) -> str | None:
    """The base that the adapter in a folder (or of that hub name) was made for; None where that is a whole model."""
    if Path(source).is_dir():
        file = find_adapter_config_file(source)
    else:
        file = None if Path(source).is_absolute() else _config_of_hub(source)
    if file is None:
        return None
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    wanted = "set base_model_name_or_path in its adapter_config.json to the folder or hub name of the base"
    if not base:
        raise ValueError(f"{source!r} is an adapter that names no base: {wanted}")
    if Path(base).is_absolute() and not Path(base).exists():
        raise FileNotFoundError(f"{source!r} is an adapter on {base!r}, and there is no such folder: {wanted}")
    return base


@functools.cache  # without a network each question takes many seconds
def _config_of_hub(name: str) -> str | None:
    return find_adapter_config_file(name)


def has_tokenizer(source: str) -> bool:
    return any(has_file(source, file) for file in TOKENIZER_FILES)


def with_incoming(model: Any, config: TrainConfig, *, say: Say) -> Any:
    """The base with the adapter that `config.model` names on it, or merged into it; a whole model as it is.

    Args:
        model: the base, or a model object that was given.
    """
    if config.model is not None and adapter_base(config.model) is not None:
        _check_rank(config, f"model={config.model!r} is an adapter")
        model = _attach(model, config.model)
    elif is_adapted(model):
        _check_rank(config, "the model has PEFT adapters")
    if config.adapter == "continue":
        return model
    if not is_adapted(model):
        raise ValueError(f"adapter='merge' goes with a model that is an adapter; {config.model or 'the model'} is none")
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("adapter='merge' cannot be: the adapter is a prompt, not a change of weights; leave it out")
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ValueError("adapter='merge' would round the adapter to a quantised base: merge it into the plain base")
    which, model = ", ".join(model.active_adapters), model.merge_and_unload().requires_grad_(True)
    say(f"adapter=merge: the adapter ({which}) is merged into its base, and that is what is trained from")
    if config.lora_rank:
        model.name_or_path = str(Path(str(config.output_dir)).resolve() / BASE)
        say(f"the merged base is saved in {model.name_or_path}: the new adapter goes on top of it")
    return model


def _attach(model: Any, source: str) -> Any:
    """The adapter on its base, to be trained; of a model without numbers (on the meta device) the shapes alone."""
    peft = _peft()
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    saved = [w for key, w in peft.load_peft_weights(source, device="cpu").items() if key.endswith(f".{name}.weight")]
    if saved and len(saved[0]) != len(embeddings.weight):  # tokens were added to the base
        model.resize_token_embeddings(len(saved[0]))
    if model.device.type != "meta":
        return peft.PeftModel.from_pretrained(model, source, is_trainable=True)
    settings = peft.PeftConfig.from_pretrained(source)
    settings.inference_mode = False
    return peft.get_peft_model(model, settings)


def keeps_merged_base(config: TrainConfig) -> bool:
    """Whether the run's adapter goes on a base that is saved nowhere else."""
    return config.adapter == "merge" and config.lora_rank > 0


def _check_rank(config: TrainConfig, what: str) -> None:
    if config.lora_rank and config.adapter == "continue":
        raise ValueError(
            f"{what}, which is trained on with its own rank, and lora_rank={config.lora_rank} asks for a new one: "
            "leave lora_rank out, or set adapter=merge to merge the old one into its base and train a new one on top"
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('adapters need PEFT, which is not installed: pip install "fastpref[train]"') from error
    return peft


def choose_trained(model: Any, config: TrainConfig) -> tuple[Any, list[str]]:
    """The model with what the options leave untrained frozen, and lines that say what a user may not expect.

    A PeftModel is taken as it is: its adapters say what is trained, but for one that is the reference.
    """
    lines: list[str] = []
    if getattr(model, "_hf_peft_config_loaded", False) and config.lora_rank:
        raise ValueError(
            f"transformers has loaded adapters into the model, and lora_rank={config.lora_rank} asks for others: give "
            "the adapter's folder as model, or PeftModel.from_pretrained(base, folder, is_trainable=True)"
        )
    if config.lora_rank:
        model, lines = add_lora(model, config)
    named = reference_adapter(model)
    for name, parameter in model.named_parameters() if named is not None else ():
        if named in name.split("."):
            parameter.requires_grad_(False)
    if config.freeze_head:
        lines += freeze_head(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        hint = "load the adapter with is_trainable=True" if active_adapters(model) else "requires_grad_(True) undoes it"
        raise ValueError(f"no weight of the model is trained, all are frozen: {hint}")
    return model, lines


def add_lora(model: Any, config: TrainConfig) -> tuple[Any, list[str]]:
    """The model with LoRA layers (PEFT) on the targets, everything else frozen; lines for the user."""
    from transformers.pytorch_utils import Conv1D

    peft = _peft()
    modules, parameters = _targets(model, config.lora_target_modules)
    sizes = _matrices(model)
    # GPT-2's layers keep their weights the other way round; PEFT would find that out and warn.
    turned = any(isinstance(module, Conv1D) for module in modules.values())

    def add(model: Any, modules: Collection[str], parameters: Collection[str]) -> Any:
        options: dict[str, Any] = {"target_parameters": sorted(parameters)} if parameters else {}
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
            target_modules=sorted(modules),
            fan_in_fan_out=turned,
            **options,
        )
        return peft.get_peft_model(model, lora)

    with warnings.catch_warnings():  # of rank_pattern, which PEFT sets itself where it passes over layers
        warnings.simplefilter("ignore", RuntimeWarning)
        model = add(model, modules, parameters)
    # PEFT takes gate_proj, up_proj, down_proj for what experts were called before transformers stacked them, and passes
    # over dense layers and shared experts of these names; as parameters it takes them.
    passed = {name for name in modules.keys() - set(model.base_model.targeted_module_names) if _is_plain(modules[name])}
    if passed:
        model = add(model.unload(), modules.keys() - passed, parameters | {f"{name}.weight" for name in passed})
    adapted = {f"{name}.weight" for name in model.base_model.targeted_module_names}
    adapted |= set(model.base_model.targeted_parameter_names)
    reached = sum(size for name, size in sizes.items() if name in adapted)
    share = reached / max(sum(sizes.values()), 1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    lines = [
        f"LoRA of rank {config.lora_rank}: {trained:,} weights are trained, {frozen:,} stay as they are; it reaches "
        f"{share:.0%} of the model's matrix weights (embeddings and head apart)"
    ]
    if share < 0.5:
        largest = max((name for name in sizes if name not in adapted), key=lambda name: sizes[name])
        lines.append(
            f"LoRA reaches less than half of the model's matrix weights, {reached:,} of {sum(sizes.values()):,}: the "
            f"largest that it leaves out is {largest}; lora_target_modules names what gets an adapter"
        )
    return model, lines


def _is_plain(module: nn.Module) -> bool:
    """Whether its weight is a matrix of numbers as they are, not quantised."""
    weight: Any = module.weight
    return bool(weight.is_floating_point()) and weight.dim() == 2


def _matrices(model: nn.Module) -> dict[str, int]:
    """Weights in each matrix of the model, or stack of them, by name; without embeddings, head and what is tied."""
    head = output_head(model)
    apart = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(getattr(head, "weight", None))}
    sizes = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in apart:
                packed = name == "weight" and isinstance(module, nn.Linear)  # a quantised one has fewer elements
                size = module.in_features * module.out_features if packed else parameter.numel()
                sizes[f"{prefix}.{name}"] = size
    return sizes


def _targets(model: Any, names: str) -> tuple[dict[str, nn.Module], set[str]]:
    """Modules that get an adapter, by their full names, and the names of parameters that hold all experts' matrices.

    The head never does: the linear path reads the head's weight, where an adapter beside it would not be seen.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if names.strip() == ALL_LINEAR:
        return _all_linear(model, modules), set(_experts(model, modules))
    head = output_head(model)
    experts, linear = _experts(model, modules), _all_linear(model, modules)
    found: dict[str, nn.Module] = {}
    stacks: set[str] = set()
    for wanted in (part.strip() for part in names.split(",")):
        matching = {name: m for name, m in modules.items() if wanted and f".{name}".endswith(f".{wanted}")}
        of_experts = {name for name in experts if wanted and f".{name}".endswith(f".{wanted}")}
        if not matching and not of_experts:
            leaves = sorted({name.rpartition(".")[2] for name in (*linear, *experts)})
            raise ValueError(
                f"lora_target_modules: {wanted!r} matches no module of {type(model).__name__}; its linear layers are "
                f"{', '.join(leaves)}"
            )
        for name, module in matching.items():
            if head is not None and getattr(module, "weight", None) is head.weight:
                tied = "" if module is head else ", as does what is tied to it"
                raise ValueError(
                    f"lora_target_modules: {wanted!r} is the head ({name}), which stays without an adapter{tied}: "
                    "leave it out"
                )
            why = _why_not(name, modules)
            if why is not None:
                raise ValueError(
                    f"lora_target_modules: {wanted!r} matches {name}, {why}: leave it out (all-linear does)"
                )
        found |= matching
        stacks |= of_experts
    return found, stacks


def _all_linear(model: Any, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The linear layers of the text model, of a vision-language model too; no head, no router."""
    from transformers.pytorch_utils import Conv1D

    head, text = output_head(model), _text_modules(model)
    return {
        name: m
        for name, m in modules.items()
        if isinstance(m, (nn.Linear, Conv1D)) and m is not head and id(m) in text and _why_not(name, modules) is None
    }


def _experts(model: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Names of the text model's parameters (experts, ., .), in which transformers keeps the matrices of all experts."""
    text = _text_modules(model)
    return [
        f"{name}.{own}"
        for name, module in modules.items()
        if id(module) in text and not isinstance(module, nn.modules.conv._ConvNd)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    ]


def _text_modules(model: Any) -> set[int]:
    several = model.config.get_text_config() is not model.config  # with a tower for images or sound beside the text
    return {id(module) for module in (model.get_decoder() if several else model).modules()}


def _why_not(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Why the module of this name can have no adapter, in words; None where it can."""
    parent, _, own = name.rpartition(".")
    if set(name.split(".")) & set(ROUTERS):
        return "which chooses experts"
    mixer = modules.get(parent)
    if own in MAMBA_READS and hasattr(mixer, "A_log") and hasattr(mixer, "D"):
        return "whose weight Mamba's kernels read themselves, without an adapter"
    return None


def output_head(model: Any) -> Any:
    """The model's output embeddings, None where it has none."""
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def freeze_head(model: Any) -> list[str]:
    """Freeze the output embeddings, and with them input embeddings that share the weight; lines for the user."""
    head = output_head(model)
    if not isinstance(head, nn.Module):
        raise ValueError(f"freeze_head: {type(model).__name__} has no output embeddings to freeze")
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
        raise ValueError(
            "freeze_head: the model's adapter trains the head (modules_to_save): leave freeze_head out, or the head "
            "out of modules_to_save"
        )
    head.requires_grad_(False)
    inputs = model.get_input_embeddings()
    if getattr(inputs, "weight", None) is not getattr(head, "weight", head):
        return []
    return ["freeze_head: the input embeddings are tied to the head, so they are frozen too"]


def reference_adapter(model: Any) -> str | None:
    """The adapter that by its name is the reference, where the policy is another one."""
    if not (is_adapted(model) and hasattr(model.base_model, "set_adapter")):
        return None
    named = [name for name in REFERENCES if name in model.peft_config]
    return named[0] if named and named[0] not in model.active_adapters else None


@contextmanager
def adapter_active(model: Any, name: str | None) -> Iterator[None]:
    """The model with this adapter in place of its active ones; with None as it is. What is trained stays the same."""
    if name is None:
        yield
        return
    before, required = list(model.active_adapters), [(p, p.requires_grad) for p in model.parameters()]

    def switch(names: list[str]) -> None:
        model.base_model.set_adapter(names)
        for parameter, value in required:  # at once: FSDP2 takes over what it sees in the first forward
            parameter.requires_grad_(value)

    switch([name])
    try:
        yield
    finally:
        switch(before)


def plain_names(model: Any) -> Callable[[str], str | None]:
    """What gives the name that a weight has without adapters; None for an adapter's own weights."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix: list[str] = []
    inner: dict[str, str] = {}
    # PEFT's layers hold the original as `base_layer`, its wrappers of modules trained as a whole as `original_module`.
    for name, module in model.named_modules():
        if module is base:
            prefix = name.split(".") if name else []
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            inner[name] = "base_layer"
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            inner[name] = "original_module"

    def plain(name: str) -> str | None:
        parts = name.split(".")
        within = [inner.get(".".join(parts[:place])) for place in range(len(parts))]
        if parts[: len(prefix)] != prefix or any(w not in (None, p) for w, p in zip(within, parts, strict=True)):
            return None
        return ".".join([part for wanted, part in zip(within, parts, strict=True) if wanted is None][len(prefix) :])

    return plain


def say_how_to_merge(model: Any, folder: Path, *, say: Say) -> None:
    """A line on the adapter saved in `folder`; none for a model that was saved whole."""
    if not is_adapted(model):
        return
    name, base = model.active_adapters[0], model.active_peft_config.base_model_name_or_path
    folder = folder if name == "default" else folder / name  # as PEFT saves them
    if base:
        whose, load = f"that of {base}", f'AutoPeftModelForCausalLM.from_pretrained("{folder}")'
        kind = type(model.get_base_model())
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING.values():  # a vision-language model, whose text part that would load
            load = f'PeftModel.from_pretrained({kind.__name__}.from_pretrained("{base}"), "{folder}")'
    else:
        whose, load = "without its base", f'PeftModel.from_pretrained(base, "{folder}")'
    say(
        f"{folder} holds the adapter alone, {whose}; to merge it (with PEFT): "
        f'{load}.merge_and_unload().save_pretrained("merged")'
    )
