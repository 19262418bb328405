"""The anyio shell around the planner: collects requests, runs batches, hands every caller its own outcome."""

import inspect
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

import anyio
from anyio.abc import TaskGroup

from batching.bisection import Bisection
from batching.cost import CostModel, PaddedCostModel
from batching.errors import (
    BatchingError,
    BatchTimeoutError,
    DeadlineExceededError,
    OutputCountError,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
)
from batching.policy import Batch, BatchPlanner, BatchPolicy
from batching.request import Failure, Outcome, Priority, Request, Success
from batching.statistics import SchedulerStatistics
from batching.threads import DedicatedThread

T = TypeVar("T")
R = TypeVar("R")

RunBatch = Callable[[list[T]], Sequence[R | Exception]] | Callable[[list[T]], Awaitable[Sequence[R | Exception]]]
"""Runs one batch: a list of payloads in, a sequence with one output for each out, in the same order.

An output that is an `Exception` is that item's error. A raised exception fails the batch, which is then split.
"""


_CALLER_GONE = Failure(BatchingError("its caller was cancelled"))
"""The outcome of a request that nobody waits for any more."""


class _Waiter:
    """Wakes one caller when all its requests have their outcomes."""

    __slots__ = ("all_done", "arrival_s", "deadline_s", "timeout_s", "unfinished")

    def __init__(self, arrival_s: float, timeout_s: float | None) -> None:
        self.all_done = anyio.Event()
        self.unfinished = 0
        self.arrival_s = arrival_s
        self.timeout_s = timeout_s
        self.deadline_s = math.inf if timeout_s is None else arrival_s + timeout_s

    def one_done(self) -> None:
        self.unfinished -= 1
        if not self.unfinished:
            self.all_done.set()


@dataclass(slots=True, eq=False, kw_only=True)
class _Pending(Request[T], Generic[T, R]):
    """A request with the caller that waits for it."""

    waiter: _Waiter
    outcome: Outcome[R] | None = None


@dataclass(slots=True)
class _Counters:
    """What `SchedulerStatistics` reports, while it is still counted."""

    running: int = 0
    accepted: int = 0
    succeeded: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    refused: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    busy_s: float = 0.0
    batch_sizes: Counter[int] = field(default_factory=Counter)


