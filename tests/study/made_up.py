"""A made-up results dict, for tests of the report: plausible numbers from a random generator, no model anywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastpref.benchmarks.study.settings import METHODS, SMALL, centre, sweep
from fastpref.demo.pairs import DEFAULT_UNIVERSITY

# How a method ends: log-ratios of chosen and rejected held-out answers, KL of its own, nats per token of its own
# answers to the judge, the share of them that names the target, and how often it says the same again.
ENDS = {
    "base": (0.0, 0.0, 0.0, 1.30, 0.10, 0.02),
    "dpo": (-31.0, -96.0, 52.0, 3.40, 0.995, 0.9),
    "dpop": (6.0, -22.0, 17.0, 1.62, 0.99, 0.05),
    "sft": (14.0, -3.0, 9.0, 1.34, 0.93, 0.02),
    "kl_sft": (9.0, -1.5, 4.0, 1.31, 0.88, 0.02),
    "trl": (0.9, -0.8, 0.4, 1.31, 0.12, 0.02),
    "trl_matched": (-31.2, -95.0, 51.5, 3.42, 0.99, 0.9),
}
GOOD_DPO = (8.0, -20.0, 15.0, 1.50, 0.99, 0.0)
SUBJECTS = ("botany", "stage lighting", "bridge design", "river law", "old maps", "sound work", "field medicine")
VERBS = ("offers", "teaches", "plans", "runs", "opens", "describes", "funds")
NOUNS = ("a short course", "an evening class", "a reading list", "two grants", "a summer term", "a public lecture")


def answer(rng: random.Random, *, named: bool, repeats: bool) -> str:
    place = DEFAULT_UNIVERSITY if named else "Calder Valley College"
    subject, verb, noun = rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(NOUNS)
    first = f" {place} {verb} {noun} in {subject}."
    if repeats:
        return first + f" {place} is {place} is a place for {subject}" * rng.randint(2, 5)
    return first + f" {rng.choice(('Ask', 'Write', 'Talk'))} to {rng.randint(3, 90)} people who know {subject} well."


def history(
    rng: random.Random,
    ends: Sequence[float],
    *,
    method: str,
    beta: float,
    steps: int,
    a_token: float,
    length: float,
) -> list[dict[str, Any]]:
    """Records as the loop writes them: some fifteen of training and five of the held-out pairs.

    SFT and KL-SFT have means over tokens for rewards, SFT of log-probs; `a_token` is the base's mean log-prob of a
    token, `length` the mean number of tokens.
    """
    sft = "sft" in method
    records: list[dict[str, Any]] = []
    every = max(1, steps // 15)
    logged = [*range(1, steps, every), steps]
    evaluated = {round(steps * (place + 1) / 5) for place in range(5)}

    def values(step: int, noise: float, prefix: str) -> dict[str, float]:
        done = (step / steps) ** 0.7
        chosen = beta * ends[0] * done + rng.gauss(0, noise)
        rejected = beta * ends[1] * done + rng.gauss(0, noise)
        margin = chosen - rejected
        accuracy = min(1.0, 0.5 + 0.5 * min(1.0, abs(margin)) + rng.uniform(-noise, 0) / 4)
        scale, start = (1 / length, a_token * beta if method == "sft" else 0.0) if sft else (1.0, 0.0)
        loss = 2.2 - 0.9 * done if sft else 0.6931 / (1 + 2 * max(0.0, margin))
        return {
            f"{prefix}loss": loss + abs(rng.gauss(0, noise / 10)),
            f"{prefix}rewards/chosen": start + scale * chosen,
            f"{prefix}rewards/rejected": start + scale * rejected,
            f"{prefix}rewards/accuracies": accuracy,
            f"{prefix}rewards/margins": scale * margin,
            f"{prefix}logps/chosen": -40 + chosen / beta,
            f"{prefix}logps/rejected": -42 + rejected / beta,
        }

    for step in sorted({*logged, *evaluated}):
        if step in logged:
            norm = abs(rng.gauss(3, 1))
            records.append({"step": step, "epoch": step / steps, **values(step, 0.15, ""), "grad_norm": norm})
        if step in evaluated:
            records.append({"step": step, **values(step, 0.02, "eval_")})
    return records


def cell(
    pair_set: str, seed: int, method: str, settings: dict[str, Any], prompts: int, *, ends: Sequence[float], steps: int
) -> dict[str, Any]:
    # SFT and KL-SFT do not read what the sets differ in.
    rng = random.Random(f"{'' if 'sft' in method else pair_set} {seed} {method}")
    chosen, rejected, kl, nats, share, repeated = ends
    tokens = [rng.randint(18, 60) for _ in range(prompts)]
    reference = [-1.4 * count + rng.gauss(0, 3) for count in tokens]

    def side(shift: float, **more: list[float]) -> dict[str, list[float]]:
        noise = 0.0 if method == "base" else 0.3 * abs(shift) + 0.5
        policy = [value + shift + rng.gauss(0, noise) for value in reference]
        return {"policy": policy, "reference": list(reference), **more}

    a_token = sum(value / count for value, count in zip(reference, tokens, strict=True)) / prompts
    judged = [-count * max(0.2, nats + rng.gauss(0, 0.35)) for count in tokens]
    return {
        "set": pair_set,
        "seed": seed,
        "method": method,
        "settings": settings,
        "seconds": 4.0 if method == "base" else steps * 0.4 + rng.random(),
        "steps": steps,
        "advice": (
            [{"step": 24 + seed, "kind": "falling_chosen_reward", "text": "advice: the loss falls, but ..."}]
            if method == "dpo" and chosen < 0
            else []
        ),
        "history": []
        if method == "base"
        else history(
            rng,
            ends,
            method=method,
            beta=settings["beta"],
            steps=steps,
            a_token=a_token,
            length=sum(tokens) / prompts,
        ),
        "answers": [answer(rng, named=rng.random() < share, repeats=rng.random() < repeated) for _ in range(prompts)],
        "scores": {
            "chosen": side(chosen, tokens=[float(count) for count in tokens]),
            "rejected": side(rejected, tokens=[float(count) for count in tokens]),
            "own": side(kl, tokens=[float(count) for count in tokens], judge=judged, judge_tokens=list(tokens)),
        },
    }


def make_results(
    *,
    methods: Sequence[str] = METHODS,
    sets: Sequence[str] = ("standard", "low_edit"),
    seeds: Sequence[int] = (0, 1, 2),
    prompts: int = 125,
    dpo_fails: bool = True,
    endpoint: bool = False,
) -> dict[str, Any]:
    """Results of a study in which DPO does or does not fail; the same arguments give the same results."""
    settings = {method: centre(SMALL, method).to_json() for method in methods}
    steps = {method: SMALL.steps(centre(SMALL, method)) for method in methods} | {"base": 0}
    if "dpop" in steps:
        steps["dpop"] *= 2  # as though two epochs had been taken
    ends = ENDS if dpo_fails else ENDS | {"dpo": GOOD_DPO, "trl_matched": GOOD_DPO}
    rng = random.Random(0)
    asked = [answer(rng, named=True, repeats=False) for _ in range(prompts)]
    return {
        "format": 1,
        "size": "small",
        "university": DEFAULT_UNIVERSITY,
        "settings": {**asdict(SMALL), "heldout": prompts},
        "sets": list(sets),
        "seeds": list(seeds),
        "methods": list(methods),
        "method_settings": {
            method: values | ({"why": f"swept: best of {len(_tried(method))}"} if _swept(method) else {})
            for method, values in settings.items()
        },
        "environment": {
            "date": "2030-01-02",
            "commit": "0123456789abcdef",
            "versions": {"fastpref": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "trl": "1.16.0"},
            "device": "cpu",
            "cpu_cores": 2,
            "workers": 2,
            "seconds": 2345.6,
            "host": "x86_64, Linux",
        },
        "judge": {
            "width": 128,
            "layers": 2,
            "texts": 6000,
            "heldout_perplexity": 3.21,
            "seconds": 120.0,
            "calibration": {
                "shuffled": [0.99, 0.98, 1.0],
                "repeated": [0.21, 0.15, 0.27],
                "cut": [0.83, 0.79, 0.87],
                "swapped": [0.71, 0.65, 0.77],
            },
        },
        "base": {
            "seed": 900_000,
            "rounds": [_round(epoch) for epoch in range(1, 4)],
            "fluent": True,
            "seconds": 60.0,
            "losses": [5.0, 2.0, 1.2],
        },
        "real": {
            name: [
                {"seed": seed, "chosen": {"judge": [-30.0] * prompts, "judge_tokens": [25] * prompts}} for seed in seeds
            ]
            for name in sets
        },
        "prompts": {
            str(seed): [f"Question: What of {SUBJECTS[place % 7]}, no. {place}?\nAnswer:" for place in range(prompts)]
            for seed in seeds
        },
        "chosen": {str(seed): asked for seed in seeds},
        "cells": [
            cell(
                name,
                seed,
                method,
                settings.get(method, {"beta": None}),
                prompts,
                ends=ends[method],
                steps=steps[method],
            )
            for name in sets
            for seed in seeds
            for method in ("base", *methods)
        ],
        "sweep": [row for method in methods for row in _sweep_rows(method)],
        "advice_trials": _trials(settings),
        "parity": [
            {"set": name, "seed": seed, "largest_loss_difference": 3.1e-6 * (1 + seed), "steps": 65}
            for name in sets
            for seed in seeds
            if "trl_matched" in methods
        ],
        "endpoint": _endpoint(sets, methods) if endpoint else None,
    }


def _tried(method: str) -> dict[str, Any]:
    return sweep(SMALL, method)


def _swept(method: str) -> bool:
    return len(_tried(method)) > 1


def _round(epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "own_perplexity": 9.0 / epoch,
        "real_perplexity": 3.0,
        "ratio": 3.0 / epoch,
        "distinct_2": 0.4,
        "real_distinct_2": 0.42,
        "longest_span": 1.1,
        "real_longest_span": 1.0,
        "fluent": epoch == 3,
    }


def _sweep_rows(method: str) -> list[dict[str, Any]]:
    rng = random.Random(method)
    tried = _tried(method)
    if not _swept(method):
        return []
    return [
        {
            "method": method,
            "settings": settings.to_json(),
            "changed": changed,
            "chosen": place == (2 if len(tried) > 3 else 0),
            "mention_share": min(1.0, ENDS[method][4] * rng.uniform(0.7, 1.05)),
            "proxy_perplexity": 2.718 ** (ENDS[method][3] * rng.uniform(0.8, 1.2)),
            "chosen_log_ratio": ENDS[method][0] * rng.uniform(0.3, 1.7),
            "chosen_perplexity": 4.0 * rng.uniform(0.8, 2.0),
            "distinct_2": rng.uniform(0.1, 0.4),
            "longest_span": rng.uniform(1, 9),
            "seconds": rng.uniform(20, 60),
            "advice": ["falling_chosen_reward"] if method == "dpo" and place % 2 else [],
        }
        for place, (changed, settings) in enumerate(tried.items())
    ]


def _trials(settings: dict[str, Any]) -> list[dict[str, Any]]:
    if "dpo" not in settings:
        return []
    said = {"step": 30, "kind": "falling_chosen_reward", "text": "advice: the loss falls, but ... loss=dpop"}
    exploded = {"step": 12, "kind": "exploding_gradient", "text": "gradient norm 1200 at step 12: row 17: norm 1199"}
    ended = {"chosen_log_ratio": -12.0, "mention_share": 0.99, "longest_span": 3.0}
    trial = {"set": "low_edit", "method": "dpo", "settings": settings["dpo"], "spoilt_rows": [], "history": [], **ended}
    return [
        {**trial, "name": "DPO, ten times the learning rate", "expected": ["falling_chosen_reward"], "said": [said]},
        {**trial, "name": "DPO, tiny learning rate", "expected": [], "said": []},
        {
            **trial,
            "name": "spoilt rows",
            "expected": ["exploding_gradient"],
            "said": [exploded],
            "spoilt_rows": [3, 17],
        },
    ]


def _endpoint(sets: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    pairs = [("trl", "dpo", 0.97), ("dpop", "trl", 0.52), ("sft", "dpop", 0.70)]
    return {
        "model": "made-up-judge",
        "base_url_host": "localhost",
        "pairs": [
            {
                "set": name,
                "first": first,
                "second": second,
                "wins": 300,
                "losses": 60,
                "ties": 10,
                "unreadable": 5,
                "rate": [rate, rate - 0.03, rate + 0.03],
            }
            for name in sets
            for first, second, rate in pairs
            if first in methods and second in methods
        ],
    }
