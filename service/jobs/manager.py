"""The jobs of a process: stores what is accepted, tells what became of it, and sends results on their way."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol, Self

import anyio

from modalkit.batching import Failure, Outcome, Success
from modalkit.batching.task_groups import plain_task_group
from modalkit.service.jobs.delivery import Deliverer
from modalkit.service.jobs.errors import JobStoreError
from modalkit.service.jobs.model import FinishedJob, Job, JobFilter, JobPage, JobStatus, NewJob
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.jobs.store import JobCounts, JobStore
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.queue_backends.sending import close_backend

logger = logging.getLogger(__name__)

EXPIRED_AT_ONCE = 1000


class JobFeed(Protocol):
    """Runs the jobs of one model, told of changes by the manager."""

    def wake(self) -> None:
        """A job was stored."""

    def abandon(self, job_id: str) -> None:
        """A job was cancelled; it may or may not be with this feed."""


class JobManager:
    """Owns an open job store and the deliveries from it; several workers, one per model, may share it.

    An async context manager. On entering, jobs that an earlier process left running are queued again and deliveries
    that it left pending are sent. Without a `queue_backend`, results are kept for `result_ttl_s` seconds after a job's
    end and sent nowhere. Every `sweep_interval_s` seconds, jobs expire whose time has come, and old ones are removed.
    `clock` gives wall-clock Unix seconds. A backend that the manager `owns` is closed with it.
    """

    def __init__(
        self,
        store: JobStore,
        queue_backend: QueueBackend | None = None,
        *,
        owns_backend: bool = False,
        allowed_queues: Sequence[str] = ("*",),
        result_ttl_s: float = 86_400.0,
        max_delivery_attempts: int = 8,
        sweep_interval_s: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if queue_backend is not None and not isinstance(queue_backend, QueueBackend):
            raise TypeError(
                f"queue_backend must have an 'async send_message(queue_name, message) -> bool', got {queue_backend!r}"
            )
        self.store = store
        self.clock = clock
        self._backend = queue_backend
        self._owns_backend = owns_backend
        self._queue_rules = QueueRules(allowed_queues, queue_backend)
        self._result_ttl_s = result_ttl_s
        self._sweep_interval_s = sweep_interval_s
        self._deliverer = (
            None
            if queue_backend is None
            else Deliverer(queue_backend, store, max_attempts=max_delivery_attempts, clock=clock)
        )
        # All mutable state: who runs the jobs of a model, who waits for the end of a job, whether anybody may, and what
        # is open.
        self.one_group = anyio.Lock()
        """Held by the feed that runs a group of suspects, from before they are taken until their ends are stored."""
        self._feeds: dict[str, JobFeed] = {}
        self._waiters: defaultdict[str, set[anyio.Event]] = defaultdict(set)
        self._may_wait = True
        self._exit_stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if self._owns_backend:
                stack.push_async_callback(close_backend, self._backend)
            await stack.enter_async_context(self.store)
            recovery = await self.store.recover(self.clock())
            if recovery.requeued:
                logger.warning("%d jobs that were running when the last process ended run again", recovery.requeued)
            for job_id in recovery.set_aside:
                logger.error("Job %s has failed: the process died with it too often", job_id)
            for job_id in recovery.undelivered:
                logger.error("The result of job %s is undelivered: the process died too often sending it", job_id)
            if self._deliverer is not None:
                await stack.enter_async_context(self._deliverer)
            background = await stack.enter_async_context(plain_task_group())
            stack.callback(background.cancel_scope.cancel)
            background.start_soon(self._sweep)
            self._exit_stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._exit_stack.__aexit__(exc_type, exc, traceback)

    @property
    def delivers(self) -> bool:
        """Whether there is a backend to send results to."""
        return self._deliverer is not None

    def check_queues(self, success_queue: str | None, failure_queue: str | None) -> None:
        """Raise `QueueNotAllowedError` or `QueueNameError` for a queue that nothing can or may be sent to."""
        self._queue_rules.check(success_queue, failure_queue)

    async def submit(self, jobs: Sequence[NewJob]) -> list[Outcome[str]]:
        """Store jobs, whose queues have been checked, to be run. Returns their ids once that is done, in their order.

        In place of an id there may be that of an earlier job with the same idempotency key, or an
        `IdempotencyKeyReusedError`. Raises other `JobStoreError`s for all.
        """
        added = await self.store.add(jobs)
        for model_name in {job.model_name for job in jobs}:
            if feed := self._feeds.get(model_name):
                feed.wake()
        return [Success(entry) if isinstance(entry, str) else Failure(entry) for entry in added]

    async def get(self, job_id: str, wait_s: float = 0.0) -> Job | None:
        """The job, or None if there is none; waits up to `wait_s` seconds for it to end, until `stop_waiting`."""
        ended = anyio.Event()
        self._waiters[job_id].add(ended)
        try:
            job = await self.store.get(job_id)
            if wait_s <= 0 or job is None or job.status.has_ended or not self._may_wait:
                return job
            with anyio.move_on_after(wait_s):
                await ended.wait()
            return await self.store.get(job_id)
        finally:
            waiters = self._waiters[job_id]
            waiters.discard(ended)
            if not waiters:
                del self._waiters[job_id]

    async def page(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:
        """See `JobStore.page`."""
        return await self.store.page(limit, which, cursor)

    async def counts(self) -> JobCounts:
        """See `JobStore.counts`."""
        return await self.store.counts()

    def stop_waiting(self) -> None:
        """Answer whoever waits for the end of a job with the job as it is, now and from now on. Idempotent."""
        self._may_wait = False
        self._announce(list(self._waiters))

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended, and return it as it then is; None if there is none."""
        job = await self.store.cancel(job_id, self.clock())
        if job is not None and job.status is JobStatus.CANCELLED:
            if feed := self._feeds.get(job.model_name):
                feed.abandon(job_id)
            self._announce([job_id])
        return job

    async def finish(self, ends: Sequence[tuple[Job, FinishedJob]]) -> None:
        """Store how jobs ended, wake who waits for them and deliver their messages. Raises `JobStoreError`."""
        # What there is a place for is delivered from here, without being read from the store again.
        in_hand: dict[str, Job] = {}
        some_are_left = False
        if self._deliverer is not None:
            for job, end in ends:
                queue = job.success_queue if end.status is JobStatus.SUCCEEDED else job.failure_queue
                if not queue:
                    continue
                finished = job.finished(end) if self._deliverer.reserve(queue) else None
                if finished is not None:
                    in_hand[job.job_id] = finished
                else:
                    some_are_left = True
        # Shielded, because what is stored as in hand must be delivered from here: nobody else would.
        with anyio.CancelScope(shield=True):
            try:
                ended = await self.store.finish([end for _, end in ends], in_hand=in_hand)
            except BaseException:
                self._let_go(in_hand.values())
                raise
            delivered = [in_hand.pop(job_id) for job_id in ended if job_id in in_hand]
            self._let_go(in_hand.values())
            if self._deliverer is not None:
                self._deliverer.deliver(delivered)
                if some_are_left:
                    self._deliverer.wake()
            self._announce(ended)

    def _let_go(self, jobs: Iterable[Job]) -> None:
        if self._deliverer is not None:
            self._deliverer.release(job.delivery_queue for job in jobs if job.delivery_queue is not None)

    async def replay(self, job_ids: Sequence[str] | None = None) -> int:
        """Send undelivered results, of these jobs or of all, once more; returns how many."""
        replayed = await self.store.replay(job_ids, self.clock())
        if self._deliverer is not None:
            self._deliverer.wake()
        return replayed

    async def purge(self, which: JobFilter) -> int:
        """Remove ended jobs; see `JobStore.purge`."""
        return await self.store.purge(which)

    def attach(self, model_name: str, feed: JobFeed) -> None:
        """Tell `feed` from now on of the jobs of this model."""
        self._feeds[model_name] = feed

    def detach(self, model_name: str) -> None:
        """End what `attach` began."""
        self._feeds.pop(model_name, None)

    def _have_ended(self, job_ids: Iterable[str]) -> None:
        self._announce(job_ids)
        if self._deliverer is not None:
            self._deliverer.wake()

    def _announce(self, job_ids: Iterable[str]) -> None:
        if self._waiters:
            for job_id in job_ids:
                for ended in self._waiters.get(job_id, ()):
                    ended.set()

    async def _sweep(self) -> None:
        while True:
            try:
                while expired := await self.store.expire(EXPIRED_AT_ONCE, self.clock()):
                    self._have_ended(expired)
                await self.store.remove_finished(self.clock() - self._result_ttl_s)
            except JobStoreError:
                logger.exception("Old jobs could not be removed; trying again in %g s", self._sweep_interval_s)
            await anyio.sleep(self._sweep_interval_s)
