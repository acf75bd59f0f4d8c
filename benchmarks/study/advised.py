"""Whether the loop's advice came where it should and nowhere else, by the results alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastpref.benchmarks.study.reading import MEASURES, SET_TITLES, TITLES, Cell, Study
from fastpref.benchmarks.study.words import MISSING, escaped, listed, number, percent, plural, table

FALLING, EXPLODING = "falling_chosen_reward", "exploding_gradient"
KINDS = {FALLING: "falling chosen reward", EXPLODING: "exploding gradient"}
# Records of training that are looked at together, since one batch may show anything,
RECENT = 5
# and how many nats the chosen answers must have lost by their mean before advice is called for. Where it is
# less, but some, either is right.
CLEAR = 0.5
# Losses that raise the chosen answer and look at nothing else: there is no margin that its log-prob could pay for.
NO_MARGIN = ("sft", "kl_sft")

# What a trial came to beside its advice: whether a remedy is one.
ENDED: dict[str, Callable[[float], str]] = {
    "chosen_log_ratio": number("+.1f"),
    "mention_share": percent,
    "longest_span": number(".1f"),
}


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


def cells_table(study: Study) -> list[str]:
    rows = []
    for (name, method), seen in judged(study).items():
        needed = sum(one.called_for is True for one in seen)
        either = sum(one.called_for is None for one in seen)
        steps = [str(one.fired) for one in seen if one.fired is not None]
        at = f", at step{'s' if len(steps) > 1 else ''} {listed(steps)}" if steps else ""
        others = [KINDS.get(kind, kind) for one in seen for kind in one.others]
        rows.append(
            [
                TITLES[method],
                SET_TITLES.get(name, name),
                f"{needed} of {len(seen)}" + (f" ({either} on the edge)" if either else ""),
                f"{len(steps)} of {len(seen)}{at}",
                escaped(", ".join(others)) or "–",
                "yes" if all(one.right for one in seen) else "**no**",
            ]
        )
    return table(
        ["", "set", "runs that call for it", "runs that got it", "other advice", "as it should be"], rows, words=2
    )


def trials_table(study: Study) -> list[str]:
    rows = []
    for trial in study.results["advice_trials"]:
        said = [f"{KINDS.get(advice['kind'], advice['kind'])}, step {advice['step']}" for advice in trial["said"]]
        expected = trial["expected"]
        wanted = "either" if expected is None else ", ".join(KINDS.get(kind, kind) for kind in expected) or "none"
        rows.append(
            [
                escaped(trial["name"]),
                SET_TITLES.get(trial["set"], trial["set"]),
                f"{trial['settings']['learning_rate']:.3g}",
                f"{trial['settings']['beta']:g}",
                wanted,
                (escaped("; ".join(said)) or "none") + (", then it diverged" if trial.get("diverged") else ""),
                _spoilt(trial),
                *(_ended(trial, name, write) for name, write in ENDED.items()),
                "–" if trial_right(trial) is None else "yes" if trial_right(trial) else "**no**",
            ]
        )
    names = ["trial", "set", "learning rate", "β", "advice expected", "advice given", "spoilt rows"]
    ended = [MEASURES[name].title for name in ENDED]
    return table([*names, *ended, "as it should be"], rows, words=2)


def _ended(trial: dict[str, Any], name: str, write: Callable[[float], str]) -> str:
    return MISSING if trial.get(name) is None else write(trial[name])


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


def _spoilt(trial: dict[str, Any]) -> str:
    rows = trial["spoilt_rows"]
    if not rows:
        return "–"
    first = first_named(trial["said"])
    return f"{listed(list(map(str, rows)))}; " + (f"{first} named first" if first in rows else "neither named first")


def words_said(study: Study) -> dict[str, str]:
    """The first advice of each kind in full, trials before runs."""
    runs = [trial["said"] for trial in study.results["advice_trials"]]
    runs += [cell.get("advice", []) for cell in study.results["cells"]]
    texts: dict[str, str] = {}
    for said in runs:
        for advice in said:
            texts.setdefault(KINDS.get(advice["kind"], advice["kind"]), advice["text"])
    return texts


def summary(study: Study) -> str:
    """One sentence: how many runs and trials of our loop were advised as they should."""
    runs = [one for seen in judged(study).values() for one in seen]
    trials = [right for right in map(trial_right, study.results["advice_trials"]) if right is not None]
    parts = []
    if runs:
        parts.append(f"{sum(one.right for one in runs)} of {plural(len(runs), 'run')}")
    if trials:
        parts.append(f"{sum(trials)} of {plural(len(trials), 'trial')} with an advice expected or ruled out")
    return f"As it should be: {listed(parts)}." if parts else "No run of this package's loop is in these results."
