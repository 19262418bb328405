"""Lets one task sleep until something has happened: the cheapest way that the event loop offers."""

import asyncio
from collections.abc import Awaitable

import anyio
from anyio.lowlevel import EventLoopToken


class Wakeup:
    """An event for one task that waits for it once.

    On asyncio it is a bare future: an event of anyio's holds one of asyncio's, which makes a future for whoever waits,
    and to wake a task from a thread by anyio takes another third of the time. One of these is made for every request.
    """

    __slots__ = ("_event", "_future", "_token")

    def __init__(self, token: EventLoopToken) -> None:
        self._token = token
        self._future: asyncio.Future[None] | None = None
        if isinstance(token.native_token, asyncio.AbstractEventLoop):
            self._future = token.native_token.create_future()
        else:
            self._event = anyio.Event()

    def wait(self) -> Awaitable[object]:
        """Wait until it is set; to be awaited once."""
        return self._event.wait() if self._future is None else self._future

    def set(self) -> None:
        """Wake the task that waits, or let it not wait at all. Idempotent, also after the task was cancelled."""
        if self._future is None:
            self._event.set()
        elif not self._future.done():
            self._future.set_result(None)

    def set_from_thread(self) -> None:
        """Do so from another thread; raises `anyio.RunFinishedError` when the event loop has ended."""
        if self._future is None:
            self._token.backend_class.run_sync_soon(self.set, (), self._token.native_token)
            return
        try:
            self._future.get_loop().call_soon_threadsafe(self.set)
        except RuntimeError:
            raise anyio.RunFinishedError from None
