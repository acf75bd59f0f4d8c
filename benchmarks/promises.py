"""What the project promises of its own cases, and whether a run's rows keep it; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .report.words import is_timed

Row = dict[str, Any]
MIB = 2**20

# Of the logits path's headline case on a CPU: at least so many times faster.
FASTER_THAN = {"plain": 5.0, "cross_entropy": 3.5, "cross_entropy_nocopy": 3.5}
HEADLINE_PEAK_MIB = 16.0
# Of the logits path on a GPU: the share of a copy's bandwidth, in every case whose logits are large.
SHARE_OF_COPY = 0.9
SHARE_OF_COPY_BYTES = 2**30
# Of the linear path on a CPU, by scored share: times faster than plain, and than the fastest rival.
LINEAR_FASTER = {"linear-quarter": (12.0, 7.0), "linear-half": (7.5, 4.0), "linear-most": (4.2, 2.3)}
LINEAR_FASTER_IN_64_MIB = {"linear-quarter": 9.0, "linear-half": 5.0, "linear-most": 3.2}
LINEAR_OVER_PRODUCTS, LINEAR_FROZEN, LINEAR_PEAK_MIB = 1.4, 0.65, 80.0
# "Linear in the scored rows": the time a row of the longest case over that of the shortest.
LINEAR_GROWTH = 1.15
# Of the linear path on a GPU, over the products alone: (case, mode, provider).
GPU_OVER_PRODUCTS = {
    ("linear-half", "forward", "fastpref_logps"): 1.15,
    ("linear-frozen", "train", "fastpref"): 1.15,
    ("linear-half", "train", "fastpref"): 1.12,
}
GPU_PEAK_MIB = {"linear-half": 1.1 * 1024, "linear-long": 3.0 * 1024}

# Of whole training runs on a CPU: so many times faster, a share of the peak, losses, the share outside the layers.
TRAINING_FASTER_THAN = {"trl": 8.0, "plain": 3.0}
TRAINING_PEAK_OF_TRLS, TRAINING_LOSSES, TRAINING_OUTSIDE_LAYERS = 0.4, 1e-4, 0.25
# Of TRL's own trainer with fastpref inside, against the same without.
INSIDE_TRL_FASTER, INSIDE_TRL_PEAK = 4.0, 0.5
TRAINING_FASTER_ON_GPU = 2.0
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
        side, verdict = "at least" if self.at_least else "at most", "met" if self.met else "MISSED"
        return f"{self.case}: {self.got:.2f} {self.what} ({side} {self.bound:g}): {verdict}"


def judge(rows: Sequence[Row], device_class: str) -> list[Promise]:
    """The promises of a device class, of which the rows are there."""
    longest = [row for row in rows if "longest" in row]
    rows = [row for row in rows if is_timed(row)]
    found = {(row["case"], row["mode"], row["provider"]): row for row in rows}
    if device_class == "cpu":
        return [*_logits_on_cpu(found), *_linear_on_cpu(found), *_training_on_cpu(rows), *_longest_on_cpu(longest)]
    if device_class == "gpu":
        return [*_logits_on_gpu(rows), *_linear_on_gpu(found), *_training_on_gpu(rows)]
    return []


Found = dict[tuple[str, str, str], Row]


def _logits_on_cpu(found: Found) -> list[Promise]:
    """cross_entropy is there twice: as people write it after a shift, and at its best, without the logits' copy."""
    ours = found.get(("headline", "train", "fastpref"))
    if ours is None:
        return []
    promises = []
    for name, bound in FASTER_THAN.items():
        if other := found.get(("headline", "train", name)):
            promises.append(Promise("headline", f"times faster than {name}", _times(other, ours), bound, True))
    return [*promises, *_peak(ours, HEADLINE_PEAK_MIB)]


def _logits_on_gpu(rows: Sequence[Row]) -> list[Promise]:
    ours = [row for row in rows if row["suite"] == "logps" and row["provider"] == "fastpref" and row["series"] is None]
    return [
        Promise(f"{row['case']} {row['mode']}", "of a copy's bandwidth", row["ratio_to_limit"], SHARE_OF_COPY, True)
        for row in ours
        if row["work"] >= SHARE_OF_COPY_BYTES
    ]


def _linear_on_cpu(found: Found) -> list[Promise]:
    train = {(case, provider): row for (case, mode, provider), row in found.items() if mode == "train"}
    promises = []
    for case, (over_plain, over_rival) in LINEAR_FASTER.items():
        ours, plain = train.get((case, "fastpref")), train.get((case, "plain"))
        if ours and plain:
            promises.append(Promise(case, "times faster than plain", _times(plain, ours), over_plain, True))
        rivals = [row for (name, _), row in train.items() if name == case and row["rival"]]
        if ours and rivals:
            best = min(rivals, key=lambda row: row["median_ms"])
            what = f"times faster than {best['provider']}, the fastest of {len(rivals)} rivals"
            promises.append(Promise(case, what, _times(best, ours), over_rival, True))
        if ours and ours["ratio_to_limit"] is not None:
            promises.append(_over_products(case, ours, LINEAR_OVER_PRODUCTS))
    for case, bound in LINEAR_FASTER_IN_64_MIB.items():
        ours, plain = train.get((f"{case}-64MiB", "fastpref")), train.get((case, "plain"))
        if ours and plain:
            promises.append(Promise(f"{case}-64MiB", "times faster than plain", _times(plain, ours), bound, True))
    half, frozen = train.get(("linear-half", "fastpref")), train.get(("linear-frozen", "fastpref"))
    if half and frozen:
        share = _times(frozen, half)
        promises.append(Promise("linear-frozen", "of the trainable time", share, LINEAR_FROZEN, False))
    return [*promises, *_in_64_mib(train)]


