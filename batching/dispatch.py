"""The workers of a scheduler: each takes the next batch from the planner, runs it, and takes the next one."""

import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Generic, TypeVar

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from modalkit.batching.batch_run import BatchRunner
from modalkit.batching.errors import DeadlineExceededError, SchedulerClosedError, users_error
from modalkit.batching.execution import Executor, Progress
from modalkit.batching.executors import Executors
from modalkit.batching.pending import Pending
from modalkit.batching.planner import BatchPlanner
from modalkit.batching.policy import Batch, Decision
from modalkit.batching.request import Failure, Priority
from modalkit.batching.stages import StageShares
from modalkit.batching.wakeup import Sleepers

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

MIN_OVERLAP_SHARE = 0.1  # of a batch's time outside its second stage
MIN_OVERLAP_S = 0.0005  # that it saves: overlapping costs two more visits to threads, about 50 microseconds each
# Of the batches that share a visit to the thread. With more, the visit's share of an item is small already, and to form
# them would hold the event loop for long.
MAX_VISIT_BATCHES, MAX_VISIT_ITEMS = 8, 1024
MAX_VISIT_S = 0.0005  # that these may be expected to take: a visit costs up to 0.3 ms
PREFETCH_MARGIN = 2.0  # the next batch is formed this many expected first stages before the end of the second stage
MAX_FAULTS_IN_A_ROW = 3
BROKEN = "the scheduler is broken and runs nothing any more; the log says why; restart the process"


