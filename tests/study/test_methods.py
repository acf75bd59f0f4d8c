"""Alignment runs: TRL's trainer and our loop are given the same pairs in the same order, and their losses agree."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the study needs fastpref[train]")
pytest.importorskip("datasets", reason="the study needs fastpref[train]")
pytest.importorskip("matplotlib", reason="the study needs fastpref[train]")

from fastpref.benchmarks.study import methods
from fastpref.benchmarks.study.base import Speaker, load_speaker
from fastpref.benchmarks.study.pairs import make_pairs
from fastpref.benchmarks.study.settings import (
    METHODS,
    SIZES,
    SMALL,
    TINY,
    centre,
    choose,
    sweep,
)
from fastpref.demo.base import build_model, train_tokenizer
from fastpref.demo.pairs import Pair, PairSet
from fastpref.training.checkpoints.save import save_final_model


@pytest.fixture(scope="module")
def data() -> PairSet:
    return make_pairs(train=TINY.train, heldout=TINY.heldout, university="Larkmoor University", seed=0)["standard"]


@pytest.fixture(scope="module")
def base(data: PairSet, tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    texts = [pair["prompt"] + pair[answer] for pair in data.train for answer in ("chosen", "rejected")]
    tokenizer = train_tokenizer(texts, vocabulary=TINY.vocabulary)
    folder = tmp_path_factory.mktemp("base")  # TRL's trainer reads the reference from where its model came
    save_final_model(folder, build_model(tokenizer, width=32, layers=1, heads=2, seed=0), tokenizer)
    return load_speaker(folder / "model")


def losses(history: list[dict[str, Any]], name: str = "loss") -> dict[int, float]:
    return {record["step"]: record[name] for record in history if name in record}


def test_the_order_is_that_of_our_loop_over_epochs(data: PairSet, base: Speaker, tmp_path: Path) -> None:
    """Seen from within: the rows of each step, as the loop's own batches have them."""
    from fastpref.training import loop

    seen: list[list[int]] = []
    real = loop.FiniteGuard.see_batch

    def see(self: Any, scored: Any) -> None:
        seen.append(sorted(scored.batch.rows))
        real(self, scored)

    settings = dataclasses.replace(centre(TINY, "dpo"), epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.FiniteGuard, "see_batch", see)
        methods.align(TINY, settings, base, data, seed=3, folder=tmp_path)
    rows = methods.order(TINY.train, TINY.batch_size, steps=6, seed=3)
    assert seen == [sorted(rows[begin : begin + TINY.batch_size]) for begin in range(0, len(rows), TINY.batch_size)]
    assert rows[: TINY.train] != rows[TINY.train :]
    assert sorted(rows) == sorted([*range(TINY.train)] * 2)


def test_trl_with_the_settings_of_dpo_takes_the_same_steps(data: PairSet, base: Speaker, tmp_path: Path) -> None:
    """Two epochs of three steps: losses, held-out losses and rewards to float32's rounding."""
    pytest.importorskip("trl", reason='needs pip install "fastpref[trl]"')
    settings = dataclasses.replace(centre(TINY, "dpo"), epochs=2, learning_rate=3e-3)
    ours = methods.align(TINY, settings, base, data, seed=1, folder=tmp_path / "ours")
    other = dataclasses.replace(settings, trainer="trl")
    theirs = methods.align(TINY, other, base, data, seed=1, folder=tmp_path / "theirs")
    assert (ours.steps, theirs.steps) == (6, 6)
    for name in ("loss", "eval_loss", "rewards/chosen", "eval_rewards/rejected"):
        here, there = losses(ours.history, name), losses(theirs.history, name)
        shared = {step: here[step] for step in there}  # TRL's trainer does not log the last step for being the last
        assert len(shared) >= 2
        assert there == pytest.approx(shared, abs=2e-5), name
    assert losses(ours.history)[6] < losses(ours.history)[1] - 0.05  # it did learn
    assert not (tmp_path / "theirs" / "checkpoint-6").exists()


