"""Collects single requests into batches and gives each caller its own outcome; the anyio shell around the planner."""

import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Generic, Self, TypeVar, Unpack, cast

import anyio
from anyio import AsyncContextManagerMixin
from anyio.lowlevel import current_token

from modalkit.batching.batch_run import CANCELLED, BatchRunner
from modalkit.batching.cost import CostModel
from modalkit.batching.dispatch import BROKEN, Dispatcher
from modalkit.batching.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
    raise_anew,
)
from modalkit.batching.executors import Executors, RunOptions
from modalkit.batching.measured_cost import MeasuredCostModel
from modalkit.batching.pending import Group, ItemSizes, Listener, Pending, Withdraw
from modalkit.batching.planner import BatchPlanner
from modalkit.batching.policy import BatchPolicy
from modalkit.batching.request import LARGEST_SIZE, Failure, Outcome, Priority, Success
from modalkit.batching.stages import RunBatch
from modalkit.batching.statistics import BatchRecord, SchedulerStatistics
from modalkit.batching.task_groups import plain_task_group
from modalkit.batching.wakeup import Future, asyncio_loop, make_future

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")


class BatchScheduler(AsyncContextManagerMixin, Generic[T, R]):
    """Collects single requests into batches and runs them, on asyncio or trio.

    Use it as an async context manager, and enter and leave it in the same task. When the block ends normally, new
    requests are refused, and all accepted ones run. When it ends by an exception or by cancellation, requests that have
    not finished fail with `SchedulerClosedError`.

    `run_batch` is a synchronous function, which runs in a thread of the scheduler; or an asynchronous function; or
    three `Stages` of either kind, which overlap with those of the next batch, in a second thread, where that pays.
    A list of these is for as many devices, which take batches from one queue; `cost_model` is then a list, too.

    `options` (see `RunOptions`) say how many batches run at once, how long each may take, how a device gets ready for
    them, and what is called after the last one. While `max_partial_in_flight` batches run, only full ones are added:
    for a `run_batch` that costs by the call and not by the item, such as a remote call.

    `item_size` gives the size of a payload for which `submit` gets no size. It runs in the event loop for each request,
    so it has to be fast. If it fails or returns an invalid size, the nearest valid size counts (1 after a failure), and
    one warning is logged. Batches are formed by `cost_model`, by default a `MeasuredCostModel`.

    If a batch fails, its failing items are searched for and fail alone; the other items run again in later batches.
    Where nothing succeeds any more, the `Failure` of each item `is_systemic`. Once 64 items in a row have failed alone,
    batches are given up after three runs; before, after a minute in which eight have. A batch whose error
    `is_too_large` accepts is halved until its parts fit, and later batches stay below that size for a while.
    `on_batch` gets the record of each batch, in the event loop; an exception that it raises is logged.

    Each accepted request gets exactly one outcome: a result, its own error, or cancellation. An exception of
    `cost_model` or of the scheduler itself is logged and fails the requests of that batch. After three in a row the
    scheduler `is_broken`: all its requests then fail with `SchedulerClosedError`.
    """

    def __init__(
        self,
        run_batch: RunBatch[T, R] | Sequence[RunBatch[T, R]],
        *,
        policy: BatchPolicy | None = None,
        cost_model: CostModel | Sequence[CostModel] | None = None,
        item_size: Callable[[T], int] | None = None,
        max_partial_in_flight: int | None = None,
        is_too_large: Callable[[Exception], bool] | None = None,
        on_batch: Callable[[BatchRecord], None] | None = None,
        name: str = "batch scheduler",
        **options: Unpack[RunOptions],
    ) -> None:
        self.policy = policy or BatchPolicy()
        executors = Executors(run_batch, name, **options)
        devices, workers = executors.devices, executors.max_in_flight
        if cost_model is None:
            cost_model = [MeasuredCostModel() for _ in range(devices)]
        cost_models = cost_model if isinstance(cost_model, Sequence) else [cost_model]
        if not cost_models or devices != len(cost_models):
            raise ValueError(f"cost_model must be one for each of the {devices} devices, got {len(cost_models)}")
        self.name = name
        self._sizes = None if item_size is None else ItemSizes(item_size, name)
        # All mutable state: the planner with its queue; the dispatcher with its workers and the counters; the clock.
        self._planner: BatchPlanner[Pending[T, R]] = BatchPlanner(self.policy, *cost_models, workers=workers)
        runner = BatchRunner(self._planner, is_too_large=is_too_large, on_batch=on_batch, name=name)
        self._dispatcher = Dispatcher(
            self._planner, executors, runner, max_partial_in_flight=max_partial_in_flight, name=name
        )
        self._telemetry = runner.telemetry
        self._now: Callable[[], float] = anyio.current_time
        self._opened_s = self._closed_s = math.nan

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        if not math.isnan(self._opened_s):
            raise RuntimeError("a BatchScheduler can be entered only once")
        token = current_token()
        self._loop = asyncio_loop(token)
        self._now = token.backend_class.current_time if self._loop is None else self._loop.time  # a quarter of the time
        self._opened_s = self._now()
        try:
            async with plain_task_group() as task_group:
                self._dispatcher.start(task_group, self._now)
                try:
                    yield self
                finally:
                    self._dispatcher.close()
        finally:
            self._dispatcher.fail_all(SchedulerClosedError("the scheduler was aborted before this request finished"))
            self._closed_s = self._now()
            await self._dispatcher.executors.close()

    async def submit(
        self,
        payload: T,
        *,
        size: int | None = None,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
        owner: str = "",
        tag: str | None = None,
    ) -> R:
        """Run one payload in a batch and return its result, or raise its own error.

        While requests of several owners wait in a lane, each owner gets an equal share of it, by the sizes of requests.
        The record of its batch has its `tag`, as for all ways to submit.

        Raises `QueueFullError`, `RequestTooLargeError`, `SchedulerClosedError` or `ValueError` (a `size` out of range)
        before anything is queued; `DeadlineExceededError` after `timeout_s` seconds; and `BatchTimeoutError`,
        `OutputCountError` or what `run_batch` raised for this payload. When cancelled, a request that waits leaves the
        queue; one that runs is finished, and its result dropped.
        """
        arrival_s, deadline_s = self._times(timeout_s)
        future: Future[Outcome[R]] = make_future(self._loop)
        size = self._size_of(payload, size)
        request = Pending(payload, size, priority, arrival_s, deadline_s, owner, tag, future)
        self._enqueue((request,))
        if timeout_s is None:
            try:
                await future
            except BaseException:
                self._withdraw((request,), CANCELLED)
                raise
        else:
            await self._wait(future, (request,), timeout_s)
        outcome = request.outcome
        if isinstance(outcome, Success):
            return outcome.value
        try:
            if isinstance(outcome, Failure):
                raise_anew(outcome.error)
            raise AssertionError("a request was left without an outcome: this is a bug in modalkit")
        finally:
            del request, outcome, future  # else the error and its frames refer to each other until garbage collection

    async def submit_many(
        self,
        payloads: Iterable[T],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
        owner: str = "",
        tag: str | None = None,
    ) -> list[Outcome[R]]:
        """Run many payloads and return their outcomes in the same order: a `Success` or a `Failure` for each.

        A payload that is too large for any batch gets a `Failure` and does not affect the others. Raises
        `QueueFullError` or `SchedulerClosedError` before anything is queued: all payloads are accepted, or none.
        `timeout_s` and cancellation are as for `submit`.
        """
        arrival_s, deadline_s = self._times(timeout_s)
        group = Group(make_future(self._loop))
        refused: dict[int, Failure] = {}
        requests = list[Pending[T, R]]()
        if self._sizes is None:
            requests = [Pending(payload, 1, priority, arrival_s, deadline_s, owner, tag, group) for payload in payloads]
        else:
            for number, payload in enumerate(payloads):
                try:
                    size = self._size_of(payload)
                except RequestTooLargeError as error:
                    refused[number] = Failure(error)
                else:
                    requests.append(Pending(payload, size, priority, arrival_s, deadline_s, owner, tag, group))
        self._enqueue(requests)
        if requests:
            group.unfinished = len(requests)
            await self._wait(group.finished, requests, timeout_s)
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
        owner: str = "",
        tag: str | None = None,
    ) -> Withdraw:
        """Queue one payload and return at once; `on_outcome` is called in the event loop with its outcome.

        It serves callers that have many requests at a time and no task for each. It returns a function that withdraws
        the request; after that, `on_outcome` is not called. Raises what `submit` raises before anything is queued.
        """
        arrival_s, deadline_s = self._times(None)
        size = self._size_of(payload, size)
        listener = Listener(on_outcome)
        request = Pending(payload, size, priority, arrival_s, deadline_s, owner, tag, listener)
        self._enqueue((request,))
        return partial(self._withdraw_from, listener, request)

    def submit_many_nowait(
        self,
        payloads: Iterable[T],
        on_outcome: Callable[[int, Outcome[R]], None],
        *,
        priority: Priority = Priority.INTERACTIVE,
        owner: str = "",
        tag: str | None = None,
    ) -> list[Callable[[], object] | Failure]:
        """Queue payloads, all or none, as `submit_nowait` does with one; `on_outcome` gets the place of each, from 0.

        Returns, in their order, what withdraws each, or the `Failure` of one that is too large for any batch. They may
        fill three quarters of the queue, because their caller can wait for room and others cannot; beyond that,
        `QueueFullError` is raised.
        """
        arrival_s, deadline_s = self._times(None)
        requests = list[Pending[T, R]]()
        handles = list[Callable[[], object] | Failure]()
        for place, payload in enumerate(payloads):
            try:
                size = self._size_of(payload)
            except RequestTooLargeError as error:
                handles.append(Failure(error))
            else:
                listener = Listener(partial(on_outcome, place))
                request = Pending(payload, size, priority, arrival_s, deadline_s, owner, tag, listener)
                requests.append(request)
                handles.append(partial(self._withdraw_from, listener, request))
        depth, limit = len(self._planner.queue), max(1, self.policy.max_queue_items * 3 // 4)
        if depth + len(requests) > limit:
            raise QueueFullError(depth, limit, len(requests))
        self._enqueue(requests)
        return handles

    async def replace(
        self,
        run_batch: RunBatch[T, R] | Sequence[RunBatch[T, R]],
        *,
        policy: BatchPolicy,
        item_size: Callable[[T], int] | None = None,
        warm_up: Sequence[Callable[[], object]] = (),
        in_turn: bool = False,
        **options: Unpack[RunOptions],
    ) -> None:
        """Run the next batches by other functions, within other limits. The arguments are those of the constructor.

        Requests that wait are kept, with their sizes, and batches that run end by the function that they began with,
        except that one whose failing items are searched for is requeued. With `in_turn`, the next batch of a device
        waits for those: both are of one model. `warm_up`, one for each device, is called before, in a thread of the
        device, while batches go on; it may return an awaitable. What it raises is raised, and changes nothing. With an
        `on_close`, the one before is called once the old batches have ended, and calls of the old functions that hang
        are `stuck_threads` no more. Also raises `SchedulerClosedError`, and `ValueError` for another number of devices.
        """
        executors = Executors(run_batch, self.name, **options)
        async with self._dispatcher.replacing(executors, warm_up, in_turn=in_turn):
            self._ensure_open()
            self.policy = policy
            self._planner.set_policy(policy, executors.max_in_flight)
            self._sizes = None if item_size is None else ItemSizes(item_size, self.name)

    def check_room(
        self, *, priority: Priority = Priority.INTERACTIVE, timeout_s: float | None = None, owner: str = ""
    ) -> None:
        """Raise what a request should be refused with now; for frontends, before they read and parse a request.

        That is `SchedulerClosedError`; `QueueFullError`, as `submit` does, and where the requests before it in the
        queue are predicted to take `max_queue_s` of the policy; `DeadlineUnreachableError` where these are predicted
        to take `timeout_s` or more. What it refuses is counted as refused.
        """
        self._ensure_open()
        try:
            self._planner.check_room(priority, timeout_s, owner)
        except (QueueFullError, DeadlineUnreachableError):
            self._telemetry.refused += 1
            raise

    async def run_in_thread(self, function: Callable[[], S], timeout_s: float | None = None, *, device: int = 0) -> S:
        """Run a function, such as a warm-up, in a thread that runs batches of `device`, while no batch is in any stage.

        Raises what the function raises, `SchedulerClosedError`, and `TimeoutError` after `timeout_s` seconds; then the
        function goes on in its thread, and its result is dropped.
        """
        self._ensure_open()
        async with self._dispatcher.paused() as executors:
            return await executors.first_of(device).run_while_paused(function, timeout_s)

    async def run_as_one_batch(self, payloads: Sequence[T]) -> Sequence[R | Exception]:
        """Run payloads as one batch, while no other batch is in any stage; returns the output or error of each.

        Raises what the batch raises: it is not split. Also raises `BatchTimeoutError`, `InputsMovedError`,
        `OutputCountError` and `SchedulerClosedError`.
        """
        self._ensure_open()
        async with self._dispatcher.paused() as executors:
            return await executors.first_of(0).run_batch_while_paused(list(payloads))

    def statistics(self) -> SchedulerStatistics:
        """An immutable snapshot of the requests and batches that wait, run and have ended."""
        queue = self._planner.queue
        arrivals_s = {lane: [request.arrival_s for request in queue.firsts(lane)] for lane in Priority}
        return self._telemetry.snapshot(
            queued={priority: queue.waiting(priority) for priority in Priority},
            work_s={priority: queue.seconds(priority) for priority in Priority},
            oldest_s={lane: self._now() - min(times_s) if times_s else 0.0 for lane, times_s in arrivals_s.items()},
            running=sum(len(batch.requests) for batch in self._dispatcher.runner.running.values()),
            open_s=self._open_s() * len(self._dispatcher.executors),
            stuck_threads=self.stuck_threads,
        )

    @property
    def demand(self) -> int:
        """The batches that run plus the requests that wait: no fewer than the batches that will run at once.

        May be read in any thread.
        """
        return len(self._dispatcher.runner.running) + len(self._planner.queue)

    @property
    def stuck_threads(self) -> int:
        """Calls that ran past the batch timeout and have not returned; each holds a thread."""
        return self._dispatcher.executors.stuck_threads

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted: inside the `async with` block, unless the scheduler is broken."""
        return self._dispatcher.is_open

    @property
    def is_broken(self) -> bool:
        """Whether the scheduler has stopped for good, because its own code failed three times in a row."""
        return self._dispatcher.broken.is_set()

    async def wait_until_broken(self) -> None:
        """Wait until the scheduler `is_broken`, which may never happen."""
        await self._dispatcher.broken.wait()

    def _open_s(self) -> float:
        if math.isnan(self._opened_s):
            return 0.0
        return (self._now() if math.isnan(self._closed_s) else self._closed_s) - self._opened_s

    def _ensure_open(self) -> None:
        if not self._dispatcher.is_open:
            raise SchedulerClosedError(
                BROKEN if self.is_broken else "the scheduler is not open: use it inside its 'async with' block"
            )

    def _times(self, timeout_s: float | None) -> tuple[float, float]:
        """When a request arrives and when its deadline is, on the event loop's clock."""
        if not self._dispatcher.is_open:
            self._ensure_open()
        arrival_s = self._now()
        return arrival_s, math.inf if timeout_s is None else arrival_s + timeout_s

    def _size_of(self, payload: T, size: int | None = None) -> int:
        """The size of a payload, if it is not given; raises `RequestTooLargeError` or `ValueError`."""
        if size is None:
            if self._sizes is None:
                return 1
            size = self._sizes.of(payload)
        elif not 1 <= size <= LARGEST_SIZE:
            raise ValueError(f"size must be from 1 to {LARGEST_SIZE}, got {size!r}")
        limit = self.policy.max_batch_tokens
        if limit is not None and size > limit:
            raise RequestTooLargeError(size, limit)
        return size

    def _enqueue(self, requests: Sequence[Pending[T, R]]) -> None:
        try:
            self._planner.push_all(requests)
        except QueueFullError as error:
            self._telemetry.refused += len(requests)
            self._planner.add_retry(error)
            raise
        self._telemetry.accepted += len(requests)
        self._dispatcher.sleepers.wake_one()

    async def _wait(self, future: Future[Any], requests: Sequence[Pending[T, R]], timeout_s: float | None) -> None:
        """Wait for all outcomes. At the deadline, or when cancelled, withdraw the requests that have no outcome."""
        try:
            with anyio.CancelScope(deadline=requests[0].deadline_s) as scope:
                await future
            if scope.cancelled_caught and timeout_s is not None:
                self._withdraw(requests, Failure(DeadlineExceededError(timeout_s)))
        except BaseException:
            self._withdraw(requests, CANCELLED)
            raise

    def _withdraw_from(self, listener: Listener[R], request: Pending[T, R], *, only_waiting: bool = False) -> bool:
        if only_waiting and request not in self._planner.queue:
            return False
        listener.stop()
        self._withdraw((request,), CANCELLED)
        return True

    def _withdraw(self, requests: Sequence[Pending[T, R]], outcome: Failure) -> None:
        for request in requests:
            if request.outcome is None:
                self._planner.queue.discard(request)
                self._dispatcher.runner.fail(request, outcome)
