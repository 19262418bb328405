"""Lets one task sleep until something has happened, in the cheapest way that the event loop offers."""

import asyncio
import math
from collections.abc import Generator
from operator import itemgetter
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import EventLoopToken

T = TypeVar("T")


def asyncio_loop(token: EventLoopToken) -> asyncio.AbstractEventLoop | None:
    """The asyncio event loop of a token, or None if the token is of trio."""
    return token.native_token if isinstance(token.native_token, asyncio.AbstractEventLoop) else None


class EventFuture(Generic[T]):
    """As much of a future of asyncio as is used here, on trio: one task awaits it, once."""

    __slots__ = ("_event", "_result")

    def __init__(self) -> None:
        self._event = anyio.Event()

    def __await__(self) -> Generator[Any, None, T]:
        yield from self._event.wait().__await__()
        return self._result

    def done(self) -> bool:
        """Whether it has its result."""
        return self._event.is_set()

    def set_result(self, result: T) -> None:
        """Wake the task that awaits it, now or later."""
        self._result = result
        self._event.set()


Future = asyncio.Future[T] | EventFuture[T]
"""Wakes one task, with a result. An event of anyio would take twice as long: it makes a future for each wait."""


def make_future(loop: asyncio.AbstractEventLoop | None) -> Future[Any]:
    """A future of this loop of asyncio; without one, that of trio."""
    return EventFuture() if loop is None else loop.create_future()


def wake(future: Future[None]) -> None:
    """Wake the task that awaits the future, if it still does and was not woken before."""
    if not future.done():
        future.set_result(None)


class Sleepers:
    """Tasks that sleep until there is something to do.

    One event wakes one task: that of the lowest rank, and among these the one that has slept longest.
    """

    def __init__(self) -> None:
        self._sleeping: list[tuple[tuple[bool, int], anyio.Event]] = []

    async def sleep_until(self, wake_s: float, rank: tuple[bool, int]) -> None:
        """Sleep until woken, at most until `wake_s` on the event loop's clock."""
        woken = anyio.Event()
        sleeping = rank, woken
        self._sleeping.append(sleeping)
        try:
            if math.isinf(wake_s) and wake_s > 0:
                await woken.wait()
            else:
                with anyio.CancelScope(deadline=wake_s):
                    await woken.wait()
        finally:
            if not woken.is_set():
                self._sleeping.remove(sleeping)

    def wake_one(self) -> None:
        """Wake one task, if one sleeps."""
        if self._sleeping:
            first = min(self._sleeping, key=itemgetter(0))
            self._sleeping.remove(first)
            first[1].set()

    def wake_all(self) -> None:
        """Wake all tasks that sleep."""
        while self._sleeping:
            self.wake_one()
