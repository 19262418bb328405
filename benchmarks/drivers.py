"""Calls a function of this process with one item at a time; asyncio and trio. `load` does the like over HTTP."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

T = TypeVar("T")

Call = Callable[[T], Awaitable[object]]
"""Sends one item, and returns when it is answered."""


def do_nothing(items: Sequence[int]) -> Sequence[int]:
    """Answer each item of a batch with itself."""
    return items


async def work_off(callers: Sequence[Call[T]], items: Sequence[T]) -> None:
    """Distribute the items among callers. Each sends one as soon as its last one is answered."""
    waiting = iter(items)

    async def work(call: Call[T]) -> None:
        for item in waiting:
            await call(item)

    async with anyio.create_task_group() as task_group:
        for call in callers:
            task_group.start_soon(work, call)


async def open_loop(call: Call[T], items: Sequence[T], arrivals_s: Sequence[float]) -> list[float]:
    """Send each item at its time, in seconds from now, without waiting for earlier ones; return the seconds of each.

    They are counted from the time when the item was due, so that a late sender hides no latency.
    """
    latencies_s: list[float] = []
    begun_s = anyio.current_time()

    async def send(item: T, due_s: float) -> None:
        await call(item)
        latencies_s.append(anyio.current_time() - due_s)

    async with anyio.create_task_group() as task_group:
        for item, arrival_s in zip(items, arrivals_s, strict=True):
            await anyio.sleep_until(begun_s + arrival_s)
            task_group.start_soon(send, item, begun_s + arrival_s)
    return latencies_s


async def timed_s(work: Awaitable[object]) -> float:
    """The seconds that `work` takes."""
    started_s = anyio.current_time()
    await work
    return anyio.current_time() - started_s
