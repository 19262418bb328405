"""A device to simulate: its cost table, its capacity, and the rules, each with its best parameters for the device."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from modalkit.batching import BatchPlanner, BatchPolicy, MeasuredCostModel
from modalkit.benchmarks.simulate.engine import Rule, Run, Simulation
from modalkit.benchmarks.simulate.optimal import OptimalPartition
from modalkit.benchmarks.simulate.rules import FixedWindow, SortedFifo, TokenBudget
from modalkit.benchmarks.simulate.tables import CostTable, load_table
from modalkit.benchmarks.simulate.workload import (
    ARRIVALS,
    ArrivalKind,
    ClosedLoop,
    IndexedRequest,
    OpenLoop,
    Source,
    corpus_sizes,
    draw_sizes,
)

MAX_BATCH_SIZE = 32  # of every rule: the largest that the published tables have

# The default policy. The queue is limited by the simulation instead, in the same way for all rules.
POLICY = BatchPolicy(max_batch_size=MAX_BATCH_SIZE, max_queue_items=2**60)

MODALKIT, UNCALIBRATED = "modalkit", "modalkit, uncalibrated"
FIXED_WINDOW = "fixed window FIFO"

TOKEN_BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
TUNING_REQUESTS = 4_000

CALIBRATION = tuple((count, size) for count in (1, 4, MAX_BATCH_SIZE) for size in (16, 64, 256))

Planner = BatchPlanner[IndexedRequest]


def planner(table: CostTable, noise: float, *, calibrated: bool = True) -> Planner:
    """The planner of modalkit.

    It does not know the table. It gets the seconds of each batch, with noise; and, if `calibrated`, those of each shape
    of `CALIBRATION` once, as a worker measures them at its start. If not, it starts with the default costs.
    """
    return BatchPlanner(POLICY, learnt_costs(table, noise) if calibrated else MeasuredCostModel())


def learnt_costs(table: CostTable, noise: float) -> MeasuredCostModel:
    """A cost model that has learnt the shapes of `CALIBRATION`."""
    model = MeasuredCostModel()
    random = np.random.default_rng(0)
    for count, size in CALIBRATION:
        factor = float(random.lognormal(-(noise**2) / 2, noise))
        model.calibrate(count, size, count * size, table.seconds(count, size) * factor)
    return model


@dataclass(frozen=True)
class Device:
    """A cost table with the rules and parameters of its simulations."""

    table: CostTable
    noise: float
    """The standard deviation of the logarithm of a batch's time around the table's."""
    capacity: float
    """Requests per second of the best offline loop: the sorted corpus in batches of one fixed size."""
    rules: dict[str, Callable[[], Rule]]
    settings: dict[str, str]
    """The parameters of the tuned rules, by name."""

    def run(self, rule: str, source: Source, seed: int = 0, max_queue_items: float = math.inf) -> Run:
        """One simulation of a rule of this device."""
        return simulate(self.rules[rule](), source, self.table, self.noise, seed, max_queue_items)

    def open_loop(self, kind: ArrivalKind, rate: float, requests: int, seed: int) -> OpenLoop:
        """Requests with sizes of the corpus, `rate` per second."""
        random = np.random.default_rng(seed)
        return OpenLoop(ARRIVALS[kind](rate, requests, random), draw_sizes(requests, random))

    def closed_loop(self, callers: int, requests: int, seed: int) -> ClosedLoop:
        """`callers` that together send `requests`."""
        return ClosedLoop(callers, draw_sizes(requests, np.random.default_rng(seed)))

    def backlog_rate(self, rule: str, requests: int, seed: int = 0) -> float:
        """Requests per second when all wait from the start: the maximum of the rule."""
        return backlog_rate(self.rules[rule](), self.table, requests, self.noise, seed)


def simulate(
    rule: Rule, source: Source, table: CostTable, noise: float, seed: int, max_queue_items: float = math.inf
) -> Run:
    """One run of `rule` against the costs of `table`."""
    return Simulation(rule, source, table.seconds, noise=noise, seed=seed, max_queue_items=max_queue_items).run()


def backlog_rate(rule: Rule, table: CostTable, requests: int, noise: float, seed: int = 0) -> float:
    """Requests per second of `rule` when all of them wait from the start."""
    source = OpenLoop(np.zeros(requests), draw_sizes(requests, np.random.default_rng(seed)))
    finished_s = simulate(rule, source, table, noise, seed).finished_s
    return float(np.count_nonzero(~np.isnan(finished_s)) / np.nanmax(finished_s))


def offline_rate(table: CostTable, max_batch_size: int = MAX_BATCH_SIZE) -> float:
    """Requests per second of the best offline loop: the corpus sorted by size, in batches of the best fixed size."""
    sizes = np.sort(corpus_sizes()).tolist()

    def seconds(count: int) -> float:
        batches = [sizes[start : start + count] for start in range(0, len(sizes), count)]
        return sum(table.seconds(len(batch), batch[-1]) for batch in batches)

    return len(sizes) / min(seconds(count) for count in range(1, max_batch_size + 1))


def make_device(name: str, noise: float) -> Device:
    """The device of that name. Raises `ValueError` if there is none."""
    table = load_table(name)

    def rate(budget: int) -> float:
        return backlog_rate(TokenBudget(budget, MAX_BATCH_SIZE), table, TUNING_REQUESTS, noise)

    budget = max(TOKEN_BUDGETS, key=rate)
    rules: dict[str, Callable[[], Rule]] = {
        MODALKIT: partial(planner, table, noise),
        UNCALIBRATED: partial(planner, table, noise, calibrated=False),
        "optimal partition": lambda: OptimalPartition(learnt_costs(table, noise), MAX_BATCH_SIZE),
        "no batching": partial(TokenBudget, 1, 1),
        FIXED_WINDOW: partial(FixedWindow, MAX_BATCH_SIZE, 0.010),
        "token budget FIFO": partial(TokenBudget, budget, MAX_BATCH_SIZE),
        "sorted FIFO": partial(SortedFifo, MAX_BATCH_SIZE),
    }
    return Device(table, noise, offline_rate(table), rules, {"token budget FIFO": f"{budget} tokens"})
