"""A thread that runs operations on what it has opened, many together ("group commit")."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

import anyio
from anyio.lowlevel import EventLoopToken, current_token

from modalkit.batching.wakeup import Future, asyncio_loop, make_future, wake
from modalkit.service.jobs.errors import JobStoreBusyError, JobStoreClosedError

MAX_WAITING_OPERATIONS = 100_000

Operation = Callable[[Any], Any]


@dataclass(slots=True, eq=False)
class _Entry:
    """An operation on its way through the thread and back. `operation` is None to open (first) and to close (last)."""

    done: Future[None]
    operation: Operation | None
    is_wanted: bool = True
    result: Any = None


class OperationThread:
    """Hands operations to `run`, in a thread of its own: those that came together, and more up to `max_together`.

    `run` returns the result or the error of each, in the same order; what it raises is the error of all. The thread
    starts as soon as the event loop has run what is ready now; operations that come while it runs are in the next list.

    An async context manager. The thread enters the context that `resources` returns, whose errors are raised, and
    leaves it after what waits is finished. When an exception leaves the block, only the operations that have begun are
    finished; the others raise `JobStoreClosedError`.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Operation]], Sequence[Any]],
        resources: Callable[[], AbstractContextManager[None]],
        *,
        max_together: int,
    ) -> None:
        self._name = name
        self._run = run
        self._resources = resources
        self._max_together = max_together
        # All mutable state.
        self._coming: list[_Entry] = []  # goes to the thread at the end of this pass of the event loop
        self._queue: SimpleQueue[list[_Entry]] = SimpleQueue()  # went to the thread
        self._waiting = 0  # operations without a result
        self._is_open = False  # whether operations are accepted
        self._aborted = False  # whether operations that have not begun fail
        self._token: EventLoopToken

    async def __aenter__(self) -> None:
        self._token = current_token()
        self._queue = SimpleQueue()
        self._aborted = False
        threading.Thread(target=self._serve, name=self._name, daemon=True).start()
        try:
            await self._pass_through(None)
        except BaseException:
            await self._stop()
            raise
        self._is_open = True

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        self._aborted = exc_type is not None
        await self._stop()

    async def _stop(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._pass_through(None)

    async def perform(self, operation: Operation) -> Any:
        """Run an operation, together with others, and return its result, or raise its error.

        Raises `JobStoreBusyError` and `JobStoreClosedError`. When cancelled, an operation that has not begun is not
        run; one that has is finished.
        """
        if not self._is_open:
            raise JobStoreClosedError
        if self._waiting >= MAX_WAITING_OPERATIONS:
            raise JobStoreBusyError(self._waiting)
        return await self._pass_through(operation)

    async def _pass_through(self, operation: Operation | None) -> Any:
        loop = asyncio_loop(self._token)
        entry = _Entry(make_future(loop), operation)
        self._waiting += 1
        self._coming.append(entry)
        if loop is None or self._max_together == 1:
            self._hand_over()
        elif len(self._coming) == 1:
            loop.call_soon(self._hand_over)
        try:
            await entry.done
        finally:
            entry.is_wanted = False
            self._waiting -= 1
        if isinstance(entry.result, BaseException):
            raise entry.result
        return entry.result

    def _hand_over(self) -> None:
        if self._coming:
            self._queue.put(self._coming)
            self._coming = []

    # In the thread.

    def _serve(self) -> None:
        opened = ExitStack()
        self._answer(self._queue.get(), lambda: [opened.enter_context(self._resources())])
        while (entries := self._take())[-1].operation is not None:
            self._run_wanted(entries)
            del entries  # else the thread would keep the last results alive while it waits
        *entries, last = entries
        self._run_wanted(entries)
        close: Callable[[], object] = opened.close
        self._answer([last], lambda: [close()])

    def _take(self) -> list[_Entry]:
        """Wait for entries; returns them with those that came meanwhile, up to the one that closes."""
        entries = self._queue.get()
        with suppress(Empty):
            while len(entries) < self._max_together and entries[-1].operation is not None:
                entries += self._queue.get_nowait()
        return entries

    def _run_wanted(self, entries: list[_Entry]) -> None:
        wanted = [entry for entry in entries if entry.is_wanted]
        operations = [entry.operation for entry in wanted if entry.operation is not None]
        if self._aborted:
            self._answer(wanted, lambda: [JobStoreClosedError() for _ in wanted])
        elif wanted:
            self._answer(wanted, lambda: self._run(operations))

    def _answer(self, entries: list[_Entry], results_of: Callable[[], Sequence[Any]]) -> None:
        """Call `results_of` and wake the callers of the entries; where their event loop has ended, there are none."""
        try:
            results = results_of()
        except BaseException as error:  # noqa: BLE001  # handed to the callers
            results = [error] * len(entries)
        for entry, result in zip(entries, results, strict=True):
            entry.result = result
        with suppress(RuntimeError):
            self._token.backend_class.run_sync_soon(_wake, (entries,), self._token.native_token)


def _wake(entries: list[_Entry]) -> None:
    for entry in entries:
        wake(entry.done)
