"""Which model and batch a step is measured on, and the float64 truth of its loss and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cases import DTYPES
from .cases_step import StepCase
from .measure import relative_error
from .providers.base import BETA


def build_model(case: StepCase, device: str) -> Any:
    """The case's causal LM in training mode; the same random weights at every call on the same device."""
    from transformers import AutoModelForCausalLM

    shape = case.shape
    if case.frozen and shape.tied:
        raise ValueError(f"case {case.name}: the head of {case.model} is tied to its embedding and cannot be frozen")
    config = shape.config(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config.use_cache = False
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[case.dtype], attn_implementation="sdpa")
    if case.frozen:
        model.get_output_embeddings().weight.requires_grad_(False)
    if case.checkpointing:
        checkpoint_layers(model)
    return model.train()


def checkpoint_layers(model: Any) -> None:
    # The older name, where the newer one is not there yet; where it is, the older one warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def make_step_batch(case: StepCase, device: str, seed: int) -> list[Tensor]:
    """input_ids (B, T); labels (B, T), -100 in the prompt, which a pair shares; ref_logps (B,) float32.

    The two references of a pair are equal, so that a loss which cannot be given the reference's log-probs is the same
    loss without. Their size is that of uniform guessing, as the policy's is.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(case.vocab, (case.batch, case.length), generator=generator)
    prompt = case.length - case.scored_per_sequence
    input_ids[case.pairs :, :prompt] = input_ids[: case.pairs, :prompt]
    labels = input_ids.clone()
    labels[:, :prompt] = -100
    reference = torch.full((case.batch,), -case.scored_per_sequence * math.log(case.vocab))
    return [input_ids.to(device), labels.to(device), reference.to(device)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def named_parameters(model: Any) -> dict[str, nn.Parameter]:
    """One early matrix, the last norm, and the head (which may be the embedding): what the errors are taken of."""
    head = model.get_output_embeddings().weight
    some = {"q_proj": model.model.layers[0].self_attn.q_proj.weight, "norm": model.model.norm.weight}
    return {**some, "head": head} if head.requires_grad else some


@dataclass(frozen=True)
class StepTruth:
    """The loss, and the gradients of the named parameters with their places among the trainable ones, in float64."""

    batch: list[Tensor]  # what it is the truth of
    loss: float
    gradients: dict[str, Tensor]
    places: dict[str, int]

    @classmethod
    @torch.enable_grad()
    def of(cls, case: StepCase, batch: list[Tensor], device: str) -> StepTruth:
        input_ids, labels, reference = batch
        model = _widened(build_model(case, device))
        hidden = model.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state
        targets = labels[:, 1:]
        scored = targets != -100
        logits = functional.linear(hidden[:, :-1][scored], model.get_output_embeddings().weight)  # (N, V)
        tokens = logits.log_softmax(-1).gather(-1, targets[scored][:, None]).squeeze(-1)
        logps = tokens.view(case.batch, -1).sum(-1)  # every sequence scores the same number of tokens
        chosen, rejected = (logps - reference.double()).chunk(2)
        loss = functional.softplus(-BETA * (chosen - rejected)).mean()
        named = named_parameters(model)
        gradients = torch.autograd.grad(loss, list(named.values()))
        order = [id(parameter) for parameter in trainable(model)]
        places = {name: order.index(id(parameter)) for name, parameter in named.items()}
        return cls(batch, float(loss.detach()), dict(zip(named, gradients, strict=True)), places)

    def errors(self, loss: Tensor, gradients: list[Tensor]) -> dict[str, Any]:
        return {
            "value_error": abs(float(loss) - self.loss),
            "gradient_errors": {
                name: relative_error(gradients[place], self.gradients[name]) for name, place in self.places.items()
            },
        }


def _widened(model: Any) -> Any:
    """The model in float64, with norms in float64 too: transformers' RMS norms go through float32 whatever comes in."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm(module)
    return model


def _rms_norm(module: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        return module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon))

    return forward
