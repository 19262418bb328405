"""Divides the threads that torch uses on a CPU between batches that run at once.

A model's layers are short, and at the end of each one torch's threads wait for the slowest. Batches that run at once
with fewer threads wait less. Measured on 2 cores with the bundled model: two batches with one thread each do 1.2 to 1.4
times as many items per second as one batch with two threads.

OpenMP keeps threads for each thread that computes. While they are no more than the cores, they spin between two layers,
else they sleep, and a lone text takes 1.3 times as long. So lone batches should be computed by one thread of a process,
which has all of OpenMP's. Where another process needs a core, threads that spin wait for one that does not run: a lone
text takes up to 4 times as long, and then it has one thread, which waits for none.

A container may have a quota of CPU time. Threads that spin use it up at the begin of each period, and then all of them
stop until the next one. So torch has no more threads than the cores that the quota is worth.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from modalkit.pipelines.memory import CGROUP

MAX_IN_FLIGHT = 4
"""Most batches that run at once on a CPU; more would divide the requests that wait into ever smaller batches."""
UNDISTURBED_SHARE = 0.75
"""Of the seconds of all their threads: what lone batches have of the cores, on average, where nothing else needs them.

Measured on 2 cores: 0.85 to 0.97, beside a process that is always busy 0.56 to 0.68."""
SMOOTHING = 0.25
MIN_PAUSE, MAX_PAUSE = 8, 1024
"""Lone batches with one thread after disturbed ones, before all threads are tried again."""

MOVE_AFTER = 8
"""Lone batches in a row in other threads, after which that of the last one is theirs."""


class CpuThreads:
    """The threads of this process for torch: `total` when no more than one batch runs.

    `clock` and `used_s` tell the time, and the seconds of cores that this process has used.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, used_s: Callable[[], float] = time.process_time
    ) -> None:
        self.total = torch.get_num_threads()
        self._clock = clock
        self._used_s = used_s
        self._lone: threading.Thread | None = None
        self._elsewhere = 0  # lone batches in other threads since the last one there
        self._share = 1.0  # of lone batches
        self._pause = MIN_PAUSE
        self._left = 0  # lone batches with one thread before all are tried again
        self._make_restorer()
        os.register_at_fork(after_in_child=self._make_restorer)  # a fork has no other threads than the one that forked

    def _make_restorer(self) -> None:
        self._restorer = ThreadPoolExecutor(1, "torch threads")

    @property
    def max_in_flight(self) -> int:
        """How many batches should run at once, under load."""
        return min(MAX_IN_FLIGHT, self.total)

    def set_total(self, total: int) -> None:
        """Use `total` threads, from this call on."""
        self.total = total
        torch.set_num_threads(total)

    def limit_to_quota(self, cgroup: Path = CGROUP) -> None:
        """Use no more threads than the cores whose time the container may use."""
        if (cores := _quota_cores(cgroup)) is not None and cores < self.total:
            self.set_total(cores)

    def share(self, in_flight: int) -> None:
        """Let this thread's next operations use its part of the threads while `in_flight` batches run.

        A lone batch gets all of them in the thread that computes most of these, unless they were disturbed lately.
        """
        part = max(1, self.total // in_flight)
        if in_flight == 1:
            self._elsewhere = 0 if self._lone is threading.current_thread() else self._elsewhere + 1
            if self._lone is None or not self._lone.is_alive() or self._elsewhere == MOVE_AFTER:
                self._lone = threading.current_thread()
            if self._lone is not threading.current_thread():
                part = max(1, self.total // 2)
            elif self._left > 0:
                self._left -= 1
                part = 1
        self.use(part)

    def use(self, part: int) -> None:
        """Let this thread's next operations use so many threads."""
        if torch.get_num_threads() != part:
            torch.set_num_threads(part)
            # That was for this thread, and for all threads that use torch for the first time from now on. A call in
            # another thread sets the number for those back.
            self._restorer.submit(torch.set_num_threads, self.total).result()

    @contextmanager
    def watched(self) -> Generator[None]:
        """Find whether batches that torch computes in the block, with all threads, are disturbed by other processes."""
        if self._lone is not threading.current_thread() or not 1 < self.total == torch.get_num_threads():
            yield
            return
        started_s, used_s = self._clock(), self._used_s()
        yield
        if (elapsed_s := self._clock() - started_s) > 0:
            self._share += SMOOTHING * ((self._used_s() - used_s) / (self.total * elapsed_s) - self._share)
        if self._share < UNDISTURBED_SHARE:
            self._left, self._pause = self._pause, min(2 * self._pause, MAX_PAUSE)
        else:
            self._left, self._pause = 0, MIN_PAUSE


def waited_s() -> float:
    """The seconds that all threads of this process could run and had no core; 0 where the kernel does not tell."""
    total_ns = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            total_ns += int(file.read_text(encoding="ascii").split()[1])
    return total_ns / 1e9


def _quota_cores(cgroup: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max" is no limit
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        return math.ceil(int(quota) / int(period))
    with suppress(OSError, ValueError):  # version 1 of control groups, where -1 is no limit
        files = (cgroup / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        quota, period = (file.read_text(encoding="ascii") for file in files)
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else None
    return None


@cache
def cpu_threads() -> CpuThreads:
    """The one of this process. The first call must come before any number of threads was set for one thread only.

    Torch keeps more threads than the quota is worth in a thread that has used it before.
    """
    threads = CpuThreads()
    threads.limit_to_quota()
    return threads
