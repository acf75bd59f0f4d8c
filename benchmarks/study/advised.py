"""Whether the loop's advice came where it should and nowhere else, by the results alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastpref.benchmarks.study.reading import Cell, Study

FALLING, EXPLODING = "falling_chosen_reward", "exploding_gradient"
# Records of training that are looked at together, since one batch may show anything,
RECENT = 5
# and how many nats the chosen answers must have lost by their mean before advice is called for. Where it is
# less, but some, either is right.
CLEAR = 0.5
# Losses that raise the chosen answer and look at nothing else: there is no margin that its log-prob could pay for.
NO_MARGIN = ("sft", "kl_sft")


class Seen(NamedTuple):
    """A run of our loop: whether the failure was there at its end, or at some time before, and what was said."""

    called_for: bool | None  # None: too close to zero, or there for a while only; advice or none, both are right
    fired: int | None  # the step
    others: list[str]  # advice of another kind, which nothing calls for in a run on sound data

    @property
    def right(self) -> bool:
        return not self.others and (self.called_for is None or self.called_for == (self.fired is not None))


def look(cell: Cell) -> Seen:
    """Judge the falling chosen reward in a run by its training records, apart from how the loop does."""
    called_for = False if cell["settings"]["loss"] in NO_MARGIN else _called_for(cell)
    said = {advice["kind"]: advice["step"] for advice in cell.get("advice", [])}
    return Seen(called_for, said.get(FALLING), [kind for kind in said if kind != FALLING])


def _called_for(cell: Cell) -> bool | None:
    records = [record for record in cell["history"] if _has(record, "loss") and _has(record, "rewards/chosen")]
    windows = [records[place : place + RECENT] for place in range(1, max(2, len(records) - RECENT + 1))]
    beta, failing, lost = cell["settings"]["beta"], [], 0.0
    for window in filter(None, windows):
        nats = -sum(record["rewards/chosen"] for record in window) / len(window) / beta
        lost = nats if sum(record["loss"] for record in window) / len(window) < records[0]["loss"] else 0.0
        failing.append(lost > CLEAR)
    if failing and failing[-1]:
        return True
    return None if any(failing) or lost > 0 else False


def _has(record: dict[str, Any], name: str) -> bool:
    return record.get(name) is not None


def judged(study: Study) -> dict[tuple[str, str], list[Seen]]:
    """By set and method, of the methods that our loop ran."""
    ours = [m for m in study.methods if study.results["method_settings"][m]["trainer"] == "fastpref"]
    by_method = {(name, method): study.cells(name, method) for method in ours for name in study.sets}
    return {key: [look(cell) for cell in cells] for key, cells in by_method.items() if cells}


def trial_right(trial: dict[str, Any]) -> bool | None:
    """Whether just the expected kinds were said; None where either way is right, or a run diverged.

    Where rows were spoilt: whether one of them was named first, and the falling chosen reward as in every run. One that
    should have drawn no advice should not have diverged either.
    """
    if trial["expected"] is None:
        return None
    if trial.get("diverged"):
        return None if trial["expected"] else False
    if trial["spoilt_rows"]:
        seen = look({**trial, "advice": trial["said"]})
        as_every_run = seen.called_for is None or seen.called_for == (seen.fired is not None)
        return first_named(trial["said"]) in trial["spoilt_rows"] and as_every_run
    return {advice["kind"] for advice in trial["said"]} == set(trial["expected"])


def first_named(said: Sequence[dict[str, Any]]) -> int | None:
    """The row that advice about gradients lists first, as the one that did most of it."""
    listed_rows = (re.search(r"\brow (\d+): ", advice["text"]) for advice in said if advice["kind"] == EXPLODING)
    return next((int(found[1]) for found in listed_rows if found), None)
