"""What the project promises of its own cases, and whether a run's rows keep it; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple

from .report.words import is_timed

Row = dict[str, Any]
MIB = 2**20

Key = tuple[str, str, str]  # case, mode, provider
Found = dict[Key, Row]

# On a CPU, forward and backward: our case, the other one, whose it is, and at least so many times faster. Of the
# logits path cross_entropy is there twice: as people write it after a shift, and without the logits' copy.
FASTER_THAN = (
    ("headline", "headline", "plain", 5.0),
    ("headline", "headline", "cross_entropy", 3.5),
    ("headline", "headline", "cross_entropy_nocopy", 3.5),
    ("linear-quarter", "linear-quarter", "plain", 12.0),
    ("linear-half", "linear-half", "plain", 7.5),
    ("linear-most", "linear-most", "plain", 4.2),
    ("linear-quarter-64MiB", "linear-quarter", "plain", 9.0),
    ("linear-half-64MiB", "linear-half", "plain", 5.0),
    ("linear-most-64MiB", "linear-most", "plain", 3.2),
)
FASTER_THAN_RIVALS = {"linear-quarter": 7.0, "linear-half": 4.0, "linear-most": 2.3}
LINEAR_FROZEN = 0.65  # of the trainable time
# "Linear in the scored rows": the time a row of the longest case over that of the shortest.
LINEAR_GROWTH = 1.15
PEAK_MIB = {"headline": 16.0, "linear-*-64MiB": 80.0}
OVER_PRODUCTS: dict[Key, float] = {(case, "train", "fastpref"): 1.4 for case in FASTER_THAN_RIVALS}

# On a GPU: the share of a copy's bandwidth, in every case whose logits are large; the rest as above.
SHARE_OF_COPY, SHARE_OF_COPY_BYTES = 0.9, 2**30
GPU_OVER_PRODUCTS = {
    ("linear-half", "forward", "fastpref_logps"): 1.15,
    ("linear-frozen", "train", "fastpref"): 1.15,
    ("linear-half", "train", "fastpref"): 1.12,
}
GPU_PEAK_MIB = {"linear-half": 1.1 * 1024, "linear-long": 3.0 * 1024}

# Of whole training runs on a CPU: who, against whom, so many times faster a step, and a share of the process's peak.
TRAINING = (
    ("fastpref", "trl", "", 8.0, 0.4),
    ("fastpref", "plain", "", 3.0, None),
    ("trl_fastpref", "trl", " with fastpref in trl", 4.0, 0.5),
)
TRAINING_ON_GPU = (("fastpref", "trl", "", 2.0, None),)
TRAINING_LOSSES, TRAINING_OUTSIDE_LAYERS = 1e-4, 0.25
LONGEST_OVER_PLAIN = 8.0


class Promise(NamedTuple):
    """`got` is `what`, and should be at least (or at most) `bound`."""

    case: str
    what: str
    got: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.got >= self.bound if self.at_least else self.got <= self.bound

    @property
    def verdict(self) -> str:
        return "met" if self.met else "**MISSED**"

    def __str__(self) -> str:
        side = "at least" if self.at_least else "at most"
        return f"{self.case}: {self.got:.2f} {self.what} ({side} {self.bound:g}): {self.verdict.strip('*')}"


def judge(rows: Sequence[Row], device_class: str) -> list[Promise]:
    """The promises of a device class, of which the rows are there."""
    timed = [row for row in rows if is_timed(row)]
    found = {(row["case"], row["mode"], row["provider"]): row for row in timed}
    if device_class == "cpu":
        return [
            *_faster(found, timed),
            *_over_products(found, OVER_PRODUCTS),
            *_linear_growth(found),
            *_peaks(found, PEAK_MIB),
            *_training(timed, TRAINING),
            *_training_losses_and_layers(timed),
            *_longest([row for row in rows if "longest" in row]),
        ]
    if device_class == "gpu":
        return [
            *_share_of_copy(timed),
            *_over_products(found, GPU_OVER_PRODUCTS),
            *_peaks(found, GPU_PEAK_MIB),
            *_training(timed, TRAINING_ON_GPU),
        ]
    return []


def _faster(found: Found, rows: Sequence[Row]) -> Iterator[Promise]:
    for case, other_case, name, bound in FASTER_THAN:
        ours, other = found.get((case, "train", "fastpref")), found.get((other_case, "train", name))
        if ours and other:
            yield Promise(case, f"times faster than {name}", _times(other, ours), bound, True)
    for case, bound in FASTER_THAN_RIVALS.items():
        ours = found.get((case, "train", "fastpref"))
        rivals = [row for row in rows if (row["case"], row["mode"]) == (case, "train") and row["rival"]]
        if ours and rivals:
            best = min(rivals, key=lambda row: row["median_ms"])
            what = f"times faster than {best['provider']}, the fastest of {len(rivals)} rivals"
            yield Promise(case, what, _times(best, ours), bound, True)


def _over_products(found: Found, bounds: Mapping[Key, float]) -> Iterator[Promise]:
    for key, bound in bounds.items():
        row = found.get(key)
        if row and row["ratio_to_limit"] is not None:
            what = f"times the products alone, {row['products']} of them, {row['provider']} {row['mode']}"
            yield Promise(row["case"], what, 1 / row["ratio_to_limit"], bound, False)


def _linear_growth(found: Found) -> Iterator[Promise]:
    ours = {case: row for (case, mode, name), row in found.items() if (mode, name) == ("train", "fastpref")}
    half, frozen = ours.get("linear-half"), ours.get("linear-frozen")
    if half and frozen:
        yield Promise("linear-frozen", "of the trainable time", _times(frozen, half), LINEAR_FROZEN, False)
    shortest = ours.get("linear-half-64MiB")
    grown = [row for case, row in ours.items() if fnmatch(case, "linear-growth-*-64MiB")]
    if shortest and grown:
        longest = max(grown, key=lambda row: row["scored_rows"])
        growth = _times(longest, shortest) * shortest["scored_rows"] / longest["scored_rows"]
        yield Promise(longest["case"], f"times the time a row of {shortest['case']}", growth, LINEAR_GROWTH, False)


def _peaks(found: Found, bounds: Mapping[str, float]) -> Iterator[Promise]:
    for (case, mode, name), row in found.items():
        peak = row.get("peak_beyond_gradient_bytes")
        for pattern, bound in bounds.items():
            if (mode, name) == ("train", "fastpref") and peak is not None and fnmatch(case, pattern):
                yield Promise(case, "MiB beyond the gradients", peak / MIB, bound, False)


def _share_of_copy(rows: Sequence[Row]) -> Iterator[Promise]:
    for row in rows:
        ours = (row["suite"], row["provider"], row["series"]) == ("logps", "fastpref", None)
        if ours and row["work"] >= SHARE_OF_COPY_BYTES:
            case = f"{row['case']} {row['mode']}"
            yield Promise(case, "of a copy's bandwidth", row["ratio_to_limit"], SHARE_OF_COPY, True)


def _training(rows: Sequence[Row], wanted: Sequence[tuple[str, str, str, float, float | None]]) -> Iterator[Promise]:
    runs = {(row["case"], row["provider"]): row for row in rows if row["suite"] == "training"}
    for case in dict.fromkeys(case for case, _ in runs):
        for name, against, how, faster, share in wanted:
            ours, other = runs.get((case, name)), runs.get((case, against))
            if not (ours and other):
                continue
            what = f"times faster a step{how or f' than {against}'}"
            yield Promise(case, what, _times(other, ours), faster, True)
            if share is not None:
                got = ours["peak_bytes"] / other["peak_bytes"]
                yield Promise(case, f"of the peak of {against}'s process{how}", got, share, False)


def _training_losses_and_layers(rows: Sequence[Row]) -> Iterator[Promise]:
    for row in rows:
        if (row["suite"], row["provider"]) != ("training", "fastpref"):
            continue
        if row["dtype"] == "fp32" and row["loss_error_against"] is not None:
            what = f"of {row['loss_error_against']}'s loss at the step that is furthest from it"
            yield Promise(row["case"], what, row["loss_error"], TRAINING_LOSSES, False)
        if row["case"].startswith("training-share"):
            what = "of a step outside the layers"
            yield Promise(row["case"], what, row["outside_layers"], TRAINING_OUTSIDE_LAYERS, False)


def _longest(rows: Sequence[Row]) -> Iterator[Promise]:
    found = {row["provider"]: row["longest"] for row in rows if row["case"] == "longest-training"}
    if found.get("fastpref") and found.get("plain"):
        ratio = found["fastpref"] / found["plain"]
        yield Promise("longest-training", "times the plain loop's longest pair", ratio, LONGEST_OVER_PLAIN, True)


def _times(slower: Row, faster: Row) -> float:
    return float(slower["median_ms"] / faster["median_ms"])
