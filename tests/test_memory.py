"""How much memory there is, and how much a piece of work takes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("psutil", reason="fastpref.memory needs fastpref[train]")

from fastpref import memory
from fastpref.memory import Meter, available, peak, resident


@pytest.mark.parametrize("resets", [True, False])
def test_a_meter_sees_what_was_taken_and_given_back(resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system's own peak where it can be reset, else by looking often; an earlier, higher peak does not show."""
    if not resets:
        monkeypatch.setattr(memory, "reset_peak", lambda: False)
    elif not memory.reset_peak():
        pytest.skip("the peak of resident memory cannot be reset here")
    before = torch.ones(48 << 20)  # 192 MiB, and gone again
    del before
    meter = Meter(torch.device("cpu"))
    for size in (32, 64):
        meter.begin()
        held = torch.ones(size << 18)  # MiB
        held.mul_(2).sum()
        del held
        assert size - 2 < meter.taken() / 2**20 < size + 16
        meter.end()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_control_group_leaves_what_its_limit_and_those_above_it_do(tmp_path: Path) -> None:
    assert memory._group_limits(tmp_path) == []
    two = {
        "proc/self/cgroup": "0::/slice/job\n",
        "sys/fs/cgroup/slice/job/memory.max": "max\n",
        "sys/fs/cgroup/slice/memory.max": "5000000\n",
        "sys/fs/cgroup/slice/memory.current": "4000000\n",
        "sys/fs/cgroup/slice/memory.stat": "anon 1\ninactive_file 500000\nactive_file 7\n",
    }
    assert memory._group_limits(write(tmp_path / "b", two)) == [1_500_000]
    one = {
        "proc/self/cgroup": "5:cpu:/x\n4:cpuset,memory:/of/the/host\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2500000\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 9\ntotal_inactive_file 200000\n",
    }
    assert memory._group_limits(write(tmp_path / "c", one)) == [700_000]


def test_available_is_the_least_of_the_machines_memory_and_every_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(memory, "_group_limits", lambda root: limits)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    assert available() == 8000
    limits += [9000, 700]
    assert available() == 700
    limits += [-5]  # a group may have been given a lower limit than it uses
    assert available() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_limit_on_the_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = memory.psutil.Process().memory_info().vms
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), hard))
        assert 0 <= available() <= 4 << 20
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_peak_is_forgotten_when_it_is_reset_and_never_below_what_is_resident() -> None:
    held = torch.ones(24 << 20)  # 96 MiB
    highest = peak()
    del held
    if not memory.reset_peak():
        pytest.skip("the peak of resident memory cannot be reset here")
    assert peak() < highest - (64 << 20)
    assert peak() > resident() - (1 << 20)


def test_other_devices_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="memory of a mps device cannot be measured here: set batch_size yourself"):
        Meter(torch.device("mps"))
