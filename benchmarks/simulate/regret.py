"""The regret of the planner on each cost structure, compared with the best fixed batch size known in advance."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from modalkit.batching import BatchPlanner, Decision, MeasuredCostModel, Priority
from modalkit.benchmarks.simulate.devices import MAX_BATCH_SIZE, POLICY
from modalkit.benchmarks.simulate.engine import Rule, Simulation
from modalkit.benchmarks.simulate.rules import Fifo, as_batch
from modalkit.benchmarks.simulate.structures import DRIFT_AFTER_ITEMS, SIZE_MIXES, STRUCTURES, CostedDevice, Structure
from modalkit.benchmarks.simulate.workload import ClosedLoop, IndexedRequest, OpenLoop, poisson

FIRST_ITEMS, ALL_ITEMS = 200, 2_000
CALLERS = 64
OPEN_LOAD = 0.7
SEEDS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Regret:
    """Figures of one structure with one mix of sizes, each as a share of the best fixed batch size's figure."""

    structure: str
    mix: str
    first: float
    """Throughput of a backlog of 200 items, from a cold start."""
    all: float
    """Throughput of a backlog of 2,000 items, from a cold start."""
    callers: float
    """Throughput of 64 callers in a closed loop, 2,000 items."""
    waiting: float
    """Mean latency of the best fixed batch size over ours, in an open loop at 70 % of its capacity."""
    batches: int
    """Batches of the planner in the backlog of 200 items."""


class FixedBatches(Fifo):
    """Runs the oldest request with the requests nearest to it in size, `count` in all, without waiting."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def decide(self, now: float) -> Decision[IndexedRequest]:  # noqa: ARG002  # this rule needs no clock
        """Run the oldest with its nearest."""
        if len(self.queue) <= self.count:
            return self.take(len(self.queue)) if self.queue else Decision()
        anchor = self.queue[0].size
        nearest = sorted(range(len(self.queue)), key=lambda i: (abs(self.queue[i].size - anchor), i))[: self.count]
        chosen = set(nearest)
        taken = [self.queue[i] for i in nearest]
        rest = [request for i, request in enumerate(self.queue) if i not in chosen]
        self.queue.clear()
        self.queue.extend(rest)
        return Decision(as_batch(taken))


def cold_planner(structure: Structure) -> BatchPlanner[IndexedRequest]:
    """The planner of modalkit, which knows nothing about the structure."""
    return BatchPlanner(POLICY, MeasuredCostModel(structure.feature))


def best_fixed_s(structure: Structure, sizes: NDArray[np.int64], seed: int) -> float:
    """Seconds of a backlog, sorted by size, in batches of the fixed size that takes the least time.

    A drift counts by its mean, because in order of size it would affect only the large items.
    """
    by_size = np.sort(sizes).tolist()
    steady = replace(structure, drift=1.0)

    def seconds(count: int) -> float:
        device = CostedDevice(steady, np.random.default_rng(seed))
        cuts = [by_size[start : start + count] for start in range(0, len(by_size), count)]
        for cut in cuts:
            device(len(cut), cut[-1], sum(cut))
        drifted = max(0, len(by_size) - DRIFT_AFTER_ITEMS) / len(by_size)
        return device.expected_s * (1 + (structure.drift - 1) * drifted)

    return min(seconds(count) for count in range(1, MAX_BATCH_SIZE + 1))


def backlog_s(rule: Rule, structure: Structure, sizes: NDArray[np.int64], seed: int) -> tuple[float, int]:
    """Seconds that a rule needs for a backlog of bulk requests, and the number of its batches."""
    device = CostedDevice(structure, np.random.default_rng(seed))
    run = Simulation(rule, OpenLoop(np.zeros(len(sizes)), sizes, Priority.BULK), device).run()
    return device.expected_s, len(run.batches)


def _closed_s(rule: Rule, structure: Structure, sizes: NDArray[np.int64], seed: int) -> float:
    device = CostedDevice(structure, np.random.default_rng(seed))
    return float(Simulation(rule, ClosedLoop(CALLERS, sizes), device).run().finished_s.max())


def _mean_latency_s(
    rule: Rule, structure: Structure, sizes: NDArray[np.int64], arrivals_s: NDArray[np.float64], seed: int
) -> float:
    device = CostedDevice(structure, np.random.default_rng(seed))
    run = Simulation(rule, OpenLoop(arrivals_s, sizes), device).run()
    return float((run.finished_s - run.arrivals_s).mean())


def backlog_share(structure: Structure, mix: str, items: int, seed: int) -> tuple[float, int]:
    """Throughput of a backlog from a cold start, as a share of the best fixed batch size, and the number of batches."""
    sizes = SIZE_MIXES[mix](items, np.random.default_rng(seed))
    ours_s, batches = backlog_s(cold_planner(structure), structure, sizes, seed)
    return best_fixed_s(structure, sizes, seed) / ours_s, batches


def regret(structure: Structure, mix: str, seed: int = 1, *, loops: bool = True) -> Regret:
    """All figures of a structure with one mix; without `loops`, only those of the backlogs."""
    first, batches = backlog_share(structure, mix, FIRST_ITEMS, seed)
    whole, _ = backlog_share(structure, mix, ALL_ITEMS, seed)
    if not loops:
        return Regret(structure.name, mix, first, whole, float("nan"), float("nan"), batches)
    random = np.random.default_rng(seed)
    sizes = SIZE_MIXES[mix](ALL_ITEMS, random)
    counts = (1, 2, 4, 8, 16, 32)

    def best(of: Callable[[Rule], float]) -> float:
        return min(of(FixedBatches(count)) for count in counts)

    callers = best(lambda rule: _closed_s(rule, structure, sizes, seed)) / _closed_s(
        cold_planner(structure), structure, sizes, seed
    )
    rate = OPEN_LOAD * ALL_ITEMS / best(lambda rule: backlog_s(rule, structure, sizes, seed)[0])
    arrivals_s = poisson(rate, ALL_ITEMS, random)
    waiting = best(lambda rule: _mean_latency_s(rule, structure, sizes, arrivals_s, seed)) / _mean_latency_s(
        cold_planner(structure), structure, sizes, arrivals_s, seed
    )
    return Regret(structure.name, mix, first, whole, callers, waiting, batches)


def mean_regret(structure: Structure, mix: str, seeds: Sequence[int] = SEEDS, *, loops: bool = True) -> Regret:
    """The mean of `regret` over some seeds."""
    runs = [regret(structure, mix, seed, loops=loops) for seed in seeds]
    return Regret(
        structure.name,
        mix,
        first=fmean(run.first for run in runs),
        all=fmean(run.all for run in runs),
        callers=fmean(run.callers for run in runs),
        waiting=fmean(run.waiting for run in runs),
        batches=runs[0].batches,
    )


def study(jobs: int) -> list[Regret]:
    """All cases, on `jobs` processes."""
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_case, range(len(list(cases())))))


def _case(number: int) -> Regret:
    # A case is passed by its number, because the functions of a structure cannot be pickled.
    return mean_regret(*list(cases())[number])


def cases() -> Iterator[tuple[Structure, str]]:
    """Each structure with each of its mixes."""
    for structure in STRUCTURES:
        for mix in structure.mixes:
            yield structure, mix