def _in_64_mib(train: dict[tuple[str, str], Row]) -> list[Promise]:
    small = [row for (case, provider), row in train.items() if case.endswith("-64MiB") and provider == "fastpref"]
    promises = [promise for row in small for promise in _peak(row, LINEAR_PEAK_MIB)]
    shortest = train.get(("linear-half-64MiB", "fastpref"))
    longest = max(small, key=lambda row: row["scored_rows"], default=None)
    if shortest and longest and longest["case"].startswith("linear-growth"):
        growth = _times(longest, shortest) * shortest["scored_rows"] / longest["scored_rows"]
        what = f"times the time a row of {shortest['case']}"
        promises.append(Promise(longest["case"], what, growth, LINEAR_GROWTH, False))
    return promises


def _linear_on_gpu(found: Found) -> list[Promise]:
    rows = {key: found[key] for key in GPU_OVER_PRODUCTS if key in found}
    promises = [
        _over_products(key[0], row, GPU_OVER_PRODUCTS[key])
        for key, row in rows.items()
        if row["ratio_to_limit"] is not None
    ]
    peaks = [(found.get((case, "train", "fastpref")), bound) for case, bound in GPU_PEAK_MIB.items()]
    return [*promises, *(promise for row, bound in peaks if row for promise in _peak(row, bound))]


def _training(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The training runs of a file: by case, then by contestant."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["suite"] == "training":
            cases.setdefault(row["case"], {})[row["provider"]] = row
    return cases


def _training_on_cpu(rows: Sequence[Row]) -> list[Promise]:
    promises = []
    for case, here in _training(rows).items():
        ours, trl = here.get("fastpref"), here.get("trl")
        for name, bound in TRAINING_FASTER_THAN.items():
            other = here.get(name)
            if ours and other:
                promises.append(Promise(case, f"times faster a step than {name}", _times(other, ours), bound, True))
        if ours and trl:
            share = ours["peak_bytes"] / trl["peak_bytes"]
            promises.append(Promise(case, "of the peak of trl's process", share, TRAINING_PEAK_OF_TRLS, False))
        inside = here.get("trl_fastpref")
        if inside and trl:
            faster, share = _times(trl, inside), inside["peak_bytes"] / trl["peak_bytes"]
            promises.append(Promise(case, "times faster a step with fastpref in trl", faster, INSIDE_TRL_FASTER, True))
            what = "of the peak of trl's process with fastpref in trl"
            promises.append(Promise(case, what, share, INSIDE_TRL_PEAK, False))
        if ours and ours["dtype"] == "fp32" and ours["loss_error_against"] in here:
            what = f"of {ours['loss_error_against']}'s loss at the step that is furthest from it"
            promises.append(Promise(case, what, ours["loss_error"], TRAINING_LOSSES, False))
        if ours and case.startswith("training-share"):
            what = "of a step outside the layers"
            promises.append(Promise(case, what, ours["outside_layers"], TRAINING_OUTSIDE_LAYERS, False))
    return promises


def _training_on_gpu(rows: Sequence[Row]) -> list[Promise]:
    return [
        Promise(
            case, "times faster a step than trl", _times(here["trl"], here["fastpref"]), TRAINING_FASTER_ON_GPU, True
        )
        for case, here in _training(rows).items()
        if "trl" in here and "fastpref" in here
    ]


def _longest_on_cpu(rows: Sequence[Row]) -> list[Promise]:
    found = {row["provider"]: row for row in rows if row["case"] == "longest-training"}
    ours, plain = found.get("fastpref"), found.get("plain")
    if not (ours and plain and plain["longest"]):
        return []
    ratio = ours["longest"] / plain["longest"]
    return [Promise("longest-training", "times the plain loop's longest pair", ratio, LONGEST_OVER_PLAIN, True)]


def _times(slower: Row, faster: Row) -> float:
    return slower["median_ms"] / faster["median_ms"]


def _over_products(case: str, row: Row, bound: float) -> Promise:
    what = f"times the products alone, {row['products']} of them, {row['provider']} {row['mode']}"
    return Promise(case, what, 1 / row["ratio_to_limit"], bound, False)


def _peak(row: Row, bound: float) -> list[Promise]:
    peak = row["peak_beyond_gradient_bytes"]
    return [] if peak is None else [Promise(row["case"], "MiB beyond the gradients", peak / MIB, bound, False)]
