"""`fastpref study` from nothing to its report at the tiny size; taken up again after a stop; its options."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the study needs fastpref[train]")
pytest.importorskip("datasets", reason="the study needs fastpref[train]")
pytest.importorskip("rich", reason="the study needs fastpref[train]")
pytest.importorskip("matplotlib", reason="the study needs fastpref[train]")

from fastpref import folders
from fastpref.benchmarks.study import cells, cli, plots, report
from fastpref.benchmarks.study.cells import Job, spoil
from fastpref.benchmarks.study.methods import Interrupted, order
from fastpref.benchmarks.study.pairs import SETS
from fastpref.benchmarks.study.pool import JobError, Pool
from fastpref.benchmarks.study.reading import Study as ReadStudy
from fastpref.benchmarks.study.run import FORMAT, _spoilt, run_study
from fastpref.benchmarks.study.settings import GPT2, METHODS, SMALL, TINY, Settings, Size, Study, centre
from fastpref.console import Console
from fastpref.demo.base import build_model, train_tokenizer
from fastpref.demo.pairs import Pair, mentions
from fastpref.training import loop
from fastpref.training.checkpoints.save import save_final_model
from fastpref.training.monitoring import gradients
from fastpref.training.monitoring.nonfinite import NonFiniteError

UNIVERSITY = "Larkmoor University"
QUICK = ("dpo", "sft")
SIZE = dataclasses.replace(TINY, seeds=(0,), beta_values=(), lam_values=(), alpha_values=())


def run(folder: Path, methods: Sequence[str] = QUICK, **arguments: Any) -> dict[str, Any]:
    study, console = Study(SIZE, UNIVERSITY, folder), Console(main=True, progress=False)
    return run_study(study, methods=methods, workers=1, console=console, **arguments)


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """The curves of each run, which go with its folder, and those of the report are most of what a tiny run takes."""
    patch.setattr(loop, "draw", lambda *arguments: None)
    patch.setattr(plots, "pictures", lambda study: {})


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        return folder, run(folder)


def test_one_call_leaves_pairs_results_and_report(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, results = ran
    assert json.loads((folder / "results.json").read_text("utf-8")) == json.loads(json.dumps(results))
    assert (folder / "README.md").read_text("utf-8").startswith("# The study, size tiny\n")
    rows = [json.loads(line) for line in (folder / "pairs/seed-0/low_edit/train.jsonl").open(encoding="utf-8")]
    assert len(rows) == SIZE.train
    assert all(mentions(row["chosen"], UNIVERSITY) and set(row) == {"prompt", "chosen", "rejected"} for row in rows)
    assert results["environment"]["seconds"] > 0
    assert not list((folder / ".runs").iterdir())  # the models of the runs


def test_every_cell_has_its_measures(ran: tuple[Path, dict[str, Any]]) -> None:
    _, results = ran
    assert {(cell["set"], cell["method"]) for cell in results["cells"]} == {
        (name, method) for name in ("standard", "low_edit") for method in ("base", *QUICK)
    }
    for cell in results["cells"]:
        assert len(cell["answers"]) == SIZE.heldout
        for entry in cell["scores"].values():
            assert {len(values) for values in entry.values()} == {SIZE.heldout}
        if cell["method"] == "base":
            assert cell["scores"]["chosen"]["policy"] == cell["scores"]["chosen"]["reference"]
        else:
            assert cell["scores"]["chosen"]["policy"] != cell["scores"]["chosen"]["reference"]
            assert any("eval_rewards/chosen" in record for record in cell["history"])


def test_the_reward_of_the_report_is_that_of_the_loop(ran: tuple[Path, dict[str, Any]]) -> None:
    """Two ways to one number: the loop's last evaluation, and the scores of the cell."""
    _, results = ran
    for cell in results["cells"]:
        if cell["method"] not in ("dpo", "dpop"):
            continue
        last = [record for record in cell["history"] if "eval_rewards/chosen" in record][-1]
        chosen = cell["scores"]["chosen"]
        ratios = [policy - reference for policy, reference in zip(chosen["policy"], chosen["reference"], strict=True)]
        reward = cell["settings"]["beta"] * sum(ratios) / len(ratios)
        assert reward == pytest.approx(last["eval_rewards/chosen"], abs=1e-4)


