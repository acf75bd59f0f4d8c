"""Noise of training mode: what is switched off, and the check before the first step that none is left.

Preference losses compare log-probs with those of a reference: noise in them is noise in the loss. The model stays in
training mode, which gradient checkpointing asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastpref.losses import preference_loss
from fastpref.training.precision import autocasts
from fastpref.training.run import Run
from fastpref.training.step import batch_logps

# Numbers by which a model of experts shakes what its router sees (Mixtral, MiniMax, Phi-MoE, DBRX).
JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
# Routers that draw the experts at random in training mode, by no number that could be set to 0.
DRAWING_ROUTERS = ("PhimoeTopKRouter",)
PAIRS = 2  # that the check looks at: the shortest of the first step
# What rounding may change in a log-prob, as a share of it: the rows of a batch, or a kernel, may be others.
ROUNDING, ROUNDING_16_BIT = 1e-4, 1e-2

# By model, the config entries that were set to 0: (config, name, value).
_switched_off: WeakKeyDictionary[nn.Module, list[tuple[Any, str, float]]] = WeakKeyDictionary()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0 in modules, where a module keeps it as a number, and in configs.

    Attentions keep numbers; Falcon and Persimmon look into their config in each forward. `restored_config` brings the
    config's back. Router jitter is set to 0 too, and routers that draw experts run as in evaluation mode.
    """
    configs = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("drop" in name or name in JITTER) and isinstance(value, float):
                setattr(module, name, 0.0)
        if type(module).__name__ in DRAWING_ROUTERS:
            module.register_forward_pre_hook(_as_in_evaluation)
        if hasattr(module, "config") and hasattr(module.config, "to_dict"):
            configs[id(module.config)] = module.config
    found = [
        (config, name, value)
        for config in configs.values()
        for name, value in vars(config).items()
        if "drop" in name and isinstance(value, float) and value
    ]
    _set(found, zero=True)
    _switched_off.setdefault(model, []).extend(found)


def _as_in_evaluation(module: nn.Module, args: Any) -> None:
    module.training = False


def _set(entries: list[tuple[Any, str, float]], *, zero: bool) -> None:
    for config, name, value in entries:
        setattr(config, name, 0.0 if zero else value)


def restore_config(model: nn.Module) -> None:
    """Bring the model's config back for good: it may be the caller's."""
    for module in model.modules():
        _set(_switched_off.pop(module, []), zero=False)


@contextmanager
def restored_config(model: nn.Module) -> Iterator[None]:
    """The model's config as it came, to be saved; then dropout is off in it again."""
    entries = [entry for module in model.modules() for entry in _switched_off.get(module, [])]
    _set(entries, zero=False)
    try:
        yield
    finally:
        _set(entries, zero=True)


def check_start(run: Run) -> None:
    """Hold the policy in training mode against evaluation mode, and both against the reference, before the first step.

    A few short pairs, in three forwards that every process makes. Lines say where log-probs that should be the same
    are not; a run that resumes, or keeps its dropout, is not looked at.
    """
    if run.state is not None or not run.config.disable_dropout:
        return
    pairs = sorted((run.pairs[index] for index in run.plan.step(0)), key=lambda pair: pair.length)[:PAIRS]
    model, batch = run.model, run.collate(pairs)

    def logps() -> Tensor:  # (P, 2)
        return torch.stack(batch_logps(model, batch, run.config, reduction=run.spec.reduction), dim=1)

    training, device = model.training, run.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        model.train()
        first, again, drawing = logps(), logps(), []
        model.eval()
        quiet = logps()
        noisy = torch.tensor(float(_beyond(run, first, again) or _beyond(run, first, quiet)), device=device)
        if run.accelerator.reduce(noisy, "sum"):  # all processes make the next forward, or none
            model.train()
            with _watched(model, device) as drawing:
                logps()
            run.console.say(_on_noise(run, batch.rows, torch.stack([quiet, first, again]), drawing))
        model.train(training)
    if not run.starts_at_reference:
        return
    assert batch.ref_chosen is not None
    assert batch.ref_rejected is not None  # the loss has a reference
    start = torch.stack([batch.ref_chosen, batch.ref_rejected], dim=1)
    if _beyond(run, first, start):
        said = ""
        if not run.spec.unpaired:
            options: dict[str, Any] = dict(run.config.loss_arguments)
            if run.spec.needs_tokens:
                options["tokens"] = batch.scored_tokens
            chosen, rejected = start.unbind(1)
            losses = (preference_loss(x[:, 0], x[:, 1], chosen, rejected, **options).losses for x in (first, start))
            loss, equal = (values.mean() for values in losses)
            said = f"; the loss of {len(pairs)} pairs is {loss:.4f}, where equal log-probs give {equal:.4f}"
        worst = (first - start).abs().amax(1).argmax()
        run.console.say(
            "at the first step policy and reference should be the same function, and are not: of row "
            f"{batch.rows[worst]} the log-probs are {_pair(first[worst])} and {_pair(start[worst])} (chosen, "
            f"rejected){said}"
        )


def _beyond(run: Run, one: Tensor, other: Tensor) -> bool:
    """Whether log-probs differ by more than rounding."""
    wide = all(parameter.dtype in (torch.float32, torch.float64) for parameter in run.model.parameters())
    share = ROUNDING if wide and not autocasts(run.config, run.accelerator.device) else ROUNDING_16_BIT
    return not torch.allclose(one, other, rtol=share, atol=share, equal_nan=True)


@contextmanager
def _watched(model: nn.Module, device: torch.device) -> Iterator[list[str]]:
    """Collects the innermost modules whose forward draws random numbers."""
    found: list[str] = []
    entered: list[tuple[Tensor, int]] = []  # of each forward that has begun: random state, and how many were found

    def state() -> Tensor:
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def enter(module: nn.Module, args: Any) -> None:
        entered.append((state(), len(found)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        before, count = entered.pop()
        if len(found) == count and not torch.equal(before, state()):
            found.append(f"{names[module]} ({type(module).__name__})")

    names = {module: name for name, module in model.named_modules()}
    hooks = [hook for m in names for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _on_noise(run: Run, rows: list[int], logps: Tensor, drawing: list[str]) -> str:
    """A line; `logps` (3, P, 2) are those of evaluation mode and twice those of training mode."""
    worst = (logps - logps[0]).abs().amax((0, 2)).argmax()
    quiet, first, again = (_pair(values[worst]) for values in logps)
    where = f"random numbers are drawn in {drawing[0]}" if drawing else "no random number is drawn"
    others = f" and {len(drawing) - 1} more" if len(drawing) > 1 else ""
    return (
        f"training mode computes something else than evaluation mode, with dropout switched off: of row {rows[worst]} "
        f"the log-probs (chosen, rejected) are {quiet} in evaluation, {first} and {again} in training mode; {where}"
        f"{others}. The loss has this noise in it"
    )


def _pair(logps: Tensor) -> str:
    chosen, rejected = logps.tolist()
    return f"({chosen:.4f}, {rejected:.4f})"
