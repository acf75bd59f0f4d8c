"""The rows of the linear suite as a table, and what the project promises of them, as measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The least times faster than plain, and than the fastest rival, on a CPU by scored share.
WANTED_FASTER = {"linear-quarter": (12.0, 7.0), "linear-half": (7.5, 4.0), "linear-most": (4.2, 2.3)}
WANTED_FASTER_IN_64_MIB = {"linear-quarter": 9.0, "linear-half": 5.0, "linear-most": 3.2}
WANTED_OVER_PRODUCTS, WANTED_FROZEN, WANTED_PEAK_MIB = 1.4, 0.65, 80.0
# "Linear in the scored rows": the time a row of the longest case over that of the shortest.
WANTED_GROWTH = 1.15
# On a GPU, over the products alone: (case, mode, provider).
WANTED_ON_GPU = {
    ("linear-half", "forward", "fastpref_logps"): 1.15,
    ("linear-frozen", "train", "fastpref"): 1.15,
    ("linear-half", "train", "fastpref"): 1.12,
}
WANTED_PEAK_MIB_ON_GPU = {"linear-half": 1.1 * 1024, "linear-long": 3.0 * 1024}

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    errors = ("loss_error", "hidden_error_relative", "weight_error_relative")
    header = ("case", "mode", "provider", "ms", "spread", "rounds", "of products", "TFLOP/s", "peak MiB")
    lines: list[tuple[str, ...]] = [(*header, "loss err", "dh err", "dW err")]
    for row in rows:
        provider, peak, ratio = row["provider"], row["peak_beyond_gradient_bytes"], row["ratio_to_products"]
        if provider == "products":
            provider = f"products, {row['products_dtype']}"
        lines.append(
            (
                row["case"],
                row["mode"],
                provider,
                f"{row['median_ms']:.2f}",
                f"{(row['q3_ms'] - row['q1_ms']) / row['median_ms']:.0%}",
                str(row["rounds"]),
                "-" if ratio is None else f"{ratio:.2f}",
                f"{row['tflop_per_s']:.3f}",
                "-" if peak is None else f"{peak / 2**20:.1f}",
                *("-" if row[error] is None else f"{row[error]:.1e}" for error in errors),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join([*map(str.ljust, line[:3], widths), *map(str.rjust, line[3:], widths[3:])]) for line in lines]
    return "\n".join([*text, "peak MiB: beyond inputs and gradients; spread: between quartiles; errors: see README"])


def promises(rows: Sequence[Row], device_class: str) -> list[str]:
    """The promised numbers of a CPU or of a GPU, each where the rows that it needs are there."""
    found = {(row["case"], row["mode"], row["provider"]): row for row in rows}
    if device_class == "cpu":
        return _on_cpu(found)
    return _on_gpu(found) if device_class == "gpu" else []


def _on_cpu(found: dict[tuple[str, str, str], Row]) -> list[str]:
    train = {(case, provider): row for (case, mode, provider), row in found.items() if mode == "train"}
    lines = []
    for case, (over_plain, over_rival) in WANTED_FASTER.items():
        ours, plain = train.get((case, "fastpref")), train.get((case, "plain"))
        if ours and plain:
            lines.append(_at_least(case, plain["median_ms"] / ours["median_ms"], "times faster than plain", over_plain))
        rivals = [row for (name, _), row in train.items() if name == case and row["rival"]]
        if ours and rivals:
            best = min(rivals, key=lambda row: row["median_ms"])
            what = f"times faster than {best['provider']}, the fastest of {len(rivals)} rivals"
            lines.append(_at_least(case, best["median_ms"] / ours["median_ms"], what, over_rival))
        if ours and ours["ratio_to_products"] is not None:
            lines.append(_at_most(case, ours["ratio_to_products"], "times the products alone", WANTED_OVER_PRODUCTS))
    for case, over_plain in WANTED_FASTER_IN_64_MIB.items():
        ours, plain = train.get((f"{case}-64MiB", "fastpref")), train.get((case, "plain"))
        if ours and plain:
            ratio = plain["median_ms"] / ours["median_ms"]
            lines.append(_at_least(f"{case}-64MiB", ratio, "times faster than plain", over_plain))
    half, frozen = train.get(("linear-half", "fastpref")), train.get(("linear-frozen", "fastpref"))
    if half and frozen:
        share = frozen["median_ms"] / half["median_ms"]
        lines.append(_at_most("linear-frozen", share, "of the trainable time", WANTED_FROZEN))
    small = [row for (case, provider), row in train.items() if case.endswith("-64MiB") and provider == "fastpref"]
    lines.extend(_peak(row, WANTED_PEAK_MIB) for row in small)
    shortest, longest = train.get(("linear-half-64MiB", "fastpref")), max(small, key=_rows, default=None)
    if shortest and longest and longest is not shortest and longest["case"].startswith("linear-growth"):
        growth = (longest["median_ms"] / _rows(longest)) / (shortest["median_ms"] / _rows(shortest))
        what = f"times the time a row of {shortest['case']}"
        lines.append(_at_most(longest["case"], growth, what, WANTED_GROWTH))
    return lines


def _on_gpu(found: dict[tuple[str, str, str], Row]) -> list[str]:
    lines = []
    for key, bound in WANTED_ON_GPU.items():
        if (row := found.get(key)) is not None and row["ratio_to_products"] is not None:
            case, mode, provider = key
            what = f"times the products alone, {row['products']} of them, {provider} {mode}"
            lines.append(_at_most(case, row["ratio_to_products"], what, bound))
    for case, bound in WANTED_PEAK_MIB_ON_GPU.items():
        if (row := found.get((case, "train", "fastpref"))) is not None:
            lines.append(_peak(row, bound))
    return lines


def _rows(row: Row) -> int:
    return int(row["scored_rows"])


def _peak(row: Row, bound: float) -> str:
    return _at_most(row["case"], row["peak_beyond_gradient_bytes"] / 2**20, "MiB beyond the gradients", bound)


def _at_least(case: str, got: float, what: str, bound: float) -> str:
    return f"{case}: {got:.2f} {what} (at least {bound:g}): {'met' if got >= bound else 'MISSED'}"


def _at_most(case: str, got: float, what: str, bound: float) -> str:
    return f"{case}: {got:.2f} {what} (at most {bound:g}): {'met' if got <= bound else 'MISSED'}"
