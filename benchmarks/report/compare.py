"""What got slower or faster between two results files, beyond the noise; and which errors and peaks grew.

Times are held against what measuring the same thing twice shifts: noise.py says how that is known. A time of a single
round is shown and not judged. An error beyond twice the old one, above what rounding alone makes, a peak beyond 2% and
1 MiB, and a longest pair that shrank by an eighth are regressions too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .noise import Key, Noise
from .words import LIMIT, Row, error, is_timed, memory, milliseconds, tokens

ERROR_GROWTH = 2.0
PEAK_GROWTH, PEAK_FLOOR = 1.02, 2**20
LONGEST_SHRINKS = 7 / 8  # a search that time ended stops at any length


class Bound(NamedTuple):
    """A number that is worse where it grew beyond a factor and by more than `floor`."""

    field: str
    factor: float
    above: float  # a new value up to this is chance, whatever the old one was
    by: float
    write: Callable[[float], str]


# float32 sums of some thousand nats round by 1e-4; its gradients by 1e-6 of their norm. Below, growth is chance.
BOUNDS = (
    Bound("value_error", ERROR_GROWTH, 1e-4, 0.0, error),
    Bound("gradient_error", ERROR_GROWTH, 1e-6, 0.0, error),
    Bound("peak_beyond_gradient_bytes", PEAK_GROWTH, 0.0, PEAK_FLOOR, memory),
    Bound("peak_bytes", PEAK_GROWTH, 0.0, PEAK_FLOOR, memory),
)


@dataclass(frozen=True)
class Change:
    """One row that is another now: what of it, by how much, and whether that is for the worse."""

    key: Key
    what: str  # "time", a field of errors, "peak" or "longest"
    text: str
    worse: bool
    ratio: float = math.nan  # new / old; of time without the drift


@dataclass(frozen=True)
class Comparison:
    head: list[str]  # what the two files are, how they differ, and what was taken out
    changes: list[Change]
    compared: int
    only_old: list[Key]
    only_new: list[Key]
    not_compared: list[str] = field(default_factory=list)  # why, a line each

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.worse]

    @property
    def exit_code(self) -> int:
        return 1 if self.regressions else 0

    def format(self) -> str:
        lines = list(self.head)
        parts = {
            "worse": self._said(worse=True),
            "better": self._said(worse=False),
            "only in the old file": [_name(key) for key in self.only_old],
            "only in the new file": [_name(key) for key in self.only_new],
            "not compared": self.not_compared,
        }
        for title, found in parts.items():
            if found:
                lines += ["", f"{title}:", *(f"  {line}" for line in found)]
        worse, better = (len({c.key for c in self.changes if c.worse is verdict}) for verdict in (True, False))
        counts = f"{self.compared} rows compared: {worse} worse, {better} better, the rest within the noise"
        return "\n".join([*lines, "", counts])

    def _said(self, *, worse: bool) -> list[str]:
        found = sorted((c for c in self.changes if c.worse is worse), key=lambda c: (c.what != "time", c.key))
        return [f"{_name(change.key)}: {change.text}" for change in found]


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Of two results files, as `results.read` gives them."""
    before, after = _by_key(old), _by_key(new)
    both = [key for key in before if key in after]
    pairs = {key: (before[key], after[key]) for key in both}
    timed = {key: (a, b) for key, (a, b) in pairs.items() if is_timed(a) and is_timed(b)}
    not_compared = [*_without_keys(old), *_other_shapes(timed), *_single_rounds(timed)]
    timed = {key: pair for key, pair in timed.items() if not _shapes_that_differ(*pair)}
    other = {key: (a, b) for key, (a, b) in pairs.items() if not is_timed(a)}
    noise = Noise(timed, _changed_packages(old, new), same_device=old["device"] == new["device"])
    changes = [change for key, (a, b) in timed.items() for change in _time(key, a, b, noise)]
    for key, (a, b) in [*timed.items(), *other.items()]:
        changes += [*_growth(key, a, b), *_longest(key, a, b)]
    return Comparison(
        head=[*_heads(old, new), *noise.lines()],
        changes=changes,
        compared=len(timed) + len(other),
        only_old=[key for key in before if key not in after],
        only_new=[key for key in after if key not in before],
        not_compared=not_compared,
    )


def _by_key(file: dict[str, Any]) -> dict[Key, Row]:
    rows = (row for row in file["rows"] if "provider" in row and "case" in row)
    return {(row["suite"], row["case"], row.get("mode", ""), row["provider"]): row for row in rows}


