"""Several gloo processes for a test file that brings their work along.

    def work(folder: Path) -> None:  # in each process; torch.distributed.init_process_group("gloo") finds its ranks
        ...
        torch.save(results, folder / f"{dist.get_rank()}.pt")

    @pytest.fixture(scope="module")
    def two(launch, tmp_path_factory) -> list[Any]:  # what each rank saved, in rank order
        return launch(__file__, 2, tmp_path_factory.mktemp("two"))

As a script this file is the parent of those processes: it imports the test file once and forks, which takes a fraction
of the time that as many imports do.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

GRACE = 10.0  # seconds that the others get to end by themselves once a process has failed


@pytest.fixture(scope="session")
def launch() -> Callable[..., list[Any]]:
    """`launch(file, processes, folder, *arguments, timeout=120)`: what each rank saved as `folder/{rank}.pt`.

    Each rank calls the file's `work(folder, *arguments)`. Where one fails, or the timeout (seconds) passes, all are
    ended and the test fails with the end of every rank's stderr.
    """
    return _launch


def _launch(file: str, processes: int, folder: Path, *arguments: str, timeout: float = 120) -> list[Any]:
    # The store lives here, on a port that the system chose: nothing can take it before the processes meet.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank opens a store of its own
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, file, str(folder), *arguments]
    with (folder / "parent.stderr").open("wb") as stderr:
        parent = subprocess.Popen(command, cwd=folder, env=environment, stderr=stderr, start_new_session=True)
        try:
            code: int | str = parent.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"none within {timeout:g} s"
        finally:
            if parent.poll() is None:
                os.killpg(parent.pid, signal.SIGKILL)  # the ranks are in its session
                parent.wait()
    if code != 0:
        ends = [f"--- {path.stem}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.stderr"))]
        pytest.fail(f"exit code {code}\n" + "\n".join(ends), pytrace=False)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _fork(file: str, folder: Path, *arguments: str) -> int:
    """Forks the ranks of a launch and waits for them; 1 where one of them failed."""
    work = runpy.run_path(file)["work"]
    running = set()
    for rank in range(int(os.environ["WORLD_SIZE"])):
        pid = os.fork()
        if pid == 0:
            _run(rank, work, folder, *arguments)
        running.add(pid)
    failed, deadline = False, float("inf")
    while running and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        running.discard(pid)
        if pid and status and not failed:
            failed, deadline = True, time.monotonic() + GRACE
        time.sleep(0.0 if pid else 0.02)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return int(failed)


def _run(rank: int, work: Callable[..., None], folder: Path, *arguments: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    code = 1
    try:
        log = os.open(folder / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(folder, *arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(_fork(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
