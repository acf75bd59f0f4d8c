"""What does measuring the same thing twice shift? Times of two results files are held against that.

- The shift of a row is the median of the logarithms of all ratios new / old of its samples (Hodges and Lehmann 1963):
  nearly as sharp as a difference of means, and a stray first sample does not move it.
- The machine's own drift is taken out first: the median shift of the rows that are not fastpref's and whose packages
  are the same in both files, of the suite where it has three of them, else of all suites. Without any, the measured
  limits stand in; between two devices nothing is taken out. `lines` says which it was, and how much.
- The noise has two parts. Within a run, the variance of the row's samples; a row of two rounds cannot know its own, so
  it is averaged with that of its suite's rows, which counts as four degrees of freedom (a moderated variance, as in
  Smyth 2004). Between runs, what the rows that cannot have changed differ by beyond their samples' noise, 1% at least.
- The bound is three standard errors of both, widened as Student's t is, and never under 5%.

tests/test_benchmarks_results.py simulates it: at no change fewer than 1% of rows are called, and 15% at five rounds of
3% noise is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median, quantiles, variance

from .words import DISTRIBUTIONS, OURS, Row

Key = tuple[str, str, str, str]  # suite, case, mode, provider

STANDARD_ERRORS = 3.0
LEAST_EFFECT = 0.05
PRIOR_FREEDOM = 4  # degrees of freedom that the suite's variance counts as
LEAST_BETWEEN_RUNS = 0.01
# Of a drift known by limits alone. On one machine and day the copy bandwidth alone differed by 8% between files.
LIMITS_UNCERTAINTY = 0.05
ENOUGH_CONTROLS = 3


class Noise:
    """What measuring the same thing twice shifts, learned from all rows of both files."""

    def __init__(self, timed: dict[Key, tuple[Row, Row]], packages: Sequence[str], *, same_device: bool) -> None:
        self.timed = timed
        self.same_device = same_device
        self.shifts = {key: shift_of(a["times_ms"], b["times_ms"]) for key, (a, b) in timed.items()}
        self.suites = list(dict.fromkeys(key[0] for key in timed))
        self.usual = {suite: self._usual_variance(suite) for suite in self.suites}
        controls = [key for key, (row, _) in timed.items() if _unchanged(row["family"], packages)]
        self.drifts = {suite: self._drift(suite, controls) for suite in self.suites}

    def _usual_variance(self, suite: str) -> float:
        """The upper quartile, not the mean, of the rows' variances: one row that went astray says nothing of others."""
        variances = [
            variance(logs)
            for key, pair in self.timed.items()
            if key[0] == suite
            for row in pair
            if len(logs := _logs(row["times_ms"])) > 1
        ]
        if len(variances) < 2:
            return variances[0] if variances else LEAST_EFFECT**2
        return quantiles(variances, n=4, method="inclusive")[2]

    def _standard_error(self, key: Key) -> float:
        """Of the shift, by the samples of both runs."""
        samples = [_logs(row["times_ms"]) for row in self.timed[key]]
        squares = sum(variance(logs) * (len(logs) - 1) for logs in samples if len(logs) > 1)
        moderated = (squares + PRIOR_FREEDOM * self.usual[key[0]]) / self._freedom(key)
        return math.sqrt(moderated * sum(1 / len(logs) for logs in samples))

    def _freedom(self, key: Key) -> int:
        return PRIOR_FREEDOM + sum(len(row["times_ms"]) - 1 for row in self.timed[key])

    def _bound(self, key: Key) -> float:
        # Student's t at the level of so many deviations of a normal, to first order in 1 / freedom.
        errors = STANDARD_ERRORS * (1 + (STANDARD_ERRORS**2 + 1) / (4 * self._freedom(key)))
        between = self.drifts[key[0]][1]
        return max(math.log1p(LEAST_EFFECT), errors * math.hypot(self._standard_error(key), between))

    def _drift(self, suite: str, controls: Sequence[Key]) -> tuple[float, float, str]:
        """The machine's own shift, the deviation between runs beyond the samples' noise, and where both come from."""
        if not self.same_device:
            return 0.0, LEAST_BETWEEN_RUNS, ""
        own = [key for key in controls if key[0] == suite]
        chosen = own if len(own) >= ENOUGH_CONTROLS else list(controls)
        if len(chosen) >= ENOUGH_CONTROLS:
            shifts = [self.shifts[key] for key in chosen]
            drift = median(shifts)
            spread = 1.4826 * median(abs(shift - drift) for shift in shifts)
            within = median(self._standard_error(key) for key in chosen)
            between = math.sqrt(max(spread**2 - within**2, 0.0) + spread**2 / len(chosen))
            return drift, max(between, LEAST_BETWEEN_RUNS), f"{len(chosen)} rows that are not fastpref's"
        limits = [
            math.log(b["limit_ms"] / a["limit_ms"])
            for key, (a, b) in self.timed.items()
            if key[0] == suite and a.get("limit_ms") and b.get("limit_ms")
        ]
        if limits:
            return median(limits), LIMITS_UNCERTAINTY, "the measured limits"
        return 0.0, LIMITS_UNCERTAINTY, ""

    def beyond(self, key: Key) -> tuple[float, float]:
        """The shift without the drift, and how far measuring twice may shift: both of the logarithm of time."""
        return self.shifts[key] - self.drifts[key[0]][0], self._bound(key)

    def lines(self) -> list[str]:
        lines = []
        for suite in self.suites:
            drift, _, source = self.drifts[suite]
            if source:
                lines.append(f"{suite}: the machine took {math.expm1(drift):+.1%} time ({source}); taken out")
            else:
                why = "rows to know its drift by" if self.same_device else "device in common"
                lines.append(f"{suite}: no {why}; times are compared as they are")
        return lines


def _unchanged(family: str, packages: Sequence[str]) -> bool:
    """A row whose time no commit of ours and no package that changed can have moved."""
    needs = ("torch", "triton", *DISTRIBUTIONS.get(family, ()))
    return family != OURS and not any(name in packages for name in needs)


def _logs(times: Iterable[float]) -> list[float]:
    return [math.log(time) for time in times]


def shift_of(old: Sequence[float], new: Sequence[float]) -> float:
    was = _logs(old)
    return median(after - before for after in _logs(new) for before in was)
