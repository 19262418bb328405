"""What the scheduler itself costs: requests that need no work, beside the smallest loop that batches them."""

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import anyio
from batched import aio  # type: ignore[import-untyped]  # the package has no type information

from batching import BatchPolicy, BatchScheduler
from benchmarks.baselines import Gather, queue_and_thread, what_waits
from benchmarks.drivers import Call, timed_s, work_off
from benchmarks.measurement import Figure, Rounds

CALLERS = 1_000
BATCH_SIZE = 32


def do_nothing(items: Sequence[int]) -> Sequence[int]:
    """Answer each item with itself."""
    return items


class OverheadStudy:
    """Microseconds an item of each way to batch, in a closed loop of 1,000 callers; all with batches of at most 32."""

    name = "overhead"

    def __init__(self, items: int = 50_000) -> None:
        self._items = range(items)
        self._rounds = self._contenders()

    def warm_up(self) -> None:
        """Run one round that is forgotten."""
        self._contenders().run()

    def run_round(self) -> None:
        """Measure each way once."""
        self._rounds.run()

    def figures(self) -> list[Figure]:
        """Times and their ratios."""
        figure, ratio = self._rounds.figure, self._rounds.ratio
        return [
            figure("bare", "bare queue and thread, per item", "us"),
            figure("submit", "submit, per item", "us"),
            figure("batched", "the batched library, per item", "us"),
            figure("submit_many", "submit_many, per item", "us"),
            ratio("submit", "bare", "submit / bare queue and thread", at_most=2),
            ratio("submit", "batched", "submit / the batched library", at_most=1 / 3),
            ratio("submit_many", "submit", "submit_many / submit", at_most=1 / 3),
        ]

    def _contenders(self) -> Rounds:
        ways = {"bare": self._bare, "submit": self._submit, "batched": self._batched, "submit_many": self._submit_many}
        return Rounds([partial(self._us_per_item, name, way) for name, way in ways.items()])

    def _us_per_item(self, name: str, way: Callable[[], Awaitable[float]]) -> dict[str, float]:
        return {name: anyio.run(way) / len(self._items) * 1e6}

    async def _closed_loop_s(self, call: Call[int]) -> float:
        return await timed_s(work_off([call] * CALLERS, self._items))

    async def _bare(self) -> float:
        gather: Gather[int, int] = what_waits(BATCH_SIZE)
        async with queue_and_thread(do_nothing, gather) as submit:
            return await self._closed_loop_s(submit)

    async def _submit(self) -> float:
        async with _scheduler() as scheduler:
            return await self._closed_loop_s(scheduler.submit)

    async def _batched(self) -> float:
        return await self._closed_loop_s(aio.dynamically(do_nothing, batch_size=BATCH_SIZE))

    async def _submit_many(self) -> float:
        """As many requests under way as callers in the other loops, in one list after the other."""
        async with _scheduler() as scheduler:
            started_s = time.perf_counter()
            for start in range(0, len(self._items), CALLERS):
                await scheduler.submit_many(self._items[start : start + CALLERS])
            return time.perf_counter() - started_s


def _scheduler() -> BatchScheduler[int, int]:
    return BatchScheduler(do_nothing, policy=BatchPolicy(max_batch_size=BATCH_SIZE))