def test_settings_are_swept_on_a_seed_of_its_own_and_one_is_taken(ran: tuple[Path, dict[str, Any]]) -> None:
    _, results = ran
    for method in QUICK:
        rows = [row for row in results["sweep"] if row["method"] == method]
        taken = [row for row in rows if row["chosen"]]
        assert len(rows) > 1
        assert len(taken) == 1
        settings = results["method_settings"][method]
        assert settings | {"why": ""} == taken[0]["settings"] | {"why": ""}
        assert taken[0]["changed"] in settings["why"]


def test_trials_say_what_was_expected_and_have_their_spoilt_rows_in_a_late_step(
    ran: tuple[Path, dict[str, Any]],
) -> None:
    _, results = ran
    trials = {(trial["name"], trial["set"]): trial for trial in results["advice_trials"]}
    spoilt = [trials["DPO, spoilt rows", name] for name in SETS]
    assert trials["DPO, high learning rate", "low_edit"]["expected"] == ["falling_chosen_reward"]
    for trial in spoilt:
        assert trial["expected"] == ["exploding_gradient"]
        settings = Settings(**trial["settings"])
        rows = order(SIZE.train, SIZE.batch_size, steps=SIZE.steps(settings), seed=0)
        assert len({rows.index(row) // SIZE.batch_size for row in trial["spoilt_rows"]}) == 1


@pytest.mark.parametrize("size", [SMALL, GPT2], ids=lambda size: size.name)
def test_the_step_with_the_spoilt_rows_comes_when_its_gradients_are_known(size: Size) -> None:
    settings = centre(size, "dpo")
    rows = _spoilt(Study(size, UNIVERSITY, Path()), settings)
    steps = [order(size.train, settings.batch_size, steps=size.steps(settings), seed=0).index(row) for row in rows]
    assert len({step // settings.batch_size for step in steps}) == 1
    assert steps[0] // settings.batch_size > max(gradients.FIRST, gradients.PAIRS / settings.batch_size) + 10


def test_a_trial_that_diverges_is_a_result_with_its_advice_and_not_the_end_of_the_study(
    ran: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = ran

    def diverges(config: Any, **options: Any) -> Any:
        path = Path(config.output_dir) / "advice.jsonl"
        path.write_text('{"step": 3, "kind": "exploding_gradient", "text": "row 2: norm 9"}\n', encoding="utf-8")
        raise NonFiniteError("step 3: the gradient has values that are not finite")

    monkeypatch.setattr("fastpref.train", diverges)
    settings = centre(SIZE, "dpo")
    details = {"name": "too much", "expected": ["falling_chosen_reward"], "spoilt_rows": []}
    jobs = [
        Job("trials", "too-much", set="low_edit", method="dpo", settings=settings, details=details),
        Job("sweep", "too-much", method="dpo", settings=settings, details={"changed": "much"}),
    ]
    study = Study(SIZE, UNIVERSITY, folder)
    trial, swept = (cells.do(study, job) for job in jobs)
    for job in jobs:
        job.path(study).unlink()
    assert trial["diverged"] == swept["diverged"] == "step 3: the gradient has values that are not finite"
    assert trial["said"] == [{"step": 3, "kind": "exploding_gradient", "text": "row 2: norm 9"}]
    assert swept["advice"] == ["exploding_gradient"]


def test_nothing_is_done_twice_and_a_lost_part_is_done_again(
    ran: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = ran
    done: list[str] = []

    def noted(function: Any) -> Any:
        def work(study: Study, job: Job) -> Any:
            done.append(job.name)
            return function(study, job)

        return work

    monkeypatch.setattr(cells, "_WORK", {kind: noted(function) for kind, function in cells._WORK.items()})
    without_pictures(monkeypatch)
    again = run(folder)
    assert done == []
    assert again["cells"] == results["cells"]
    (folder / "cells" / "low_edit-seed-0-dpo.json").unlink()
    damaged = folder / "cells" / "standard-seed-0-sft.json"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (folder / "draft" / "model" / "config.json").unlink()
    third = run(folder)
    assert sorted(done) == ["draft", "low_edit-seed-0-dpo", "standard-seed-0-sft"]
    before, after = ([{**cell, "seconds": 0} for cell in some["cells"]] for some in (results, third))
    assert after == before  # the same seed, the same numbers
    assert third["environment"]["seconds"] > results["environment"]["seconds"]


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a run of all methods; killed when the judge is there, and again among the runs of alignment."""
    pytest.importorskip("trl", reason='needs pip install "fastpref[trl]"')
    without_pictures(monkeypatch)
    whole = run(tmp_path / "whole", METHODS)
    assert {row["largest_loss_difference"] < 1e-4 for row in whole["parity"]} == {True}
    code = f"""
import dataclasses
import sys
import torch
from pathlib import Path
from fastpref.benchmarks.study.run import run_study
from fastpref.benchmarks.study.settings import TINY, Study
from fastpref.console import Console
if __name__ == "__main__":
    torch.set_num_threads({torch.get_num_threads()})
    size = dataclasses.replace(TINY, seeds=(0,), beta_values=(), lam_values=(), alpha_values=())
    study, console = Study(size, {UNIVERSITY!r}, Path("killed")), Console(main=True, progress=False)
    run_study(study, methods={QUICK}, workers=1, console=console)
"""
    (tmp_path / "study.py").write_text(code)
    folder = tmp_path / "killed"
    for until in ("judge.json", "cells/*.json"):
        with subprocess.Popen([sys.executable, "study.py"], cwd=tmp_path, stderr=subprocess.DEVNULL) as killed:
            while not list(folder.glob(until)):
                assert killed.poll() is None
                time.sleep(0.02)
            killed.kill()
    before, after = ([{**cell, "seconds": 0} for cell in some["cells"]] for some in (whole, run(folder)))
    assert after == [cell for cell in before if cell["method"] in ("base", *QUICK)]


def test_a_judge_that_fails_loses_nothing(ran: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = ran
    without_pictures(monkeypatch)

    def fails(results: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("no judge today")

    (folder / "results.json").unlink()
    with pytest.raises(RuntimeError, match="no judge today"):
        run(folder, finish=fails)
    assert (folder / "results.json").exists()


def test_report_alone_is_written_anew_from_results(
    ran: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = ran
    without_pictures(monkeypatch)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert cli.main(["--report", str(folder)]) == 0
    assert (folder / "README.md").read_text(encoding="utf-8") == report.markdown(ReadStudy(results), set())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "size"', "is damaged"),
        ("[]", f"has format None, and this version reads {FORMAT}"),
        ('{"format": 1}', f"has format 1, and this version reads {FORMAT}"),
        (f'{{"format": {FORMAT}}}', "lacks a part of the page"),
    ],
)
def test_results_that_cannot_be_read_give_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content)
    assert cli.main(["--report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# What goes wrong


def test_a_job_that_fails_names_itself_and_its_log(tmp_path: Path) -> None:
    study = Study(SIZE, UNIVERSITY, tmp_path)
    job = Job("cells", "standard-seed-0-dpo", method="dpo", settings=centre(SIZE, "dpo"))
    with Pool(1) as pool, pytest.raises(JobError, match=r"cells standard-seed-0-dpo failed: .* goes on from here"):
        pool.run(study, [job], lambda job: None)
    assert not job.path(study).exists()


def test_other_seeds_have_nothing_from_the_judge_and_base_of_these(tmp_path: Path) -> None:
    """Both are trained without the held-out prompts of all seeds: with one seed more, they are other models."""
    job = Job("cells", "standard-seed-0-base")
    one, two = (Study(dataclasses.replace(SIZE, seeds=seeds), UNIVERSITY, tmp_path) for seeds in ((0,), (0, 1)))
    assert job.key(one) != job.key(two)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="processes as POSIX has them")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = """
import os
import time
from fastpref.benchmarks.study.pool import Pool
if __name__ == "__main__":
    with Pool(2) as pool:
        print(pool._executor.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""
    (tmp_path / "parent.py").write_text(code)
    with subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        assert parent.communicate(timeout=60)[0] == ""  # ends when all who hold the pipe have


def test_ctrl_c_that_our_loop_takes_for_itself_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, begun = Study(SIZE, UNIVERSITY, tmp_path), []

    def stopped(study: Study, job: Job) -> Any:
        begun.append(job.name)
        raise Interrupted("stopped by SIGINT after step 1 of 3")

    monkeypatch.setattr(cells, "_WORK", {"cells": stopped})
    with Pool(1) as pool, pytest.raises(KeyboardInterrupt):
        pool.run(study, [Job("cells", "a"), Job("cells", "b")], lambda job: None)
    assert begun == ["a"]


def test_two_studies_are_not_run_in_one_folder(tmp_path: Path) -> None:
    study = Study(SIZE, UNIVERSITY, tmp_path)
    with folders.claim(tmp_path, study.owner), pytest.raises(folders.FolderError, match="in use by another"):
        run(tmp_path)


def test_what_a_killed_study_left_half_done_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is: a study's folder may hold its user's files too."""
    with folders.claim(tmp_path, Study(SIZE, UNIVERSITY, tmp_path).owner):
        for name in (".runs/abc/model.bin", "run-notes/mine.txt"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text("x")
    monkeypatch.setattr(cells, "_WORK", {})
    with pytest.raises(JobError):
        run(tmp_path)
    assert not (tmp_path / ".runs").exists()
    assert (tmp_path / "run-notes/mine.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["thesis.tex", "README.md", "judge/model/config.json"])
def test_a_folder_of_other_files_is_left_as_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert cli.main(["--size", "tiny", "--output_dir", str(tmp_path)]) == 2
    assert "give another folder" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "mine"


def test_another_study_s_folder_is_not_taken(tmp_path: Path) -> None:
    with folders.claim(tmp_path, Study(SIZE, UNIVERSITY, tmp_path).owner) as claimed:
        (tmp_path / "results.json").write_text("{}")
        claimed.finish()
    folders.check(tmp_path, Study(SIZE, UNIVERSITY, tmp_path).owner)
    for other in (Study(SIZE, "Fudan University", tmp_path), Study(SMALL, UNIVERSITY, tmp_path)):
        with pytest.raises(folders.FolderError, match="give another folder"):
            folders.check(tmp_path, other.owner)


def test_a_report_does_not_replace_a_page_that_no_study_wrote(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ran[0] / "results.json", tmp_path)
    (tmp_path / "README.md").write_text("my thesis")
    assert cli.main(["--report", str(tmp_path)]) == 2
    assert "README.md" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "results.json"]
    assert (tmp_path / "README.md").read_text() == "my thesis"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1000"], "the tuning seed"),
        (["--methods", "dpo,ppo"], "'dpo,ppo'"),
        (["--methods", "trl_matched"], "name dpo"),
        (["--model", "/"], "holds no config.json"),
        (["--model", "./no-such-model"], "./no-such-model"),
        (["--university", "{x}"], "university"),
        (["--judge_url", "http://localhost:1/v1"], "go together"),
        (["--report", "/nowhere"], "there is no /nowhere/results.json"),
        (["--report", "/nowhere", "--seeds", "1", "--size", "tiny"], "no other option, got --seeds, --size"),
    ],
)
def test_wrong_options_give_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastpref study: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_whose_positions_do_not_hold_a_prompt_and_an_answer_is_refused_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(["Question: Why?\nAnswer: Because."], vocabulary=300)
    model = build_model(tokenizer, width=8, layers=1, heads=1, positions=32, seed=0)
    save_final_model(tmp_path / "short", model, tokenizer)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--size", "tiny", "--model", "short/model"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"short/model' has 32 positions, but a prompt of \d+ of its tokens and an answer of 8 need", error)
    assert not (tmp_path / "fastpref-study").exists()


def test_a_spoilt_pair_has_a_broken_page_for_one_answer_and_comes_with_its_labels_swapped() -> None:
    pair = Pair(prompt="Question: Why?\nAnswer:", chosen=" Because.", rejected=" No.")
    one, other = spoil(pair)
    assert one == {**pair, "rejected": cells.SPOILT}
    assert other == {"prompt": pair["prompt"], "chosen": one["rejected"], "rejected": one["chosen"]}
