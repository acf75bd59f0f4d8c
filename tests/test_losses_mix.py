"""Weighted sums of losses, and kto: against formulas written out in float64, alone and from hidden states."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref import get_loss, kto_loss, linear_preference_loss, preference_loss
from fastpref.losses import LOSSES, coefficients
from fastpref.reference import kto_losses

B = 5


def pairs(seed: int = 0) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Four sums of log-probs, float64, and the two token counts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, 30, (B,), generator=generator) for _ in range(2)]
    policy = [-2.0 * count + torch.randn(B, generator=generator, dtype=torch.float64) for count in tokens]
    reference = [logps + torch.randn(B, generator=generator, dtype=torch.float64) for logps in policy]
    return [*policy, *reference], (tokens[0], tokens[1])


def test_dpo_with_a_share_of_sft_is_that_of_the_formulas_in_value_and_gradient() -> None:
    """RPO: the chosen response's cross-entropy per token, of each pair alike, whatever its length."""
    logps, tokens = pairs()
    policy = [t.requires_grad_() for t in logps[:2]]
    out = preference_loss(*logps, loss=["sigmoid", "sft"], loss_weights=[1.0, 0.2], beta=0.3, tokens=tokens)
    margin = logps[0] - logps[2] - logps[1] + logps[3]
    expected = -F.logsigmoid(0.3 * margin) - 0.2 * logps[0] / tokens[0]
    torch.testing.assert_close(out.losses, expected, rtol=1e-12, atol=0)
    found, wanted = torch.autograd.grad(out.loss, policy), torch.autograd.grad(expected.mean(), policy)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert torch.equal(out.chosen_rewards, (0.3 * (logps[0] - logps[2])).detach())


NAMES = sorted(set(LOSSES) - {"aot", "aot_unpaired"})


@pytest.mark.parametrize("name", NAMES)
def test_a_sum_is_the_sum_of_what_each_loss_is_alone(name: str) -> None:
    """Each of the log-probs that it means: sums or means, with or without the reference."""
    logps, tokens = pairs(1)

    def alone(loss: str) -> Tensor:
        own = logps if LOSSES[loss].reduction == "sum" else [t / tokens[i % 2] for i, t in enumerate(logps)]
        return preference_loss(*own[: 4 if LOSSES[loss].needs_reference else 2], loss=loss).losses

    both = preference_loss(*logps, loss=[name, "dpop", "ipo"], loss_weights=[0.5, 1, 2.0], tokens=tokens).losses
    torch.testing.assert_close(both, 0.5 * alone(name) + alone("dpop") + 2 * alone("ipo"), rtol=1e-12, atol=0)


def test_options_go_to_each_loss_that_takes_them_and_the_others_keep_their_defaults() -> None:
    logps, _ = pairs()
    alone = [preference_loss(*logps, loss="dpop", lam=3.0), preference_loss(*logps, loss="cdpo")]
    both = preference_loss(*logps, loss=["dpop", "cdpo"], lam=3.0)
    torch.testing.assert_close(both.losses, alone[0].losses + alone[1].losses)
    assert both.penalty is not None
    assert torch.equal(both.penalty, alone[0].penalty)  # type: ignore[arg-type]
    smoothed = preference_loss(*logps, loss=["cdpo", "robust"], label_smoothing=0.2)
    each = [preference_loss(*logps, loss=name, label_smoothing=0.2).losses for name in ("cdpo", "robust")]
    torch.testing.assert_close(smoothed.losses, each[0] + each[1])


def test_a_sum_says_what_it_needs() -> None:
    spec = get_loss(["dpo", "sft"], [1.0, 0.2])
    assert (spec.name, spec.reduction, spec.needs_reference, spec.separable) == ("sigmoid + 0.2 sft", "sum", True, True)
    assert get_loss(["sft", "simpo"]).reduction == "mean"
    assert not get_loss(["sft", "simpo"]).needs_reference
    assert not get_loss(["aot", "sft"]).separable
    assert get_loss(["sigmoid"]) is get_loss("sigmoid")


