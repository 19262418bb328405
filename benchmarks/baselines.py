"""The baselines for the scheduler: a minimal batching loop, and batches by a fixed window (asyncio)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

Queue = asyncio.Queue[tuple[T, asyncio.Future[R]]]
Collect = Callable[[Queue[T, R]], Awaitable[list[tuple[T, asyncio.Future[R]]]]]


@asynccontextmanager
async def queue_and_thread(
    run_batch: Callable[[list[T]], Sequence[R]], collect: Collect[T, R]
) -> AsyncIterator[Callable[[T], Awaitable[R]]]:
    """A queue, a loop that collects batches from it by `collect`, and one thread that runs them.

    Yields the function that submits an item. There are no errors for single items, no cancellation and no limits: any
    error ends the loop.
    """
    queue: Queue[T, R] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def submit(item: T) -> asyncio.Future[R]:
        future: asyncio.Future[R] = loop.create_future()
        queue.put_nowait((item, future))
        return future

    async def serve() -> None:
        with ThreadPoolExecutor(1) as thread:
            while True:
                batch = await collect(queue)
                outputs = await loop.run_in_executor(thread, run_batch, [item for item, _ in batch])
                for (_, future), output in zip(batch, outputs, strict=True):
                    future.set_result(output)

    async with asyncio.TaskGroup() as task_group:
        serving = task_group.create_task(serve())
        yield submit
        serving.cancel()


def waiting_items(max_batch_size: int) -> Collect[T, R]:
    """Batches of the items that wait already, in order of arrival."""

    async def collect(queue: Queue[T, R]) -> list[tuple[T, asyncio.Future[R]]]:
        batch = [await queue.get()]
        while len(batch) < max_batch_size and not queue.empty():
            batch.append(queue.get_nowait())
        return batch

    return collect


def fixed_window(max_batch_size: int, window_s: float) -> Collect[T, R]:
    """Batches in order of arrival. Each waits until it is full, or until `window_s` seconds have passed.

    The window starts when the worker takes the first item, as in most servers with this rule.
    """

    async def collect(queue: Queue[T, R]) -> list[tuple[T, asyncio.Future[R]]]:
        batch = [await queue.get()]
        closes_s = asyncio.get_running_loop().time() + window_s
        try:
            async with asyncio.timeout_at(closes_s):
                while len(batch) < max_batch_size:
                    batch.append(await queue.get())
        except TimeoutError:
            pass
        return batch

    return collect
