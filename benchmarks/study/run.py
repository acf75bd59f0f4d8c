"""The study from its first file to its report: pairs, judge, base, swept settings, results, trials of the advice."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpref.benchmarks.study.cells import Job
from fastpref.benchmarks.study.methods import order
from fastpref.benchmarks.study.pairs import SETS
from fastpref.benchmarks.study.pool import Pool, cores
from fastpref.benchmarks.study.report import print_summary, write_report
from fastpref.benchmarks.study.settings import METHODS, TITLES, TUNING_SEED, Settings, Study, centre, choose, sweep
from fastpref.console import Console
from fastpref.demo.pairs import write_jsonl
from fastpref.environment import record
from fastpref.folders import Claim, claim
from fastpref.training.checkpoints.durable import new_file

FORMAT = 2
RESULTS = "results.json"
# How far into its first epoch the step comes that has the spoilt rows, in the trials of the second advice.
SPOILT_AT = 0.6
PACKAGES = ("fastpref", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "trl")


def run_study(
    study: Study,
    *,
    methods: Sequence[str] = METHODS,
    workers: int,
    console: Console,
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Do what is not done yet of the study, write results.json and the report into its folder, and give the results.

    `finish` gives the results' entry "endpoint", the verdicts of an endpoint that judges.

    Raises:
        JobError: a part failed; what was finished stays, and the same call goes on from there.
        FolderError: the folder is not this study's, or another process's study is running in it.
    """
    size, seeds = study.size, study.size.seeds
    with claim(study.folder, study.owner) as claimed:
        shutil.rmtree(study.runs, ignore_errors=True)  # of a study that was killed
        with _counted(claimed), Pool(workers) as pool:
            stage = functools.partial(_stage, study, pool, console)
            _write_pairs(study)
            first = [Job("judge", "judge"), *([] if study.model else [Job("draft", "draft")])]
            judge, *draft = stage("proxy judge, first round of the base", first)
            base = stage("base until fluent", [Job("base", "base")])[0]
            swept = stage("swept settings", _sweep_jobs(study, methods))
            chosen = _chosen(study, swept, methods)
            cells = stage("alignment", _cell_jobs(study, chosen))
            trials = stage("trials of the advice", _trial_jobs(study, chosen))
        taken = [chosen[method].to_json() | {"why": ""} for method in chosen]
        heldout = {str(seed): study.pairs(seed)[SETS[0]].heldout for seed in seeds}
        results: dict[str, Any] = {
            "format": FORMAT,
            "size": size.name,
            "university": study.university,
            "model": study.model,
            "settings": dataclasses.asdict(size),
            "sets": list(SETS),
            "seeds": list(seeds),
            "tuning_seed": TUNING_SEED,
            "methods": list(chosen),
            "method_settings": {method: settings.to_json() for method, settings in chosen.items()},
            "environment": record(PACKAGES)
            | {"cpu_cores": cores(), "workers": workers, "seconds": claimed.notes["seconds"]},
            "judge": judge,
            "base": base | _with_draft(base, draft),
            "real": _real(cells),
            "prompts": {seed: [pair["prompt"] for pair in pairs] for seed, pairs in heldout.items()},
            "chosen": {seed: [pair["chosen"] for pair in pairs] for seed, pairs in heldout.items()},
            "cells": cells,
            "sweep": [row | {"chosen": row["settings"] | {"why": ""} in taken} for row in swept],
            "advice_trials": trials,
            "parity": _parity(cells),
            "endpoint": None,
        }
        page = publish(results, study.folder)  # before anybody is asked, who may fail
        if finish is not None:
            results["endpoint"] = finish(results)
            page = publish(results, study.folder)
        claimed.finish()
    print_summary(results)
    console.say(f"{results['environment']['seconds']:.0f} s; the report is {page}")
    return results


