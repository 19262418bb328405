"""Lets one task sleep until something has happened, in the cheapest way that the event loop offers."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable

import anyio
from anyio.lowlevel import EventLoopToken


def asyncio_loop(token: EventLoopToken) -> asyncio.AbstractEventLoop | None:
    """The asyncio event loop of a token, or None if the token is of trio."""
    return token.native_token if isinstance(token.native_token, asyncio.AbstractEventLoop) else None


class Wakeup:
    """An event for one task, which waits for it once.

    With a `loop` of asyncio it is a bare future. An event of anyio holds one of asyncio, which makes a future for each
    task that waits. One wakeup is made for each request, and the bare future halves its cost.
    """

    __slots__ = ("_event", "_future")

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._future: asyncio.Future[None] | None = None
        if loop is not None:
            self._future = loop.create_future()
        else:
            self._event = anyio.Event()

    def wait(self) -> Awaitable[object]:
        """Wait until it is set; to be awaited once."""
        return self._event.wait() if self._future is None else self._future

    def set(self) -> None:
        """Wake the task that waits, now or later. Idempotent, also after the task was cancelled."""
        if self._future is None:
            self._event.set()
        elif not self._future.done():
            self._future.set_result(None)


class Sleepers:
    """Tasks that sleep until there is something to do. One event wakes one task, the one that has slept longest."""

    def __init__(self) -> None:
        self._sleeping: deque[anyio.Event] = deque()

    async def sleep_until(self, wake_s: float) -> None:
        """Sleep until woken, at most until `wake_s` on the event loop's clock."""
        woken = anyio.Event()
        self._sleeping.append(woken)
        try:
            if math.isinf(wake_s) and wake_s > 0:
                await woken.wait()
            else:
                with anyio.CancelScope(deadline=wake_s):
                    await woken.wait()
        finally:
            if not woken.is_set():
                self._sleeping.remove(woken)

    def wake_one(self) -> None:
        """Wake the task that has slept longest, if there is one."""
        if self._sleeping:
            self._sleeping.popleft().set()

    def wake_all(self) -> None:
        """Wake all tasks that sleep."""
        while self._sleeping:
            self.wake_one()
