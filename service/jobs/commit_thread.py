"""A thread that runs operations in transactions, many in each ("group commit")."""

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import EventLoopToken, current_token

from modalkit.batching.wakeup import Wakeup, asyncio_loop
from modalkit.service.jobs.errors import JobStoreBusyError, JobStoreClosedError

Op = TypeVar("Op")
T = TypeVar("T")


class _Entry(Generic[Op]):
    """An operation, or a function that runs between transactions, on its way through the thread and back."""

    __slots__ = ("done", "function", "is_last", "operation", "result", "wanted")

    def __init__(
        self, done: Wakeup, operation: Op | None, function: Callable[[], Any] | None, *, is_last: bool = False
    ) -> None:
        self.done = done
        self.is_last = is_last
        self.operation = operation
        self.function = function
        self.result: Any = None
        self.wanted = True


class CommitThread(Generic[Op]):
    """Hands operations to `commit`, in a thread of its own, in lists of up to `max_together`.

    `commit` returns the result or the error of each, in the same order; what it raises is the error of all. The thread
    starts as soon as an operation comes; those that come while it runs are in the next list. Everything that uses the
    database runs in this one thread, opening and closing included.
    """

    def __init__(
        self, name: str, commit: Callable[[list[Op]], Sequence[Any]], *, max_together: int, max_waiting: int
    ) -> None:
        self._name = name
        self._commit = commit
        self._max_together = max_together
        self._max_waiting = max_waiting
        # All mutable state: what goes to the thread, how much of it has not come back, whether more may come, and
        # whether what has not begun is still to be done.
        self._queue: SimpleQueue[_Entry[Op]] = SimpleQueue()
        self._waiting = 0
        self._is_open = False
        self._aborted = False
        self._token: EventLoopToken

    async def start(self, first: Callable[[], None], undo: Callable[[], None]) -> None:
        """Start the thread with a call of `first`; where that raises, the thread ends and the error is raised.

        When cancelled, `undo` is called behind it, also where `first` was not called or has raised.
        """
        self._token = current_token()
        self._queue = SimpleQueue()
        self._aborted = False
        self._is_open = True
        threading.Thread(target=self._serve, name=self._name, daemon=True).start()
        try:
            await self.call(first)
        except Exception:
            await self.stop(lambda: None)
            raise
        except BaseException:
            await self.stop(undo)
            raise

    async def stop(self, last: Callable[[], None], *, abort: bool = False) -> None:
        """Refuse more, finish what waits, call `last` and let the thread end.

        With `abort`, only what has begun is finished; the rest raises `JobStoreClosedError`.
        """
        self._is_open = False
        self._aborted = abort
        entry: _Entry[Op] = _Entry(Wakeup(asyncio_loop(self._token)), None, last, is_last=True)
        self._queue.put(entry)
        with anyio.CancelScope(shield=True):
            await entry.done.wait()
        if isinstance(entry.result, BaseException):
            raise entry.result

    async def perform(self, operation: Op) -> Any:
        """Run an operation in some transaction and return its result, or raise its error.

        Raises `JobStoreBusyError` and `JobStoreClosedError`. When cancelled, an operation that has not begun is not
        run; one that has is finished.
        """
        return await self._pass_through(operation, None)

    async def call(self, function: Callable[[], T]) -> T:
        """Call a function between two transactions."""
        result: T = await self._pass_through(None, function)
        return result

    async def _pass_through(self, operation: Op | None, function: Callable[[], Any] | None) -> Any:
        if not self._is_open:
            raise JobStoreClosedError
        if self._waiting >= self._max_waiting:
            raise JobStoreBusyError(self._waiting)
        entry = _Entry(Wakeup(asyncio_loop(self._token)), operation, function)
        self._waiting += 1
        self._queue.put(entry)
        try:
            await entry.done.wait()
        finally:
            entry.wanted = False
            self._waiting -= 1
        if isinstance(entry.result, Exception):
            raise entry.result
        return entry.result

    # In the thread.

    def _serve(self) -> None:
        entry: _Entry[Op] | None = None
        while True:
            entry = entry or self._queue.get()
            if entry.function is None:
                entries, entry = self._together(entry)
                self._commit_all(entries)
                continue
            if entry.is_last or (entry.wanted and not self._aborted):
                try:
                    entry.result = entry.function()
                except BaseException as error:  # noqa: BLE001  # handed to the caller
                    entry.result = error
            else:
                entry.result = JobStoreClosedError()
            self._give_back([entry])
            if entry.is_last:
                return
            entry = None

    def _together(self, first: _Entry[Op]) -> tuple[list[_Entry[Op]], _Entry[Op] | None]:
        """What waits from `first` on and belongs into one transaction, and what comes after it, if it was seen."""
        entries = [first]
        while len(entries) < self._max_together:
            try:
                entry = self._queue.get_nowait()
            except Empty:
                break
            if entry.function is not None:
                return entries, entry
            entries.append(entry)
        return entries, None

    def _commit_all(self, entries: list[_Entry[Op]]) -> None:
        if self._aborted:
            for entry in entries:
                entry.result = JobStoreClosedError()
        else:
            wanted = [entry for entry in entries if entry.wanted]
            operations = [entry.operation for entry in wanted if entry.operation is not None]
            try:
                results = self._commit(operations) if operations else ()
            except Exception as error:  # noqa: BLE001  # handed to the callers
                results = [error] * len(wanted)
            for entry, result in zip(wanted, results, strict=True):
                entry.result = result
        self._give_back(entries)

    def _give_back(self, entries: list[_Entry[Op]]) -> None:
        """Wake the callers; where the event loop has ended meanwhile, there are none."""
        try:
            self._token.backend_class.run_sync_soon(_wake, (entries,), self._token.native_token)
        except RuntimeError:
            return


def _wake(entries: list[_Entry[Any]]) -> None:
    for entry in entries:
        entry.done.set()
