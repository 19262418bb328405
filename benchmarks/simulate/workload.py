"""Arrivals and sizes of requests, drawn in advance from a seed."""

import json
import math
from collections.abc import Sequence
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modalkit.batching import Priority, Request

BURST_RATE = 3.0  # times the mean rate, while a burst lasts
BURST_SHARE = 0.2  # of the time; between bursts the rate is then half the mean
REQUESTS_PER_BURST = 200.0  # on average

IndexedRequest = Request[int]
"""A request whose payload is its number: its index in all arrays of results."""


class ArrivalKind(StrEnum):
    """How requests arrive in an open loop, that is, independently of earlier answers."""

    POISSON = "poisson"
    BURSTY = "bursty"


@cache
def corpus_sizes() -> NDArray[np.int64]:
    """The tokens of each text of the mixed-length corpus."""
    stored = json.loads((files("modalkit.benchmarks.simulate") / "sizes.json").read_text(encoding="utf-8"))
    return np.repeat(*np.array([(int(size), count) for size, count in stored["counts"].items()]).T)


def draw_sizes(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """`count` sizes of random texts of the corpus."""
    return random.choice(corpus_sizes(), count)


def poisson(rate: float, count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """The times of `count` independent arrivals, `rate` per second."""
    return np.cumsum(random.exponential(1 / rate, count))


def bursty(rate: float, count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """The times of `count` arrivals of a two-state Markov-modulated Poisson process, `rate` per second on average.

    In a burst the rate is `BURST_RATE` times as high. The lengths of bursts are exponentially distributed, with
    `REQUESTS_PER_BURST` arrivals on average, and bursts take `BURST_SHARE` of the time.
    """
    burst_s = REQUESTS_PER_BURST / (BURST_RATE * rate)
    calm_s = burst_s * (1 - BURST_SHARE) / BURST_SHARE
    calm_rate = rate * (1 - BURST_RATE * BURST_SHARE) / (1 - BURST_SHARE)
    times = np.empty(0)
    while len(times) < count:
        cycles = max(16, math.ceil(1.5 * count / (rate * (burst_s + calm_s))))
        spells_s = random.exponential(np.tile([calm_s, burst_s], cycles))
        counts = random.poisson(spells_s * np.tile([calm_rate, BURST_RATE * rate], cycles))
        starts_s = (times[-1] if len(times) else 0.0) + np.cumsum(spells_s) - spells_s
        inside = random.random(counts.sum()) * np.repeat(spells_s, counts)
        times = np.concatenate([times, np.sort(np.repeat(starts_s, counts) + inside)])
    return times[:count]


ARRIVALS = {ArrivalKind.POISSON: poisson, ArrivalKind.BURSTY: bursty}


class Source(Protocol):
    """A source of requests."""

    total: int
    """The number of all requests."""

    @property
    def next_s(self) -> float:
        """When the next request arrives, as known now; infinity if none does."""
        ...  # a protocol method has no body

    def take_until(self, now: float) -> Sequence[IndexedRequest]:
        """Return the requests that have arrived by `now`, in order."""
        ...

    def done(self, count: int, now: float) -> None:
        """Record that `count` requests were answered, refused or dropped at `now`."""
        ...


class OpenLoop:
    """Requests that arrive at given, ascending times, independently of earlier answers."""

    def __init__(
        self,
        arrivals_s: NDArray[np.float64],
        sizes: NDArray[np.int64],
        priorities: Sequence[Priority] | Priority = Priority.INTERACTIVE,
    ) -> None:
        self.total = len(arrivals_s)
        self.arrivals_s = arrivals_s
        self.sizes = sizes
        self._arrivals_s: list[float] = [*arrivals_s.tolist(), math.inf]
        self._sizes = sizes.tolist()
        self._priorities = [priorities] * self.total if isinstance(priorities, Priority) else priorities
        self._next = 0

    @property
    def next_s(self) -> float:
        """When the next request arrives."""
        return self._arrivals_s[self._next]

    def take_until(self, now: float) -> list[IndexedRequest]:
        """Return the requests that have arrived by `now`."""
        first, arrivals_s = self._next, self._arrivals_s
        last = first
        while arrivals_s[last] <= now < math.inf:
            last += 1
        self._next = last
        return [
            Request(index, self._sizes[index], self._priorities[index], arrivals_s[index])
            for index in range(first, last)
        ]

    def done(self, count: int, now: float) -> None:
        """Do nothing: no request waits for an answer."""


class ClosedLoop:
    """Callers that each send the next request when the last one is answered."""

    def __init__(self, callers: int, sizes: NDArray[np.int64]) -> None:
        self.total = len(sizes)
        self._sizes = sizes.tolist()
        self._next = 0
        self._ready = min(callers, self.total)
        self.next_s = 0.0

    def take_until(self, now: float) -> list[IndexedRequest]:
        """Return the requests of the callers that are ready."""
        if self.next_s > now:
            return []
        first, self._next = self._next, min(self._next + self._ready, self.total)
        requests = [
            Request(index, self._sizes[index], Priority.INTERACTIVE, self.next_s) for index in range(first, self._next)
        ]
        self._ready, self.next_s = 0, math.inf
        return requests

    def done(self, count: int, now: float) -> None:
        """Let as many callers send their next requests."""
        if self._next < self.total:
            self._ready += count
            self.next_s = now
