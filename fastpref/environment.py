"""What a result was made with: versions, hardware, the variables that change what runs, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What training depends on; callers with other dependencies name their own.
PACKAGES = (
    "fastpref",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
)
# The environment that changes what runs, ours and Triton's. Nothing beyond it is ever written down.
VARIABLES = (
    "FASTPREF_BACKEND",
    "FASTPREF_VALIDATE",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
)


def record(packages: Sequence[str] = PACKAGES, *, folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """The environment of a result, as JSON holds it; callers add keys of their own.

    Args:
        packages: whose installed versions are recorded, None where one is not installed.
        folder: whose git commit is recorded; by default this package's own.

    Returns:
        date (UTC, to the second), python, system, versions (by package), cpu (name and cores), threads (of torch),
        gpus (a name each), cuda (torch's version of it, None without a GPU), commit (None outside a repository),
        variables (those of VARIABLES that are set).
    """
    import torch  # here, because files with such records are read without it too

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: package_version(name) for name in packages},
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "commit": commit(folder),
        "variables": variables(),
    }


def package_version(name: str) -> str | None:
    """The installed version, None without one."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def variables() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def processor() -> str:
    """The CPU by the name that Linux has for it, and its cores."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {os.cpu_count()} cores"


def commit(folder: Path) -> str | None:
    """The folder's git commit, with "+" where files differ from it; None outside a repository or without git."""
    try:
        found, changed = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("+" if changed else "")
