"""A whole training step of DPO on a Hugging Face causal LM, beside the same step without head and loss.

A step is the forward of [chosen; rejected], the loss, the backward, gradient clipping and AdamW. The reference's
log-probs are known beforehand for everyone: each trainer can compute them once, and its documentation advises it. Only
the way from the model to the loss is a provider's own; the rest is one code for all, and no provider pays for another's
trainer.

Every call starts from the same weights: the learning rate is 0, which costs AdamW the same arithmetic, and gradients
are clipped at infinity, which costs the same and leaves them as the provider made them. So the first call, which is
held against the float64 truth, and the timed ones compute the same.

Memory is what a step takes beyond the weights and AdamW's two moments, which are there before it: activations, whatever
the loss makes, and all gradients, which are gone after it. `gradient_bytes` are those of all trained parameters.

The limit, "transformer", is the step of the layers alone, with hidden states summed against a fixed tensor. Its
clipping and AdamW go over the head too: no loss gets around those. So `head_share`, one minus the ratio to the limit,
is what the head's products and the loss take of a step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cases_step import StepCase, step_cases
from ..inputs_step import StepTruth, build_model, make_step_batch, trainable
from ..measure import release
from ..providers.base import Provider
from .base import Inputs, Output, Suite, beside

LIMIT = "transformer"
BESIDE = beside("step")
# A longer case is held against the truth on batches of this length: attention in float64 grows with the square of it.
CHECKED_LENGTH = 1024


class Stepper:
    """A model of its own, an optimiser and a provider's loss; `step` is the whole step."""

    def __init__(self, case: StepCase, provider: Provider, device: str) -> None:
        self.key = (case, provider.name)
        self.model = build_model(case, device)
        # Liger puts its own functions into the module that a model's class comes from, where the next model finds them.
        self.module = sys.modules[type(self.model).__module__]
        self.saved = dict(vars(self.module))
        self.parameters = trainable(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)
        try:
            self.loss = provider.call(self.model, case)
        except BaseException:
            self.close()
            raise
        self._make_moments()

    def _make_moments(self) -> None:
        """A step on zeros: AdamW allocates at its first one, and that is not to count as a step's memory."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, batch: Sequence[Tensor]) -> Output:
        """The loss, and all gradients as the optimiser was given them, in the order of `parameters`."""
        loss = self.loss(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, float("inf"))
        self.optimizer.step()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.forget_gradients()
        return Output(loss.detach(), gradients)

    def close(self) -> None:
        for name in set(vars(self.module)) - set(self.saved):
            delattr(self.module, name)
        vars(self.module).update(self.saved)


class StepSuite(Suite):
    name = "step"
    case_type = StepCase
    limit = "the same step without head and loss"
    limit_provider = LIMIT
    work_unit = "FLOP"
    shape = (
        "model",
        "batch",
        "length",
        "layers",
        "hidden",
        "vocab",
        "share",
        "dtype",
        "scored_rows",
        "frozen",
        "checkpointing",
    )
    limit_shape = shape
    gradient_names = ("q_proj", "norm", "head")
    extra = {"tokens_per_second": None, "head_share": None, "checked_length": None}  # noqa: RUF012 (a ClassVar)

    def __init__(self, providers: Sequence[Provider]) -> None:
        super().__init__(providers)
        self._stepper: Stepper | None = None
        self._limit_ms: dict[StepCase, float] = {}

    def cases(self, device_class: str, *, memory: int) -> list[StepCase]:
        return step_cases(device_class, memory=memory)

    def entries(self, case: StepCase, device_class: str) -> list[tuple[str, str]]:
        beside = (name for name in BESIDE[case.beside] if case.compiled or name != "compiled")
        return [(name, "train") for name in (LIMIT, *beside)]

    def load(self, case: StepCase, device: str, *, truth: bool) -> Inputs:
        self.forget()
        sets: list[list[Any]] = [make_step_batch(case, device, seed) for seed in range(2 if truth else 1)]
        if not truth:
            return Inputs(sets, None)
        batch = sets[0]
        if case.length > CHECKED_LENGTH:
            case = replace(case, length=CHECKED_LENGTH, pairs=1)
            batch = make_step_batch(case, device, 0)
        found = StepTruth.of(case, batch, device)
        release()
        return Inputs(sets, found)

    def prepare(self, case: StepCase, provider: str, mode: str, inputs: Inputs, device: str) -> None:
        self._of(case, provider, device)

    def call(self, case: StepCase, provider: str, mode: str, inputs: list[Any]) -> Output:
        if mode != "train":
            raise ValueError(f"the suite step has the mode train alone, got {mode!r}")
        return self._of(case, provider, inputs[0].device.type).step(inputs)

    def errors(self, case: StepCase, truth: StepTruth, output: Output) -> dict[str, Any]:
        if self._stepper is None or output.value is None:
            raise RuntimeError("errors are those of a call just made")
        if self._stepper.key[1] == LIMIT:
            return {}
        if truth.batch[0].shape != (case.batch, case.length):
            output = self._stepper.step(truth.batch)
        if output.value is None:
            raise ValueError("a provider of steps gave no loss")
        return {**truth.errors(output.value, output.gradients), "checked_length": truth.batch[0].shape[1]}

    def work(self, case: StepCase, mode: str) -> int:
        return case.body_operations + case.head_operations

    def weighs(self, case: StepCase, provider: str, device: str) -> bool:
        return case.weighed or device != "cpu"

    def facts(self, case: StepCase, provider: str, mode: str, median_ms: float) -> dict[str, Any]:
        facts: dict[str, Any] = {"tokens_per_second": case.tokens / median_ms * 1e3}
        if provider == LIMIT:
            self._limit_ms[case] = median_ms
            # It leaves the head's part undone.
            return {**facts, "work": case.body_operations, "rate": case.body_operations / median_ms / 1e9}
        if case in self._limit_ms:
            facts["head_share"] = 1 - self._limit_ms[case] / median_ms
        return facts

    def _of(self, case: StepCase, provider: str, device: str) -> Stepper:
        if self._stepper is None or self._stepper.key != (case, provider):
            self.forget()
            self._stepper = Stepper(case, self.providers[provider], device)
        return self._stepper

    def forget(self) -> None:
        """The last provider's model: two of them may not fit."""
        if self._stepper is not None:
            self._stepper.close()
            self._stepper = None
            release()
