"""Jobs on several processes, each on its share of the cores: tiny models do not use more than one core well."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait as wait_for
from types import TracebackType
from typing import Any

import torch

from fastpref.benchmarks.study.cells import Job, do
from fastpref.benchmarks.study.methods import Interrupted
from fastpref.benchmarks.study.settings import Study

# glibc's malloc.h: how large a piece is asked of the system alone, and how much free memory is given back to it.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PIECE_BYTES, KEPT_BYTES = 2**25, 2**28  # older versions take no larger pieces


class JobError(RuntimeError):
    """A job failed; what had been finished stays."""


class Pool:
    """`workers` processes that do jobs; with one worker this process does them itself."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._threads = max(1, cores() // workers)
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self.workers > 1:
            # Not forked: a fork of a process whose thread pools have run hangs in them.
            self._executor = ProcessPoolExecutor(
                self.workers,
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(self._threads,),
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            if kind is not None and not issubclass(kind, Exception):  # Ctrl-C: nobody waits for minutes of work
                for worker in active_children():
                    worker.kill()
            self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, study: Study, jobs: Sequence[Job], done: Callable[[Job], None]) -> list[dict[str, Any]]:
        """What each job gives, in the order of `jobs`; `done` is called as each one ends.

        Raises:
            JobError: one failed; no further one is begun, and those that run are waited for.
        """
        if self._executor is None:
            results = []
            for job in jobs:
                try:
                    results.append(do(study, job))
                except Interrupted as error:  # our loop takes Ctrl-C for itself
                    raise KeyboardInterrupt from error
                except Exception as error:
                    raise _failed(study, job, error) from error
                done(job)
            return results
        futures: dict[Future[dict[str, Any]], Job] = {}
        to_come, open_ones = iter(jobs), set[Future[dict[str, Any]]]()
        while True:
            # No more than there are workers: the executor's own queue would begin one more after a failure.
            for job in islice(to_come, self.workers - len(open_ones)):
                future = self._submit(study, job)
                futures[future] = job
                open_ones.add(future)
            if not open_ones:
                break
            ended, open_ones = wait(open_ones, return_when=FIRST_COMPLETED)
            for future in ended:
                trouble = future.exception()
                if trouble is not None:
                    raise _failed(study, futures[future], trouble) from trouble
                done(futures[future])
        return [future.result() for future in futures]

    def _submit(self, study: Study, job: Job) -> Future[dict[str, Any]]:
        assert self._executor is not None
        try:
            return self._executor.submit(do, study, job)
        except BrokenProcessPool as error:  # a worker died while it had nothing to do
            raise _failed(study, job, error) from error


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    _keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all processes, and the parent sees to it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_memory() -> None:
    """Let the C library keep what a step frees: it gave back every large tensor, and the next step asked for it again.

    That was 15% to 40% of the time of TRL's trainer on a CPU, which makes the logits of all tokens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, PIECE_BYTES):  # musl has none
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)  # alone it would fix the other at its small beginning


def _end_with_parent() -> None:
    """A worker whose parent was killed would finish its job, and then wait for another one for ever."""
    parent = parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _failed(study: Study, job: Job, error: BaseException) -> JobError:
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, BrokenProcessPool):
        what = "a worker process ended abruptly, perhaps for want of memory: try fewer --workers"
    log = job.path(study).with_suffix(".log")
    return JobError(f"{job.kind} {job.name} failed: {what}. Its log is {log}; the same command goes on from here")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
