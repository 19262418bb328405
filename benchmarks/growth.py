"""How the time per request grows with the number of waiting requests."""

import math
import time
from collections.abc import Sequence
from functools import partial

import anyio
import numpy as np

from modalkit.batching import BatchPlanner, BatchPolicy, BatchScheduler, MeasuredCostModel, PaddedCostModel, Request
from modalkit.benchmarks.drivers import do_nothing
from modalkit.benchmarks.measurement import Figure, Rounds
from modalkit.benchmarks.simulate.workload import draw_sizes

DEPTHS = (1_000, 10_000, 100_000)
TAUGHT_BATCHES = 500


class GrowthStudy:
    """Microseconds per request, for several numbers of waiting requests with the sizes of texts of mixed lengths.

    The planner alone is measured with a queue of constant length: for each batch that is taken, as many requests are
    added. It has learnt the costs of two CPU cores. There batches are small, so the share of a decision per request is
    large. `submit_many` gets lists of that length.
    """

    name = "growth"

    def __init__(self, depths: Sequence[int] = DEPTHS, items: int = 100_000) -> None:
        self._depths = depths
        self._items = items
        self._rounds = self._contenders()

    def warm_up(self) -> None:
        """Run one round that does not count."""
        self._contenders().run()

    def run_round(self) -> None:
        """Measure each depth once."""
        self._rounds.run()

    def figures(self) -> list[Figure]:
        """Times, and ratios of those with the longest queue to those with the shortest."""
        figures = []
        for depth in self._depths:
            for what in ("push", "select", "submit_many"):
                limit = 10 if what == "select" and depth == 10_000 else None
                figures.append(
                    self._rounds.figure(f"{what} {depth}", f"{what}, {depth:,} queued, per item", "us", at_most=limit)
                )
        least, most = self._depths[0], self._depths[-1]
        for what in ("push and select", "submit_many"):
            name = f"{what}: {most:,} / {least:,} queued"
            figures.append(self._rounds.ratio(f"{what} {most}", f"{what} {least}", name, at_most=1.3))
        return figures

    def _contenders(self) -> Rounds:
        measures = (self._planner_us, self._submit_many_us)
        return Rounds([partial(measure, depth) for depth in self._depths for measure in measures])

    def _planner_us(self, depth: int) -> dict[str, float]:
        costs, true_costs = MeasuredCostModel(), PaddedCostModel()
        planner: BatchPlanner[Request[None]] = BatchPlanner(BatchPolicy(max_queue_items=depth + 32), costs)
        sizes = draw_sizes(depth + self._items + 32 * (TAUGHT_BATCHES + 1), np.random.default_rng(1)).tolist()
        requests = iter([Request(None, size) for size in sizes])
        for _ in range(depth):
            planner.push(next(requests))
        push_s = select_s = 0.0
        batches = counted = 0
        while counted < self._items:
            before_s = time.perf_counter()
            batch = planner.decide(0.0).batch
            decided_s = time.perf_counter()
            if batch is None:
                raise AssertionError("the planner formed no batch of a full queue")
            count = len(batch.requests)
            planner.end_batch(batch, true_costs.predict_s(count, batch.longest, batch.total))
            added = [next(requests) for _ in range(count)]
            push_began_s = time.perf_counter()
            for request in added:
                planner.push(request)
            pushed_s = time.perf_counter()
            batches += 1
            if batches > TAUGHT_BATCHES:  # until then it learns the costs
                select_s += decided_s - before_s
                push_s += pushed_s - push_began_s
                counted += count
        push_us, select_us = push_s / counted * 1e6, select_s / counted * 1e6
        return {
            f"push {depth}": push_us,
            f"select {depth}": select_us,
            f"push and select {depth}": push_us + select_us,
        }

    def _submit_many_us(self, depth: int) -> dict[str, float]:
        sizes = draw_sizes(depth, np.random.default_rng(1)).tolist()

        async def submit_lists() -> float:
            policy = BatchPolicy(max_queue_items=depth)
            async with BatchScheduler(do_nothing, policy=policy, item_size=int) as scheduler:
                lists = math.ceil(self._items / depth)
                started_s = time.perf_counter()
                for _ in range(lists):
                    await scheduler.submit_many(sizes)
                return (time.perf_counter() - started_s) / (lists * depth)

        return {f"submit_many {depth}": anyio.run(submit_lists) * 1e6}