def _without_keys(file: dict[str, Any]) -> list[str]:
    suites: dict[str, int] = {}
    for row in file["rows"]:
        if "provider" not in row or "case" not in row:
            suites[row["suite"]] = suites.get(row["suite"], 0) + 1
    return [f"{count} rows of {suite}: a sweep, without cases and providers" for suite, count in suites.items()]


_SHAPE = ("batch", "length", "vocab", "hidden", "share", "dtype", "frozen", "budget", "pairs", "layers", "work")


def _shapes_that_differ(old: Row, new: Row) -> list[str]:
    return [name for name in _SHAPE if old.get(name) != new.get(name)]


def _other_shapes(timed: dict[Key, tuple[Row, Row]]) -> list[str]:
    found = ((key, a, b, _shapes_that_differ(a, b)) for key, (a, b) in timed.items())
    return [
        f"{_name(key)}: another shape, " + ", ".join(f"{name} {a.get(name)} -> {b.get(name)}" for name in names)
        for key, a, b, names in found
        if names
    ]


def _single_round(old: Row, new: Row) -> bool:
    return min(len(old["times_ms"]), len(new["times_ms"])) < 2


def _single_rounds(timed: dict[Key, tuple[Row, Row]]) -> list[str]:
    """Said, for a reader to judge: one sample has no noise to hold it against."""
    return [
        f"{_name(key)}: time of a single round, {milliseconds(a['median_ms'])} -> {milliseconds(b['median_ms'])}"
        for key, (a, b) in timed.items()
        if _single_round(a, b)
    ]


def _heads(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = [
        f"{name}: {file['device']}, {file['date']}, commit {file['commit'] or 'unknown'}"
        + ("" if file.get("complete", True) else ", an interrupted run")
        for name, file in (("old", old), ("new", new))
    ]
    names = [name for name in ("device", "threads", "python", "system") if old.get(name) != new.get(name)]
    lines += [f"{name} differs: {old.get(name)} -> {new.get(name)}" for name in names]
    packages = _changed_packages(old, new)
    was, now = old["versions"], new["versions"]
    return lines + [f"{name} differs: {was.get(name) or 'none'} -> {now.get(name) or 'none'}" for name in packages]


def _changed_packages(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*old["versions"], *new["versions"]])
    return [name for name in names if old["versions"].get(name) != new["versions"].get(name)]


def _time(key: Key, old: Row, new: Row, noise: Noise) -> list[Change]:
    shift, bound = noise.beyond(key)
    if abs(shift) <= bound or old["family"] == LIMIT or _single_round(old, new):
        return []
    ratio = math.exp(shift)
    change = f"{ratio - 1:.0%} slower" if shift > 0 else f"{1 - ratio:.0%} less time"
    text = (
        f"{change} ({milliseconds(old['median_ms'])} -> {milliseconds(new['median_ms'])}, "
        f"{old['rounds']} and {new['rounds']} rounds; noise up to {math.expm1(bound):.0%})"
    )
    return [Change(key, "time", text, shift > 0, ratio)]


def _growth(key: Key, old: Row, new: Row) -> list[Change]:
    """Errors and peaks; of the two peaks the one beyond gradients, where both rows have it."""
    found, peaks_seen = [], "longest" in old
    for bound in BOUNDS:
        was, now = old.get(bound.field), new.get(bound.field)
        is_peak = bound.write is memory
        if was is None or now is None or (is_peak and peaks_seen):
            continue
        peaks_seen = peaks_seen or is_peak
        text = f"{bound.field} {bound.write(was)} -> {bound.write(now)}"
        if _grew(was, now, bound) or math.isnan(now):
            found.append(Change(key, bound.field, text, True, now / was if was > 0 else math.inf))
        elif _grew(now, was, bound):
            found.append(Change(key, bound.field, text, False, now / was))
    return found


def _grew(was: float, now: float, bound: Bound) -> bool:
    return now > max(bound.factor * was, bound.above) and now - was > bound.by


def _longest(key: Key, old: Row, new: Row) -> list[Change]:
    if "longest" not in old or "longest" not in new or old.get("within_bytes") != new.get("within_bytes"):
        return []
    was, now = old["longest"] or 0, new["longest"] or 0
    text = f"longest {tokens(was)} -> {tokens(now)} tokens"
    if now < LONGEST_SHRINKS * was:
        return [Change(key, "longest", text, True, now / was)]
    return [Change(key, "longest", text, False, now / was if was else math.inf)] if was < LONGEST_SHRINKS * now else []


def _name(key: Key) -> str:
    suite, case, mode, provider = key
    return " ".join(part for part in (suite, case, mode, provider) if part)
