"""Divides the threads that torch uses on a CPU between batches that run at once.

A model's layers are short, and at the end of each one torch's threads wait for the slowest. Batches that run at once
with fewer threads wait less. Measured on 2 cores with the bundled model: two batches with one thread each do 1.2 to 1.4
times as many items per second as one batch with two threads.

A lone batch may have all threads: with two it took 0.69 of the time with one, on an idle machine. OpenMP keeps threads
for each thread that computes. While they are no more than the cores, they spin between two layers, else they sleep, and
a lone text takes 1.3 times as long. So lone batches should be computed by one thread of a process, which has all of
OpenMP's. Threads that spin wait for one that does not run, where another process, or a batch that has begun meanwhile,
needs its core: such a batch took 4 times as long on average, and now and then 0.3 s. With as few threads as batches at
once have, it waits for none. Measured at 110 texts per second, half of what 2 cores can do: the 99th percentile of the
latencies is 47 to 77 ms with two threads for a batch that begins alone, and 42 to 50 ms with one. Which is better
changes with the load, so it is found by trials (`_Trials`).

A container, or a service of systemd, may have a quota of CPU time. Threads that spin use it up at the begin of each
period, and then all of them stop until the next one. So torch has no more threads than the cores that the quota is
worth.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from modalkit.pipelines.memory import CGROUP, control_groups

MAX_IN_FLIGHT = 4
"""Most batches that run at once on a CPU; more would divide the requests that wait into ever smaller batches."""
TRIAL_BATCHES = 8
MAX_LOST_BATCHES = TRIAL_BATCHES / 2
"""Batches whose time a trial may lose; then it ends."""
MIN_PAUSE, MAX_PAUSE = 8, 8192
"""Lone batches from one trial to the next: twice as many after each one that changes nothing."""
MAX_LOST_SHARE = 0.01
"""Share of the time of lone batches that trials of all threads may lose. One batch may take 100 times as long."""
ALL_BELOW = 0.85
"""Share of the seconds with a part of the threads below which lone batches get all of them.

