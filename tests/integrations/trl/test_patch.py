"""patch_trl and unpatch_trl: what existing scripts get, and that TRL is itself again afterwards."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trl
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from fastpref.integrations.trl import FastPrefDPOTrainer, patch_trl, unpatch_trl

Make = Callable[..., Any]
ORIGINALS = {name: vars(DPOTrainer)[name] for name in ("__init__", "_compute_loss")}
ADD = dpo_trainer.add_fused_lm_head


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch_trl()
    assert_is_trls_own()


def assert_is_trls_own() -> None:
    assert {name: vars(DPOTrainer)[name] for name in ORIGINALS} == ORIGINALS
    assert all(vars(DPOTrainer)[name] is method for name, method in ORIGINALS.items())
    assert dpo_trainer.add_fused_lm_head is ADD
    assert trl.DPOTrainer is DPOTrainer is dpo_trainer.DPOTrainer


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_a_script_that_imported_the_class_before_gets_the_same_run_faster_heads_and_dpop(make_trainer: Make) -> None:
    expected = losses_of(make_trainer(DPOTrainer, max_steps=3))
    patch_trl()
    patched = make_trainer(DPOTrainer, max_steps=3)
    assert type(patched) is DPOTrainer
    assert patched.model.fastpref_heads
    assert patched.ref_model.fastpref_heads
    assert losses_of(patched) == pytest.approx(expected, rel=1e-3)
    ours = losses_of(make_trainer(FastPrefDPOTrainer, max_steps=3, loss_type="dpop"))
    assert losses_of(make_trainer(DPOTrainer, max_steps=3, loss_type="dpop")) == ours
    namespace: dict[str, Any] = {}
    exec("from trl import DPOTrainer", namespace)
    assert namespace["DPOTrainer"] is DPOTrainer


def test_the_lines_of_the_page_on_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "trainers.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "patch_trl" in code]
    names: dict[str, Any] = {}
    exec(code.replace('"runs/dpop"', '"runs/dpop", use_cpu=True, bf16=False'), names)
    assert vars(DPOTrainer)["_compute_loss"] is not ORIGINALS["_compute_loss"]
    assert (names["args"].loss_type, names["args"].dpop_lambda) == (["dpop", "sft"], 5.0)


def test_patching_twice_is_patching_once() -> None:
    patch_trl()
    once = {name: vars(DPOTrainer)[name] for name in ORIGINALS}
    patch_trl()
    assert {name: vars(DPOTrainer)[name] for name in ORIGINALS} == once
    assert once != ORIGINALS
    unpatch_trl()
    assert_is_trls_own()


def test_unpatching_without_a_patch_and_twice_is_harmless() -> None:
    unpatch_trl()
    assert_is_trls_own()
    patch_trl()
    unpatch_trl()
    unpatch_trl()
    assert_is_trls_own()


def test_a_trainer_made_meanwhile_goes_on_after_unpatching(make_trainer: Make) -> None:
    patch_trl()
    trainer = make_trainer(DPOTrainer, loss_type=["dpop", "sigmoid"])
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, batch).item()
    unpatch_trl()
    assert trainer.compute_loss(trainer.model, batch).item() == expected
    plain = make_trainer(DPOTrainer)
    assert not hasattr(plain.model, "fastpref_heads")


def test_derived_trainers_are_patched_and_keep_their_own_methods(make_trainer: Make) -> None:
    class Doubled(DPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: Any) -> Any:
            return 2 * super()._compute_loss(model, inputs, return_outputs)

    patch_trl()
    plain, doubled = make_trainer(DPOTrainer, loss_type="dpop"), make_trainer(Doubled, loss_type="dpop")
    batch = next(iter(plain.get_train_dataloader()))
    one, two = (trainer.compute_loss(trainer.model, batch).item() for trainer in (plain, doubled))
    assert two == 2 * one
    assert doubled.model.fastpref_heads


def test_our_own_trainer_is_the_same_while_trls_is_patched(make_trainer: Make) -> None:
    def loss() -> tuple[float, int, list[float]]:
        trainer = make_trainer(FastPrefDPOTrainer, loss_type="dpop")
        batch = next(iter(trainer.get_train_dataloader()))
        found = trainer.compute_loss(trainer.model, batch).item()
        return found, len(trainer.model.fastpref_heads), trainer._metrics["train"]["dpop/penalty"]

    before = loss()
    patch_trl()
    assert loss() == before
    assert before[1] == len(before[2]) == 1


def test_a_trainer_that_cannot_be_made_leaves_trl_as_it_was(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="must be greater than 0"):
        make_trainer(FastPrefDPOTrainer, loss_type="exo_pair")
    assert_is_trls_own()


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "2.0.0", "1.160.0"])
def test_another_version_is_named_with_the_remedy_and_nothing_is_patched(
    found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf'TRL {found} is installed: pip install "trl==1\.16\.\*"'):
        patch_trl()
    assert_is_trls_own()


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for name in [name for name in sys.modules if name.startswith("fastpref.integrations.trl")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'pip install "fastpref\[trl\]"'):
        importlib.import_module("fastpref.integrations.trl")