def test_trl_at_its_defaults_is_given_no_settings(data: PairSet, base: Speaker, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason='needs pip install "fastpref[trl]"')
    given: dict[str, Any] = {}

    class Seen(Exception):
        pass

    class Config:
        max_length = trl.DPOConfig.max_length

        def __init__(self, **options: Any) -> None:
            given.update(options)
            raise Seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "DPOConfig", Config)
        with pytest.raises(Seen):
            methods.align(TINY, centre(TINY, "trl"), base, data, seed=0, folder=tmp_path, default_trl=True)
    learnt_with = {
        "beta",
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "warmup_steps",
        "loss_type",
    }
    assert not learnt_with & set(given)
    assert given["max_length"] == TINY.positions < Config.max_length  # the default would go beyond the model's last


@pytest.mark.slow
def test_answers_longer_than_the_model_s_positions_are_cut_alike(data: PairSet, base: Speaker, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason='needs pip install "fastpref[trl]"')
    assert trl.DPOConfig.max_length > TINY.positions
    long = [Pair({**row, "chosen": row["chosen"] * 12}) for row in data.train]
    rows = PairSet(train=long, heldout=data.heldout)
    settings = centre(TINY, "dpo")
    ours = methods.align(TINY, settings, base, rows, seed=1, folder=tmp_path / "ours")
    other = dataclasses.replace(settings, trainer="trl")
    theirs = methods.align(TINY, other, base, rows, seed=1, folder=tmp_path / "theirs")
    assert theirs.history[0]["logps/chosen"] == pytest.approx(ours.history[0]["logps/chosen"], rel=1e-5)


def test_what_is_called_trl_default_is_what_its_config_has(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason='needs pip install "fastpref[trl]"')
    config = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    settings = centre(SMALL, "trl")
    assert (settings.beta, settings.learning_rate, settings.epochs, settings.batch_size) == (
        config.beta,
        config.learning_rate,
        config.num_train_epochs,
        config.per_device_train_batch_size,
    )
    assert config.loss_type in ("sigmoid", ["sigmoid"])


def test_an_interrupted_run_is_no_result(data: PairSet, base: Speaker, tmp_path: Path) -> None:
    import fastpref

    def stopped(config: Any, **arguments: Any) -> Any:
        return fastpref.TrainResult(tmp_path, arguments["model"], 1, [], stopped="SIGINT")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastpref, "train", stopped)
        with pytest.raises(methods.Interrupted, match="SIGINT after step 1 of 3"):
            methods.align(TINY, centre(TINY, "dpo"), base, data, seed=0, folder=tmp_path)


# Settings


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_moves_one_value_at_a_time(size: Any, method: str) -> None:
    tried = sweep(size, method)
    start = tried.pop("centre")
    for changed, settings in tried.items():
        before, after = start.to_json(), settings.to_json()
        names = [name for name in before if before[name] != after[name]]
        assert len(names) == 1, changed
        assert changed.split("=")[0] in (names[0], *after["options"])
    assert bool(tried) == (method not in ("trl", "trl_matched"))


def row(**changes: float) -> dict[str, Any]:
    return {"mention_share": 1.0, "distinct_2": 0.5, "proxy_perplexity": 3.0, **changes}


def test_the_taken_setting_mentions_the_target_then_varies_then_is_likely() -> None:
    likely_without = row(mention_share=0.9, proxy_perplexity=1.0)
    likely_and_dull = row(distinct_2=0.39, proxy_perplexity=1.5)
    taken = row(mention_share=0.96, distinct_2=0.41, proxy_perplexity=2.0)
    assert choose([row(), likely_without, likely_and_dull, taken]) is taken


def test_a_run_that_diverged_says_so_out_of_a_worker_too() -> None:
    error = methods.DivergedError("step 3: not finite", [{"step": 3}])
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert (str(one), one.advice) == ("step 3: not finite", [{"step": 3}])


def test_a_setting_that_diverged_is_not_taken() -> None:
    broken = {"method": "dpo", "diverged": "step 3: the gradient has values that are not finite"}
    assert choose([broken, row()]) == row()
    with pytest.raises(ValueError, match="every swept setting of dpo diverged, the first so: step 3"):
        choose([broken])