A batch that begins meanwhile takes longer then, so a small gain is none."""
PART_BELOW = 1.1
"""Share of the seconds with all threads below which lone batches get a part of them."""
RATE_SMOOTHING, DRIFT_SMOOTHING, NOISE_SMOOTHING = 1 / 8, 1 / 4, 1 / 64
MIN_NOISE = 0.25
MAX_DRIFT = 2.0
"""Of the mean logarithm of seconds to those before, as a multiple of its mean distance from 0: more is no noise."""

MOVE_AFTER = 8
"""Lone batches in a row in other threads, after which that of the last one is theirs."""


class _Trials:
    """Whether lone batches get all threads or, at first, a part of them; and the trials of the other way.

    A trial runs some batches the other way. Its seconds are compared with what batches of the same engine and about the
    same size have taken lately. Where batches with all threads begin to take longer, they get a part at once.
    """

    def __init__(self) -> None:
        self.uses_all = False
        self._rates: dict[tuple[object, int], float] = {}  # seconds per element of inputs, by engine and power of 2
        self._mean_s = 0.0  # of lone batches
        self._noise = MIN_NOISE
        self._use(all_threads=False)

    def _use(self, *, all_threads: bool, lost_s: float = 0.0) -> None:
        self.uses_all = all_threads
        self._rates.clear()
        self._drift = 0.0
        self._pause = MIN_PAUSE
        self._begin_pause(lost_s)

    def _begin_pause(self, lost_s: float) -> None:
        """Wait for the next trial: until what was lost by all threads is a small share of the time."""
        if lost_s > 0:
            self._pause = max(self._pause, math.ceil(lost_s / (MAX_LOST_SHARE * self._mean_s)))
        self._pause = min(self._pause, MAX_PAUSE)
        self._until_trial, self._left = self._pause, TRIAL_BATCHES
        self._seconds, self._expected_s, self._compared = 0.0, 0.0, 0  # of the batches of the next trial

    def next_uses_all(self) -> bool:
        """Whether the next lone batch should have all threads."""
        return self.uses_all is (self._until_trial > 0)

    def record(self, engine: object, elements: int, seconds: float, *, used_all: bool) -> None:
        """Learn from a lone batch, which took more than 0 seconds."""
        key, rate = (engine, elements.bit_length()), seconds / elements
        known = self._rates.get(key)
        if used_all is not self.uses_all:
            self._record_trial(seconds, None if known is None else known * elements)
            return
        self._until_trial = max(0, self._until_trial - 1)
        self._rates[key] = rate if known is None else known + RATE_SMOOTHING * (rate - known)
        change = 0.0 if known is None else math.log(rate / known)
        self._drift += DRIFT_SMOOTHING * (change - self._drift)
        if used_all and known is not None and self._drift > MAX_DRIFT * self._noise:
            self._use(all_threads=False, lost_s=seconds - known * elements)
        else:
            self._mean_s += (seconds - self._mean_s) * (NOISE_SMOOTHING if self._mean_s else 1)
        self._noise = max(MIN_NOISE, self._noise + NOISE_SMOOTHING * (abs(change) - self._noise))

    def _record_trial(self, seconds: float, expected_s: float | None) -> None:
        self._left -= 1
        if expected_s is not None:
            self._seconds += seconds
            self._expected_s += expected_s
            self._compared += 1
        lost_s = self._seconds - self._expected_s
        if self._left and lost_s * self._compared <= MAX_LOST_BATCHES * self._expected_s:
            return
        if self._seconds < (PART_BELOW if self.uses_all else ALL_BELOW) * self._expected_s:
            self._use(all_threads=not self.uses_all)
        else:
            self._pause *= 2
            self._begin_pause(0.0 if self.uses_all else lost_s)


class CpuThreads:
    """The threads of this process for torch: `total` when no more than one batch runs. `clock` tells the time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total = torch.get_num_threads()
        self._clock = clock
        self._trials = _Trials()
        self._lone: threading.Thread | None = None
        self._is_lone = False  # whether the batch in that thread began alone
        self._elsewhere = 0  # lone batches in other threads since the last one there
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
        """Use no more threads than the cores whose time the container, or the service of systemd, may use."""
        quotas = [cores for group in control_groups(cgroup) if (cores := _quota_cores(group)) is not None]
        if quotas and min(quotas) < self.total:
            self.set_total(min(quotas))

    def share(self, in_flight: int) -> None:
        """Let this thread's next operations use its part of the threads while `in_flight` batches run.

        A lone batch gets all of them in the thread that computes most of these, if that is faster.
        """
        part, thread = max(1, self.total // in_flight), threading.current_thread()
        if in_flight == 1:
            self._elsewhere = 0 if self._lone is thread else self._elsewhere + 1
            if self._lone is None or not self._lone.is_alive() or self._elsewhere == MOVE_AFTER:
                self._lone = thread
            if self._lone is not thread:
                part = max(1, self.total // 2)
            elif not self._trials.next_uses_all():
                part = self.total // self.max_in_flight
        if self._lone is thread:
            self._is_lone = in_flight == 1
        self.use(part)

    def use(self, part: int) -> None:
        """Let this thread's next operations use so many threads."""
        if torch.get_num_threads() != part:
            torch.set_num_threads(part)
            # That was for this thread, and for all threads that use torch for the first time from now on. A call in
            # another thread sets the number for those back.
            self._restorer.submit(torch.set_num_threads, self.total).result()

    @contextmanager
    def timed(self, engine: object, inputs: Mapping[str, torch.Tensor]) -> Generator[None]:
        """Learn from the seconds of a batch that is computed in the block, if it began alone.

        `engine` stands for what computes it: seconds are compared between batches of the same one.
        """
        if not (self._is_lone and self._lone is threading.current_thread()):
            yield
            return
        used_all, started_s = torch.get_num_threads() == self.total, self._clock()
        yield
        elements = sum(tensor.numel() for tensor in inputs.values())
        if (elapsed_s := self._clock() - started_s) > 0:
            self._trials.record(engine, max(1, elements), elapsed_s, used_all=used_all)


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


_MADE: list[CpuThreads] = []
_MAKING = threading.Lock()


def cpu_threads() -> CpuThreads:
    """The one of this process. The first call must come before any number of threads was set for one thread only.

    Torch keeps more threads than the quota is worth in a thread that has used it before.
    """
    if not _MADE:
        with _MAKING:  # several models may load at once
            if not _MADE:
                threads = CpuThreads()
                threads.limit_to_quota()
                _MADE.append(threads)
    return _MADE[0]
