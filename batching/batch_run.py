"""Runs batches, finds the failing items of those that fail, and gives each request its outcome."""

import logging
import traceback
from asyncio import InvalidStateError
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

import anyio

from modalkit.batching.errors import (
    BatchingError,
    BatchTimeoutError,
    DeadlineExceededError,
    OutputCountError,
    users_error,
)
from modalkit.batching.execution import BatchDeferredError, BatchDisturbedError, Executor
from modalkit.batching.group_testing import FailureHistory, GroupTest
from modalkit.batching.pending import Pending
from modalkit.batching.planner import BatchPlanner
from modalkit.batching.policy import Batch
from modalkit.batching.request import Failure, Priority, Success
from modalkit.batching.stages import StageSeconds, StageShares
from modalkit.batching.statistics import BatchRecord, Telemetry

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")
P = ParamSpec("P")

MAX_PREPARE_S = 300.0
"""Seconds that the items of a failed batch wait for their device; then other devices may run them."""
MAX_SYSTEMIC_SEARCH_S = 60.0
"""Seconds that the failing items of a batch are searched for where nothing succeeds; then it is given up."""
CANCELLED = Failure(BatchingError("its caller was cancelled"))
"""The outcome of a request whose caller no longer waits."""


@dataclass(frozen=True, slots=True)
class BatchRun(Generic[T, R]):
    """A batch that runs."""

    batch: Batch[Pending[T, R]]
    wanted: list[Pending[T, R]]
    """Its requests whose callers still wait: only these run."""
    formed_s: float


