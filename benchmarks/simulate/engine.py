"""The discrete-event simulation: one worker, a clock that jumps from event to event, and a rule that forms batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modalkit.batching import Batch, Decision, Priority
from modalkit.benchmarks.simulate.workload import IndexedRequest, Source

CLOCK_TICK_S = 1e-9
STALLS_ALLOWED = 100


class Rule(Protocol):
    """Decides which batch runs next; `BatchPlanner` is one.

    `decide` is called when the worker is free and a request has arrived, or the `wake_s` of the last decision has come.
    It returns requests as `expired` to drop them.
    """

    def push(self, request: IndexedRequest) -> None:
        """Add a request that arrived at its `arrival_s`."""
        ...  # a protocol method has no body

    def decide(self, now: float) -> Decision[IndexedRequest]:
        """The batch to run now, or when to ask again."""
        ...

    def end_batch(self, batch: Batch[IndexedRequest], elapsed_s: float) -> None:
        """Record that a batch ran for `elapsed_s` seconds."""
        ...


class SimulationError(Exception):
    """Raised when a rule is wrong: it stops the clock, loses a request, or runs one twice."""


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a simulation: arrays indexed by the number of the request, and a list of batches."""

    arrivals_s: NDArray[np.float64]
    started_s: NDArray[np.float64]
    """When its batch started; NaN for a request that was refused or dropped."""
    finished_s: NDArray[np.float64]
    is_bulk: NDArray[np.bool_]
    sizes: NDArray[np.int64]
    batches: list["RunBatch"]
    refused: int
    """Requests that arrived when the queue was full."""
    dropped: int
    """Requests that the rule returned as expired."""


@dataclass(frozen=True, slots=True)
class RunBatch:
    """One batch that ran: its start, its seconds and its contents."""

    started_s: float
    elapsed_s: float
    count: int
    longest: int
    total: int
    is_bulk: bool


OnBatch = Callable[[float, Batch[IndexedRequest]], None]


class Simulation:
    """Runs `source` through `rule` on one worker whose batches take `seconds(count, longest, total)`.

    With `noise`, each time is multiplied by a log-normal factor of mean 1 and that standard deviation of the logarithm,
    drawn from `seed`. A request is refused if `max_queue_items` requests wait, as in the service. `on_batch` is called
    with the time and the batch when a batch starts. The worker starts at `starts_s`; earlier requests have waited.
    """

    def __init__(
        self,
        rule: Rule,
        source: Source,
        seconds: Callable[[int, int, int], float],
        *,
        noise: float = 0.0,
        seed: int = 0,
        max_queue_items: float = math.inf,
        on_batch: OnBatch | None = None,
        starts_s: float = 0.0,
    ) -> None:
        self._rule = rule
        self._source = source
        self._seconds = seconds
        self._noise = noise
        self._random = np.random.default_rng(seed)
        self._factors: list[float] = []
        self._max_queue_items = max_queue_items
        self._on_batch = on_batch
        self._starts_s = starts_s
        self._waiting = 0
        self._stalls = 0
        # Lists, because one element of an array is slow to set.
        total = source.total
        self._arrivals_s, self._started_s, self._finished_s = ([math.nan] * total for _ in range(3))
        self._sizes = [0] * total
        self._is_bulk = [False] * total
        self._batches: list[RunBatch] = []
        self._refused = self._dropped = 0

    def run(self) -> Run:
        """Run until each request is answered, refused or dropped. Raises `SimulationError` if the rule is wrong."""
        now = self._starts_s
        self._take_arrivals(now)
        while True:
            decision = self._rule.decide(now)
            self._drop_expired(len(decision.expired), now)
            if decision.batch is not None:
                now = self._run_batch(decision.batch, now)
            else:
                next_s = min(self._source.next_s, decision.wake_s)
                if next_s == math.inf:
                    break
                now = self._later(next_s, now)
            self._take_arrivals(now)
        if self._waiting:
            raise SimulationError(f"the rule lost {self._waiting} requests")
        return Run(
            arrivals_s=np.array(self._arrivals_s),
            started_s=np.array(self._started_s),
            finished_s=np.array(self._finished_s),
            is_bulk=np.array(self._is_bulk),
            sizes=np.array(self._sizes),
            batches=self._batches,
            refused=self._refused,
            dropped=self._dropped,
        )

    def _later(self, next_s: float, now: float) -> float:
        """The time of the next event, at least one tick from now, as on a real clock."""
        self._stalls = self._stalls + 1 if next_s <= now else 0
        if self._stalls > STALLS_ALLOWED:
            raise SimulationError(f"the rule asks for a decision at {next_s}, but the time is already {now}")
        return max(next_s, now + CLOCK_TICK_S)

    def _take_arrivals(self, now: float) -> None:
        while self._source.next_s <= now:
            for request in self._source.take_until(now):
                self._arrivals_s[request.payload] = request.arrival_s
                self._sizes[request.payload] = request.size
                self._is_bulk[request.payload] = request.priority is Priority.BULK
                if self._waiting < self._max_queue_items:
                    self._waiting += 1
                    self._rule.push(request)
                else:
                    self._refused += 1
                    self._source.done(1, now)

    def _drop_expired(self, count: int, now: float) -> None:
        if count:
            self._waiting -= count
            self._dropped += count
            self._source.done(count, now)

    def _run_batch(self, batch: Batch[IndexedRequest], now: float) -> float:
        requests = batch.requests
        if self._on_batch is not None:
            self._on_batch(now, batch)
        sizes = [request.size for request in requests]
        longest, total = max(sizes), sum(sizes)
        elapsed_s = self._seconds(len(requests), longest, total) * self._factor()
        end_s = now + elapsed_s
        for request in requests:
            if not math.isnan(self._finished_s[request.payload]):
                raise SimulationError(f"the rule runs request {request.payload} twice")
            self._started_s[request.payload] = now
            self._finished_s[request.payload] = end_s
        self._batches.append(RunBatch(now, elapsed_s, len(requests), longest, total, batch.priority is Priority.BULK))
        self._waiting -= len(requests)
        # Requests that arrive meanwhile find the queue without this batch.
        self._take_arrivals(end_s)
        self._rule.end_batch(batch, elapsed_s)
        self._source.done(len(requests), end_s)
        return end_s

    def _factor(self) -> float:
        if not self._noise:
            return 1.0
        if not self._factors:
            self._factors = self._random.lognormal(-(self._noise**2) / 2, self._noise, 10_000).tolist()
        return self._factors.pop()
