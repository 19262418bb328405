"""Runs synchronous functions for an event loop, one at a time, in a thread that is kept."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from anyio.lowlevel import EventLoopToken, current_token

from modalkit.batching.errors import as_exception
from modalkit.batching.wakeup import Future, asyncio_loop, make_future, wake

T = TypeVar("T")


class _Call(Generic[T]):
    """One function call that the thread is to make."""

    def __init__(self, function: Callable[[], T], token: EventLoopToken) -> None:
        self.function = function
        self._token = token
        self._loop = asyncio_loop(token)
        self.done: Future[None] = make_future(self._loop)
        self.result: T
        self.error: BaseException | None = None

    def run(self) -> None:
        """Call the function and wake the caller; raises `RuntimeError` if the event loop has ended meanwhile."""
        try:
            self.result = self.function()
        except BaseException as error:  # noqa: BLE001  # the caller raises it
            self.error = error
        if self._loop is not None:
            self._loop.call_soon_threadsafe(wake, self.done)
        else:
            self._token.backend_class.run_sync_soon(wake, (self.done,), self._token.native_token)


class DedicatedThread:
    """A thread that runs one function at a time. It is always the same thread, unless a call is abandoned.

    One thread for all calls keeps the state that libraries hold for each thread (OpenMP's workers, CUDA contexts,
    connections). A call costs one visit to the thread. Python cannot stop a running function: if its caller is
    cancelled, the call is abandoned and goes on in the old thread, and the next call gets a new thread. The threads are
    daemons, so a function that never returns does not keep the process alive. From `run` to `close`, the object belongs
    to one event loop.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[_Call[object] | None] | None = None
        self._abandoned: list[threading.Thread] = []
        self._thread: threading.Thread | None = None
        self._token: EventLoopToken

    async def run(self, function: Callable[[], T]) -> T:
        """Run `function` in the thread; return its result or raise its error.

        When cancelled, it returns at once, and the function's outcome is dropped. An error that is no `Exception`, such
        as `SystemExit`, is raised as a `RuntimeError`, because it must not end the event loop's thread.
        """
        calls = self._running_queue()
        call = _Call(function, self._token)
        calls.put(call)  # type: ignore[arg-type]  # the thread does not use the result
        try:
            await call.done
        except BaseException:
            self.close(abandon=True)
            raise
        if call.error is None:
            return call.result
        # The frames of the error must not refer to the error: otherwise all objects of the function would stay until
        # the next garbage collection. So here and in the thread's frame only the call refers to it.
        error, call.error = call.error, None
        try:
            raise as_exception(error)
        finally:
            del error

    def close(self, *, abandon: bool = False) -> None:
        """End the thread after its current call; with `abandon`, count it as stuck until then. Idempotent."""
        if self._calls is None or self._thread is None:
            return
        self._calls.put(None)
        if abandon:
            self._abandoned = [*filter(threading.Thread.is_alive, self._abandoned), self._thread]
        self._calls = self._thread = None

    @property
    def stuck(self) -> int:
        """How many abandoned calls are still running."""
        if self._abandoned:
            self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        return len(self._abandoned)

    def wait_for_stuck(self, until_s: float) -> None:
        """Wait, in any thread, until no abandoned call runs any more, or until `until_s` of the monotonic clock."""
        for thread in self._abandoned:
            thread.join(max(0.0, until_s - time.monotonic()))

    def _running_queue(self) -> "SimpleQueue[_Call[object] | None]":
        if self._calls is None:
            calls: SimpleQueue[_Call[object] | None] = SimpleQueue()
            thread = threading.Thread(target=_serve, args=(calls,), name=self._name, daemon=True)
            thread.start()  # raises where there may be no more threads: then the next call tries it again
            self._calls, self._thread, self._token = calls, thread, current_token()
        return self._calls


def _serve(calls: "SimpleQueue[_Call[object] | None]") -> None:
    while (call := calls.get()) is not None:
        try:
            call.run()
        except RuntimeError:
            return  # the event loop ended while an abandoned call went on
        del call  # else the thread would keep the last batch alive while it waits for the next
