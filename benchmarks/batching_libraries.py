"""Other libraries that gather calls into batches, as contenders of the overhead study: those that are installed.

`batched` comes with the extra ``bench``; the others with the environment that ``make bench-peers`` builds.
"""

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec

from batched import aio  # type: ignore[import-untyped]  # the package has no type information

from modalkit.benchmarks.drivers import Call, do_nothing

Measure = Callable[[Call[int]], Awaitable[float]]
"""Sends all items through a call; returns the seconds."""

BATCHED = "the batched library"

Way = Callable[[Measure, int], Awaitable[float]]
"""Measures a library with batches of at most so many items."""


def installed_libraries() -> dict[str, Way]:
    """How each library is measured, by its name."""
    ways: dict[str, Way] = {BATCHED: _batched}
    if find_spec("flyte"):
        ways["flyte's DynamicBatcher"] = _flyte
    if find_spec("razors_edge"):
        ways["razors-edge-batching-scheduler"] = _razors_edge
    return ways


async def _batched(measure: Measure, batch_size: int) -> float:
    return await measure(aio.dynamically(do_nothing, batch_size=batch_size))


async def _flyte(measure: Measure, batch_size: int) -> float:
    from flyte.extras import DynamicBatcher

    async def process(items: list[int]) -> Sequence[int]:
        return await asyncio.to_thread(do_nothing, items)

    async with DynamicBatcher(process, max_batch_size=batch_size) as batcher:

        async def call(item: int) -> None:
            await (await batcher.submit(item))

        return await measure(call)


async def _razors_edge(measure: Measure, batch_size: int) -> float:
    """It runs batches in another process, which starts before the measurement and is ended after it."""
    from batching_executor.process_manager import ComputeExecutor

    from modalkit.benchmarks.razors_edge_task import task_of

    task = task_of(batch_size)
    others = set(multiprocessing.active_children())
    executor = ComputeExecutor([task], async_limit=1_000)

    async def call(item: int) -> None:
        await executor.async_compute_fn(task, item)

    try:
        await call(0)  # compiles its planner
        return await measure(call)
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
