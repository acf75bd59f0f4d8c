"""Comparable curves out of the histories of different losses: held-out log-ratios to the base in nats per answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref.benchmarks.study.reading import Cell, scores
from fastpref.losses import get_loss

Points = tuple[np.ndarray, np.ndarray]  # steps, values


def points(history: Sequence[dict[str, Any]], name: str) -> Points:
    """A record's entry over the steps, where there is one."""
    found = [(record["step"], record[name]) for record in history if record.get(name) is not None]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, float), np.asarray(values, float)


def log_ratios(cell: Cell, side: str) -> Points:
    """The mean log-ratio of the held-out chosen or rejected answers, in nats per answer, from zero at the start.

    SFT and KL-SFT report means over an answer's tokens, and SFT log-probs instead of log-ratios. From these the base's
    own are taken, which the cell's scores hold, and tokens become answers by what they came to at the end; between
    start and end that is nearly exact, since the lengths of the answers stay.
    """
    settings = cell["settings"]
    spec = get_loss(settings["loss"])
    steps, rewards = points(cell["history"], f"eval_rewards/{side}")
    values = rewards / settings["beta"]
    if spec.reduction == "mean" and len(values):
        found = scores(cell, side, "policy", "reference", "tokens")
        if found is None:
            return np.zeros(0), np.zeros(0)
        policy, reference, tokens = (np.asarray(column, float) for column in found)
        if not spec.needs_reference:
            values = values - np.mean(reference / tokens)
        values = values * _tokens_to_answers(policy - reference, tokens)
    if not len(steps):  # nothing was evaluated, or nothing of it is a number: a lone zero would be read as the end
        return steps, values
    return np.concatenate([[0.0], steps]), np.concatenate([[0.0], values])


def _tokens_to_answers(ratios: np.ndarray, tokens: np.ndarray) -> float:  # (N,), (N,)
    """How many times the mean over answers of a log-ratio per token is the mean log-ratio of an answer."""
    length, a_token = float(tokens.mean()), float((ratios / tokens).mean())
    factor = float(ratios.mean()) / a_token if a_token else length
    # Near zero the quotient says nothing; the two means even may differ in sign.
    return factor if length / 2 < factor < 2 * length else length


def rewards(cell: Cell, side: str) -> Points:
    steps, values = log_ratios(cell, side)
    return steps, cell["settings"]["beta"] * values


def margins(cell: Cell) -> Points:
    """The log-ratio of the chosen answer less that of the rejected one, in nats."""
    (steps, chosen), (_, rejected) = log_ratios(cell, "chosen"), log_ratios(cell, "rejected")
    return (steps, chosen - rejected) if len(chosen) == len(rejected) else (np.zeros(0), np.zeros(0))


def accuracies(cell: Cell) -> Points:
    """In %. Not from zero, where equal models tell nothing apart; none of SFT, which compares log-probs instead."""
    if not get_loss(cell["settings"]["loss"]).needs_reference:
        return np.zeros(0), np.zeros(0)
    steps, values = points(cell["history"], "eval_rewards/accuracies")
    return steps, 100 * values


def mean_curve(curves: Sequence[Points]) -> Points:
    """The mean over seeds, at the steps of the first as far as all of them go."""
    last = min(steps[-1] for steps, _ in curves)
    at = curves[0][0][curves[0][0] <= last]
    return at, np.mean([np.interp(at, steps, values) for steps, values in curves], axis=0)
