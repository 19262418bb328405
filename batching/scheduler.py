"""The anyio shell around the planner: collects requests, runs batches, hands every caller its own outcome."""

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint, current_token

from modalkit.batching.batch_run import CALLER_GONE, BatchRunner
from modalkit.batching.cost import CostModel
from modalkit.batching.errors import (
    DeadlineExceededError,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
    text_of,
)
from modalkit.batching.execution import Executor, Progress
from modalkit.batching.measured_cost import MeasuredCostModel
from modalkit.batching.pending import ItemSizes, Listener, Pending, Waiter
from modalkit.batching.planner import BatchPlanner
from modalkit.batching.policy import Batch, BatchPolicy, Decision
from modalkit.batching.records import BatchRecord
from modalkit.batching.request import LARGEST_SIZE, Failure, Outcome, Priority, Success
from modalkit.batching.stages import RunBatch
from modalkit.batching.statistics import SchedulerStatistics
from modalkit.batching.task_groups import plain_task_group
from modalkit.batching.wakeup import Sleepers, asyncio_loop

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

OVERLAP_PAYS_FROM = 0.1  # of a batch's time outside its second stage: what overlapping the stages saves at most
OVERLAP_PAYS_FROM_S = 0.0005  # the same in seconds: it takes two more visits to threads, of some 50 microseconds each
PREFETCH_MARGIN = 2.0  # how many times the expected first stage before the end of the second stage before it
BREAKDOWNS_UNTIL_BROKEN = 3
BROKEN = "the scheduler is broken and runs nothing any more; the log says why; restart the process"

