"""The study from its first file to its report: pairs, judge, base, swept settings, results, trials of the advice."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import fastpref
from fastpref.benchmarks.study.cells import Job, Study
from fastpref.benchmarks.study.claim import alone, counted, seconds_so_far
from fastpref.benchmarks.study.methods import order
from fastpref.benchmarks.study.pairs import SETS
from fastpref.benchmarks.study.pool import Pool, cores
from fastpref.benchmarks.study.report import print_summary, write_report
from fastpref.benchmarks.study.settings import METHODS, TUNING_SEED, Settings, centre, choose, sweep
from fastpref.benchmarks.study.ticks import ticks
from fastpref.demo.pairs import write_jsonl
from fastpref.environment import commit, package_version, processor
from fastpref.training.durable import new_file

FORMAT = 2
RESULTS = "results.json"
# How far into its first epoch the step comes that has the spoilt rows, in the trials of the second advice.
SPOILT_AT = 0.6
# Between lines about what is under way, where there is no terminal to draw a bar on.
LINE_SECONDS = 30.0
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "trl")


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
        FolderBusyError: another study is running in the folder.
    """
    size, seeds = study.size, study.size.seeds
    with alone(study.folder), counted(study.folder), Pool(workers) as pool, _Progress(study, console) as progress:
        _write_pairs(study)
        first = [Job("judge", "judge"), *([] if study.model else [Job("draft", "draft")])]
        judge, *draft = progress.run(pool, "proxy judge, first round of the base", first)
        base = progress.run(pool, "base until fluent", [Job("base", "base")])[0]
        swept = progress.run(pool, "swept settings", _sweep_jobs(study, methods))
        chosen = _chosen(study, swept, methods)
        cells = progress.run(pool, "alignment", _cell_jobs(study, chosen))
        trials = progress.run(pool, "trials of the advice", _trial_jobs(study, chosen))
    taken = [chosen[method].to_json() | {"why": ""} for method in chosen]
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
        "environment": _environment(workers) | {"seconds": seconds_so_far(study.folder)},
        "judge": judge,
        "base": base | _with_draft(base, draft),
        "real": _real(cells),
        "prompts": {str(seed): [pair["prompt"] for pair in study.pairs(seed)[SETS[0]].heldout] for seed in seeds},
        "chosen": {str(seed): [pair["chosen"] for pair in study.pairs(seed)[SETS[0]].heldout] for seed in seeds},
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
    print_summary(results)
    console.print(f"{results['environment']['seconds']:.0f} s; the report is {page}", highlight=False)
    return results


def publish(results: dict[str, Any], folder: Path) -> Path:
    """Write results.json and the report beside it; the report's page."""
    with new_file(folder / RESULTS) as new:
        new.write_text(json.dumps(results, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return write_report(results, folder)


class _Progress:
    """A bar over the jobs of a stage where there is a terminal; else a line for each job that is done."""

    def __init__(self, study: Study, console: Console) -> None:
        self._study, self._console = study, console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def run(self, pool: Pool, title: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        started, ended = time.perf_counter(), 0
        task = self._bar.add_task(title, total=len(jobs))

        def done(job: Job) -> None:
            nonlocal ended
            ended += 1
            self._bar.advance(task)
            if not self._console.is_terminal:
                self._say(f"{title} {ended}/{len(jobs)}: {job.name} ({time.perf_counter() - started:.0f} s)")

        said = started

        def look() -> None:
            """Of a job that takes minutes too it is to be seen that it goes on."""
            nonlocal said
            under_way = ticks(self._study.folder)
            self._bar.update(task, description=f"{title} ({under_way})" if under_way else title)
            if under_way and not self._console.is_terminal and time.perf_counter() - said > LINE_SECONDS:
                said = time.perf_counter()
                self._say(f"{title}: {under_way} ({said - started:.0f} s)")

        results = pool.run(self._study, jobs, done, look)
        self._bar.remove_task(task)
        self._say(f"{title}: {len(jobs)} done, {time.perf_counter() - started:.0f} s")
        return results

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False)


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

    def trial(
        title: str,
        method: str,
        settings: Settings,
        expected: list[str] | None,
        *,
        set: str = "low_edit",
        spoilt: Sequence[int] = (),
    ) -> Job:
        details = {"name": title, "expected": expected, "spoilt_rows": list(spoilt)}
        name = "-".join(f"{set} {title}".lower().replace(",", "").replace("=", " ").split())
        return Job("trials", name, seed=seed, set=set, method=method, settings=settings, details=details)

    jobs = []
    if "dpo" in chosen:
        plain = replace(chosen["dpo"], why="")
        jobs += [
            trial("DPO, high learning rate", "dpo", hard, falls),
            # What the advice names, one at a time, on the same pairs.
            trial("remedy: loss dpop", "dpop", replace(hard, loss="dpop", options={"lam": size.lam}), []),
            trial("remedy: margin_clip 1", "dpo", replace(hard, options={"margin_clip": 1.0}), None),
            trial("remedy: beta a third", "dpo", replace(hard, beta=hard.beta / 3), None),
            trial("remedy: learning rate a ninth", "dpo", replace(hard, learning_rate=hard.learning_rate / 9), None),
            *(
                trial("DPO, spoilt rows", "dpo", plain, explodes, set=name, spoilt=_spoilt(study, plain))
                for name in SETS
            ),
        ]
    if "dpop" in chosen:
        plain = replace(chosen["dpop"], why="")
        jobs += [
            trial("DPOP, spoilt rows", "dpop", plain, explodes, set=name, spoilt=_spoilt(study, plain)) for name in SETS
        ]
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


def _environment(workers: int) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(Path(__file__).parent),
        "versions": {
            "python": platform.python_version(),
            "fastpref": fastpref.__version__,
            **{name: package_version(name) for name in PACKAGES},
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processor": processor(),
        "cpu_cores": cores(),
        "workers": workers,
    }
