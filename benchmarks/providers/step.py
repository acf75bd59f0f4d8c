"""The ways from a causal LM and a batch to the DPO loss of a training step, as each project's trainer goes them.

A provider's `call` takes the model and the case, sets itself up, and gives the loss as a function of input_ids (B, T),
labels (B, T) and ref_logps (B,). It may change the model as its project would; the suite builds a new one for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

import fastpref

from ..cases_step import StepCase
from .base import BETA, Provider
from .liger import fused_dpo_loss
from .ours import dpo_of_logps
from .plain import compiled, plain_loss

StepLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _inputs(input_ids: Tensor) -> dict[str, Any]:
    """As a collator would give them; no sequence here is padded."""
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}


def _stateless(loss: Callable[..., Tensor]) -> Callable[[Any, StepCase], StepLoss]:
    """The provider whose loss of (model, input_ids, labels, ref_logps) needs nothing set up."""
    return lambda model, case: partial(loss, model)


def _fastpref(model: Any, input_ids: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    return dpo_of_logps(cast(Tensor, fastpref.model_logps(model, {**_inputs(input_ids), "labels": labels})), ref_logps)


def _fastpref_hidden(model: Any, input_ids: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    hidden = model.model(**_inputs(input_ids)).last_hidden_state
    weight = model.get_output_embeddings().weight
    return fastpref.linear_preference_loss(hidden, weight, labels, ref_logps, loss="sigmoid", beta=BETA).loss


def _fastpref_logits(model: Any, input_ids: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    """The logits take their gradient in place: nobody else reads them."""
    logps = fastpref.sequence_logps(model(**_inputs(input_ids)).logits, labels, inplace_backward=True)
    return dpo_of_logps(cast(Tensor, logps), ref_logps)


def _plain(model: Any, input_ids: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    return plain_loss(model(**_inputs(input_ids)).logits, labels, ref_logps)


def _compiled(model: Any, input_ids: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    return compiled(plain_loss)(model(**_inputs(input_ids)).logits, labels, ref_logps)


def _when_compiled(case: StepCase) -> str | None:
    return None if case.compiled else "not compiled in this case, where it would take most of the time"


def _liger_layers(model: Any) -> None:
    """Its kernels for norms, rotary embeddings and MLPs. They are Triton's: on a CPU the layers stay as they are."""
    if model.device.type != "cuda":
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # As transformers' use_liger_kernel does; not its cross-entropy, which is no part of DPO.
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)


def _liger(model: Any, case: StepCase) -> StepLoss:
    _liger_layers(model)
    fused = fused_dpo_loss(case.compiled)

    def loss(input_ids: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
        hidden = model.model(**_inputs(input_ids)).last_hidden_state
        value, *_ = fused(model.get_output_embeddings().weight, hidden[:, :-1], labels[:, 1:])
        return cast(Tensor, value[0] if isinstance(value, tuple) else value)

    return loss


def _trl(model: Any, case: StepCase, *, liger: bool = False) -> StepLoss:
    from .trl_trainer import build_trainer

    trainer = build_trainer(model, liger=liger)
    if liger:
        _liger_layers(model)  # in TRL the first thing that train() does

    def loss(input_ids: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
        chosen, rejected = ref_logps.chunk(2)
        batch = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "completion_mask": (labels != -100).long(),
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        return cast(Tensor, trainer.compute_loss(model, batch))

    return loss


def _transformer(model: Any, case: StepCase) -> StepLoss:
    """The layers alone; a head that is trained gets a gradient of zeros, so that clipping and optimiser see it too."""
    head = model.get_output_embeddings().weight
    fixed: list[Tensor] = []

    def loss(input_ids: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
        hidden = model.model(**_inputs(input_ids)).last_hidden_state
        if not fixed or fixed[0].shape != hidden.shape:
            fixed[:] = [torch.randn_like(hidden)]
        if head.requires_grad and not case.shape.tied:
            head.grad = torch.zeros_like(head)
        return (hidden * fixed[0]).sum(dtype=torch.float32)

    return loss


_BASE = {"transformers": "transformers"}
_LIGER = {**_BASE, "liger_kernel": "liger-kernel"}
_TRL = {**_BASE, "trl": "trl", "datasets": "datasets"}

_ours = partial(Provider, family="fastpref", modules=_BASE)
_plains = partial(Provider, family="plain", modules=_BASE)

STEP = (
    Provider("transformer", _transformer, "limit", modules=_BASE),
    _ours("fastpref", _stateless(_fastpref)),
    _ours("fastpref_hidden", _stateless(_fastpref_hidden)),
    _ours("fastpref_logits", _stateless(_fastpref_logits)),
    _plains("plain", _stateless(_plain), slow=True),
    _plains("compiled", _stateless(_compiled), rival=True, compiles=True, serves=_when_compiled),
    Provider("trl", _trl, "trl", rival=True, slow=True, modules=_TRL),
    Provider("trl_liger", partial(_trl, liger=True), "trl", rival=True, gpu_only=True, modules={**_TRL, **_LIGER}),
    Provider("liger", _liger, "liger", rival=True, slow=True, compiles=True, modules=_LIGER),
)