_BREAKDOWNS = (Exception, SystemExit)
"""What must not end a worker's task, wherever it comes from: a custom cost model, say, or a bug."""


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

    A batch that fails is searched for the guilty items, which fail alone; the rest waits for a later batch, and while
    failures are frequent, batches are small. Where nothing succeeds any more, batches are given up after a few runs,
    with a `Failure` that `is_systemic`. A batch that runs longer than `batch_timeout_s` is run again item by item, and
    one that is too long alone fails with `BatchTimeoutError`; a synchronous function cannot be stopped, so it goes on
    in its thread, unheard, while a new thread takes the next batch. A batch whose error `is_too_large` recognises is
    halved until its parts fit, and later batches stay below that size for a while. `on_batch` is called in the event
    loop with the record of each batch; an exception of its own is logged.

    Every accepted request gets exactly one outcome: a result, an error of its own, or the cancellation of its caller.
    An exception of `cost_model`, or of the scheduler itself, is logged and fails the requests in hand; after three in a
    row, with no batch in between that ran, the scheduler `is_broken`: whatever waits and comes gets
    `SchedulerClosedError`.
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
        self._sizes = None if item_size is None else ItemSizes(item_size, name)
        timeout_s = math.inf if batch_timeout_s is None else batch_timeout_s
        self._eager_in_flight = math.inf if eager_in_flight is None else eager_in_flight
        self._executors = [Executor(run_batch, timeout_s, f"{name} {i}") for i in range(max_in_flight)]
        # All mutable state: the planner with its queue, the runner with what runs and what is counted, how idle
        # workers wake, and how often in a row their tasks went wrong.
        self._planner: BatchPlanner[Pending[T, R]] = BatchPlanner(self.policy, self.cost_model)
        self._runner: BatchRunner[T, R] = BatchRunner(
            self._planner, is_too_large=is_too_large or _never, on_batch=on_batch, name=name
        )
        self._sleepers = Sleepers()
        self._breakdowns = 0
        self._broken = anyio.Event()
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
        self._now = self._runner.now = token.backend_class.current_time
        self._opened_s = self._now()
        self._open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._exit_stack is None:
            raise RuntimeError("a BatchScheduler cannot be left before it was entered")
        self._open = False
        self._sleepers.wake_all()
        try:
            return await self._exit_stack.__aexit__(exc_type, exc, traceback)
        finally:
            self._answer_all(SchedulerClosedError("the scheduler was aborted before this request finished"))
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
                self._withdraw((request,), CALLER_GONE)
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
        refused: dict[int, Failure] = {}
        requests = list[Pending[T, R]]()
        if self._sizes is None:
            requests = [Pending(payload, 1, priority, waiter) for payload in payloads]
        else:
            for number, payload in enumerate(payloads):
                try:
                    requests.append(self._make_request(payload, None, priority, waiter))
                except RequestTooLargeError as error:
                    refused[number] = Failure(error)
        self._enqueue(requests)
        if requests:
            waiter.unfinished = len(requests)
            await self._wait(waiter, requests)
        outcomes = cast("list[Outcome[R]]", [request.outcome for request in requests])
        if not refused:
            return outcomes
        others = iter(outcomes)
        return [refused.get(number) or next(others) for number in range(len(requests) + len(refused))]

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
        return self._runner.telemetry.snapshot(
            queued={priority: self._planner.queue.waiting(priority) for priority in Priority},
            running=sum(len(batch.requests) for batch in self._runner.running.values()),
            open_s=self._open_s() * len(self._executors),
            stuck_threads=self.stuck_threads,
        )

    @property
    def stuck_threads(self) -> int:
        """Calls that ran past the batch timeout and have still not come back; each holds a thread."""
        return sum(executor.stuck_threads for executor in self._executors)

    @property
    def is_broken(self) -> bool:
        """Whether the scheduler has given up because its own tasks went wrong again and again; it stays so."""
        return self._broken.is_set()

    async def wait_until_broken(self) -> None:
        """Wait until the scheduler `is_broken`, if it ever is."""
        await self._broken.wait()

    def _open_s(self) -> float:
        if math.isnan(self._opened_s):
            return 0.0
        return (self._now() if math.isnan(self._closed_s) else self._closed_s) - self._opened_s

    # The caller's side.

    def _ensure_open(self) -> None:
        if not self._open:
            raise SchedulerClosedError(
                BROKEN if self.is_broken else "the scheduler is not open: use it inside its 'async with' block"
            )

    def _make_waiter(self, timeout_s: float | None) -> Waiter:
        self._ensure_open()
        return Waiter(self._loop, self._now(), timeout_s)

    def _make_request(
        self, payload: T, size: int | None, priority: Priority, waiter: Waiter | Listener[R]
    ) -> Pending[T, R]:
        if size is None:
            size = 1 if self._sizes is None else self._sizes.of(payload)
        elif not 1 <= size <= LARGEST_SIZE:
            raise ValueError(f"size must be from 1 to {LARGEST_SIZE}, got {size!r}")
        limit = self.policy.max_batch_tokens
        if limit is not None and size > limit:
            raise RequestTooLargeError(size, limit)
        return Pending(payload, size, priority, waiter)

    def _enqueue(self, requests: Sequence[Pending[T, R]]) -> None:
        try:
            self._planner.push_all(requests)
        except QueueFullError:
            self._runner.telemetry.refused += len(requests)
            raise
        self._runner.telemetry.accepted += len(requests)
        self._sleepers.wake_one()

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
            self._withdraw(requests, CALLER_GONE)
            raise

    def _withdraw_unheard(self, request: Pending[T, R], listener: Listener[R]) -> None:
        listener.stop()
        self._withdraw((request,), CALLER_GONE)

    def _withdraw(self, requests: Sequence[Pending[T, R]], outcome: Failure) -> None:
        for request in requests:
            if request.outcome is None:
                self._planner.queue.discard(request)
                self._runner.fail(request, outcome)

    # The worker's side.

    async def _serve(self, executor: Executor[T, R]) -> None:
        """Run one batch after the other, until the scheduler is closed and nothing waits, or it is broken."""
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
        while not self.is_broken:
            decision = self._decide()
            for request in decision.expired:
                self._runner.fail(request, Failure(DeadlineExceededError(request.deadline_s - request.arrival_s)))
            if decision.batch is not None:
                if len(self._planner.queue):
                    self._sleepers.wake_one()
                return decision.batch
            if not self._open and not self._runner.running:  # a batch that runs may yet put requests back
                return None
            await self._sleepers.sleep_until(decision.wake_s)
        return None

    def _decide(self) -> Decision[Pending[T, R]]:
        if self._must_hold_back():
            return Decision()
        try:
            return self._planner.decide(self._now(), draining=not self._open)
        except _BREAKDOWNS as error:
            # The batch would have been formed around one of these: without them the next one may work.
            oldest = list(filter(None, map(self._planner.queue.oldest, Priority)))
            for request in oldest:
                self._planner.queue.discard(request)
            self._break_down(error, oldest)
            return Decision(wake_s=-math.inf)

    def _must_hold_back(self) -> bool:
        """Whether enough batches run, and too few requests wait for a full one."""
        queue = self._planner.queue
        return (
            len(self._runner.running) >= self._eager_in_flight
            and self._open
            and max(map(queue.waiting, Priority)) < self._planner.largest_count
        )

    def _overlap_pays(self, executor: Executor[T, R]) -> bool:
        """Whether a batch should start its first stage in the second thread: a lone one is quicker in one visit."""
        shares = self._runner.shares
        return (
            executor.has_stages
            and shares.outside >= OVERLAP_PAYS_FROM
            and shares.outside_s >= OVERLAP_PAYS_FROM_S
            and (executor.is_busy or len(self._planner.queue) > 0)
        )

    async def _start(self, batch: Batch[Pending[T, R]], executor: Executor[T, R], task_group: TaskGroup) -> None:
        """Start a batch beside the one that runs, and return when the next one should be formed.

        That is once this one is in its second stage, and so late that the next one's first stage just fits in: until
        then requests may arrive that suit it better.
        """
        progress = Progress(partial(self._planner.prefers_interactive_to, batch))
        task_group.start_soon(self._run, batch, executor, progress)
        await progress.predict_started.wait()
        shares = self._runner.shares
        in_hand_s = batch.predicted_s * (1 - shares.outside - PREFETCH_MARGIN * shares.preprocess)
        with anyio.move_on_after(in_hand_s):
            await progress.predict_ended.wait()

    async def _run(
        self, batch: Batch[Pending[T, R]], executor: Executor[T, R], progress: Progress | None = None
    ) -> None:
        try:
            await self._runner.run(batch, executor, progress)
        except _BREAKDOWNS as error:
            self._runner.running.pop(id(batch), None)
            self._break_down(error, batch.requests)
        else:
            self._breakdowns = 0
        if not self._open:
            self._sleepers.wake_all()  # to run what was put back, or to end
        elif progress is not None:
            self._sleepers.wake_one()  # its worker may be holding back because of it

    # When things go wrong.

    def _break_down(self, error: BaseException, requests: Iterable[Pending[T, R]]) -> None:
        """Go on after something went wrong in a worker's task, with these requests in hand."""
        self._breakdowns += 1
        logger.error(
            "%s: a batch could not be formed or run, by a fault of the cost model or of modalkit; its requests fail",
            self.name,
            exc_info=error,
        )
        failure = Failure(error if isinstance(error, Exception) else RuntimeError(text_of(error)))
        for request in requests:
            if request not in self._planner.queue:
                self._runner.fail(request, failure)
        if self._breakdowns >= BREAKDOWNS_UNTIL_BROKEN:
            logger.error("%s: that was so %d times in a row; %s", self.name, self._breakdowns, BROKEN)
            self._open = False
            self._broken.set()
            self._answer_all(SchedulerClosedError(BROKEN))
            self._sleepers.wake_all()

    def _answer_all(self, error: SchedulerClosedError) -> None:
        queue, running = self._planner.queue, self._runner.running
        unfinished = [request for batch in running.values() for request in batch.requests]
        for priority in Priority:
            while (request := queue.oldest(priority)) is not None:
                queue.discard(request)
                unfinished.append(request)
        running.clear()
        failure = Failure(error)
        for request in unfinished:
            self._runner.fail(request, failure)


def _never(_: Exception) -> bool:
    return False
