"""When each step of a training run ended, and what it was spent on: whatever trainer runs, by torch's global hooks.

A step ends when the optimiser has stepped. The time before the first forward with a gradient is not training: from the
first forward of all to it the reference's log-probs are computed, if they are, and what else stands there. Phases of a
step, on a CPU, where work is done when a call returns:

- layers: forward and backward of the policy's backbone (the model without its head); its backward begins when the
  gradient of its output is there;
- optimiser, clipping;
- rest: the head's log-probs, the loss, a reference within the step, metrics, data: all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers

PHASES = ("layers", "optimiser", "clipping")


class Clock:
    """`on_step` is called at the end of each step, outside of its time."""

    def __init__(self, device: str, on_step: Callable[[], None] = lambda: None) -> None:
        self.gpu = device.startswith("cuda")
        self.on_step = on_step
        self.first_forward: float | None = None
        self.first_step: float | None = None  # its first forward
        self.ends: list[float] = []
        self.seconds: list[float] = []
        self.phases: list[dict[str, float]] = []
        self._since = 0.0
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._begun: float | None = None  # of a forward of the backbone
        self._backbones: dict[int, bool] = {}
        self._gradient_there: float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        hooks = [
            modules.register_module_forward_pre_hook(self._before_forward),
            modules.register_module_forward_hook(self._after_forward),
            optimizers.register_optimizer_step_pre_hook(self._before_optimizer),
            optimizers.register_optimizer_step_post_hook(self._after_optimizer),
        ]
        backward = mock.patch.object(torch.autograd, "backward", self._timed_backward(torch.autograd.backward))
        clipping = mock.patch.object(
            torch.nn.utils, "clip_grad_norm_", self._timed("clipping", torch.nn.utils.clip_grad_norm_)
        )
        try:
            with backward, clipping:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def reference_seconds(self) -> float:
        """Before the first step."""
        if self.first_forward is None or self.first_step is None:
            raise RuntimeError("no model ran a forward")
        return self.first_step - self.first_forward

    def _now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return perf_counter()

    def _is_backbone(self, module: Any) -> bool:
        known = self._backbones.get(id(module))
        if known is None:
            from transformers import PreTrainedModel

            known = isinstance(module, PreTrainedModel) and module.base_model is module
            self._backbones[id(module)] = known
        return known

    def _before_forward(self, module: Any, args: Any) -> None:
        if self.first_forward is None:
            self.first_forward = self._now()
        if not torch.is_grad_enabled():
            return
        if self.first_step is None:
            self.first_step = self._since = self._now()
        if not self.gpu and self._is_backbone(module):
            self._begun = perf_counter()

    def _after_forward(self, module: Any, args: Any, output: Any) -> None:
        if self._begun is None or not torch.is_grad_enabled() or not self._is_backbone(module):
            return
        self._spent["layers"] += perf_counter() - self._begun
        self._begun = None
        hidden = output[0]
        if hidden.requires_grad:
            hidden.register_hook(self._see_gradient)

    def _see_gradient(self, gradient: torch.Tensor) -> None:
        if self._gradient_there is None:
            self._gradient_there = perf_counter()

    def _timed_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def timed(*args: Any, **kwargs: Any) -> None:
            self._gradient_there = None
            backward(*args, **kwargs)
            if self._gradient_there is not None:
                self._spent["layers"] += perf_counter() - self._gradient_there

        return timed

    def _timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            result = call(*args, **kwargs)
            self._spent[phase] += perf_counter() - start
            return result

        return timed

    def _before_optimizer(self, *_: Any) -> None:
        self._optimizer_began = perf_counter()

    def _after_optimizer(self, *_: Any) -> None:
        now = self._now()
        self._spent["optimiser"] += now - self._optimizer_began
        seconds = now - self._since
        self.seconds.append(seconds)
        if not self.gpu:
            if not self._spent["layers"]:
                raise RuntimeError("a step ended, and no forward of the backbone was seen in it")
            self.phases.append({**self._spent, "rest": seconds - sum(self._spent.values())})
        self.on_step()
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._since = perf_counter()
