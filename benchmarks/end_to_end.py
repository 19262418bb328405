"""The worker with the bundled model on texts of mixed lengths, beside alternatives in the same process."""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

import anyio
import numpy as np
from pydantic import BaseModel

from modalkit.batching import Priority
from modalkit.benchmarks.baselines import fixed_window, queue_and_thread
from modalkit.benchmarks.drivers import Call, open_loop, timed_s, work_off
from modalkit.benchmarks.in_process import (
    BundledPipeline,
    Records,
    arrival_order_scheduler,
    padding_share,
    raise_failures,
    run_sorted,
    worker_of,
)
from modalkit.benchmarks.measurement import Figure, Rounds, in_own_thread

OFFLINE_BATCH_SIZES = (4, 8, 16, 32, 64)
CALLERS = 64
FIFO_BATCH_SIZE, FIFO_WINDOW_S = 32, 0.010
OPEN_LOOP_LOAD = 0.7
PAUSE_S = 0.005
LEARNING_BATCHES = 100
LONG_QUEUE = 1_000


class EndToEndStudy:
    """Items per second and latencies of each way to run the same items.

    The warm-up finds the two best batch sizes of the offline loop, and the capacities from which the loads of the open
    loops are computed. `batch_config` has the settings of the workers that are not the defaults.
    """

    name = "end to end"

    def __init__(
        self,
        pipeline: BundledPipeline,
        items: Sequence[BaseModel],
        *,
        open_loop_items: int = 1_000,
        idle_calls: int = 200,
        batch_config: Mapping[str, object] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._items = list(items)
        self._open_loop_items = self._items[:open_loop_items]
        self._batch_config = batch_config or {}
        self._idle_items = self._items[:idle_calls]
        self._by_size = sorted(items, key=pipeline.item_size)
        self._by_tokens = sorted(items, key=pipeline.token_count)
        self._best_batch_sizes: Sequence[int] = OFFLINE_BATCH_SIZES
        self._fifo_capacity = self._capacity = 0.0
        self._rounds = Rounds(
            [
                self._offline,
                self._bulk,
                self._overdue,
                self._callers,
                self._arrival_order,
                self._idle,
                self._open_loops,
            ]
        )

    def warm_up(self) -> None:
        """Find the best batch sizes and the capacities."""
        in_own_thread(self._find_capacities)

    def _find_capacities(self) -> None:
        rates = {size: self._offline_rate(self._by_size, size) for size in OFFLINE_BATCH_SIZES}
        self._best_batch_sizes = sorted(rates, key=rates.__getitem__, reverse=True)[:2]
        self._capacity = self._bulk()["bulk"]
        self._fifo_capacity = len(self._open_loop_items) / anyio.run(self._fifo_s)

    def run_round(self) -> None:
        """Measure each contender once."""
        self._rounds.run()

    def figures(self) -> list[Figure]:
        """Rates, latencies and their ratios."""
        figure, ratio = self._rounds.figure, self._rounds.ratio
        sizes = " or ".join(map(str, self._best_batch_sizes))
        return [
            figure("offline", f"offline, sorted by size, batches of {sizes}", "items/s"),
            figure("offline exact", "offline, sorted by exact token counts", "items/s"),
            figure("bulk", "predict_many of everything", "items/s"),
            ratio("bulk", "offline", "predict_many / offline", at_least=0.97),
            ratio("bulk", "offline exact", "predict_many / offline by exact token counts"),
            figure("overdue", "predict_many, all overdue", "items/s"),
            ratio("overdue", "bulk", "predict_many, all overdue / predict_many", at_least=0.95),
            figure("callers", f"{CALLERS} callers", "items/s"),
            ratio("callers", "offline", f"{CALLERS} callers / offline", at_least=0.92),
            figure("arrival order", f"{CALLERS} callers, arrival order, batches of {FIFO_BATCH_SIZE}", "items/s"),
            ratio("callers", "arrival order", f"{CALLERS} callers / arrival order", at_least=3),
            figure("direct", "direct call, median", "ms"),
            figure("idle", "idle worker, median", "ms"),
            figure("idle excess", "idle worker - 1.05 x direct call", "ms", at_most=0.5),
            figure("fifo p50", "fixed window at 70% of its capacity, p50", "ms"),
            figure("fifo p99", "fixed window at 70% of its capacity, p99", "ms"),
            figure("ours p50", "the worker at the same load, p50", "ms"),
            figure("ours p99", "the worker at the same load, p99", "ms"),
            ratio("ours p99", "fifo p99", "p99: the worker / fixed window", at_most=0.5),
            figure("loaded p50", "the worker at 70% of its own capacity, p50", "ms"),
            figure("loaded p99", "the worker at 70% of its own capacity, p99", "ms"),
            figure("bulk error", f"cost error after {LEARNING_BATCHES} batches, predict_many", "", at_most=0.15),
            figure("callers error", f"cost error after {LEARNING_BATCHES} batches, callers", "", at_most=0.15),
            figure("padding", f"padding in the tensors, {LONG_QUEUE:,} or more queued", "", at_most=0.05),
            figure("estimated padding", "the same by estimated sizes", ""),
        ]

    # All items at once.

    def _offline_rate(self, in_order: Sequence[BaseModel], batch_size: int) -> float:
        started_s = time.perf_counter()
        run_sorted(self._pipeline, in_order, batch_size)
        return len(in_order) / (time.perf_counter() - started_s)

    def _offline(self) -> dict[str, float]:
        by_size = max(self._offline_rate(self._by_size, size) for size in self._best_batch_sizes)
        return {"offline": by_size, "offline exact": self._offline_rate(self._by_tokens, self._best_batch_sizes[0])}

    def _bulk(self) -> dict[str, float]:
        return anyio.run(self._measure_bulk)

    def _overdue(self) -> dict[str, float]:
        return {"overdue": anyio.run(partial(self._measure_bulk, max_age_ms=0))["bulk"]}

    async def _measure_bulk(self, **changed: object) -> dict[str, float]:
        records = Records()
        async with worker_of(self._pipeline, records, **{**self._batch_config, **changed}) as worker:
            self._pipeline.shapes.clear()  # remove those of the worker's calibration
            started_s = time.perf_counter()
            outcomes = await worker.predict_many(self._items, priority=Priority.BULK)
            elapsed_s = time.perf_counter() - started_s
        raise_failures(outcomes)
        count = len(self._items)
        return {
            "bulk": count / elapsed_s,
            "bulk error": records.cost_error(LEARNING_BATCHES),
            "padding": padding_share(self._pipeline.shapes, count, LONG_QUEUE),
            "estimated padding": padding_share(records.shapes(), count, LONG_QUEUE),
        }

    # A closed loop: each caller sends the next item when the last is answered.

    def _callers(self) -> dict[str, float]:
        return anyio.run(self._callers_rate_and_error)

    async def _callers_rate_and_error(self) -> dict[str, float]:
        records = Records()
        async with worker_of(self._pipeline, records, **self._batch_config) as worker:
            rate = await self._closed_loop_rate(worker.predict)
        return {"callers": rate, "callers error": records.cost_error(LEARNING_BATCHES)}

    def _arrival_order(self) -> dict[str, float]:
        return {"arrival order": anyio.run(self._arrival_order_rate)}

    async def _arrival_order_rate(self) -> float:
        async with arrival_order_scheduler(self._pipeline, FIFO_BATCH_SIZE) as scheduler:
            return await self._closed_loop_rate(scheduler.submit)

    async def _closed_loop_rate(self, call: Call[BaseModel]) -> float:
        return len(self._items) / await timed_s(work_off([call] * CALLERS, self._items))

    # An idle worker with one caller.

    def _idle(self) -> dict[str, float]:
        direct_ms, idle_ms = (seconds * 1000 for seconds in anyio.run(self._idle_s))
        return {"direct": direct_ms, "idle": idle_ms, "idle excess": idle_ms - 1.05 * direct_ms}

    async def _idle_s(self) -> tuple[float, float]:
        """The median seconds of a direct call and of a call through an idle worker, for the same items in turn."""
        direct_s, idle_s = [], []
        async with worker_of(self._pipeline, Records(), **self._batch_config) as worker:
            for item in self._idle_items:
                await anyio.sleep(PAUSE_S)  # torch's threads spin for a while after a call
                started_s = time.perf_counter()
                self._pipeline.run_inference([item])
                direct_s.append(time.perf_counter() - started_s)
                await anyio.sleep(PAUSE_S)
                idle_s.append(await timed_s(worker.predict(item)))
        return statistics.median(direct_s), statistics.median(idle_s)

    # An open loop: items arrive at random times.

    def _open_loops(self) -> dict[str, float]:
        fifo_load, own_load = OPEN_LOOP_LOAD * self._fifo_capacity, OPEN_LOOP_LOAD * self._capacity
        return {
            **_percentiles_ms("fifo", anyio.run(self._fifo_open_loop, fifo_load)),
            **_percentiles_ms("ours", anyio.run(self._worker_open_loop, fifo_load)),
            **_percentiles_ms("loaded", anyio.run(self._worker_open_loop, own_load)),
        }

    async def _fifo_s(self) -> float:
        """Seconds for all items at once, in batches in order of arrival."""
        async with self._fifo() as submit:
            return await timed_s(work_off([submit] * len(self._open_loop_items), self._open_loop_items))

    async def _fifo_open_loop(self, rate: float) -> list[float]:
        async with self._fifo() as submit:
            return await self._open_loop(submit, rate)

    async def _worker_open_loop(self, rate: float) -> list[float]:
        async with worker_of(self._pipeline, Records(), **self._batch_config) as worker:
            return await self._open_loop(worker.predict, rate)

    def _fifo(self) -> AbstractAsyncContextManager[Call[BaseModel]]:
        return queue_and_thread(self._pipeline.run_inference, fixed_window(FIFO_BATCH_SIZE, FIFO_WINDOW_S))

    async def _open_loop(self, call: Call[BaseModel], rate: float) -> list[float]:
        gaps_s = np.random.default_rng(1).exponential(1 / rate, len(self._open_loop_items))
        return await open_loop(call, self._open_loop_items, np.cumsum(gaps_s).tolist())


def _percentiles_ms(name: str, latencies_s: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(latencies_s, [0.5, 0.99]) * 1000
    return {f"{name} p50": float(p50), f"{name} p99": float(p99)}
