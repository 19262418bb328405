"""What the scheduler is compared to: the smallest batching loop there is, and batches by a fixed window (asyncio)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

Queue = asyncio.Queue[tuple[T, asyncio.Future[R]]]
Gather = Callable[[Queue[T, R]], Awaitable[list[tuple[T, asyncio.Future[R]]]]]


@asynccontextmanager
async def queue_and_thread(
    run_batch: Callable[[list[T]], Sequence[R]], gather: Gather[T, R]
) -> AsyncIterator[Callable[[T], Awaitable[R]]]:
    """A queue, a loop that takes the batches that `gather` makes of it, and one thread that runs them.

    Gives out what to call with an item. It has no errors for single items, no cancellation, no limits: whatever goes
    wrong ends it.
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
                batch = await gather(queue)
                outputs = await loop.run_in_executor(thread, run_batch, [item for item, _ in batch])
                for (_, future), output in zip(batch, outputs, strict=True):
                    future.set_result(output)

    async with asyncio.TaskGroup() as task_group:
        serving = task_group.create_task(serve())
        yield submit
        serving.cancel()


def what_waits(max_batch_size: int) -> Gather[T, R]:
    """Batches of what waits already, in order of arrival."""

    async def gather(queue: Queue[T, R]) -> list[tuple[T, asyncio.Future[R]]]:
        batch = [await queue.get()]
        while len(batch) < max_batch_size and not queue.empty():
            batch.append(queue.get_nowait())
        return batch

    return gather


def fixed_window(max_batch_size: int, window_s: float) -> Gather[T, R]:
    """Batches in order of arrival, for which it waits until they are full or `window_s` is over.

    The window opens when the worker takes the first item, as in most servers with this rule.
    """

    async def gather(queue: Queue[T, R]) -> list[tuple[T, asyncio.Future[R]]]:
        batch = [await queue.get()]
        closes_s = asyncio.get_running_loop().time() + window_s
        try:
            async with asyncio.timeout_at(closes_s):
                while len(batch) < max_batch_size:
                    batch.append(await queue.get())
        except TimeoutError:
            pass
        return batch

    return gather
