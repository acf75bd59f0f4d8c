"""What the study's jobs are, and how each is done: judge, base, swept settings, results, trials of the loop's advice.

A job writes one JSON file under the study's folder, and a job whose file is there already is not done again: a study
that was interrupted goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from fastpref.benchmarks.study.base import Speaker, draft_base, load_speaker, make_base, make_judge
from fastpref.benchmarks.study.measures import longest_repeated_span
from fastpref.benchmarks.study.methods import DivergedError, align
from fastpref.benchmarks.study.settings import TUNING_SEED, Settings, Study
from fastpref.demo.measures import answer_logps, distinct_bigrams, generate, mention_share, perplexity_of
from fastpref.demo.pairs import Pair, PairSet
from fastpref.training.checkpoints.durable import find_damage, new_file

# A page whose encoding was not understood, several times as long as an answer; what is beyond a model's positions is
# cut. No model has seen much of it, so its log-prob drifts far in any run, and its gradients are large.
SPOILT = " " + 100 * "\ufffd"
DIGITS = 7
# Jobs of which a study has one, before all others.
FIRST = ("judge", "draft", "base")


@dataclass(frozen=True)
class Job:
    """One unit of work: `kind` says which function does it, `name` where its file is."""

    kind: str
    name: str
    seed: int = 0
    set: str = "standard"
    method: str = "base"
    settings: Settings | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def path(self, study: Study) -> Path:
        return (
            study.folder / f"{self.name}.json" if self.kind in FIRST else study.folder / self.kind / f"{self.name}.json"
        )

    def key(self, study: Study) -> dict[str, Any]:
        """What the file's content depends on; a file with another key is made anew.

        That is all seeds, for a job of one seed too: judge and base, which it uses, have read no prompt of any of them.
        """
        settings = None if self.settings is None else self.settings.to_json()
        own = {"kind": self.kind, "seed": self.seed, "set": self.set, "method": self.method, "settings": settings}
        key = {"size": asdict(study.size), "university": study.university, "model": study.model, **own, **self.details}
        return json.loads(json.dumps(key))


def finished(study: Study, job: Job) -> dict[str, Any] | None:
    """What the job's file holds, if it is there, whole, and was made for the same key."""
    path = job.path(study)
    if not path.exists() or (job.kind in FIRST and find_damage(study.folder / job.name / "model")):
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["result"] if content["key"] == job.key(study) else None
    except (ValueError, KeyError, TypeError):  # damaged: what is missing is made again
        return None


def do(study: Study, job: Job) -> dict[str, Any]:
    """Do a job, unless it has been done, and give what its file holds. What is printed goes to a log beside it."""
    done = finished(study, job)
    if done is not None:
        return done
    path = job.path(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".log").open("w", encoding="utf-8") as log, _said_to(log):
        result = _WORK[job.kind](study, job)
    with new_file(path) as new:
        new.write_text(json.dumps({"key": job.key(study), "result": result}, ensure_ascii=False) + "\n", "utf-8")
    return result


@contextlib.contextmanager
def _said_to(log: TextIO) -> Iterator[None]:
    """What is printed to stderr goes to the log, and so do the warnings of transformers, whose handlers keep stderr."""
    handlers = [
        handler for handler in logging.getLogger("transformers").handlers if type(handler) is logging.StreamHandler
    ]
    before = [handler.setStream(log) for handler in handlers]
    try:
        with contextlib.redirect_stderr(log):
            yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)


def _judge(study: Study, job: Job) -> dict[str, Any]:
    return make_judge(study.size, study.university, study.folder / "judge")


def _draft(study: Study, job: Job) -> dict[str, Any]:
    made = draft_base(study.size, study.university, study.folder / "draft")
    return {**made, "losses": _rounded(made["losses"])}


def _base(study: Study, job: Job) -> dict[str, Any]:
    judge = load_speaker(study.folder / "judge" / "model")
    start = study.model or str(study.folder / "draft" / "model")
    made = make_base(study.size, study.university, study.folder / "base", judge, start, given=study.model)
    return {**made, "losses": _rounded(made["losses"])}


def _cell(study: Study, job: Job) -> dict[str, Any]:
    """A result: the base or an aligned model of one set and seed, with all its measures."""
    base, data = load_speaker(study.folder / "base" / "model"), study.pairs(job.seed)[job.set]
    ran: dict[str, Any] = {"seconds": 0.0, "steps": 0, "advice": [], "history": []}
    model = base.model
    if job.settings is not None:
        model, ran = _align(study, job, job.settings, base, data)
    answers, scores = _measure(study, Speaker(model, base.tokenizer), base, data.heldout, job.seed)
    return {"set": job.set, "seed": job.seed, "method": job.method, **ran, "answers": answers, "scores": scores}