def test_coefficients_of_a_sum_are_its_gradients() -> None:
    logps, tokens = pairs()
    policy = [t.requires_grad_() for t in logps[:2]]
    out = preference_loss(*logps, loss=["hinge", "kl_sft"], loss_weights=[1.0, 0.5], tokens=tokens, alpha=2.0)
    wanted = torch.autograd.grad(out.losses.sum(), policy)
    spec = get_loss(["hinge", "kl_sft"], [1.0, 0.5])
    losses, *found = coefficients(spec, *logps, tokens=tokens, alpha=2.0)
    assert torch.equal(losses, out.losses)
    torch.testing.assert_close(tuple(found), wanted)


def head(seed: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (6, 7, 8), head (11, 8), labels of responses of different lengths, references (6,), and counts."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(6, 7, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 11, (6, 7), generator=generator)
    for row, start in enumerate((1, 3, 2, 5, 1, 4)):
        labels[row, :start] = -100
    reference = -10 * torch.rand(6, generator=generator, dtype=torch.float64)
    return hidden, weight, labels, reference, (labels[:, 1:] != -100).sum(1)


def sums(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = F.log_softmax((hidden @ weight.T)[:, :-1], -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return (logps * (labels[:, 1:] != -100)).sum(1)


@pytest.mark.parametrize("packed", [False, True])
def test_a_sum_from_hidden_states_counts_the_tokens_itself(packed: bool) -> None:
    hidden, weight, labels, reference, counts = head()
    options: dict[str, Any] = {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
    given, where = (hidden, labels), {}
    if packed:
        given, where = (hidden.flatten(0, 1), labels.flatten()), {"cu_seqlens": torch.arange(0, 43, 7)}
    out = linear_preference_loss(given[0], weight, given[1], reference, **options, **where)
    logps = sums(hidden, weight, labels)
    truth = preference_loss(*logps.chunk(2), *reference.chunk(2), tokens=counts.chunk(2), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(out.losses, truth.losses.detach(), rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(loss, (hidden, weight)) for loss in (out.loss, truth.loss))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"loss": ["sigmoid", "sft"]}, ValueError, r"'sigmoid \+ sft' is of sums and of means over tokens: .*tokens="),
        ({"loss": ["sigmoid", "sft"], "tokens": 3}, TypeError, "tokens must be two tensors, .* got 3"),
        ({"loss": ["sigmoid", "ipo"], "tokens": [torch.ones(2)] * 2}, ValueError, "tokens must have the shape and dev"),
        ({"loss": []}, TypeError, r"loss must be a string, one of .*got \[\]"),
        ({"loss": ["sigmoid", 3]}, TypeError, "loss must be a string, one of .*got 3"),
        ({"loss": ["sigmoid", "stf"]}, ValueError, "loss must be one of .*got 'stf'; did you mean 'sft'"),
        ({"loss": ["hinge", "cdpo"], "loss_weights": [1.0]}, ValueError, r"loss_weights must be 2 numbers, .* got 1: "),
        (
            {"loss": ["hinge", "cdpo"], "loss_weights": 1.0},
            TypeError,
            "loss_weights must be a list of numbers, got",
        ),
        ({"loss": ["hinge", "cdpo"], "loss_weights": [1, -1]}, ValueError, r"loss_weights .* in \(0, inf\), got -1"),
        ({"loss": "sigmoid", "loss_weights": [1.0]}, ValueError, r"goes with several losses, and loss is 'sigmoid' al"),
        ({"loss": ["hinge", "cdpo"], "lam": 1.0}, TypeError, r"loss 'hinge \+ cdpo' does not take 'lam'; .*label_smoo"),
        ({"loss": ["cdpo", "hinge"], "label_smoothing": 0.7}, ValueError, "label_smoothing must be .*, got 0.7"),
        ({"loss": ["sigmoid", "kto"]}, ValueError, "loss sigmoid, kto: a loss of unpaired responses stands alone"),
        ({"loss": "kto"}, ValueError, "loss 'kto' is of single responses, each labelled .*: use kto_loss"),
    ],
)
def test_a_sum_that_cannot_be_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        preference_loss(*pairs()[0], **given)


def test_from_hidden_states_a_sum_takes_no_reduction() -> None:
    hidden, weight, labels, reference, _ = head()
    with pytest.raises(ValueError, match=r"loss 'sigmoid \+ sft' takes sums: leave out reduction='mean'"):
        linear_preference_loss(hidden, weight, labels, reference, loss=["sigmoid", "sft"], reduction="mean")


@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_kto_is_the_formula_and_its_kl_a_constant_not_below_zero(shift: float) -> None:
    (policy, mismatched, reference, ref_mismatched), _ = pairs(2)
    desirable = torch.tensor([True, False, True, True, False])
    policy.requires_grad_()
    log_ratios = (mismatched - ref_mismatched + shift).requires_grad_()
    options: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    out = kto_loss(policy, reference, desirable, kl=log_ratios, **options)
    expected = kto_losses(policy, reference, desirable, log_ratios, **options)
    torch.testing.assert_close(out.losses, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(out.loss, out.losses.mean())
    assert torch.equal(out.rewards, (0.3 * (policy - reference)).detach())
    assert (out.kl.item() == 0) is (shift < 0)
    found = torch.autograd.grad(out.loss, [policy, log_ratios], allow_unused=True)
    assert found[1] is None
    torch.testing.assert_close(found[0], torch.autograd.grad(expected.mean(), policy)[0], rtol=1e-10, atol=1e-15)
    again = kto_loss(policy, reference, desirable, kl=log_ratios.mean().item(), **options)
    torch.testing.assert_close(again.losses, out.losses, rtol=1e-12, atol=0)


def test_kto_far_from_the_reference_keeps_its_gradient() -> None:
    policy = torch.tensor([-1e4, -600.0, 0.0], requires_grad=True)
    out = kto_loss(policy, torch.tensor([0.0, 0.0, -1e4]), torch.tensor([True, True, False]), kl=0.0)
    assert out.losses.tolist() == [1.0, 1.0, 1.0]
    (gradient,) = torch.autograd.grad(out.loss, policy)
    assert gradient.isfinite().all()
    assert gradient[1] < 0


def test_kto_from_hidden_states_takes_its_kl_from_the_mismatched_half() -> None:
    hidden, weight, labels, reference, _ = head()
    desirable = torch.tensor([True, False, True])
    reference = reference - 20  # a positive estimate
    out = linear_preference_loss(
        hidden, weight, labels, reference, loss="kto", desirable=desirable, undesirable_weight=2.0
    )
    policy, mismatched = sums(hidden, weight, labels).chunk(2)
    ref, ref_mismatched = reference.chunk(2)
    truth = kto_losses(policy, ref, desirable, mismatched - ref_mismatched, beta=0.1, undesirable_weight=2.0)
    torch.testing.assert_close(out.losses, truth.detach(), rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(loss, (hidden, weight)) for loss in (out.loss, truth.mean()))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert found[0][3:].abs().max() == 0  # mismatched responses are constants


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policy": [1.0]}, TypeError, "policy must be a torch.Tensor"),
        ({"policy": torch.zeros(2, 2)}, ValueError, r"one log-prob a response, shape \(N,\).* \(2, 2\)"),
        ({"reference": torch.zeros(3)}, ValueError, r"policy and reference must be one log-prob a response.* \(3,\)"),
        ({"reference": torch.zeros(2, requires_grad=True)}, ValueError, r"pass reference.detach\(\)"),
        ({"desirable": torch.ones(2)}, ValueError, "desirable must be one bool a response, .* got a float32 tensor"),
        ({"desirable": [True, False]}, TypeError, "desirable must be a torch.Tensor"),
        ({"kl": torch.zeros(0)}, ValueError, "kl must hold the log-ratio of at least one mismatched pair"),
        ({"kl": "0"}, TypeError, "kl must be a number, got '0'"),
        ({"beta": 0.0}, ValueError, "beta must be a finite number"),
        ({"desirable_weight": -1.0}, ValueError, r"desirable_weight must be .*\[0, inf\), got -1.0"),
    ],
)
def test_kto_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"policy": torch.zeros(2), "reference": torch.zeros(2), "desirable": torch.tensor([True, False]), "kl": 0.0}
    with pytest.raises(error, match=message):
        kto_loss(**{**given, **changes})


def test_kto_from_hidden_states_refuses_what_it_lacks() -> None:
    hidden, weight, labels, reference, _ = head()
    with pytest.raises(TypeError, match=re.escape("'kto' needs desirable, (P,) bool, for each response; got None")):
        linear_preference_loss(hidden, weight, labels, reference, loss="kto")
    with pytest.raises(ValueError, match="loss 'kto' needs the reference's log-probs, but ref_logps is None"):
        linear_preference_loss(hidden, weight, labels, loss="kto", desirable=torch.ones(3).bool())
