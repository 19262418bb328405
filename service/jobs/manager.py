"""The jobs of a process: stores what is accepted, tells what became of it, and sends results on their way."""

import fnmatch
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Protocol, Self

import anyio

from batching import Priority
from batching.task_groups import plain_task_group
from service.errors import ServiceError
from service.jobs.delivery import Deliverer
from service.jobs.errors import JobStoreError
from service.jobs.model import DeliveryStatus, FinishedJob, Job, JobStatus, NewJob
from service.jobs.store import JobStore
from service.queue_backends import QueueBackend

logger = logging.getLogger(__name__)


class QueueNotAllowedError(ServiceError):
    """Raised when a job names a queue that ``allowed_queues`` does not cover."""

    def __init__(self, field: str, queue_name: str, allowed: Sequence[str]) -> None:
        super().__init__(f"{field}: queue {queue_name!r} is not allowed; allowed are: {', '.join(allowed) or 'none'}")
        self.field = field
        self.queue_name = queue_name


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
    end and sent nowhere; old ones are removed every `sweep_interval_s` seconds. `clock` gives wall-clock Unix seconds.
    """

    def __init__(
        self,
        store: JobStore,
        queue_backend: QueueBackend | None = None,
        *,
        allowed_queues: Sequence[str] = ("*",),
        result_ttl_s: float = 86_400.0,
        max_delivery_attempts: int = 8,
        sweep_interval_s: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.clock = clock
        self._allowed_queues = allowed_queues
        self._result_ttl_s = result_ttl_s
        self._sweep_interval_s = sweep_interval_s
        self._deliverer = (
            None
            if queue_backend is None
            else Deliverer(queue_backend, store, max_attempts=max_delivery_attempts, clock=clock)
        )
        # All mutable state: who runs the jobs of a model, who waits for the end of a job, whether anybody may, and
        # what is open.
        self._feeds: dict[str, JobFeed] = {}
        self._waiters: defaultdict[str, set[anyio.Event]] = defaultdict(set)
        self._may_wait = True
        self._exit_stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.store)
            if requeued := await self.store.requeue_running():
                logger.warning("%d jobs that were running when the last process ended will run again", requeued)
            if self._deliverer is not None:
                await stack.enter_async_context(self._deliverer)
            background = await stack.enter_async_context(plain_task_group())
            stack.callback(background.cancel_scope.cancel)
            background.start_soon(self._sweep)
            if self._deliverer is not None:
                background.start_soon(self._recover, self._deliverer)
            self._exit_stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._exit_stack.__aexit__(exc_type, exc, traceback)

    async def submit(
        self,
        model_name: str,
        message: dict[str, Any],
        *,
        success_queue: str | None = None,
        failure_queue: str | None = None,
        meta: dict[str, Any] | None = None,
        priority: Priority = Priority.BULK,
    ) -> str:
        """Store a job and return its id; from then on it is run, whatever happens to this process.

        Raises `QueueNotAllowedError`, and `JobStoreError` when it could not be stored.
        """
        delivers = self._deliverer is not None
        for field, queue_name in (("success_queue", success_queue), ("failure_queue", failure_queue)):
            if queue_name is not None and not any(fnmatch.fnmatchcase(queue_name, p) for p in self._allowed_queues):
                raise QueueNotAllowedError(field, queue_name, self._allowed_queues)
        job = NewJob(
            job_id=uuid.uuid4().hex,
            model_name=model_name,
            message=message,
            success_queue=success_queue if delivers else None,
            failure_queue=failure_queue if delivers else None,
            meta=meta or {},
            priority=priority,
            created_at=self.clock(),
        )
        await self.store.add([job])
        if feed := self._feeds.get(model_name):
            feed.wake()
        return job.job_id

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

    def stop_waiting(self) -> None:
        """Answer whoever waits for the end of a job with the job as it is, now and from now on. Idempotent."""
        self._may_wait = False
        for job_id in self._waiters:
            self._announce(job_id)

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended, and return it as it then is; None if there is none."""
        job = await self.store.cancel(job_id, self.clock())
        if job is not None and job.status is JobStatus.CANCELLED:
            if feed := self._feeds.get(job.model_name):
                feed.abandon(job_id)
            self._announce(job_id)
        return job

    async def finish(self, outcome: FinishedJob) -> None:
        """Store how a job ended, wake who waits for it and deliver its message. Raises `JobStoreError`."""
        for job in await self.store.finish([outcome]):
            self._announce(job.job_id)
            if job.delivery is DeliveryStatus.PENDING and self._deliverer is not None:
                self._deliverer.enqueue(job)

    def attach(self, model_name: str, feed: JobFeed) -> None:
        """Tell `feed` from now on of the jobs of this model."""
        self._feeds[model_name] = feed

    def detach(self, model_name: str) -> None:
        """End what `attach` began."""
        self._feeds.pop(model_name, None)

    def _announce(self, job_id: str) -> None:
        for ended in self._waiters.get(job_id, ()):
            ended.set()

    async def _sweep(self) -> None:
        while True:
            try:
                await self.store.remove_finished(self.clock() - self._result_ttl_s)
            except JobStoreError:
                logger.exception("Old jobs could not be removed; trying again in %g s", self._sweep_interval_s)
            await anyio.sleep(self._sweep_interval_s)

    async def _recover(self, deliverer: Deliverer) -> None:
        try:
            await deliverer.recover()
        except JobStoreError:
            logger.exception("Pending deliveries could not be read; they are sent after the next start")
