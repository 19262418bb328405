"""Runs synchronous functions in a thread of their own, for an event loop."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from anyio.lowlevel import EventLoopToken, current_token

from modalkit.batching.errors import text_of
from modalkit.batching.wakeup import Wakeup, asyncio_loop

T = TypeVar("T")


class _Call(Generic[T]):
    """One function call on its way through the thread and back."""

    def __init__(self, function: Callable[[], T], token: EventLoopToken) -> None:
        self.function = function
        self._token = token
        self._loop = asyncio_loop(token)
        self.done = Wakeup(self._loop)
        self.result: T
        self.error: BaseException | None = None

    def run(self) -> None:
        """Call the function and wake the caller; raises `RuntimeError` when the event loop has ended meanwhile."""
        try:
            self.result = self.function()
        except BaseException as error:  # noqa: BLE001  # handed to the caller, who raises it
            self.error = error
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.done.set)
        else:
            self._token.backend_class.run_sync_soon(self.done.set, (), self._token.native_token)


class DedicatedThread:
    """A thread that runs one function at a time; always the same one, unless a call has to be abandoned.

    One thread for all calls keeps what libraries hold by thread (OpenMP's workers, CUDA contexts, connections) warm,
    and a call costs one hop each way. Python cannot stop a running function: when a caller is cancelled, its call is
    abandoned, goes on in the old thread, and the next call gets a new one. Threads are daemons, so that a function that
    never returns does not keep the process from ending. From `run` to `close`, it belongs to one event loop.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[_Call[object] | None] | None = None
        self._abandoned: list[threading.Thread] = []
        self._thread: threading.Thread | None = None
        self._token: EventLoopToken

    async def run(self, function: Callable[[], T]) -> T:
        """Run `function` in the thread and return its result or raise its error.

        When cancelled, it returns at once, and the function's outcome is dropped. What is no `Exception` (a
        `SystemExit`, say) is raised as a `RuntimeError`, because it must not end the event loop's thread.
        """
        calls = self._running_queue()
        call = _Call(function, self._token)
        calls.put(call)  # type: ignore[arg-type]  # the thread never looks at the result
        try:
            await call.done.wait()
        except BaseException:
            self.close(abandon=True)
            raise
        if call.error is None:
            return call.result
        # The error's frames must not hold the error: all that the function had in hand would stay until the garbage
        # collector comes. Here and in the thread's frame, it is the call that holds it.
        error, call.error = call.error, None
        try:
            if isinstance(error, Exception):
                raise error
            raise RuntimeError(f"a call in this thread raised {text_of(error)}") from error
        finally:
            del error

    def close(self, *, abandon: bool = False) -> None:
        """Let the thread end after its current call; with `abandon`, count it as stuck until it does. Idempotent."""
        if self._calls is None or self._thread is None:
            return
        self._calls.put(None)
        if abandon:
            self._abandoned.append(self._thread)
        self._calls = self._thread = None

    @property
    def stuck(self) -> int:
        """How many abandoned calls are still running."""
        if self._abandoned:
            self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        return len(self._abandoned)

    def _running_queue(self) -> "SimpleQueue[_Call[object] | None]":
        if self._calls is None:
            self._calls = SimpleQueue()
            self._token = current_token()
            self._thread = threading.Thread(target=_serve, args=(self._calls,), name=self._name, daemon=True)
            self._thread.start()
        return self._calls


def _serve(calls: "SimpleQueue[_Call[object] | None]") -> None:
    while (call := calls.get()) is not None:
        try:
            call.run()
        except RuntimeError:
            return  # the event loop ended while an abandoned call went on: nobody waits for its outcome
        del call  # so that the thread does not keep the last batch alive while it waits for the next
