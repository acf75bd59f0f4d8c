"""How a row is named and a number written for people: one spelling for pictures, comparison and report.

Works on the plain dicts of a results file and imports nothing, so that a page is made where torch runs no benchmark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

# A suite as a title says it.
TITLES = {
    "logps": "Log-probs from logits",
    "linear": "The loss from hidden states",
    "losses": "The losses",
    "step": "A training step",
    "training": "Whole training runs",
    "longest": "The longest pair that trains",
}
MODES = {"train": "forward and backward", "forward": "forward"}
# The distribution whose version a family's time hangs on, beside torch's.
DISTRIBUTIONS = {
    "trl": ("trl",),
    "liger": ("liger-kernel", "trl"),
    "cut-cross-entropy": ("cut-cross-entropy",),
    "quack": ("quack-kernels",),
}
OURS, LIMIT = "fastpref", "limit"


def is_timed(row: Row) -> bool:
    """Sweeps and the longest pairs are rows as well, of other fields."""
    return row.get("median_ms") is not None and "provider" in row and "mode" in row


def best_of_ours(rows: Iterable[Row]) -> Row | None:
    """The row of the provider that carries the package's name: what a reader gets who chooses nothing."""
    ours = [row for row in rows if row["family"] == OURS]
    return next((row for row in ours if row["provider"] == OURS), ours[0] if ours else None)


def fastest_rival(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if row["rival"]), key=lambda row: row["median_ms"], default=None)


def milliseconds(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1e3:.1f} s"
    if value >= 1:
        return f"{three(value)} ms"
    return f"{three(value * 1e3)} µs"


def three(value: float) -> str:
    """Three significant digits, and no more behind the point than they need: 1234, 123, 12.3, 1.23, 0.123."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}"


def times(value: float) -> str:
    """A ratio of two times, as "4.4×"."""
    return f"{value:.0f}×" if value >= 99.5 else f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"


def memory(size: float | None) -> str:
    if size is None:
        return "–"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(size) >= scale:
            return f"{three(size / scale)} {unit}"
    return f"{round(size / 2**10)} KiB"


def peak_of(row: Row) -> float | None:
    """Beyond inputs and gradients; of a whole run, which has neither apart, the process's."""
    return row.get("peak_bytes") if row["suite"] == "training" else row.get("peak_beyond_gradient_bytes")


def error(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def tokens(length: float) -> str:
    """A length as people say it: 512, 1k, 64k."""
    return f"{length / 1024:g}k" if length >= 1024 and length % 1024 == 0 else f"{length:,.0f}"


def shape(row: Row) -> str:
    """The shape of a row of a suite that is known here, else what it has of the usual fields."""
    scored = f"{row['share']:.0%} scored" if row.get("share") is not None else ""
    parts: Sequence[str]
    if row["suite"] == "logps":
        parts = (f"logits ({row['batch']}, {row['length']}, {row['vocab']})", row["dtype"], scored)
    elif row["suite"] == "linear":
        head = "frozen head" if row["frozen"] else "head"
        budget = f"budget {row['budget']}" if row.get("budget") else ""
        hidden = f"hidden ({row['batch']}, {row['length']}, {row['hidden']})"
        parts = (hidden, f"{head} ({row['vocab']}, {row['hidden']})", row["dtype"], scored, budget)
    else:
        numbers = (
            f"{row[name]:,} {word}{'s' * (row[name] != 1)}{after}"
            for name, word, after in (
                ("pairs", "pair", ""),
                ("layers", "layer", ""),
                ("length", "token", " a sequence"),
            )
            if isinstance(row.get(name), int)
        )
        letters = (f"{letter} = {row[name]}" for name, letter in (("hidden", "H"), ("vocab", "V")) if row.get(name))
        frozen = "frozen" if row.get("frozen") else ""
        parts = (*numbers, *letters, row.get("dtype") or "", scored, frozen)
    return ", ".join(part for part in parts if part)


def case_words(row: Row) -> str:
    """The shape of a whole training run."""
    data = f"{row['data']}, at most {row['max_length']:,} tokens a sequence" if row["length"] is None else ""
    checkpointing = "gradient checkpointing" if row["checkpointing"] else ""
    return ", ".join(part for part in (shape(row), f"{row['steps']} steps", data, checkpointing) if part)


def device(head: Row) -> str:
    """The device without the marks of its maker, with its threads where it is a CPU."""
    name = re.sub(r"\((?:R|TM)\)", "", str(head["device"]))
    return re.sub(r"\s+", " ", name).strip()


def day_and_commit(head: Row) -> str:
    commit = head["commit"]
    return f"{head['date'][:10]}, " + (f"commit {commit[:7]}{'+' * commit.endswith('+')}" if commit else "no commit")


def versions(head: Row, rows: Iterable[Row] = ()) -> str:
    """torch and Triton, and the packages of the families among `rows`."""
    names = ["torch", "triton"]
    names += [name for row in rows for name in DISTRIBUTIONS.get(row.get("family", ""), ())]
    found = ((name, head["versions"].get(name)) for name in dict.fromkeys(names))
    return ", ".join(f"{name} {version}" for name, version in found if version)


def cases_of(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (case, mode), in the order of the run."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["mode"]), []).append(row)
    return groups


def series_of(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (series, mode), of those that have more than one length."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("series"):
            groups.setdefault((row["series"], row["mode"]), []).append(row)
    return {key: group for key, group in groups.items() if len({row["length"] for row in group}) > 1}


def single_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows that are not one of several lengths."""
    series = {name for name, _ in series_of(rows)}
    return [row for row in rows if row.get("series") not in series]


def headline(rows: Sequence[Row]) -> list[Row]:
    """The rows of the trained case in which most providers stand; of those the one with most work.

    A case that is one of several lengths is taken where there is no other.
    """
    rows = single_rows(rows) or rows
    groups = [group for (_, mode), group in cases_of(rows).items() if mode == "train"]
    return max(groups, key=lambda group: (len(group), max(row["work"] for row in group)), default=[])


def longest_tokens(row: Row) -> str:
    """A lower bound where time, or the last length that is tried, ended the search and not memory."""
    if not row["longest"]:
        return "none"
    return f"{'≥ ' if row.get('stopped_by') in ('time', 'length') else ''}{row['longest']:,}"


def slug(*parts: str) -> str:
    """A file's name from what it shows: ("linear", "linear-half") is "linear-half"."""
    first, *rest = parts
    words = rest if rest and rest[0].startswith(first) else parts
    return re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(words)).strip("-").lower()


def series_slug(suite: str, series: str, mode: str, axis: str) -> str:
    """Of a picture against length."""
    return slug(suite, series, *([] if mode == "train" else [mode]), axis)
