"""What the losses refuse, and the type and words with which they refuse it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpref.losses import LOSSES, coefficients, dpo_loss, dpop_loss, get_loss, preference_loss

FOUR = [torch.full((3,), -5.0) for _ in range(4)]
TWO = FOUR[:2]


def replaced(position: int, value: Any) -> list[Any]:
    return [value if i == position else t for i, t in enumerate(FOUR)]


def gradient() -> torch.Tensor:
    return torch.full((3,), -5.0, requires_grad=True)


BAD: list[tuple[list[Any], dict[str, Any], type[Exception], str]] = [
    # The log-probs
    (replaced(0, [1.0, 2.0]), {}, TypeError, r"policy_chosen must be a torch.Tensor, got \[1.0, 2.0\] \(list\)"),
    (replaced(1, None), {}, TypeError, r"policy_rejected must be a torch.Tensor, got None"),
    (replaced(0, torch.arange(3)), {}, TypeError, "policy_chosen must have a floating-point dtype, got a int64"),
    (replaced(3, torch.ones(3).bool()), {}, TypeError, "ref_rejected must have a floating-point dtype"),
    (replaced(2, -5.0), {}, TypeError, r"ref_chosen must be a torch.Tensor, got -5.0 \(float\)"),
    (replaced(0, torch.ones(3, 4)), {}, ValueError, r"shape \(B,\) with B >= 1, got .* \(3, 4\).*sequence_logps"),
    (replaced(0, torch.tensor(-5.0)), {}, ValueError, r"policy_chosen must be one log-prob a pair"),
    ([torch.ones(0)] * 4, {}, ValueError, r"B >= 1, got a float32 tensor of shape \(0,\)"),
    (replaced(1, torch.ones(4)), {}, ValueError, r"policy_rejected must have the shape.*\(3,\).*got .*\(4,\)"),
    (replaced(2, torch.ones(1)), {}, ValueError, r"ref_chosen must have the shape and device of policy_chosen"),
    (replaced(3, torch.ones(3, 1)), {}, ValueError, r"ref_rejected must have the shape"),
    (replaced(1, torch.ones(3, device="meta")), {}, ValueError, r"shape and device.*on cpu; got .* on meta"),
    (replaced(2, gradient()), {}, ValueError, r"ref_chosen requires a gradient.*pass ref_chosen.detach\(\)"),
    (replaced(3, gradient()), {}, ValueError, r"ref_rejected requires a gradient"),
    # The reference
    (TWO, {}, ValueError, "loss 'sigmoid' needs the reference's log-probs, but ref_chosen is None"),
    (replaced(3, None), {"loss": "dpop"}, ValueError, "loss 'dpop' needs .* but ref_rejected is None"),
    (TWO, {"loss": "kl_sft"}, ValueError, "loss 'kl_sft' needs the reference's log-probs"),
    (FOUR, {"loss": "simpo"}, ValueError, "loss 'simpo' has no reference: ref_chosen must be None, got a float32"),
    (FOUR, {"loss": "sft"}, ValueError, "loss 'sft' has no reference: ref_chosen must be None"),
    ([*TWO, None, FOUR[3]], {"loss": "orpo"}, ValueError, "'orpo' has no reference: ref_rejected must be None"),
    # The loss and its options
    (FOUR, {"loss": "sigmiod"}, ValueError, r"loss must be one of aot, .*, dpo, dpop, .*; got 'sigmiod'"),
    (FOUR, {"loss": 3}, TypeError, r"loss must be a string, one of aot, .*; got 3 \(int\)"),
    (FOUR, {"lam": 5.0}, TypeError, r"loss 'sigmoid' does not take 'lam'; besides beta it takes margin_clip in \(0,"),
    (FOUR, {"label_smoothing": 0.1}, TypeError, "loss 'sigmoid' does not take 'label_smoothing'"),
    (FOUR, {"loss": "hinge", "margin_clip": 1.0}, TypeError, "'margin_clip'; besides beta it takes no options"),
    (FOUR, {"loss": "dpop", "lamda": 5.0}, TypeError, r"does not take 'lamda'; .*lam in \[0, inf\), margin_clip"),
    (FOUR, {"loss": "dpop", "lam": -1.0}, ValueError, r"lam must be a finite number in \[0, inf\), got -1.0"),
    (FOUR, {"loss": "dpop", "lam": None}, TypeError, "lam must be a number, got None"),
    (FOUR, {"loss": "dpop", "lam": float("nan")}, ValueError, "lam must be a finite number"),
    (FOUR, {"loss": "robust", "label_smoothing": 0.5}, ValueError, r"label_smoothing .* in \[0, 0.5\), got 0.5"),
    (FOUR, {"loss": "cdpo", "label_smoothing": -0.1}, ValueError, r"in \[0, 0.5\), got -0.1"),
    (FOUR, {"loss": "exo_pair", "label_smoothing": 0.0}, ValueError, r"in \(0, 0.5\), got 0.0"),
    (FOUR, {"loss": "discopop", "tau": 0.0}, ValueError, r"tau must be a finite number in \(0, 1\], got 0.0"),
    (FOUR, {"loss": "discopop", "tau": 2.0}, ValueError, r"tau must be a finite number in \(0, 1\], got 2.0"),
    (FOUR, {"loss": "bco_pair", "delta": "0"}, TypeError, r"delta must be a number, got '0' \(str\)"),
    (TWO, {"loss": "simpo", "gamma": -0.5}, ValueError, r"gamma must be a finite number in \[0, inf\)"),
    (TWO, {"loss": "cpo", "alpha": True}, TypeError, r"alpha must be a number, got True \(bool\)"),
    (FOUR, {"margin_clip": 0.0}, ValueError, r"margin_clip must be a finite number in \(0, inf\), got 0.0"),
    (FOUR, {"margin_clip": float("inf")}, ValueError, "margin_clip must be a finite number"),
    # beta
    (FOUR, {"beta": 0.0}, ValueError, r"beta must be a finite number in \(0, inf\), got 0.0"),
    (FOUR, {"beta": -0.1}, ValueError, r"beta must be a finite number in \(0, inf\), got -0.1"),
    (FOUR, {"beta": float("inf")}, ValueError, "beta must be a finite number"),
    (FOUR, {"beta": "0.1"}, TypeError, r"beta must be a number, got '0.1' \(str\)"),
    (FOUR, {"beta": torch.tensor(0.1)}, TypeError, "beta must be a number, got a float32 tensor"),
]


@pytest.mark.parametrize(("logps", "keywords", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_preference_loss_refuses(
    logps: list[Any], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        preference_loss(*logps, **keywords)


@pytest.mark.parametrize(("logps", "keywords", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_coefficients_refuse_the_same(
    logps: list[Any], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    loss, others = keywords.get("loss", "sigmoid"), {k: v for k, v in keywords.items() if k != "loss"}
    with pytest.raises(error, match=message):
        coefficients(get_loss(loss), *logps, **others)


def test_the_losses_by_name_refuse_as_well() -> None:
    with pytest.raises(ValueError, match=r"lam must be a finite number in \[0, inf\)"):
        dpop_loss(*FOUR, lam=-2.0)
    with pytest.raises(TypeError, match=r"ref_chosen must be a torch.Tensor, got 0"):
        dpo_loss(*TWO, 0, 0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'label_smoothing'"):
        dpo_loss(*FOUR, label_smoothing=0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_names_the_options_that_it_takes_when_given_another(name: str) -> None:
    logps = FOUR if LOSSES[name].needs_reference else TWO
    with pytest.raises(TypeError, match=f"loss '{name}' does not take 'temperature'") as caught:
        preference_loss(*logps, loss=name, temperature=1.0)
    for option in LOSSES[name].options:
        assert f"{option.name} in {option.interval}" in str(caught.value)


def test_the_registry_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        LOSSES["mine"] = LOSSES["sigmoid"]  # type: ignore[index]
    with pytest.raises(AttributeError, match="cannot assign to field"):
        LOSSES["sigmoid"].reduction = "mean"  # type: ignore[misc]
