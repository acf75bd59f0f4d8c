"""What the rows of one run share: the device, the set of cases, the copy bandwidth, and the rows themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import MemoryWorker, copy_bandwidth, is_gpu


class Run:
    """One run on one device; `device_class` is "auto" or one of cases.DEVICE_CLASSES."""

    def __init__(self, device_class: str) -> None:
        gpu = torch.cuda.is_available()
        self.device_class = ("gpu" if gpu else "cpu") if device_class == "auto" else device_class
        if self.device_class == "gpu" and not gpu:
            raise ValueError("--device-class gpu, but torch finds no GPU here: take cpu or tiny")
        self.device = "cuda" if gpu and self.device_class != "cpu" else "cpu"
        self.memory = torch.cuda.get_device_properties(0).total_memory if is_gpu(self.device) else 0
        self.rows: list[dict[str, Any]] = []
        self.worker = MemoryWorker()
        size = {"tiny": 2**24, "cpu": 2**28, "gpu": max(2**28, min(2**32, self.memory // 16))}[self.device_class]
        self.copy_gb_per_s = copy_bandwidth(self.device, size)


# Where conftest.py leaves the run and the suites find it.
RUN = pytest.StashKey[Run]()