def _sweep(study: Study, job: Job) -> dict[str, Any]:
    """One swept setting, on the tuning seed's pairs; no answers are kept. One that diverges has no measures."""
    assert job.settings is not None
    base, data = load_speaker(study.folder / "base" / "model"), study.pairs(TUNING_SEED)[job.set]
    about = {"method": job.method, "settings": job.settings.to_json(), **job.details}
    try:
        model, ran = _align(study, job, job.settings, base, data)
    except DivergedError as error:
        said = [advice["kind"] for advice in error.advice]
        return {**about, "diverged": str(error), "seconds": None, "advice": said}
    heldout = data.heldout[: study.size.tuning_prompts]
    answers, scores = _measure(study, Speaker(model, base.tokenizer), base, heldout, TUNING_SEED)
    return {
        **about,
        **summary(study.university, answers, scores),
        "seconds": ran["seconds"],
        "advice": [advice["kind"] for advice in ran["advice"]],
    }


def _trial(study: Study, job: Job) -> dict[str, Any]:
    """A run whose advice is what matters: of settings known to fail, of a remedy, or with spoilt rows."""
    assert job.settings is not None
    base, data = load_speaker(study.folder / "base" / "model"), study.pairs(job.seed)[job.set]
    if job.details["spoilt_rows"]:
        train = list(data.train)
        one, other = job.details["spoilt_rows"]
        train[one], train[other] = spoil(train[one])
        data = PairSet(train=train, heldout=data.heldout)
    about = {**job.details, "set": job.set, "method": job.method, "settings": job.settings.to_json()}
    try:
        model, ran = _align(study, job, job.settings, base, data)
    except DivergedError as error:
        return {**about, "diverged": str(error), "said": error.advice, "history": []}
    answers, scores = _measure(study, Speaker(model, base.tokenizer), base, data.heldout, job.seed)
    measures = summary(study.university, answers, scores)
    return {**about, "said": ran["advice"], "history": ran["history"], **measures}


_WORK = {"judge": _judge, "draft": _draft, "base": _base, "cells": _cell, "sweep": _sweep, "trials": _trial}


def spoil(pair: Pair) -> tuple[Pair, Pair]:
    """The pair with a broken page for its rejected answer, and the same with its labels swapped.

    A run may drift towards such a page or away from it. Of one of the two the margin has the wrong sign, so a sigmoid
    loss saturates on one of them at most.
    """
    prompt, chosen = pair["prompt"], pair["chosen"]
    return Pair(prompt=prompt, chosen=chosen, rejected=SPOILT), Pair(prompt=prompt, chosen=SPOILT, rejected=chosen)


def summary(university: str, answers: Sequence[str], scores: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a swept setting or a trial: means over its prompts."""
    chosen, own = scores["chosen"], scores["own"]
    spans = [longest_repeated_span(answer) for answer in answers]
    ratios = [policy - reference for policy, reference in zip(chosen["policy"], chosen["reference"], strict=True)]
    return {
        "mention_share": mention_share(answers, university),
        "proxy_perplexity": perplexity_of(own["judge"], own["judge_tokens"]),
        "chosen_log_ratio": sum(ratios) / len(ratios),
        "chosen_perplexity": perplexity_of(chosen["policy"], chosen["tokens"]),
        "distinct_2": distinct_bigrams(answers),
        "longest_span": sum(spans) / len(spans),
    }


def _align(study: Study, job: Job, settings: Settings, base: Speaker, data: PairSet) -> tuple[Any, dict[str, Any]]:
    study.runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=study.runs) as folder:  # its final model is not kept
        size = study.size if job.kind == "cells" else replace(study.size, evaluations=1)  # of others no curve is drawn
        ran = align(
            size,
            settings,
            base,
            data,
            seed=job.seed,
            folder=Path(folder),
            reference_cache=study.folder / "reference",  # most runs of a set and seed have the same
            default_trl=job.method == "trl",
        )
    about = {"settings": settings.to_json(), "seconds": ran.seconds, "steps": ran.steps}
    return ran.model, {**about, "advice": ran.advice, "history": ran.history}


def _measure(
    study: Study, policy: Speaker, reference: Speaker, heldout: Sequence[Pair], seed: int
) -> tuple[list[str], dict[str, Any]]:
    """One sampled answer to each prompt, and log-probs (summed over tokens) under policy, reference and proxy judge."""
    judge = load_speaker(study.folder / "judge" / "model")
    prompts = [pair["prompt"] for pair in heldout]
    answers = generate(
        policy.model,
        policy.tokenizer,
        prompts,
        max_new_tokens=study.size.max_new_tokens,
        seed=seed,
        top_p=study.size.top_p,
    )
    texts = {
        "chosen": [pair["chosen"] for pair in heldout],
        "rejected": [pair["rejected"] for pair in heldout],
        "own": answers,
    }
    scores: dict[str, Any] = {}
    for name, given in texts.items():
        found = answer_logps(policy.model, policy.tokenizer, prompts, given)
        start = answer_logps(reference.model, reference.tokenizer, prompts, given)
        scores[name] = {
            "policy": _rounded(found.logps),
            "reference": _rounded(start.logps),
            "tokens": found.tokens,
        }
        if name == "own" or policy.model is reference.model:  # of the data's own answers once, with the base
            judged = answer_logps(judge.model, judge.tokenizer, prompts, given)
            scores[name] |= {"judge": _rounded(judged.logps), "judge_tokens": judged.tokens}
    return answers, scores


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
