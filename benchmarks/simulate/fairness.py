"""Checks the fairness of the planner in simulation; see `Promises`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modalkit.batching import Batch, Priority
from modalkit.benchmarks.simulate.devices import POLICY, Device, planner
from modalkit.benchmarks.simulate.engine import Simulation
from modalkit.benchmarks.simulate.workload import IndexedRequest, OpenLoop, draw_sizes, poisson

OVERLOAD = 1.5
BULK_OF_OVERLOAD = 0.5  # bulk requests for each interactive one: far more than their share of the time can serve
BACKLOG_AGE_S = 3600.0
BACKLOG_REQUESTS = 40  # times those of another simulation, at most


@dataclass(frozen=True, slots=True)
class Promises:
    """The measured value of each promise."""

    bulk_share: float
    """Of the busy time while both lanes waited, with interactive requests alone at 1.5 times the capacity."""
    overtaken: int
    """Batches whose anchor was younger than an overdue request of its lane that went on waiting."""
    fresh_backlog: float
    """Requests per second when all wait from the start and none is overdue, as a share of the offline capacity."""
    overdue_backlog: float
    """The same when they have waited for up to an hour."""


class OrderWatch:
    """Counts the batches that overtook an overdue request of their lane."""

    def __init__(self, max_age_s: float, arrivals_s: Sequence[float], priorities: Sequence[Priority]) -> None:
        self.overtaken = 0
        self._max_age_s = max_age_s
        self._arrivals_s = arrivals_s
        self._waiting = {p: [i for i, of in enumerate(priorities) if of is p] for p in Priority}
        self._oldest = dict.fromkeys(Priority, 0)
        self._gone = [False] * len(arrivals_s)

    def __call__(self, now: float, batch: Batch[IndexedRequest]) -> None:
        """Check a batch that starts `now`."""
        for request in batch.requests:
            self._gone[request.payload] = True
        numbers, first = self._waiting[batch.priority], self._oldest[batch.priority]
        while first < len(numbers) and self._gone[numbers[first]]:
            first += 1
        self._oldest[batch.priority] = first
        if first < len(numbers):
            oldest_s = self._arrivals_s[numbers[first]]
            self.overtaken += now - oldest_s > self._max_age_s and oldest_s < batch.requests[0].arrival_s


def bulk_under_overload(device: Device, requests: int, seed: int) -> tuple[float, int]:
    """The share of the contended time that bulk got, and the number of batches that overtook."""
    random = np.random.default_rng(seed)
    rate = OVERLOAD * (1 + BULK_OF_OVERLOAD) * device.capacity
    arrivals_s = poisson(rate, requests, random)
    is_bulk = random.random(requests) < BULK_OF_OVERLOAD / (1 + BULK_OF_OVERLOAD)
    priorities = [Priority.BULK if bulk else Priority.INTERACTIVE for bulk in is_bulk]
    watch = OrderWatch(POLICY.max_age_s, arrivals_s.tolist(), priorities)
    contended_s, bulk_s = 0.0, 0.0
    started: list[tuple[bool, float]] = []

    def on_batch(now: float, batch: Batch[IndexedRequest]) -> None:
        watch(now, batch)
        bulk_size = sum(request.size for request in batch.requests if request.priority is Priority.BULK)
        started.append((batch.contended, bulk_size / batch.total))

    source = OpenLoop(arrivals_s, draw_sizes(requests, random), priorities)
    run = Simulation(
        planner(device.table, device.noise),
        source,
        device.table.seconds,
        noise=device.noise,
        seed=seed,
        on_batch=on_batch,
    ).run()
    for (contended, bulk_part), batch in zip(started, run.batches, strict=True):
        if contended:
            contended_s += batch.elapsed_s
            bulk_s += batch.elapsed_s * bulk_part
    return bulk_s / contended_s, watch.overtaken


def backlog_share(device: Device, requests: int, seed: int, age_s: float) -> float:
    """The rate of a bulk backlog, collected evenly over the last `age_s`, as a share of the offline capacity."""
    random = np.random.default_rng(seed)
    arrivals_s = np.linspace(-age_s, 0, requests)
    source = OpenLoop(arrivals_s, draw_sizes(requests, random), Priority.BULK)
    rule = planner(device.table, device.noise)
    run = Simulation(rule, source, device.table.seconds, noise=device.noise, seed=seed).run()
    return requests / float(run.finished_s.max()) / device.capacity


def check(device: Device, requests: int, seed: int) -> Promises:
    """Measure each promise on a device.

    The backlog has as many requests as arrive in an hour at capacity, but at most 40 times `requests`.
    """
    share, overtaken = bulk_under_overload(device, requests, seed)
    backlog = min(BACKLOG_REQUESTS * requests, round(BACKLOG_AGE_S * device.capacity))
    return Promises(
        bulk_share=share,
        overtaken=overtaken,
        fresh_backlog=backlog_share(device, backlog, seed, 0.0),
        overdue_backlog=backlog_share(device, backlog, seed, BACKLOG_AGE_S),
    )
