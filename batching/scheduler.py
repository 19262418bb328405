"""The anyio shell around the planner: collects requests, runs batches, hands every caller its own outcome."""

import asyncio
import logging
import math
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint, current_token

from batching.bisection import Bisection
from batching.cost import CostModel
from batching.errors import (
    BatchingError,
    BatchTimeoutError,
    DeadlineExceededError,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
)
from batching.execution import Executor, Progress
from batching.measured_cost import MeasuredCostModel
from batching.pending import Listener, Pending, Waiter
from batching.planner import BatchPlanner
from batching.policy import Batch, BatchPolicy, Decision
from batching.records import BatchRecord
from batching.request import LARGEST_SIZE, Failure, Outcome, Priority, Success
from batching.stages import RunBatch, StageSeconds, StageShares
from batching.statistics import SchedulerStatistics, Telemetry
from batching.task_groups import plain_task_group
from batching.wakeup import asyncio_loop

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

OVERLAP_PAYS_FROM = 0.1  # of a batch's time outside its second stage: what overlapping the stages saves at most
OVERLAP_PAYS_FROM_S = 0.0005  # the same in seconds: it takes two more visits to threads, of some 50 microseconds each
PREFETCH_MARGIN = 2.0  # how many times the expected first stage before the end of the second stage before it

_CALLER_GONE = Failure(BatchingError("its caller was cancelled"))
"""The outcome of a request that nobody waits for any more."""


