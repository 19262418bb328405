"""Who asks, when, and for how much: arrivals and sizes, drawn in advance from a seed."""

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
"""A request whose payload is its number, which is its place in all arrays of results."""


class ArrivalKind(StrEnum):
    """How requests come in an open loop, that is, without waiting for one another."""

    POISSON = "poisson"
    BURSTY = "bursty"


@cache
def corpus_sizes() -> NDArray[np.int64]:
    """The tokens of each text of the mixed-length corpus."""
    stored = json.loads((files("modalkit.benchmarks.simulate") / "sizes.json").read_text(encoding="utf-8"))
    return np.repeat(*np.array([(int(size), count) for size, count in stored["counts"].items()]).T)


def draw_sizes(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """So many sizes, each that of some text of the corpus."""
    return random.choice(corpus_sizes(), count)


def poisson(rate: float, count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """The times of `count` arrivals that know nothing of each other, `rate` of them a second."""
    return np.cumsum(random.exponential(1 / rate, count))


def bursty(rate: float, count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """The times of `count` arrivals of a Markov-modulated Poisson process with two states, `rate` a second on average.

    In a burst they come `BURST_RATE` times as fast; bursts last exponentially long, `REQUESTS_PER_BURST` arrivals on
    average, and take `BURST_SHARE` of the time.
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
    """Where requests come from."""

    total: int
    """How many will come altogether."""

    @property
    def next_s(self) -> float:
        """When the next request comes, as far as is known now; infinity if none does."""
        ...  # a protocol method has no body

    def take_until(self, now: float) -> Sequence[IndexedRequest]:
        """Hand over the requests that have come by `now`, in order."""
        ...

    def done(self, count: int, now: float) -> None:
        """Note that `count` of them were answered at `now`, or turned away."""
        ...


class OpenLoop:
    """Requests that come at given times, which rise, whatever becomes of the others."""

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
        """When the next request comes."""
        return self._arrivals_s[self._next]

    def take_until(self, now: float) -> list[IndexedRequest]:
        """Hand over the requests that have come by `now`."""
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
        """Do nothing: nobody waits for an answer before the next request."""


class ClosedLoop:
    """Callers who each send their next request the moment that the last one was answered."""

    def __init__(self, callers: int, sizes: NDArray[np.int64]) -> None:
        self.total = len(sizes)
        self._sizes = sizes.tolist()
        self._next = 0
        self._ready = min(callers, self.total)
        self.next_s = 0.0

    def take_until(self, now: float) -> list[IndexedRequest]:
        """Hand over the requests of the callers that are ready."""
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