def publish(results: dict[str, Any], folder: Path) -> Path:
    """Write results.json and the report beside it; the report's page."""
    with new_file(folder / RESULTS) as new:
        new.write_text(json.dumps(results, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return write_report(results, folder)


def _stage(study: Study, pool: Pool, console: Console, title: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    started = time.perf_counter()
    with console.bar(title, len(jobs), unit="job") as bar:
        results = pool.run(study, jobs, lambda job: bar.advance(note=job.name))
    console.say(f"{title}: {len(jobs)} done, {time.perf_counter() - started:.0f} s")
    return results


@contextmanager
def _counted(claimed: Claim) -> Iterator[None]:
    """Add the time that the block takes to the study's, which may be taken up many times, be it cut short."""
    started = time.perf_counter()
    try:
        yield
    finally:
        claimed.note(seconds=claimed.notes.get("seconds", 0.0) + time.perf_counter() - started)


def _write_pairs(study: Study) -> None:
    for seed in (*study.size.seeds, TUNING_SEED):
        for name, pairs in study.pairs(seed).items():
            folder = study.folder / "pairs" / f"seed-{seed}" / name
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / "train.jsonl", pairs.train)
            write_jsonl(folder / "heldout.jsonl", pairs.heldout)


def _sweep_jobs(study: Study, methods: Sequence[str]) -> list[Job]:
    tried = {method: sweep(study.size, method) for method in methods if method not in ("trl", "trl_matched")}
    return [
        Job(
            "sweep",
            f"{method}-{changed}",
            seed=TUNING_SEED,
            method=method,
            settings=settings,
            details={"changed": changed},
        )
        for method, every in tried.items()
        for changed, settings in every.items()
    ]


def _chosen(study: Study, swept: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Settings]:
    """The settings of each method's results: the best that was swept; for TRL its defaults, and those of DPO."""
    chosen: dict[str, Settings] = {}
    for method in methods:
        rows = [row for row in swept if row["method"] == method]
        if rows:
            best = choose(rows)
            why = f"best of {len(rows)} swept: {best['changed']}"
            chosen[method] = Settings(**best["settings"] | {"why": why})
        elif method == "trl_matched" and "dpo" in chosen:
            chosen[method] = replace(chosen["dpo"], trainer="trl", why="those that DPO took")
        else:
            chosen[method] = centre(study.size, method)
    return chosen


def _cell_jobs(study: Study, chosen: dict[str, Settings]) -> list[Job]:
    """Every set, seed and method, the longest runs first, as at the end a worker would wait for one; the base last."""
    every: list[tuple[str, Settings | None]] = [("base", None), *chosen.items()]
    jobs = [
        Job("cells", f"{name}-seed-{seed}-{method}", seed=seed, set=name, method=method, settings=settings)
        for method, settings in every
        for name in SETS
        for seed in study.size.seeds
    ]
    return sorted(jobs, key=lambda job: 0 if job.settings is None else -study.size.steps(job.settings))


def _trial_jobs(study: Study, chosen: dict[str, Settings]) -> list[Job]:
    """Runs that should draw advice and runs that should not: what each advice says, and whether its remedies help."""
    size, seed = study.size, study.size.seeds[0]
    hard = replace(centre(size, "dpo"), learning_rate=size.learning_rate * max(size.learning_rate_factors), why="")
    falls, explodes = ["falling_chosen_reward"], ["exploding_gradient"]

    # By what each is, how it runs, and the advice that should come: None where either is right.
    runs: list[tuple[str, str, Settings, list[str] | None]] = []
    if "dpo" in chosen:
        runs += [
            ("DPO, high learning rate", "dpo", hard, falls),
            # What the advice names, one at a time, on the same pairs.
            ("remedy: loss dpop", "dpop", replace(hard, loss="dpop", options={"lam": size.lam}), []),
            ("remedy: margin_clip 1", "dpo", replace(hard, options={"margin_clip": 1.0}), None),
            ("remedy: beta a third", "dpo", replace(hard, beta=hard.beta / 3), None),
            ("remedy: learning rate a ninth", "dpo", replace(hard, learning_rate=hard.learning_rate / 9), None),
        ]
    runs += [
        (f"{TITLES[method]}, spoilt rows", method, replace(chosen[method], why=""), explodes)
        for method in ("dpo", "dpop")
        if method in chosen
    ]
    jobs = []
    for title, method, settings, expected in runs:
        spoilt = _spoilt(study, settings) if expected == explodes else []
        for pair_set in SETS if spoilt else SETS[1:]:
            details = {"name": title, "expected": expected, "spoilt_rows": spoilt}
            name = "-".join(f"{pair_set} {title}".lower().replace(",", "").replace("=", " ").split())
            jobs.append(Job("trials", name, seed=seed, set=pair_set, method=method, settings=settings, details=details))
    return jobs


def _spoilt(study: Study, settings: Settings) -> list[int]:
    """Two rows of a step that the first seed's run comes to when its gradients are known."""
    steps = study.size.train // settings.batch_size
    rows = order(study.size.train, settings.batch_size, steps=steps, seed=study.size.seeds[0])
    first = int(SPOILT_AT * steps) * settings.batch_size
    return rows[first : first + 2]


def _with_draft(base: dict[str, Any], draft: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Losses and seconds of all rounds, the draft's first."""
    return {
        "losses": [loss for some in (*draft, base) for loss in some["losses"]],
        "seconds": sum(some["seconds"] for some in (*draft, base)),
    }


def _real(cells: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The data's own held-out answers under the proxy judge, which the base's cells hold."""
    real: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["method"] == "base":
            scores = cell["scores"]["chosen"]
            entry = {"judge": scores["judge"], "judge_tokens": scores["judge_tokens"]}
            real.setdefault(cell["set"], []).append({"seed": cell["seed"], "chosen": entry})
    return real


def _parity(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far TRL's trainer with DPO's settings, batches and schedule is from our own loop, record by record."""
    runs = {(cell["method"], cell["set"], cell["seed"]): cell for cell in cells}
    rows = []
    for (method, name, seed), cell in runs.items():
        ours = runs.get(("dpo", name, seed))
        if method != "trl_matched" or ours is None:
            continue
        here, there = (
            {record["step"]: record["loss"] for record in run["history"] if record.get("loss") is not None}
            for run in (ours, cell)
        )
        steps = sorted(here.keys() & there.keys())
        largest = max(abs(here[step] - there[step]) for step in steps)
        rows.append({"set": name, "seed": seed, "largest_loss_difference": largest, "steps": len(steps)})
    return rows