class BatchScheduler(Generic[T, R]):
    """Collects single requests into batches and runs them, on asyncio or trio.

    Use it as an async context manager, in the task that will also leave it. `run_batch` is a synchronous function, run
    in a thread of the scheduler's own, an asynchronous one, or three `Stages`: those of one batch overlap with those of
    the next, in a second thread, where the first and last are measured to take a real share of the time and requests
    wait. Leaving the context normally refuses new requests and runs everything accepted; leaving it by an exception
    (cancellation included) abandons what has not finished with `SchedulerClosedError`.

    Up to `max_in_flight` batches run at once (overlapping ones count as one). While `eager_in_flight` of them do, only
    full ones are added: for a `run_batch` that costs by the call and not by the item, as one over a network does.

    `item_size` gives a payload's size where `submit` is not told one; it is called in the event loop for each request
    and has to be quick. Where it fails or returns what is no size, a warning is logged once, and the nearest size
    counts (1, where there is none). Batches are formed by `cost_model`, by default a `MeasuredCostModel` that learns
    from every batch.

    A batch that runs longer than `batch_timeout_s` fails with `BatchTimeoutError`; a synchronous function cannot be
    stopped, so it goes on in its thread, unheard, while a new thread takes the next batch. A batch whose error
    `is_too_large` recognises is halved until its parts fit, and later batches stay below that size for a while.
    `on_batch` is called in the event loop with the record of each batch; an exception of its own is logged.

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
        eager_in_flight: int | None = None,
        batch_timeout_s: float | None = None,
        is_too_large: Callable[[Exception], bool] | None = None,
        on_batch: Callable[[BatchRecord], None] | None = None,
        name: str = "batch scheduler",
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, got {max_in_flight!r}")
        if eager_in_flight is not None and not 1 <= eager_in_flight <= max_in_flight:
            raise ValueError(f"eager_in_flight must be from 1 to {max_in_flight} or None, got {eager_in_flight!r}")
        if batch_timeout_s is not None and batch_timeout_s <= 0:
            raise ValueError(f"batch_timeout_s must be positive or None, got {batch_timeout_s!r}")
        self.policy = policy or BatchPolicy()
        self.cost_model = cost_model or MeasuredCostModel()
        self.name = name
        self._item_size = item_size
        self._is_too_large = is_too_large or _never
        self._on_batch = on_batch
        timeout_s = math.inf if batch_timeout_s is None else batch_timeout_s
        self._eager_in_flight = math.inf if eager_in_flight is None else eager_in_flight
        self._executors = [Executor(run_batch, timeout_s, f"{name} {i}") for i in range(max_in_flight)]
        # All mutable state: the planner with its queue, the requests that run, what is counted, what shares
        # of the time the stages take, and how idle workers wake.
        self._planner: BatchPlanner[Pending[T, R]] = BatchPlanner(self.policy, self.cost_model)
        self._running: dict[int, Batch[Pending[T, R]]] = {}  # by the id of the batch
        self._telemetry = Telemetry()
        self._shares = StageShares()
        self._sleepers: deque[anyio.Event] = deque()
        self._warned_of_sizes = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._now: Callable[[], float] = anyio.current_time
        self._opened_s = self._closed_s = math.nan
        self._open = False
        self._exit_stack: AsyncExitStack | None = None

    async def __aenter__(self) -> Self:
        if self._exit_stack is not None:
            raise RuntimeError("a BatchScheduler can be entered only once")
        self._exit_stack = AsyncExitStack()
        task_group = await self._exit_stack.enter_async_context(plain_task_group())
        for executor in self._executors:
            task_group.start_soon(self._serve, executor)
        token = current_token()
        self._loop = asyncio_loop(token)
        self._now = token.backend_class.current_time
        self._opened_s = self._now()
        self._open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._exit_stack is None:
            raise RuntimeError("a BatchScheduler cannot be left before it was entered")
        self._open = False
        while self._sleepers:
            self._wake_one()
        try:
            return await self._exit_stack.__aexit__(exc_type, exc, traceback)
        finally:
            self._abandon_unfinished()
            self._closed_s = self._now()

    async def submit(
        self,
        payload: T,
        *,
        size: int | None = None,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> R:
        """Run one payload in some batch and return its result, or raise its own error.

        Raises `QueueFullError`, `RequestTooLargeError`, `SchedulerClosedError` or `ValueError` (a `size` out of range)
        before anything is queued; `DeadlineExceededError` once `timeout_s` seconds have passed; `BatchTimeoutError`,
        `OutputCountError` or whatever `run_batch` raised for this payload. When cancelled, a request that still waits
        leaves the queue; one that runs already is finished, and its result dropped.
        """
        waiter = self._make_waiter(timeout_s)
        request = self._make_request(payload, size, priority, waiter)
        self._enqueue((request,))
        if timeout_s is None:
            try:
                await waiter.wait()
            except BaseException:
                self._withdraw((request,), _CALLER_GONE)
                raise
        else:
            await self._wait(waiter, (request,))
        outcome = request.outcome
        if isinstance(outcome, Success):
            return outcome.value
        try:
            if isinstance(outcome, Failure):
                raise outcome.error
            raise AssertionError("a request was left without an outcome: this is a bug in modalkit")
        finally:
            del request, outcome  # else the error's frames would hold the error, until the garbage collector comes

    async def submit_many(
        self,
        payloads: Iterable[T],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[R]]:
        """Run many payloads and return their outcomes in the same order: a `Success` or a `Failure` each.

        A payload that can never run (too large) is a `Failure` and disturbs no other. Raises `QueueFullError` or
        `SchedulerClosedError` before anything is queued: a list is accepted whole or not at all. Timeouts and
        cancellation are as for `submit`.
        """
        waiter = self._make_waiter(timeout_s)
        outcomes: list[Outcome[R] | Pending[T, R]] = []
        for payload in payloads:
            try:
                outcomes.append(self._make_request(payload, None, priority, waiter))
            except RequestTooLargeError as error:
                outcomes.append(Failure(error))
        requests = [entry for entry in outcomes if isinstance(entry, Pending)]
        self._enqueue(requests)
        if requests:
            waiter.unfinished = len(requests)
            await self._wait(waiter, requests)
        return [cast("Outcome[R]", entry.outcome) if isinstance(entry, Pending) else entry for entry in outcomes]

    def submit_nowait(
        self,
        payload: T,
        on_outcome: Callable[[Outcome[R]], None],
        *,
        size: int | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Callable[[], None]:
        """Queue one payload and return at once; `on_outcome` is called in the event loop with what becomes of it.

        For whoever keeps many requests in the air without a task for each. Returns a function that withdraws the
        request: then, or when it has ended already, `on_outcome` is not called any more. Raises what `submit` raises
        before anything is queued.
        """
        self._ensure_open()
        listener = Listener(on_outcome, self._now())
        request = listener.request = self._make_request(payload, size, priority, listener)
        self._enqueue((request,))
        return partial(self._withdraw_unheard, request, listener)

    async def run_in_thread(self, function: Callable[[], S], timeout_s: float | None = None) -> S:
        """Run a function of no batch in the thread that batches run in, between two of them: a warm-up, say.

        No batch is in any of its stages meanwhile, where `max_in_flight` is 1.

        Raises what it raises, `TimeoutError` once it has run for `timeout_s` seconds (it goes on unheard), and
        `SchedulerClosedError`.
        """
        self._ensure_open()
        return await self._executors[0].run_in_thread(function, timeout_s)

    def statistics(self) -> SchedulerStatistics:
        """An immutable snapshot of what is waiting, running and done."""
        return self._telemetry.snapshot(
            queued={priority: self._planner.queue.waiting(priority) for priority in Priority},
            running=sum(len(batch.requests) for batch in self._running.values()),
            open_s=self._open_s() * len(self._executors),
            stuck_threads=self.stuck_threads,
        )

    @property
    def stuck_threads(self) -> int:
        """Calls that ran past the batch timeout and have still not come back; each holds a thread."""
        return sum(executor.stuck_threads for executor in self._executors)

    def _open_s(self) -> float:
        if math.isnan(self._opened_s):
            return 0.0
        return (self._now() if math.isnan(self._closed_s) else self._closed_s) - self._opened_s

    # The caller's side.

    def _ensure_open(self) -> None:
        if not self._open:
            raise SchedulerClosedError("the scheduler is not open: use it inside its 'async with' block")

    def _make_waiter(self, timeout_s: float | None) -> Waiter:
        self._ensure_open()
        return Waiter(self._loop, self._now(), timeout_s)

    def _make_request(
        self, payload: T, size: int | None, priority: Priority, waiter: Waiter | Listener[R]
    ) -> Pending[T, R]:
        if size is None:
            size = 1 if self._item_size is None else self._measured_size(self._item_size, payload)
        elif not 1 <= size <= LARGEST_SIZE:
            raise ValueError(f"size must be from 1 to {LARGEST_SIZE}, got {size!r}")
        limit = self.policy.max_batch_tokens
        if limit is not None and size > limit:
            raise RequestTooLargeError(size, limit)
        return Pending(payload, size, priority, waiter)

    def _measured_size(self, item_size: Callable[[T], int], payload: T) -> int:
        try:
            size = math.ceil(item_size(payload))
        except Exception as error:  # noqa: BLE001  # user code may raise anything; an item without a size still runs
            self._warn_of_sizes(f"raised {type(error).__name__}: {error}; the item counts as 1")
            return 1
        if 1 <= size <= LARGEST_SIZE:
            return size
        clamped = min(max(1, size), LARGEST_SIZE)
        told = f"{size}" if size.bit_length() <= 64 else f"a number of {size.bit_length()} bits"
        self._warn_of_sizes(f"returned {told}; the item counts as {clamped}")
        return clamped

    def _warn_of_sizes(self, what: str) -> None:
        if not self._warned_of_sizes:
            logger.warning(
                "%s: item_size %s. Batches form badly like this; only this first case is logged", self.name, what
            )
            self._warned_of_sizes = True

    def _enqueue(self, requests: Sequence[Pending[T, R]]) -> None:
        try:
            self._planner.push_all(requests)
        except QueueFullError:
            self._telemetry.refused += len(requests)
            raise
        self._telemetry.accepted += len(requests)
        self._wake_one()

    async def _wait(self, waiter: Waiter, requests: Sequence[Pending[T, R]]) -> None:
        """Wait for all outcomes; at the deadline, or when cancelled, requests without one are withdrawn."""
        try:
            if waiter.timeout_s is None:
                await waiter.wait()
            else:
                with anyio.CancelScope(deadline=waiter.deadline_s):
                    await waiter.wait()
                self._withdraw(requests, Failure(DeadlineExceededError(waiter.timeout_s)))
        except BaseException:
            self._withdraw(requests, _CALLER_GONE)
            raise

    def _withdraw_unheard(self, request: Pending[T, R], listener: Listener[R]) -> None:
        listener.stop()
        self._withdraw((request,), _CALLER_GONE)

    def _withdraw(self, requests: Sequence[Pending[T, R]], outcome: Failure) -> None:
        for request in requests:
            if request.outcome is None:
                self._planner.queue.discard(request)
                self._fail(request, outcome)

    # The worker's side.

    async def _serve(self, executor: Executor[T, R]) -> None:
        """Run one batch after the other, until the scheduler is closed and nothing waits."""
        try:
            async with anyio.create_task_group() as overlapped:
                while (batch := await self._next_batch()) is not None:
                    if self._overlap_pays(executor):
                        await self._start(batch, executor, overlapped)
                    else:
                        await self._run(batch, executor)
                        if executor.is_async or len(self._planner.queue) < self.policy.max_batch_size:
                            await checkpoint()  # whoever got a result now may send the next request in time
        finally:
            executor.close()

    async def _next_batch(self) -> Batch[Pending[T, R]] | None:
        while True:
            decision = (
                Decision() if self._must_hold_back() else self._planner.decide(self._now(), draining=not self._open)
            )
            for request in decision.expired:
                self._fail(request, Failure(DeadlineExceededError(request.deadline_s - request.arrival_s)))
            if decision.batch is not None:
                if len(self._planner.queue):
                    self._wake_one()
                return decision.batch
            if not self._open:
                return None
            await self._sleep_until(decision.wake_s)

    def _must_hold_back(self) -> bool:
        """Whether enough batches run, and too few requests wait for a full one."""
        queue = self._planner.queue
        return (
            len(self._running) >= self._eager_in_flight
            and self._open
            and max(map(queue.waiting, Priority)) < self.policy.max_batch_size
        )

    async def _sleep_until(self, wake_s: float) -> None:
        """Sleep until then, or until woken. Idle workers sleep in a row, so that an arrival wakes one of many."""
        woken = anyio.Event()
        self._sleepers.append(woken)
        try:
            if math.isinf(wake_s):
                await woken.wait()
            else:
                with anyio.CancelScope(deadline=wake_s):
                    await woken.wait()
        finally:
            if not woken.is_set():
                self._sleepers.remove(woken)

    def _wake_one(self) -> None:
        if self._sleepers:
            self._sleepers.popleft().set()

    def _overlap_pays(self, executor: Executor[T, R]) -> bool:
        """Whether a batch should start its first stage in the second thread: a lone one is quicker in one visit."""
        return (
            executor.has_stages
            and self._shares.outside >= OVERLAP_PAYS_FROM
            and self._shares.outside_s >= OVERLAP_PAYS_FROM_S
            and (executor.is_busy or len(self._planner.queue) > 0)
        )

    async def _start(self, batch: Batch[Pending[T, R]], executor: Executor[T, R], task_group: TaskGroup) -> None:
        """Start a batch beside the one that runs, and return when the next one should be formed.

        That is once this one is in its second stage, and so late that the next one's first stage just fits in: until
        then requests may arrive that suit it better.
        """
        progress = Progress()
        task_group.start_soon(self._run, batch, executor, progress)
        await progress.predict_started.wait()
        in_hand_s = batch.predicted_s * (1 - self._shares.outside - PREFETCH_MARGIN * self._shares.preprocess)
        with anyio.move_on_after(in_hand_s):
            await progress.predict_ended.wait()

    async def _run(
        self, batch: Batch[Pending[T, R]], executor: Executor[T, R], progress: Progress | None = None
    ) -> None:
        self._running[id(batch)] = batch
        formed_s = self._now()
        seconds = None
        try:
            seconds, failed = await self._run_parts(batch, executor, progress)
        finally:
            if progress is not None:
                progress.end()
            total_s = self._now() - formed_s
            self._account_for(batch, total_s, seconds)
        del self._running[id(batch)]
        if progress is not None:
            self._wake_one()  # its worker may be holding back because of it
        self._report(batch, formed_s, total_s, seconds, failed, overlapped=progress is not None)

    def _account_for(self, batch: Batch[Pending[T, R]], total_s: float, seconds: StageSeconds | None) -> None:
        try:
            self._planner.batch_finished(
                batch, total_s if seconds is None else seconds.total_s, succeeded=seconds is not None
            )
        except Exception:
            logger.exception("%s: the cost model could not learn from a batch", self.name)

    async def _run_parts(
        self, batch: Batch[Pending[T, R]], executor: Executor[T, R], progress: Progress | None
    ) -> tuple[StageSeconds | None, int]:
        """Run a batch, in ever smaller parts where it fails.

        Returns the seconds of one that ran in one piece, and how many of its requests got an error.
        """
        bisection = Bisection(batch.requests)
        seconds, failed = None, 0
        for part in bisection:
            wanted = [request for request in part if request.outcome is None]
            if not wanted:
                continue
            payloads = [request.payload for request in wanted]
            # Only the batch itself is overlapped: parts of one that failed take their time.
            overlap, progress = progress, None
            outputs, part_seconds = await executor.attempt(payloads, overlap)
            if isinstance(outputs, BatchTimeoutError):
                # Not split: whatever hung would only hang again, for as long.
                failed += self._fail_all(wanted, outputs)
            elif isinstance(outputs, Exception):
                failed += self._fail_all(self._split(bisection, wanted, outputs), outputs)
            else:
                failed += self._succeed(wanted, outputs)
                if len(wanted) == len(batch.requests):
                    seconds = part_seconds
        for request, last_error in bisection.given_up():
            failed += self._fail_all([request], last_error)
        return seconds, failed

    def _split(
        self, bisection: Bisection[Pending[T, R]], part: list[Pending[T, R]], error: Exception
    ) -> list[Pending[T, R]]:
        if not self._says_too_large(error):
            return bisection.failed(part, error)
        self._planner.too_large([request.size for request in part])
        _clear_frames(error)
        return bisection.failed(part, error, blameless=True)

    def _says_too_large(self, error: Exception) -> bool:
        try:
            return self._is_too_large(error)
        except Exception:
            logger.exception("%s: is_too_large failed; the error counts as any other", self.name)
            return False

    def _succeed(self, requests: list[Pending[T, R]], outputs: Sequence[R | Exception]) -> int:
        """Hand out what a batch returned; returns how many of the outputs are errors."""
        now, failed, latencies_s = self._now(), 0, []
        for request, output in zip(requests, outputs, strict=True):
            if isinstance(output, Exception):
                failed += self._fail_all([request], output)
            elif request.outcome is None:
                request.outcome = Success(output)
                latencies_s.append(now - request.arrival_s)
                request.waiter.one_done()
        self._telemetry.requests_succeeded(latencies_s)
        return failed

    def _fail_all(self, requests: list[Pending[T, R]], error: Exception) -> int:
        """Fail requests; returns how many of them somebody still waits for."""
        waited_for = [request for request in requests if request.outcome is None]
        for request in waited_for:
            self._fail(request, Failure(error))
        return len(waited_for)

    def _fail(self, request: Pending[T, R], failure: Failure) -> None:
        if request.outcome is not None:
            return  # its caller has gone
        request.outcome = failure
        if failure is _CALLER_GONE:
            self._telemetry.cancelled += 1
        else:
            self._telemetry.request_failed(failure)
        request.waiter.one_done()

    def _report(
        self,
        batch: Batch[Pending[T, R]],
        formed_s: float,
        total_s: float,
        seconds: StageSeconds | None,
        failed: int,
        *,
        overlapped: bool,
    ) -> None:
        if seconds is not None:
            self._shares.add(seconds)
        stages = seconds or StageSeconds(0.0, 0.0, 0.0)
        arrivals_s = [request.arrival_s for request in batch.requests]
        record = BatchRecord(
            count=len(batch.requests),
            failed=failed,
            priority=batch.priority,
            reason=batch.reason,
            real_tokens=batch.total,
            padded_tokens=batch.padded_tokens,
            queue_s=formed_s - sum(arrivals_s) / len(arrivals_s),
            oldest_queue_s=formed_s - arrivals_s[0],
            preprocess_s=stages.preprocess_s,
            predict_s=stages.predict_s,
            postprocess_s=stages.postprocess_s,
            total_s=total_s,
            predicted_s=batch.predicted_s,
            overlapped=overlapped,
        )
        self._telemetry.batch_ran(record)
        if self._on_batch is not None:
            try:
                self._on_batch(record)
            except Exception:
                logger.exception("%s: on_batch failed; the batch itself was not affected", self.name)

    def _abandon_unfinished(self) -> None:
        queue = self._planner.queue
        unfinished = [request for batch in self._running.values() for request in batch.requests]
        for priority in Priority:
            while (request := queue.oldest(priority)) is not None:
                queue.discard(request)
                unfinished.append(request)
        self._running.clear()
        failure = Failure(SchedulerClosedError("the scheduler was aborted before this request finished"))
        for request in unfinished:
            self._fail(request, failure)


def _clear_frames(error: BaseException) -> None:
    """Empty the frames that an error and those behind it came through.

    They hold the tensors of the failed call: as long as they live, there is no room for a smaller batch either.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [one.__cause__, one.__context__]


def _never(_: Exception) -> bool:
    return False
