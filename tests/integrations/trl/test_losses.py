"""dpop and cdpo inside TRL's trainer, against the plain-torch truth on log-probs made by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from fastpref.integrations.trl import FastPrefDPOConfig, FastPrefDPOTrainer
from fastpref.losses import preference_loss

Make = Callable[..., Any]
PAIRS, LENGTH = 3, 7


class Made(nn.Module):
    """A model whose log-probs are written down."""

    def __init__(self, mask: torch.Tensor, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mask = mask
        self.tokens = nn.Parameter(-2 * torch.rand(2 * PAIRS, LENGTH - 1, generator=generator))
        self.squares = -torch.rand(2 * PAIRS, LENGTH - 1, generator=generator) * mask

    def forward(self, **_: Any) -> FusedCausalLMOutput:
        other = torch.zeros_like(self.tokens)
        return FusedCausalLMOutput(
            log_probs=self.tokens * self.mask,
            entropy=other,
            mean_logits=other,
            is_top1=other.bool(),
            log_sum_sq_probs=self.squares,
        )


@pytest.fixture(scope="module")
def made(make_trainer: Make) -> Any:
    """Our trainer, its batch, policy and reference."""
    trainer = make_trainer(FastPrefDPOTrainer, config=FastPrefDPOConfig, dpop_lambda=2.5, label_smoothing=0.1)
    completion = torch.zeros(2 * PAIRS, LENGTH, dtype=torch.long)
    for row, (start, end) in enumerate([(2, 7), (3, 5), (1, 6), (2, 4), (3, 7), (1, 3)]):
        completion[row, start:end] = 1
    mask = completion[:, 1:]
    ids = torch.ones_like(completion)
    policy, reference = Made(mask, 1), Made(mask, 2)
    trainer.ref_model = reference
    return trainer, {"input_ids": ids, "attention_mask": ids, "completion_mask": completion}, policy, reference


@pytest.fixture
def switched(made: Any) -> Any:
    before = dict(vars(made[0]))
    yield lambda **options: (vars(made[0]).update(options), made)[1]
    vars(made[0]).update(before)


def expected_loss(made: Any, name: str, ld_alpha: float | None, weighting: bool) -> torch.Tensor:
    """Written out, a pair and a token at a time."""
    trainer, batch, policy, reference = made
    mask = batch["completion_mask"][:, 1:]
    lengths = mask.sum(1).tolist()

    def summed(tokens: torch.Tensor, row: int) -> torch.Tensor:
        scored = tokens[row][mask[row].bool()]
        shorter = min(lengths[row % PAIRS], lengths[row % PAIRS + PAIRS])
        return scored[:shorter].sum() + (1.0 if ld_alpha is None else ld_alpha) * scored[shorter:].sum()

    total = torch.zeros((), dtype=torch.float64)
    for pair in range(PAIRS):
        w, l = pair, pair + PAIRS  # noqa: E741
        p_w, p_l, r_w, r_l = (summed(m.tokens.double(), row) for m in (policy, reference) for row in (w, l))
        margin = (p_w - r_w) - (p_l - r_l)
        sigmoid = nn.functional.logsigmoid
        if name == "dpop":
            loss = -sigmoid(trainer.beta * (margin - 2.5 * (r_w - p_w).clamp(min=0)))
        else:
            loss = -0.9 * sigmoid(trainer.beta * margin) - 0.1 * sigmoid(-trainer.beta * margin)
        weight = 1.0
        if weighting:
            for row in (w, l):
                scored = (policy.tokens - policy.squares)[row][mask[row].bool()]
                weight = weight * scored.mean().exp().item()
        total = total + weight * loss / PAIRS
    return total


@pytest.mark.parametrize("name", ["dpop", "cdpo"])
@pytest.mark.parametrize(("ld_alpha", "weighting"), [(None, False), (0.3, False), (None, True), (0.3, True)])
def test_values_and_gradients_with_both_weightings(
    name: str, ld_alpha: float | None, weighting: bool, switched: Make
) -> None:
    made = switched(loss_types=[name], loss_weights=[0.7], ld_alpha=ld_alpha, use_weighting=weighting)
    trainer, batch, policy, _ = made
    loss = trainer.compute_loss(policy, batch)
    expected = 0.7 * expected_loss(made, name, ld_alpha, weighting)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, [policy.tokens])
    (wanted,) = torch.autograd.grad(expected, [policy.tokens])
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
    assert wanted.abs().max() > 0


def test_in_a_mix_each_type_counts_by_its_weight_and_the_options_stay(switched: Make) -> None:
    trainer, batch, policy, _ = switched(loss_types=["dpop", "sigmoid", "cdpo"], loss_weights=[0.5, 2.0, 0.25])
    found = trainer.compute_loss(policy, batch)
    assert trainer.loss_types == ["dpop", "sigmoid", "cdpo"]
    assert trainer.loss_weights == [0.5, 2.0, 0.25]
    total = 0.0
    for name, weight in zip(["dpop", "sigmoid", "cdpo"], [0.5, 2.0, 0.25], strict=True):
        trainer.loss_types, trainer.loss_weights = [name], [weight]
        total += trainer.compute_loss(policy, batch).item()
    assert found.item() == pytest.approx(total, rel=1e-6)


def test_penalty_and_its_share_are_logged_as_in_the_loop(switched: Make) -> None:
    trainer, batch, policy, reference = switched(loss_types=["dpop"], loss_weights=[1.0])
    for mode in ("train", "eval"):
        trainer._metrics[mode].clear()
        getattr(trainer.model, mode)()
        trainer.compute_loss(policy, batch)
        sums = [(model.tokens.detach() * model.mask).sum(1).chunk(2) for model in (policy, reference)]
        output = preference_loss(sums[0][0], sums[0][1], sums[1][0], sums[1][1], loss="dpop", lam=2.5)
        metrics = trainer._metrics[mode]
        assert output.penalty is not None
        assert metrics["dpop/penalty"] == [pytest.approx(output.penalty.mean().item(), rel=1e-5)]
        assert metrics["dpop/active_frac"] == [pytest.approx((output.penalty > 0).float().mean().item())]
        assert 0 < metrics["dpop/active_frac"][0] < 1
        assert metrics["rewards/margins"]
    trainer.model.train()


def test_with_lambda_zero_dpop_trains_as_sigmoid_does(make_trainer: Make) -> None:
    """Whole runs of both trainers, and with the reference computed in advance."""
    runs = [
        make_trainer(DPOTrainer, max_steps=4, loss_type="sigmoid"),
        make_trainer(FastPrefDPOTrainer, config=FastPrefDPOConfig, dpop_lambda=0, max_steps=4, loss_type="dpop"),
        make_trainer(FastPrefDPOTrainer, max_steps=4, loss_type="cdpo", precompute_ref_log_probs=True),
    ]
    found = []
    for trainer in runs:
        trainer.train()
        found.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-3)


def test_with_lora_the_reference_is_the_model_without_its_adapter(make_trainer: Make, make_llama: Make) -> None:
    peft = pytest.importorskip("peft", reason='needs pip install "fastpref[trl]"')
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = make_trainer(FastPrefDPOTrainer, reference=None, parts={"peft_config": config}, loss_type="dpop")
    merged = copy.deepcopy(adapted.model).merge_and_unload()
    plain = make_trainer(FastPrefDPOTrainer, model=merged, reference=make_llama(), loss_type="dpop")
    batch = next(iter(plain.get_train_dataloader()))
    losses = [trainer.compute_loss(trainer.model, batch) for trainer in (adapted, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    assert losses[0].item() != pytest.approx(0.6931, rel=1e-3)


def test_a_plain_config_has_fastprefs_lambda(make_trainer: Make) -> None:
    trainers = [
        make_trainer(FastPrefDPOTrainer, loss_type="dpop"),
        make_trainer(FastPrefDPOTrainer, config=FastPrefDPOConfig, loss_type="dpop", dpop_lambda=50.0),
    ]
    batch = next(iter(trainers[0].get_train_dataloader()))
    first, second = (trainer.compute_loss(trainer.model, batch).item() for trainer in trainers)
    assert first == second


@pytest.mark.parametrize("name", ["dpop", "cdpo"])
def test_an_f_divergence_is_refused_by_trl_itself(name: str, make_trainer: Make) -> None:
    with pytest.raises(ValueError, match=f"f_divergence_type='forward_kl'` is only supported .*{name}"):
        make_trainer(FastPrefDPOTrainer, loss_type=["sigmoid", name], f_divergence_type="forward_kl")


def test_a_loss_that_nobody_knows_is_refused_by_trl_itself(make_trainer: Make) -> None:
    trainer = make_trainer(FastPrefDPOTrainer, loss_type=["dpop", "dpo"])
    with pytest.raises(ValueError, match="Unknown loss type: dpo"):
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert trainer.loss_types == ["dpop", "dpo"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dpop_lambda": -1.0}, ValueError, "lam must be"),
        ({"dpop_lambda": "much"}, TypeError, "lam must be"),
        ({"layout": "packed"}, ValueError, "layout must be one of"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], error: Any, message: str, tmp_path: Any) -> None:
    with pytest.raises(error, match=message):
        FastPrefDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_a_smoothing_that_cdpo_cannot_have_is_refused_when_the_trainer_is_made(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="label_smoothing must be"):
        make_trainer(FastPrefDPOTrainer, config=DPOConfig, loss_type="cdpo", label_smoothing=0.7)
