"""The rows of a run as JSON and as a table, with the machine, the versions, the date and the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest-benchmark", "trl", "liger-kernel")
# What the project promises of the headline case on a CPU.
WANTED_OVER_PLAIN, WANTED_OVER_CROSS_ENTROPY, WANTED_PEAK_MIB = 5.0, 3.5, 16.0


def environment(device: str, device_class: str, copy_gb_per_s: float) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": _device_name(device),
        "device_class": device_class,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "copy_gb_per_s": copy_gb_per_s,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """The commit, with "+" where files differ from it; None outside a repository or without git."""
    root = Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def write(path: Path, head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(json.dumps(row) for row in rows)
    opening = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{opening},\n "rows": [\n{body}\n]\n}}\n')


def table(rows: Sequence[dict[str, Any]]) -> str:
    header = ("case", "mode", "provider", "ms", "spread", "GB/s", "of copy", "peak MiB", "value err", "grad err")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        peak, gradient = row["peak_beyond_gradient_bytes"], row["gradient_error_relative"]
        lines.append(
            (
                row["case"],
                row["mode"],
                row["provider"],
                f"{row['median_ms']:.3f}",
                f"{(row['q3_ms'] - row['q1_ms']) / row['median_ms']:.0%}",
                f"{row['gb_per_s']:.1f}",
                f"{row['ratio_to_copy']:.0%}",
                f"{peak / 2**20:.1f}",
                f"{row['value_error_per_token']:.1e}",
                "-" if gradient is None else f"{gradient:.1e}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join([*map(str.ljust, line[:3], widths), *map(str.rjust, line[3:], widths[3:])]) for line in lines]
    return "\n".join([*text, "peak MiB: beyond inputs and gradient; spread: between quartiles"])


def headline(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The promised numbers of the headline case, as measured; nothing where its rows are not all there.

    cross_entropy is there twice: as people write it after a shift, and at its best, without the copy of the logits.
    """
    found = {row["provider"]: row for row in rows if row["case"] == "headline" and row["mode"] == "train"}
    others = {
        "plain": WANTED_OVER_PLAIN,
        "cross_entropy": WANTED_OVER_CROSS_ENTROPY,
        "cross_entropy_nocopy": WANTED_OVER_CROSS_ENTROPY,
    }
    if not {"fastpref", *others} <= found.keys():
        return []
    ours = found["fastpref"]
    lines = []
    for name, wanted in others.items():
        ratio = found[name]["median_ms"] / ours["median_ms"]
        lines.append(_promise(f"times faster than {name}", ratio, f"at least {wanted:g}", ratio >= wanted))
    mebibytes = ours["peak_beyond_gradient_bytes"] / 2**20
    bound = f"at most {WANTED_PEAK_MIB:g}"
    return [*lines, _promise("MiB beyond the gradient", mebibytes, bound, mebibytes <= WANTED_PEAK_MIB)]


def _promise(what: str, got: float, bound: str, met: bool) -> str:
    return f"headline: {got:.2f} {what} ({bound}): {'met' if met else 'MISSED'}"