class BatchScheduler(Generic[T, R]):
    """Collects single requests into batches and runs them, on asyncio or trio.

    Use it as an async context manager, in the task that will also leave it. `run_batch` is a synchronous function, run
    in a thread of the scheduler's own, or an asynchronous one. Up to `max_in_flight` batches run at once (synchronous
    ones each in a thread of its own). Leaving the context normally refuses new requests and runs everything accepted;
    leaving it by an exception (cancellation included) abandons what has not finished with `SchedulerClosedError`.

    `item_size` gives a payload's size where `submit` is not told one; it is called in the event loop for each request
    and has to be quick. A batch that runs longer than `batch_timeout_s` fails with `BatchTimeoutError`; a synchronous
    function cannot be stopped, so it goes on in its thread, unheard, while a new thread takes the next batch.

    Every accepted request gets exactly one outcome: a result, an error of its own, or the cancellation of its caller.
    """

    def __init__(
        self,
        run_batch: RunBatch[T, R],
        *,
        policy: BatchPolicy | None = None,
        cost_model: CostModel | None = None,
        item_size: Callable[[T], int] | None = None,
        max_in_flight: int = 1,
        batch_timeout_s: float | None = None,
        name: str = "batch scheduler",
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, got {max_in_flight!r}")
        if batch_timeout_s is not None and batch_timeout_s <= 0:
            raise ValueError(f"batch_timeout_s must be positive or None, got {batch_timeout_s!r}")
        self.policy = policy or BatchPolicy()
        self._run_batch = run_batch
        self._is_async = inspect.iscoroutinefunction(run_batch) or inspect.iscoroutinefunction(
            getattr(run_batch, "__call__", None)  # noqa: B004  # not whether it can be called, but how
        )
        self._item_size = item_size
        self._batch_timeout_s = math.inf if batch_timeout_s is None else batch_timeout_s
        self._threads = [DedicatedThread(f"{name} {i}") for i in range(max_in_flight)]
        # All mutable state: the planner with its queue, the requests that run, the counters, and how idle slots wake.
        self._planner: BatchPlanner[_Pending[T, R]] = BatchPlanner(self.policy, cost_model or PaddedCostModel())
        self._running: set[_Pending[T, R]] = set()
        self._counters = _Counters()
        self._arrival = anyio.Event()
        self._open = False
        self._task_group: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        if self._task_group is not None:
            raise RuntimeError("a BatchScheduler can be entered only once")
        self._task_group = anyio.create_task_group()
        await self._task_group.__aenter__()
        for thread in self._threads:
            self._task_group.start_soon(self._serve, thread)
        self._open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._task_group is None:
            raise RuntimeError("a BatchScheduler cannot be left before it was entered")
        self._open = False
        self._arrival.set()
        try:
            return await self._task_group.__aexit__(exc_type, exc, traceback)
        except BaseExceptionGroup as group:
            if group.exceptions == (exc,):
                return False  # the block's own exception goes on as it was raised, not wrapped
            raise
        finally:
            self._abandon_unfinished()

    async def submit(
        self,
        payload: T,
        *,
        size: int | None = None,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> R:
        """Run one payload in some batch and return its result, or raise its own error.

        Raises `QueueFullError`, `RequestTooLargeError`, `SchedulerClosedError` or `ValueError` (a size below 1) before
        anything is queued; `DeadlineExceededError` once `timeout_s` seconds have passed; `BatchTimeoutError`,
        `OutputCountError` or whatever `run_batch` raised for this payload. When cancelled, a request that still waits
        leaves the queue; one that runs already is finished, and its result dropped.
        """
        waiter = _Waiter(anyio.current_time(), timeout_s)
        request = self._make_request(payload, size, priority, waiter)
        self._enqueue([request])
        await self._wait(waiter, [request])
        match request.outcome:
            case Success(value):
                return value
            case Failure(error):
                raise error
        raise AssertionError("a request was left without an outcome: this is a bug in modalkit")

    async def submit_many(
        self,
        payloads: Iterable[T],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[R]]:
        """Run many payloads and return their outcomes in the same order: a `Success` or a `Failure` each.

        A payload that can never run (too large, an invalid size) is a `Failure` and disturbs no other. Raises
        `QueueFullError` or `SchedulerClosedError` before anything is queued: a list is accepted whole or not at all.
        Timeouts and cancellation are as for `submit`.
        """
        waiter = _Waiter(anyio.current_time(), timeout_s)
        outcomes: list[Outcome[R] | _Pending[T, R]] = []
        for payload in payloads:
            try:
                outcomes.append(self._make_request(payload, None, priority, waiter))
            except (RequestTooLargeError, ValueError) as error:
                outcomes.append(Failure(error))
        requests = [entry for entry in outcomes if isinstance(entry, _Pending)]
        self._enqueue(requests)
        if requests:
            await self._wait(waiter, requests)
        return [cast("Outcome[R]", entry.outcome) if isinstance(entry, _Pending) else entry for entry in outcomes]

    def statistics(self) -> SchedulerStatistics:
        """An immutable snapshot of what is waiting, running and done."""
        counters = self._counters
        return SchedulerStatistics(
            queued={priority: self._planner.queue.waiting(priority) for priority in Priority},
            running=len(self._running),
            accepted=counters.accepted,
            succeeded=counters.succeeded,
            failed=counters.failed,
            expired=counters.expired,
            cancelled=counters.cancelled,
            refused=counters.refused,
            batch_sizes=dict(counters.batch_sizes),
            real_tokens=counters.real_tokens,
            padded_tokens=counters.padded_tokens,
            busy_s=counters.busy_s,
            stuck_threads=sum(thread.stuck for thread in self._threads),
        )

    # The caller's side.

    def _make_request(self, payload: T, size: int | None, priority: Priority, waiter: _Waiter) -> _Pending[T, R]:
        if size is None:
            size = 1 if self._item_size is None else self._item_size(payload)
        if size < 1:
            raise ValueError(f"the size of a request must be at least 1, got {size!r}")
        limit = self.policy.max_batch_tokens
        if limit is not None and size > limit:
            raise RequestTooLargeError(size, limit)
        return _Pending(
            payload=payload,
            size=size,
            priority=priority,
            arrival_s=waiter.arrival_s,
            deadline_s=waiter.deadline_s,
            waiter=waiter,
        )

    def _enqueue(self, requests: Sequence[_Pending[T, R]]) -> None:
        if not self._open:
            raise SchedulerClosedError("the scheduler is not open: use it inside its 'async with' block")
        try:
            self._planner.queue.ensure_room(len(requests))
        except QueueFullError:
            self._counters.refused += len(requests)
            raise
        for request in requests:
            self._planner.queue.push(request)
            request.waiter.unfinished += 1
        self._counters.accepted += len(requests)
        self._arrival.set()

    async def _wait(self, waiter: _Waiter, requests: list[_Pending[T, R]]) -> None:
        """Wait for all outcomes; at the deadline, or when cancelled, requests without one are withdrawn."""
        try:
            if waiter.timeout_s is None:
                await waiter.all_done.wait()
            else:
                with anyio.CancelScope(deadline=waiter.deadline_s):
                    await waiter.all_done.wait()
                self._withdraw(requests, Failure(DeadlineExceededError(waiter.timeout_s)))
        except BaseException:
            self._withdraw(requests, _CALLER_GONE)
            raise

    def _withdraw(self, requests: list[_Pending[T, R]], outcome: Failure) -> None:
        for request in requests:
            if request.outcome is None:
                self._planner.queue.discard(request)
                self._finish(request, outcome)

    # The worker's side.

    async def _serve(self, thread: DedicatedThread) -> None:
        """Run one batch after the other, until the scheduler is closed and nothing waits."""
        try:
            while (batch := await self._next_batch()) is not None:
                await self._run(batch, thread)
        finally:
            thread.close()

    async def _next_batch(self) -> Batch[_Pending[T, R]] | None:
        while True:
            decision = self._planner.decide(anyio.current_time(), draining=not self._open)
            for request in decision.expired:
                self._finish(request, Failure(DeadlineExceededError(request.deadline_s - request.arrival_s)))
            if decision.batch is not None:
                return decision.batch
            if not self._open:
                return None
            if self._arrival.is_set():
                self._arrival = anyio.Event()
            with anyio.CancelScope(deadline=decision.wake_s):
                await self._arrival.wait()

    async def _run(self, batch: Batch[_Pending[T, R]], thread: DedicatedThread) -> None:
        self._running.update(batch.requests)
        sizes = [request.size for request in batch.requests]
        self._counters.batch_sizes[len(sizes)] += 1
        self._counters.real_tokens += sum(sizes)
        self._counters.padded_tokens += len(sizes) * max(sizes)
        started_s = anyio.current_time()
        try:
            await self._run_parts(Bisection(batch.requests), thread)
        finally:
            elapsed_s = anyio.current_time() - started_s
            self._counters.busy_s += elapsed_s
            self._planner.batch_finished(batch, elapsed_s)
        self._running.difference_update(batch.requests)

    async def _run_parts(self, bisection: Bisection[_Pending[T, R]], thread: DedicatedThread) -> None:
        for part in bisection:
            wanted = [request for request in part if request.outcome is None]
            if not wanted:
                continue
            try:
                outputs = await self._call([request.payload for request in wanted], thread)
            except BatchTimeoutError as error:
                # Not split: whatever hung would only hang again, for as long.
                for request in wanted:
                    self._finish(request, Failure(error))
            except Exception as error:  # noqa: BLE001  # user code may raise anything; it becomes the items' error
                for request in bisection.failed(wanted, error):
                    self._finish(request, Failure(error))
            else:
                for request, output in zip(wanted, outputs, strict=True):
                    self._finish(request, Failure(output) if isinstance(output, Exception) else Success(output))
        for request, last_error in bisection.given_up():
            self._finish(request, Failure(last_error))

    async def _call(self, payloads: list[T], thread: DedicatedThread) -> Sequence[R | Exception]:
        """Call `run_batch` within the batch timeout and check what it returns."""
        outputs: Any = None
        with anyio.move_on_after(self._batch_timeout_s) as scope:
            if self._is_async:
                outputs = await cast("Awaitable[Any]", self._run_batch(payloads))
            else:
                outputs = await thread.run(lambda: self._run_batch(payloads))
        if scope.cancelled_caught:
            raise BatchTimeoutError(self._batch_timeout_s, len(payloads))
        if not isinstance(outputs, Sequence) or isinstance(outputs, str | bytes):
            raise OutputCountError(len(payloads), f"{type(outputs).__name__}")
        if len(outputs) != len(payloads):
            raise OutputCountError(len(payloads), f"{len(outputs)}")
        return outputs

    def _finish(self, request: _Pending[T, R], outcome: Outcome[R]) -> None:
        if request.outcome is not None:
            return  # its caller has gone
        request.outcome = outcome
        if isinstance(outcome, Success):
            self._counters.succeeded += 1
        elif outcome is _CALLER_GONE:
            self._counters.cancelled += 1
        elif isinstance(outcome.error, DeadlineExceededError):
            self._counters.expired += 1
        else:
            self._counters.failed += 1
        request.waiter.one_done()

    def _abandon_unfinished(self) -> None:
        queue = self._planner.queue
        unfinished = list(self._running)
        for priority in Priority:
            while (request := queue.oldest(priority)) is not None:
                queue.discard(request)
                unfinished.append(request)
        self._running.clear()
        error = SchedulerClosedError("the scheduler was aborted before this request finished")
        for request in unfinished:
            self._finish(request, Failure(error))
