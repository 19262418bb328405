"""Runs batches, finds the guilty items of those that fail, and gives every request its own outcome."""

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import anyio

from modalkit.batching.errors import BatchingError, BatchTimeoutError, DeadlineExceededError
from modalkit.batching.execution import BatchYieldedError, Executor, Progress
from modalkit.batching.group_testing import FailureHistory, GroupTest
from modalkit.batching.pending import Pending
from modalkit.batching.planner import BatchPlanner
from modalkit.batching.policy import Batch
from modalkit.batching.records import BatchRecord
from modalkit.batching.request import Failure, Success
from modalkit.batching.stages import StageSeconds, StageShares
from modalkit.batching.statistics import Telemetry

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

CALLER_GONE = Failure(BatchingError("its caller was cancelled"))
"""The outcome of a request that nobody waits for any more."""


class BatchRunner(Generic[T, R]):
    """Takes batches from the planner's decision to an outcome for each request, and records each batch.

    A request of a failed batch that was not told apart from the guilty ones goes back to the planner's queue. An
    exception that comes out of `run` is a bug, or one in a custom cost model: then requests may be without an outcome.
    """

    def __init__(
        self,
        planner: BatchPlanner[Pending[T, R]],
        *,
        is_too_large: Callable[[Exception], bool],
        on_batch: Callable[[BatchRecord], None] | None,
        name: str,
    ) -> None:
        self.now: Callable[[], float] = anyio.current_time
        self.telemetry = Telemetry()
        self.shares = StageShares()
        self.running: dict[int, Batch[Pending[T, R]]] = {}
        """The batches that run now, by the id of each."""
        self._planner = planner
        self._history = FailureHistory()
        self._is_too_large = is_too_large
        self._on_batch = on_batch
        self._name = name

    async def run(
        self, batch: Batch[Pending[T, R]], executor: Executor[T, R], progress: Progress | None = None
    ) -> None:
        """Run a batch; with a `progress`, overlapping with others. One that yields to another is put back whole.

        When cancelled, its requests stay without an outcome, in `running`.
        """
        self.running[id(batch)] = batch
        formed_s = self.now()
        seconds, failed, put_back, has_yielded = None, 0, 0, False
        wanted = [request for request in batch.requests if request.outcome is None]
        try:
            if wanted:
                outputs, seconds = await executor.attempt([request.payload for request in wanted], progress)
                if isinstance(outputs, BatchYieldedError):
                    has_yielded = True
                elif isinstance(outputs, Exception):
                    failed, put_back = await self._find_guilty(wanted, executor, outputs)
                else:
                    failed = self._succeed(wanted, outputs)
                    self._history.passed(len(wanted))
        finally:
            if progress is not None:
                progress.end()
            total_s = self.now() - formed_s
            if len(wanted) < len(batch.requests):
                seconds = None
            if has_yielded:
                self._planner.batch_yielded(batch, [request for request in wanted if request.outcome is None])
            else:
                self._account_for(batch, total_s, seconds)
        self._limit_counts()
        self.running.pop(id(batch), None)  # gone already where the scheduler broke meanwhile
        if has_yielded:
            return
        if seconds is not None:
            self.shares.add(seconds)
        self._report(
            _record(
                batch, formed_s, total_s, seconds, failed=failed, put_back=put_back, overlapped=progress is not None
            )
        )

    def fail(self, request: Pending[T, R], failure: Failure) -> bool:
        """Give a request an error, unless it has its outcome; returns whether it had none."""
        if request.outcome is not None:
            return False  # its caller has gone
        request.outcome = failure
        if failure is CALLER_GONE:
            self.telemetry.cancelled += 1
        else:
            self.telemetry.request_failed(failure)
        request.waiter.one_done()
        return True

    # A batch that failed.

    async def _find_guilty(
        self, wanted: list[Pending[T, R]], executor: Executor[T, R], error: Exception
    ) -> tuple[int, int]:
        """Run parts of a batch that failed; returns how many requests got an error, and how many were put back."""
        test, failed = GroupTest(wanted, self._history, self._is_wanted), 0
        self._note_failure(test, wanted, error)
        while part := test.next_part():
            outputs, seconds = await executor.attempt([request.payload for request in part])
            if isinstance(outputs, Exception):
                self._note_failure(test, part, outputs)
            else:
                failed += self._succeed(part, outputs)
                test.passed()
                if seconds is not None:
                    self._learn(part, seconds.total_s)
        for request, own_error in test.guilty:
            failed += self.fail(request, Failure(own_error, is_systemic=test.is_systemic))
        for request in test.given_up:
            failed += self.fail(request, Failure(error, is_systemic=True))
        if isinstance(error, BatchTimeoutError) and not any(
            isinstance(own, BatchTimeoutError) for _, own in test.guilty
        ):
            self._planner.too_large([request.size for request in wanted])  # nothing hangs: they were too many
        put_back = [request for request in test.untested if request.outcome is None]
        self._planner.put_back(put_back)
        return failed, len(put_back)

    def _note_failure(self, test: GroupTest[Pending[T, R]], part: list[Pending[T, R]], error: Exception) -> None:
        if isinstance(error, BatchTimeoutError):
            test.timed_out(error)
        elif self._says_too_large(error):
            self._planner.too_large([request.size for request in part])
            _clear_frames(error)
            test.too_large(error)
        else:
            test.failed(error)

    def _is_wanted(self, request: Pending[T, R]) -> bool:
        """Whether a request should still run; one whose deadline has passed gets that as its error."""
        if request.outcome is None and request.deadline_s <= self.now():
            self.fail(request, Failure(DeadlineExceededError(request.deadline_s - request.arrival_s)))
        return request.outcome is None

    def _says_too_large(self, error: Exception) -> bool:
        try:
            return self._is_too_large(error)
        except (Exception, SystemExit):
            logger.exception("%s: is_too_large failed; the error counts as any other", self._name)
            return False

    # Outcomes.

    def _succeed(self, requests: list[Pending[T, R]], outputs: Sequence[R | Exception]) -> int:
        """Hand out what a batch returned; returns how many of the outputs are errors."""
        now, failed, latencies_s = self.now(), 0, []
        for request, output in zip(requests, outputs, strict=True):
            if isinstance(output, Exception):
                failed += self.fail(request, Failure(output))
            elif request.outcome is None:
                request.outcome = Success(output)
                latencies_s.append(now - request.arrival_s)
                request.waiter.one_done()
        self.telemetry.requests_succeeded(latencies_s)
        return failed

    # What is learnt and told.

    def _account_for(self, batch: Batch[Pending[T, R]], total_s: float, seconds: StageSeconds | None) -> None:
        try:
            self._planner.batch_finished(
                batch, total_s if seconds is None else seconds.total_s, succeeded=seconds is not None
            )
        except (Exception, SystemExit):
            logger.exception("%s: the cost model could not learn from a batch", self._name)

    def _learn(self, part: list[Pending[T, R]], elapsed_s: float) -> None:
        try:
            self._planner.run_succeeded([request.size for request in part], elapsed_s)
        except (Exception, SystemExit):
            logger.exception("%s: the cost model could not learn from a part of a batch", self._name)

    def _limit_counts(self) -> None:
        self._planner.former.count_limit = self._history.count_limit(self._planner.policy.max_batch_size)

    def _report(self, record: BatchRecord) -> None:
        self.telemetry.batch_ran(record)
        if self._on_batch is not None:
            try:
                self._on_batch(record)
            except (Exception, SystemExit):
                logger.exception("%s: on_batch failed; the batch itself was not affected", self._name)


def _record(
    batch: Batch[Pending[T, R]],
    formed_s: float,
    total_s: float,
    seconds: StageSeconds | None,
    *,
    failed: int,
    put_back: int,
    overlapped: bool,
) -> BatchRecord:
    stages = seconds or StageSeconds(0.0, 0.0, 0.0)
    arrivals_s = [request.arrival_s for request in batch.requests]
    return BatchRecord(
        count=len(batch.requests),
        failed=failed,
        put_back=put_back,
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