class BatchRunner(Generic[T, R]):
    """Gives each request of a batch that has run its outcome, or requeues it, and records the batch.

    If `end` raises an exception, it is a bug or comes from a custom cost model. Then requests may have no outcome.
    """

    def __init__(
        self,
        planner: BatchPlanner[Pending[T, R]],
        *,
        is_too_large: Callable[[Exception], bool] | None,
        on_batch: Callable[[BatchRecord], None] | None,
        name: str,
    ) -> None:
        self.now: Callable[[], float] = anyio.current_time
        self.telemetry = Telemetry()
        self.shares = StageShares()
        self.running: dict[int, Batch[Pending[T, R]]] = {}
        """The batches that run now, by their `id()`."""
        self._planner = planner
        self._history = FailureHistory()
        self._is_too_large = is_too_large
        self._on_batch = on_batch
        self._name = name
        self._has_warned = False

    def begin(self, batch: Batch[Pending[T, R]]) -> BatchRun[T, R] | None:
        """Add a batch to `running`; returns None if nobody waits for it any more."""
        wanted = [request for request in batch.requests if request.outcome is None]
        if not wanted:
            self._planner.cancel_batch(batch, [])
            return None
        self.running[id(batch)] = batch
        return BatchRun(batch, wanted, self.now())

    def requeue(self, run: BatchRun[T, R]) -> None:
        """Let the requests of a batch that did not run wait again."""
        self.running.pop(id(run.batch), None)
        self._planner.cancel_batch(run.batch, [request for request in run.wanted if request.outcome is None])

    async def end(
        self,
        run: BatchRun[T, R],
        outputs: Sequence[R | Exception] | Exception,
        seconds: StageSeconds | None,
        executor: Executor[T, R],
        *,
        batches: int,
        overlapped: bool,
    ) -> None:
        """Use the outputs of a batch, or find its failing items. A batch that was deferred is requeued whole.

        `batches` ran in the same visit to the thread, this one included: each took its part of that time. When
        cancelled, it leaves the batch in `running`, and requests without an outcome.
        """
        if isinstance(outputs, BatchDeferredError):
            self.requeue(run)
            return
        batch, wanted, ran_s = run.batch, run.wanted, self.now()
        errors, requeued, is_typical = list[Exception](), 0, False
        try:
            if isinstance(outputs, Exception):
                errors, requeued = await self._find_failing(wanted, executor, outputs)
            else:
                errors, is_typical = self._succeed(wanted, outputs)
                self._history.record_success(len(wanted))
        finally:
            total_s = (ran_s - run.formed_s) / batches + self.now() - ran_s
            if len(wanted) < len(batch.requests):
                seconds = None
            elapsed_s, succeeded = (total_s, False) if seconds is None else (seconds.total_s, is_typical)
            failed = "the cost model could not learn from a batch"
            self._call(failed, self._planner.end_batch, batch, elapsed_s, succeeded=succeeded)
        self._planner.limit_count(self._history.count_limit(self._planner.policy.max_batch_size))
        self.running.pop(id(batch), None)  # it is already removed if the scheduler has broken meanwhile
        if seconds is not None and not executor.is_retired:
            self.shares.add(seconds)
        self._report(batch, run.formed_s, total_s, seconds, errors, requeued, overlapped=overlapped)

    def fail(self, request: Pending[T, R], failure: Failure) -> bool:
        """Give a request an error, if it has no outcome yet; returns whether it had none."""
        if request.outcome is not None:
            return False
        if failure is CANCELLED:
            self.telemetry.cancelled += 1
        elif isinstance(failure.error, DeadlineExceededError):
            self.telemetry.expired += 1
        else:
            self.telemetry.failed += 1
        request.finish(failure)
        return True

    # A batch that failed.

    async def _find_failing(
        self, wanted: list[Pending[T, R]], executor: Executor[T, R], error: Exception
    ) -> tuple[list[Exception], int]:
        """Run parts of a batch that failed; returns the errors of requests, and how many were requeued."""
        test, errors = GroupTest(wanted, self._history, self._is_wanted), list[Exception]()
        if isinstance(error, BatchDisturbedError):
            error = error.error
            test.record_disturbed(error)
        else:
            self._record_failure(test, error)
        if isinstance(error, OutputCountError) and len(wanted) > 1 and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: %s; such a batch runs again in parts, so nothing is gained by batches", self._name, error
            )
        late_s = self.now() + MAX_SYSTEMIC_SEARCH_S
        # All items of a batch wait for a device that was not ready: one of them may be the cause, and harm others too.
        while not executor.is_retired and (part := test.next_part(is_late=self.now() >= late_s)):
            outputs, seconds = await executor.attempt_alone([request.payload for request in part], MAX_PREPARE_S)
            if isinstance(outputs, BatchDeferredError):
                break
            if isinstance(outputs, Exception):
                self._record_failure(test, outputs)
            else:
                part_errors, is_typical = self._succeed(part, outputs)
                errors += part_errors
                test.record_success()
                if seconds is not None and is_typical:
                    sizes = [request.size for request in part]
                    failed = "the cost model could not learn from a part of a batch"
                    self._call(failed, self._planner.record_run, sizes, seconds.total_s, executor.device)
            self._record_too_large(test, executor)
        self._record_too_large(test, executor)
        for request, own_error in test.failing:
            if self.fail(request, Failure(own_error, is_systemic=test.is_systemic)):
                errors.append(own_error)
        for request in test.unresolved:
            if self.fail(request, Failure(error, is_systemic=True)):
                errors.append(error)
        requeued = [request for request in wanted if request.outcome is None]
        self._planner.queue.requeue(requeued)
        return errors, len(requeued)

    def _record_too_large(self, test: GroupTest[Pending[T, R]], executor: Executor[T, R]) -> None:
        """Let batches that are formed from now on be smaller than the parts that are known to have been too large."""
        for part in test.take_too_large():
            self._planner.record_too_large([request.size for request in part], executor.device)

    def _record_failure(self, test: GroupTest[Pending[T, R]], error: Exception) -> None:
        """Tell the search how a part failed."""
        if isinstance(error, BatchTimeoutError):
            test.record_timeout(error)
        elif self._is_too_large is not None and self._call(
            "is_too_large failed; the error is treated as any other error", self._is_too_large, error
        ):
            _clear_frames(error)
            test.record_too_large(error)
        else:
            test.record_failure(error)

    def _is_wanted(self, request: Pending[T, R]) -> bool:
        """Whether a request should still run. If its deadline has passed, it gets a `DeadlineExceededError`."""
        if request.outcome is None and request.deadline_s <= self.now():
            self.fail(request, Failure(DeadlineExceededError(request.deadline_s - request.arrival_s)))
        return request.outcome is None

    # Outcomes.

    def _succeed(self, requests: list[Pending[T, R]], outputs: Sequence[R | Exception]) -> tuple[list[Exception], bool]:
        """Give the requests their outputs; returns those that are errors, and whether the run was a typical one.

        In a typical run at most half of the outputs are errors, whether or not their callers still wait. Others, such
        as those of invalid items, may take next to no time, and say nothing about costs.
        """
        errors, succeeded, failed = list[Exception](), 0, 0
        for request, output in zip(requests, outputs, strict=True):
            if isinstance(output, Exception):
                failed += 1
                if self.fail(request, Failure(output)):
                    errors.append(output)
            elif request.outcome is None:
                request.outcome = outcome = Success(output)
                succeeded += 1
                try:  # noqa: SIM105  # as `Pending.finish`, without a call for each request
                    request.receiver.set_result(outcome)
                except InvalidStateError:
                    pass
        self.telemetry.succeeded += succeeded
        return errors, 2 * failed <= len(requests)

    # Calls of users' code, and records.

    def _call(self, failed: str, function: Callable[P, S], *args: P.args, **kwargs: P.kwargs) -> S | None:
        """Call a function that must not end a worker; if it raises, log what has `failed` and return None."""
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            logger.exception("%s: %s", self._name, failed, exc_info=users_error(error))
            return None

    def _report(
        self,
        batch: Batch[Pending[T, R]],
        formed_s: float,
        total_s: float,
        seconds: StageSeconds | None,
        errors: list[Exception],
        requeued: int,
        *,
        overlapped: bool,
    ) -> None:
        seconds = seconds or StageSeconds(0.0, 0.0, 0.0)
        self.telemetry.count_batch(batch, total_s, seconds.predict_s)
        if self._on_batch is None:
            return
        record = BatchRecord(
            count=len(batch.requests),
            failed=len(errors),
            errors=tuple(errors),
            requeued=requeued,
            priority=batch.priority,
            reason=batch.reason,
            real_tokens=batch.total,
            padded_tokens=batch.padded_tokens,
            waits_s=_waits_s(batch, formed_s),
            sizes=[request.size for request in batch.requests],
            tags=list(filter(None, {request.tag for request in batch.requests})),
            device=batch.device,
            formed_s=formed_s,
            total_s=total_s,
            predicted_s=batch.predicted_s,
            overlapped=overlapped,
            **seconds._asdict(),
        )
        self.telemetry.keep(record)
        self._call("on_batch failed; the batch itself was not affected", self._on_batch, record)


def _waits_s(batch: Batch[Pending[T, R]], formed_s: float) -> dict[Priority, list[float]]:
    """Seconds that the requests of a batch had waited, by lane."""
    if batch.requests[-1].priority is batch.priority:  # companions of the other lane come last
        return {batch.priority: [formed_s - request.arrival_s for request in batch.requests]}
    waits_s = defaultdict[Priority, list[float]](list)
    for request in batch.requests:
        waits_s[request.priority].append(formed_s - request.arrival_s)
    return waits_s


def _clear_frames(error: BaseException) -> None:
    """Clear the stack frames of an error and of its causes.

    They hold the tensors of the failed call. As long as these exist, a smaller batch may not fit either.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [one.__cause__, one.__context__]
