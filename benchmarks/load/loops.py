"""The closed and the open loop over any asynchronous call, in one process."""

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

from modalkit.benchmarks.load.client import ANSWERED, Outcome

Call = Callable[[int], Awaitable[Outcome]]
"""Sends the request of that index; returns the items answered, or why there was no answer."""

MAX_PAUSE_S = 0.5
"""Of a client whose requests get no answer at all, so that what is away is not asked without end."""
STOP_CHECK_S = 0.1
MAX_AT_ONCE = 100
"""Requests of an open loop that are sent before anything else is done."""


@dataclass
class Samples:
    """One line for each request, and the reasons of those that failed. Times are of the system's monotonic clock."""

    due_s: "array[float]" = field(default_factory=lambda: array("d"))
    sent_s: "array[float]" = field(default_factory=lambda: array("d"))
    ended_s: "array[float]" = field(default_factory=lambda: array("d"))
    answered: "array[int]" = field(default_factory=lambda: array("l"))
    """Items with an answer; a failed request has -1 less its reason's place in `reasons`."""
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, due_s: float, sent_s: float, outcome: Outcome) -> None:
        """Add a request that ends now."""
        self.due_s.append(due_s)
        self.sent_s.append(sent_s)
        self.ended_s.append(perf_counter())
        if isinstance(outcome, str):
            outcome = -1 - self.reasons.setdefault(outcome, len(self.reasons))
        self.answered.append(outcome)

    def columns(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], list[str]]:
        """The three times as rows, the items answered, and the reasons by their place."""
        times = np.stack([np.frombuffer(column, np.float64) for column in (self.due_s, self.sent_s, self.ended_s)])
        return times, np.frombuffer(self.answered, np.int64), list(self.reasons)


async def closed_loop(call: Call, indices: Iterator[int], clients: int, samples: Samples, stop: asyncio.Event) -> None:
    """Keep so many requests under way until the indices end or `stop` is set, and wait for the last answers."""

    async def client() -> None:
        pause_s = 0.0
        for index in indices:
            sent_s = perf_counter()
            outcome = await call(index)
            samples.add(sent_s, sent_s, outcome)
            if stop.is_set():
                return
            if isinstance(outcome, str) and not outcome.startswith(ANSWERED):
                pause_s = min(2 * pause_s + 0.001, MAX_PAUSE_S)
                await asyncio.sleep(pause_s)
            else:
                pause_s = 0.0

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())


async def open_loop(
    call: Call,
    indices: Iterator[int],
    times_s: Iterator[float],
    samples: Samples,
    stop: asyncio.Event,
    drain_s: float,
) -> None:
    """Send requests at their times, in seconds from now, until they end or `stop` is set.

    Then the last answers are waited for, `drain_s` at most: what still waits then has failed.
    """
    begun_s = perf_counter()
    under_way: set[asyncio.Task[None]] = set()

    async def send(index: int, due_s: float) -> None:
        sent_s = perf_counter()
        try:
            outcome = await call(index)
        except asyncio.CancelledError:  # below
            outcome = f"no answer {drain_s:g} s after the end"
        samples.add(due_s, sent_s, outcome)

    for number, (time_s, index) in enumerate(zip(times_s, indices, strict=False)):  # the shorter one ends the loop
        if number % MAX_AT_ONCE == 0:  # where too many are due, answers are read and `stop` is seen all the same
            await asyncio.sleep(0)
        while (wait_s := begun_s + time_s - perf_counter()) > 0:
            # A timer may end up to half a millisecond early.
            await asyncio.sleep(min(wait_s, STOP_CHECK_S))
            if stop.is_set():
                break
        if stop.is_set():
            break
        task = asyncio.create_task(send(index, begun_s + time_s))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    if under_way:
        _, late = await asyncio.wait(under_way, timeout=drain_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late)
