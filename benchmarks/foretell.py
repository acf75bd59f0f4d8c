"""The search for the longest length that fits: which one to try next, by the peaks of those that were tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .process import TimeUp

RESOLUTION = 0.03
SHORTEST = 16
# A guess is confirmed from a little below it, and not further away than this many times the longest that was tried.
BELOW, REACH = 0.99, 8


class Found(NamedTuple):
    longest: int  # 0 where not even SHORTEST tokens fit
    next_failed: int | None
    stopped_by: str  # "memory", "time", or "length" where the last length fits


# The peak at so many tokens, or None where memory did not suffice; may raise TimeUp.
Trial = Callable[[int], "int | None"]


def foretell(peak_of: Trial, limit: int, *, start: int, most: int, resolution: float = RESOLUTION) -> Found:
    """The longest length that stays within `limit`, and one at most `resolution` longer that does not.

    Peaks grow almost linearly with the length: the two longest trials that fitted foretell where the limit is met.
    """
    peaks: dict[int, int] = {}
    failed: int | None = None
    length = min(start, most)
    try:
        while True:
            peak = peak_of(length)
            if peak is None:
                failed = length
            else:
                peaks[length] = peak
            longest = max(peaks, default=0)
            if longest == most:
                return Found(longest, failed, "length")
            if failed is not None and (failed - longest <= resolution * longest or failed <= SHORTEST):
                return Found(longest, failed, "memory")
            length = _next(peaks, failed, limit, most, resolution)
    except TimeUp:
        return Found(max(peaks, default=0), failed, "time")


def _next(peaks: dict[int, int], failed: int | None, limit: int, most: int, resolution: float) -> int:
    """The length to try: below the foretold one first, then just beyond the longest that fits."""
    if not peaks:
        assert failed is not None
        return max(failed // 2, 1)
    longest = max(peaks)
    if len(peaks) == 1:
        wanted = 2.0 * longest if failed is None else (longest + failed) / 2
    else:
        before = max(length for length in peaks if length != longest)
        slope = (peaks[longest] - peaks[before]) / (longest - before)
        wanted = longest + (limit - peaks[longest]) / slope if slope > 0 else math.inf
        wanted = min(BELOW * wanted, float(REACH * longest))
    step = resolution * longest
    if failed is None:
        return min(most, max(math.floor(wanted), math.floor(longest + step), longest + 1))
    if wanted >= failed:  # memory was refused earlier than foretold
        wanted = (longest + failed) / 2
    lowest = longest + max(1, math.floor(step))
    return min(max(math.floor(wanted), lowest), failed - 1)