class Dispatcher(Generic[T, R]):
    """Runs one worker for each executor, from `start` until `close` and until the queue is empty.

    An exception in a worker that comes from no batch is a *fault*: a bug, or an error of a custom cost model. It fails
    the requests of that batch. After `MAX_FAULTS_IN_A_ROW` the dispatcher sets `broken` and stops.
    """

    def __init__(
        self,
        planner: BatchPlanner[Pending[T, R]],
        executors: Executors[T, R],
        runner: BatchRunner[T, R],
        *,
        max_partial_in_flight: int | None,
        name: str,
    ) -> None:
        self.executors = executors
        self.runner = runner
        self.sleepers = Sleepers()
        self.is_open = False
        self.broken = anyio.Event()
        self._planner = planner
        if max_partial_in_flight is not None and not 1 <= max_partial_in_flight <= executors.max_in_flight:
            limit = executors.max_in_flight
            raise ValueError(f"max_partial_in_flight must be from 1 to {limit} or None, got {max_partial_in_flight!r}")
        self._max_partial_in_flight = math.inf if max_partial_in_flight is None else max_partial_in_flight
        self._name = name
        self._faults_in_a_row = 0
        self._task_group: TaskGroup
        self._retired: list[Executor[T, R]] = []
        self._replacing = anyio.Lock()

    def start(self, task_group: TaskGroup, now: Callable[[], float]) -> None:
        """Start the workers; `now` is the event loop's clock."""
        self.runner.now = now
        self.is_open = True
        self._task_group = task_group
        for executor in self.executors:
            task_group.start_soon(self._serve, executor, ())

    @asynccontextmanager
    async def paused(self) -> AsyncGenerator[Executors[T, R]]:
        """Wait until no batch is in any stage, and let none start in the block; yields the executors."""
        async with self._replacing:
            for executor in self._retired:  # which may be of the same model
                await executor.has_ended.wait()
            async with self.executors.paused():
                yield self.executors

    @asynccontextmanager
    async def replacing(
        self, executors: Executors[T, R], warm_up: Sequence[Callable[[], object]], *, in_turn: bool
    ) -> AsyncGenerator[None]:
        """Let these executors run the next batches, from the end of the block on, which is entered once they are warm.

        With `in_turn`, those of a device begin once the ones before them have ended. If anything raises, their threads
        are ended, and those before them go on.
        """
        if executors.devices != self.executors.devices:
            raise ValueError(f"there must be {self.executors.devices} devices as before, got {executors.devices}")
        try:
            await executors.warm_up(warm_up)
            async with self._replacing:
                yield
                self._replace(executors, in_turn=in_turn)
        except BaseException:
            executors.end_threads()
            raise

    def _replace(self, executors: Executors[T, R], *, in_turn: bool) -> None:
        """Start these executors; those before them end with the batches that they run, and are closed once all have."""
        executors.take_over(self.executors)
        for executor in self.executors:
            executor.is_retired = True
        self._retired = [*self._retired, *self.executors]
        self._task_group.start_soon(self._close_retired, self._retired, self.executors)
        before = self.executors if in_turn else ()
        for executor in executors:
            predecessors = [each for each in before if each.device == executor.device]
            self._task_group.start_soon(self._serve, executor, predecessors)
        self.executors = executors
        self.runner.shares = StageShares()
        self.sleepers.wake_all()

    async def _close_retired(self, retired: Sequence[Executor[T, R]], last: Executors[T, R]) -> None:
        try:
            for executor in retired:
                await executor.has_ended.wait()
            self._retired = [executor for executor in self._retired if not executor.has_ended.is_set()]
        finally:  # also where the scheduler is aborted before
            await last.close()

    def close(self) -> None:
        """Let the workers end once the queue is empty."""
        self.is_open = False
        self.sleepers.wake_all()

    def fail_all(self, error: SchedulerClosedError) -> None:
        """Fail all requests that wait or run."""
        queue, running = self._planner.queue, self.runner.running
        unfinished = [request for batch in running.values() for request in batch.requests]
        for priority in Priority:
            while (request := queue.oldest(priority)) is not None:
                queue.discard(request)
                unfinished.append(request)
        running.clear()
        failure = Failure(error)
        for request in unfinished:
            self.runner.fail(request, failure)

    async def _serve(self, executor: Executor[T, R], predecessors: Sequence[Executor[T, R]]) -> None:
        """Run one batch after the other, until the scheduler is closed and nothing waits, or is broken.

        The first one begins when the predecessors have ended. An executor that is retired runs none after the present
        one.
        """
        try:
            for predecessor in predecessors:
                await predecessor.has_ended.wait()
            async with anyio.create_task_group() as overlapped:
                while (batch := await self._next_batch(executor)) is not None:
                    if self._should_overlap(executor):
                        await self._start_overlapped(batch, executor, overlapped)
                    else:
                        await self._run(self._for_one_visit(batch, executor), executor)
                        if executor.is_async or len(self._planner.queue) < self._planner.policy.max_batch_size:
                            await checkpoint()  # callers that got a result may send a request for the next batch
        finally:
            executor.has_ended.set()
            self.sleepers.wake_one()  # a retired executor may have requeued requests

    async def _next_batch(self, executor: Executor[T, R]) -> Batch[Pending[T, R]] | None:
        while not (self.broken.is_set() or executor.is_retired):
            if executor.must_prepare and (self.is_open or len(self._planner.queue)):
                self.sleepers.wake_one()  # what woke this worker should not wait for the device
                await executor.prepare()
                continue
            decision = self._decide(executor.device)
            if decision.batch is not None:
                if len(self._planner.queue):
                    self.sleepers.wake_one()
                return decision.batch
            # A batch that runs may requeue some of its requests, and after a fault others still wait.
            if not (self.is_open or self.runner.running or len(self._planner.queue)):
                return None
            await self.sleepers.sleep_until(decision.wake_s, (executor.is_busy, executor.rank))
        return None

    def _decide(self, device: int) -> Decision[Pending[T, R]]:
        if self._should_wait_for_full_batch(device):
            return Decision()
        try:
            decision = self._planner.decide(self.runner.now(), device=device, draining=not self.is_open)
        except BaseException as error:  # noqa: BLE001  # of a cost model, or of a bug: it must not end the worker's task
            fault = users_error(error)
            # One of these would have been the anchor. Without them the next decision may succeed.
            oldest = list(filter(None, map(self._planner.queue.oldest, Priority)))
            for request in oldest:
                self._planner.queue.discard(request)
            self._handle_fault(fault, oldest)
            return Decision(wake_s=-math.inf)
        for request in decision.expired:
            self.runner.fail(request, Failure(DeadlineExceededError(request.deadline_s - request.arrival_s)))
        return decision

    def _for_one_visit(self, batch: Batch[Pending[T, R]], executor: Executor[T, R]) -> list[Batch[Pending[T, R]]]:
        """The batch, and brief ones to run after it in the same visit to the thread, while full ones wait."""
        batches, total_s, items = [batch], self._expected_s(batch), len(batch.requests)
        limit = self._planner.policy.max_batch_size
        while (
            total_s < MAX_VISIT_S
            and len(batches) < MAX_VISIT_BATCHES
            and items + limit <= MAX_VISIT_ITEMS
            and len(self._planner.queue) >= limit
            and not executor.is_async
            and (another := self._decide(executor.device).batch) is not None
        ):
            batches.append(another)
            total_s += self._expected_s(another)
            items += len(another.requests)
        return batches

    def _expected_s(self, batch: Batch[Pending[T, R]]) -> float:
        """Seconds that a batch takes: the predicted ones, or those of recent batches if that is more."""
        return max(batch.predicted_s, self.runner.shares.total_s)

    def _should_wait_for_full_batch(self, device: int) -> bool:
        """Whether `max_partial_in_flight` batches run, and too few requests wait for a full batch."""
        queue = self._planner.queue
        return (
            len(self.runner.running) >= self._max_partial_in_flight
            and self.is_open
            and max(map(queue.waiting, Priority)) < self._planner.devices[device].former.count_limit
        )

    def _should_overlap(self, executor: Executor[T, R]) -> bool:
        """Whether the next batch should start its first stage in the second thread. A lone batch is faster in one."""
        shares = self.runner.shares
        return (
            executor.stages is not None
            and shares.outside >= MIN_OVERLAP_SHARE
            and shares.saved_s >= MIN_OVERLAP_S
            and (executor.is_busy or len(self._planner.queue) > 0)
        )

    async def _start_overlapped(
        self, batch: Batch[Pending[T, R]], executor: Executor[T, R], task_group: TaskGroup
    ) -> None:
        """Start a batch while another one runs, and return when the next one should be formed.

        That is when this batch is in its second stage, and just early enough for the first stage of the next one. Until
        then requests may arrive that suit the next batch better.
        """
        progress = Progress(partial(self._planner.should_preempt, batch))
        task_group.start_soon(self._run, [batch], executor, progress)
        await progress.predict_started.wait()
        shares = self.runner.shares
        wait_s = batch.predicted_s * (1 - shares.outside - PREFETCH_MARGIN * shares.preprocess)
        with anyio.move_on_after(wait_s):
            await progress.predict_ended.wait()

    async def _run(
        self, batches: list[Batch[Pending[T, R]]], executor: Executor[T, R], progress: Progress | None = None
    ) -> None:
        """Run batches one after the other; with a `progress`, one batch at the same time as others.

        Those after one that fails, or takes long, are requeued.
        """
        runs = [run for batch in batches if (run := self.runner.begin(batch))]
        if runs:
            results = await executor.attempt([[request.payload for request in run.wanted] for run in runs], progress)
            if left := runs[len(results) :]:
                for run in left:
                    self.runner.requeue(run)
                self.sleepers.wake_one()  # another worker may run them, while the items of a failed batch are searched
            count, overlapped = len(results), progress is not None
            for run, (outputs, seconds) in zip(runs, results, strict=False):
                try:
                    await self.runner.end(run, outputs, seconds, executor, batches=count, overlapped=overlapped)
                except BaseException as error:  # noqa: BLE001  # as in `_decide`
                    fault = users_error(error)
                    self.runner.running.pop(id(run.batch), None)
                    self._handle_fault(fault, run.batch.requests)
                else:
                    self._faults_in_a_row = 0
        if progress is not None:
            progress.end()
        if not self.is_open:
            self.sleepers.wake_all()  # to run requeued requests, or to end
        elif progress is not None:
            self.sleepers.wake_one()  # a worker may wait until fewer batches run

    def _handle_fault(self, error: Exception, requests: Iterable[Pending[T, R]]) -> None:
        """Log a fault and fail these requests; after too many faults in a row, stop for good."""
        self._faults_in_a_row += 1
        logger.error(
            "%s: a batch could not be formed or run, by a fault of the cost model or of modalkit; its requests fail",
            self._name,
            exc_info=error,
        )
        failure = Failure(error)
        for request in requests:
            if request not in self._planner.queue:
                self.runner.fail(request, failure)
        if self._faults_in_a_row >= MAX_FAULTS_IN_A_ROW:
            logger.error("%s: %d faults in a row; %s", self._name, self._faults_in_a_row, BROKEN)
            self.is_open = False
            self.broken.set()
            self.fail_all(SchedulerClosedError(BROKEN))
            self.sleepers.wake_all()
