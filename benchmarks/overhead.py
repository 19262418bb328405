"""The overhead of the scheduler: requests without work, beside a minimal batching loop and other libraries."""

import gc
import time
from collections.abc import Awaitable, Callable
from functools import partial

import anyio

from modalkit.batching import BatchPolicy, BatchScheduler
from modalkit.benchmarks.baselines import Collect, queue_and_thread, waiting_items
from modalkit.benchmarks.batching_libraries import BATCHED, installed_libraries
from modalkit.benchmarks.drivers import Call, do_nothing, timed_s, work_off
from modalkit.benchmarks.measurement import Figure, Rounds

CALLERS = 1_000
# Each batch of each contender costs a visit to a thread. With 256 the cost of each item is the larger part; 32 is the
# scheduler's default.
BATCH_SIZES = (256, 32)


class OverheadStudy:
    """Microseconds per item of each contender, in a closed loop of 1,000 callers, with batches of 256 and of 32."""

    name = "overhead"

    def __init__(self, items: int = 50_000) -> None:
        self._items = range(items)
        self._libraries = installed_libraries()
        self._rounds = self._contenders()

    def warm_up(self) -> None:
        """Run one round that does not count."""
        self._contenders().run()

    def run_round(self) -> None:
        """Measure each contender once."""
        self._rounds.run()

    def figures(self) -> list[Figure]:
        """Times and their ratios."""
        return [figure for batch_size in BATCH_SIZES for figure in self._figures_of(batch_size)]

    def _figures_of(self, batch_size: int) -> list[Figure]:
        figure, ratio = self._rounds.figure, self._rounds.ratio
        is_large = batch_size == max(BATCH_SIZES)
        bare, submit, many = (f"{way} {batch_size}" for way in ("bare", "submit", "submit_many"))
        found = [
            figure(bare, f"bare queue and thread, batches of {batch_size}", "us/item"),
            figure(submit, f"submit, batches of {batch_size}", "us/item"),
            figure(many, f"submit_many, batches of {batch_size}", "us/item"),
            ratio(submit, bare, f"submit / bare queue and thread, {batch_size}", at_most=2),
            ratio(many, submit, f"submit_many / submit, {batch_size}", at_most=1 / 3 if is_large else 1 / 2),
        ]
        for name in self._libraries:
            library = f"{name} {batch_size}"
            at_most = 1 / 3 if is_large and name == BATCHED else None
            found += [
                figure(library, f"{name}, batches of {batch_size}", "us/item"),
                ratio(submit, library, f"submit / {name}, {batch_size}", at_most=at_most),
            ]
        return found

    def _contenders(self) -> Rounds:
        ways: dict[str, Callable[[int], Awaitable[float]]] = {"bare": self._bare, "submit": self._submit}
        ways |= {name: partial(way, self._closed_loop_s) for name, way in self._libraries.items()}
        ways["submit_many"] = self._submit_many
        return Rounds(
            [
                partial(self._us_per_item, f"{name} {batch_size}", partial(way, batch_size))
                for batch_size in BATCH_SIZES
                for name, way in ways.items()
            ]
        )

    def _us_per_item(self, name: str, way: Callable[[], Awaitable[float]]) -> dict[str, float]:
        gc.collect()  # so that nobody pays for the objects of the contender before
        return {name: anyio.run(way) / len(self._items) * 1e6}

    async def _closed_loop_s(self, call: Call[int]) -> float:
        return await timed_s(work_off([call] * CALLERS, self._items))

    async def _bare(self, batch_size: int) -> float:
        collect: Collect[int, int] = waiting_items(batch_size)
        async with queue_and_thread(do_nothing, collect) as submit:
            return await self._closed_loop_s(submit)

    async def _submit(self, batch_size: int) -> float:
        async with _scheduler(batch_size) as scheduler:
            return await self._closed_loop_s(scheduler.submit)

    async def _submit_many(self, batch_size: int) -> float:
        """Send lists one after the other, each with as many requests as the other loops have callers."""
        async with _scheduler(batch_size) as scheduler:
            started_s = time.perf_counter()
            for start in range(0, len(self._items), CALLERS):
                await scheduler.submit_many(self._items[start : start + CALLERS])
            return time.perf_counter() - started_s


def _scheduler(batch_size: int) -> BatchScheduler[int, int]:
    return BatchScheduler(do_nothing, policy=BatchPolicy(max_batch_size=batch_size))
