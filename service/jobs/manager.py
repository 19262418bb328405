"""The jobs of a process: accepts and stores them, tells their states, and has their results delivered."""

import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Generator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from itertools import repeat
from typing import Any, Protocol, Self, TypeVarTuple, Unpack

import anyio
from anyio import AsyncContextManagerMixin
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from pydantic import BaseModel

from modalkit.batching import Failure, Outcome, QueueOptions, Success
from modalkit.batching.errors import users_error
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel
from modalkit.service.backoff import SteadyClock
from modalkit.service.errors import NotReadyError, Readiness
from modalkit.service.jobs.batches import JobBatches
from modalkit.service.jobs.delivery import Deliverer
from modalkit.service.jobs.errors import IdempotencyKeyReusedError, JobStoreError
from modalkit.service.jobs.life import is_repetition, new_job
from modalkit.service.jobs.model import (
    ALL_JOBS,
    Job,
    JobBatchLines,
    JobEnd,
    JobFilter,
    JobPiece,
    JobRetry,
    JobStatus,
    new_job_ids,
)
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.jobs.store import Added, JobStore
from modalkit.service.jobs.telemetry import record_end
from modalkit.service.queue_backends import QueueBackend, UndeliverableError
from modalkit.service.queue_backends.protocol import check_backend
from modalkit.service.queue_backends.sending import close_backend
from modalkit.service.tracing import current_traceparent
from modalkit.service.validation import validated

logger = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")

EXPIRED_PER_CALL = 1000
DOCUMENT_GRACE_S = 86_400.0
"""Seconds for which documents are kept beyond `result_ttl_s`: as long as the jobs that they describe may take."""
NEW_JOBS_AT_ONCE = 256
"""Jobs of a list that are made without a pause; after each slice of them, other tasks run."""


class JobFeed(Protocol):
    """Runs the jobs of one model; the manager tells it of changes."""

    @property
    def input_model(self) -> type[BaseModel]:
        """The class of the model's items."""

    def wake(self) -> None:
        """Jobs in the store were queued again."""

    async def add(self, jobs: Sequence[Job]) -> Added:
        """Store new jobs, as `JobStore.add` does, and run them."""

    def abandon(self, job_id: str) -> None:
        """A job was cancelled; this feed may or may not run it."""

    def close(self) -> None:
        """Start no more jobs, because the store keeps them for the next start."""


class _Watch:
    """Collects which of some jobs have changed, with the newest piece of each, until its owner takes them."""

    def __init__(self) -> None:
        self._changed: dict[str, InferenceOutputModel | None] = {}
        self._change = anyio.Event()

    def add(self, job_id: str, piece: InferenceOutputModel | None = None) -> None:
        """A job has changed, or there is a piece of its result."""
        self._changed[job_id] = self._changed.get(job_id) if piece is None else piece
        self._change.set()

    async def changes(self) -> dict[str, InferenceOutputModel | None]:
        """Wait for changes, and take them."""
        await self._change.wait()
        self._change = anyio.Event()
        changed, self._changed = self._changed, {}
        return changed


class _NoBackend:
    """Refuses the messages that an earlier configuration left: they are kept as undelivered."""

    async def send_message(self, queue_name: str, message: str) -> bool:  # noqa: ARG002  # as the protocol has it
        raise UndeliverableError(
            "there is no queue backend: configure one (app_settings.queue_config.backend), and replay the result"
        )


class JobManager(AsyncContextManagerMixin):
    """Owns an open job store and the deliveries from it; several workers, one per model, may share it.

    An async context manager. On entering, jobs that an earlier process left running are queued again, and deliveries
    that it left pending are sent. Without a `queue_backend`, results are sent nowhere, and pending ones become
    undelivered. `result_ttl_s` seconds after its end, a job is removed. Every `sweep_interval_s` seconds, jobs expire
    whose time has come, and old ones are removed. `clock` gives wall-clock Unix seconds, by default those of a
    `SteadyClock`. A backend that the manager `owns` is closed with it.
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
        clock: Callable[[], float] | None = None,
    ) -> None:
        if queue_backend is not None:
            check_backend("queue_backend", queue_backend)
        self.store = store
        # The parts of `administration` that only the store does.
        self.page, self.purge, self.counts, self.documents = store.page, store.purge, store.counts, store
        self.clock = clock = clock or SteadyClock()
        self.check_ready: Callable[[str], None] | None = None
        """Called with a model's name before jobs are accepted for it; what it raises, `submit` raises."""
        self.batches = JobBatches(self)
        self._backend = queue_backend
        self._owns_backend = owns_backend
        self._queue_rules = QueueRules(allowed_queues, queue_backend)
        self._result_ttl_s = result_ttl_s
        self._sweep_interval_s = sweep_interval_s
        self._deliverer = Deliverer(
            _NoBackend() if queue_backend is None else queue_backend,
            store,
            max_attempts=max_delivery_attempts,
            clock=clock,
        )
        # All mutable state: the feeds by model name, the watches of each job that is watched, and `may_wait`.
        self.quarantine_lock = anyio.Lock()
        """Held by the feed that runs a quarantined group, from before it is claimed until its ends are stored."""
        self._feeds: dict[str, JobFeed] = {}
        self._watches: defaultdict[str, set[_Watch]] = defaultdict(set)
        self._background: TaskGroup | None = None
        self.may_wait = True
        """Whether callers may wait for jobs to end: until `stop_waiting`."""

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with AsyncExitStack() as stack:
            if self._owns_backend:
                stack.push_async_callback(close_backend, self._backend)
            await stack.enter_async_context(self.store)
            await self._recover()
            await stack.enter_async_context(self._deliverer)
            background = await stack.enter_async_context(plain_task_group())
            stack.callback(background.cancel_scope.cancel)
            self._background = background
            background.start_soon(self._sweep)
            yield self

    @property
    def is_open(self) -> bool:
        """Whether the manager has been entered."""
        return self._background is not None

    def start_soon(self, function: Callable[[*Ts], Coroutine[Any, Any, object]], *args: *Ts) -> None:
        """Run a function, which must raise nothing, beside the jobs; it is cancelled when the manager is left."""
        if self._background is None:
            raise RuntimeError("the job manager is not open: enter it first")
        self._background.start_soon(function, *args)

    async def _recover(self) -> None:
        recovery = await self.store.recover(self.clock())
        if recovery.requeued:
            logger.warning("%d jobs that were running when the last process ended run again", recovery.requeued)
        for job_id in recovery.failed:
            logger.error("Job %s has failed: the process died with it too often", job_id, extra={"job_id": job_id})
        for job_id in recovery.undelivered:
            logger.error(
                "The result of job %s is undelivered: the process died too often sending it",
                job_id,
                extra={"job_id": job_id},
            )

    @property
    def failure(self) -> JobStoreError | None:
        """Why jobs can neither be accepted nor read now; None where they can."""
        return self.store.failure

    @property
    def administration(self) -> Self:
        """What can be done with many jobs at once: list, count, replay, retry and purge them, and batches of them."""
        return self

    def attach(self, model_name: str, feed: JobFeed) -> None:
        """Accept jobs for this model from now on, and tell `feed` of them."""
        self._feeds[model_name] = feed

    def detach(self, model_name: str, feed: JobFeed) -> None:
        """Accept no more jobs for this model, unless another feed was attached meanwhile."""
        if self._feeds.get(model_name) is feed:
            del self._feeds[model_name]

    async def submit(
        self,
        requests: Sequence[AsyncInputModel],
        *,
        model_name: str,
        batch: JobBatchLines | None = None,
        **options: Unpack[QueueOptions],
    ) -> list[Outcome[str]]:
        """Store jobs in one step; returns the id or the error of each, in the same order, once they are stored.

        A request that is invalid, names a queue that cannot be used or reuses an idempotency key for something else has
        an error and disturbs no other. A repetition of a request with the same `idempotency_key` has the id of the
        first, where the `owner` is the same. A `batch` has the line of each request. Raises `NotReadyError` where the
        model takes no jobs, what `check_ready` raises, and `JobStoreError` when none was stored.
        When cancelled, jobs may have been stored.
        """
        feed = self._feed_of(model_name)
        now, traceparent, delivers = self.clock(), current_traceparent(), self._backend is not None

        def make(request: AsyncInputModel, job_id: str, place: tuple[str, int] | None) -> Job | Exception:
            """A job that is not stored yet, or what is wrong with the request."""
            try:
                message = request.message
                item = message if isinstance(message, BaseModel) else validated(feed.input_model, message)
                self._queue_rules.check(request.success_queue, request.failure_queue)
                job = new_job(
                    request,
                    job_id=job_id,
                    model_name=model_name,
                    message=item,
                    now=now,
                    delivers=delivers,
                    traceparent=traceparent,
                    place=place,
                    **options,
                )
                job.item = item
            except BaseException as error:  # noqa: BLE001  # a user's own validators may raise anything
                return users_error(error)
            return job

        places = repeat(None) if batch is None else zip(repeat(batch.batch_id), batch.lines)
        entries: list[Job | Exception] = []
        for start in range(0, len(requests), NEW_JOBS_AT_ONCE):
            if start:
                await checkpoint()
            some = requests[start : start + NEW_JOBS_AT_ONCE]
            entries += map(make, some, new_job_ids(len(some)), places)
        jobs = [entry for entry in entries if isinstance(entry, Job)]
        added = iter(await feed.add(jobs) if jobs else ())
        outcomes: list[Outcome[str]] = []
        for entry in entries:
            result = next(added) if isinstance(entry, Job) else entry
            if isinstance(entry, Job) and isinstance(result, IdempotencyKeyReusedError):
                result = await self._id_if_repeated(entry, result, feed.input_model)
            outcomes.append(Success(result) if isinstance(result, str) else Failure(result))
        return outcomes

    async def _id_if_repeated(
        self, job: Job, error: IdempotencyKeyReusedError, input_model: type[BaseModel]
    ) -> str | IdempotencyKeyReusedError:
        """The id of the job that has the key of this one, if it asks for the same by today's model; else the error."""
        await checkpoint()  # a list may have many, and a store in memory does not wait
        with suppress(JobStoreError):  # the other jobs are stored
            earlier = await self.store.get(error.job_id)
            if earlier is not None and is_repetition(job, earlier, input_model):
                return earlier.job_id
        return error

    def check_accepting(self, model_name: str) -> None:
        """Raise what `submit` would raise for any job now: `NotReadyError`, and what `check_ready` raises."""
        self._feed_of(model_name)

    def _feed_of(self, model_name: str) -> JobFeed:
        if self.check_ready is not None:
            self.check_ready(model_name)
        feed = self._feeds.get(model_name)
        if feed is None:
            raise NotReadyError(model_name, Readiness.LOADING)
        return feed

    async def get(self, job_id: str, wait_s: float = 0.0) -> Job | None:
        """The job, or None if there is none; waits up to `wait_s` seconds for it to end, until `stop_waiting`."""
        if wait_s <= 0:
            return await self.store.get(job_id)
        with self._watching([job_id]) as watch:
            job = await self.store.get(job_id)
            with anyio.move_on_after(wait_s):
                while job is not None and not job.status.has_ended and self.may_wait:
                    await watch.changes()
                    job = await self.store.get(job_id)
            return job

    async def watch(self, job_ids: Sequence[str]) -> AsyncGenerator[Job | JobPiece]:
        """Jobs as they are now, and again after changes, and pieces of their results; unknown ones are left out.

        It ends once all have ended, or after `stop_waiting`. The store is read after changes only. Of changes that
        follow each other fast, and of pieces, only the last may be seen.
        """
        left = set(job_ids)
        with self._watching(job_ids) as watch:
            for job_id in job_ids:
                watch.add(job_id)
            while left:
                for job_id, piece in (await watch.changes()).items():
                    job = await self.store.get(job_id)
                    has_ended = job is None or job.status.has_ended
                    if job is not None and not has_ended:
                        yield job
                    if piece is not None:
                        yield JobPiece(job_id, piece)
                    if has_ended:
                        left.discard(job_id)
                        if job is not None:
                            yield job
                if not self.may_wait:
                    return

    @contextmanager
    def _watching(self, job_ids: Collection[str]) -> Generator["_Watch"]:
        """A watch of these jobs, told of all that happens in the block."""
        watch = _Watch()
        for job_id in job_ids:
            self._watches[job_id].add(watch)
        try:
            yield watch
        finally:
            for job_id in job_ids:
                watches = self._watches[job_id]
                watches.discard(watch)
                if not watches:
                    del self._watches[job_id]

    def tell_change(self, job_ids: Iterable[str]) -> None:
        """Wake the watches of these jobs, because they have changed in the store."""
        if self._watches:
            for job_id in job_ids:
                for watch in self._watches.get(job_id, ()):
                    watch.add(job_id)

    def tell_piece(self, job_id: str, piece: InferenceOutputModel) -> None:
        """Give the watches of this job a piece of its result."""
        for watch in self._watches.get(job_id, ()):
            watch.add(job_id, piece)

    def stop_waiting(self) -> None:
        """Answer callers that wait for the end of a job with the job as it is, now and from now on. Idempotent."""
        self.may_wait = False
        self.tell_change(list(self._watches))

    def drain(self) -> None:
        """Before the manager is left: `stop_waiting`, and start no more jobs of a durable store. Idempotent.

        Jobs are still accepted, for the next start.
        """
        self.stop_waiting()
        if self.store.durable:
            for feed in self._feeds.values():
                feed.close()

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended, and return it as it then is; None if there is none."""
        now = self.clock()
        with anyio.CancelScope(shield=True):  # else its watches might not be told, and it would stay in its feed
            job = await self.store.cancel(job_id, now)
        if job is not None and job.status is JobStatus.CANCELLED:
            self.tell_cancelled(job, now, is_new=job.finished_at == now)
        return job

    def tell_cancelled(self, job: Job, now: float, *, is_new: bool = True) -> None:
        """A job was cancelled in the store: withdraw it from its feed, and wake its watches."""
        if is_new:
            record_end(job, JobStatus.CANCELLED, now)
        if feed := self._feeds.get(job.model_name):
            feed.abandon(job.job_id)
        self.tell_change([job.job_id])

    async def retry(self, job_ids: Sequence[str] | None = None, which: JobFilter = ALL_JOBS) -> int:
        """Run jobs once more that ended without success and match `which`, all or of these ids; returns how many."""
        try:
            retried = await self.store.retry(job_ids, which, self.clock())
        finally:  # it has several steps: some may be queued when it is cancelled, or fails
            for feed in self._feeds.values():
                feed.wake()
        self.tell_change(retried)
        return len(retried)

    async def finish(self, ends: Sequence[JobEnd]) -> None:
        """Store how jobs ended, wake callers that wait for them and have messages delivered. Raises `JobStoreError`."""
        self.tell_change(await self._deliverer.finish(ends))

    async def requeue(self, retries: Sequence[JobRetry]) -> None:
        """Store that jobs run again later. Raises `JobStoreError`."""
        await self.store.requeue(retries)
        self.tell_change(retry.job_id for retry in retries)

    async def replay(self, job_ids: Sequence[str] | None = None, *, owner: str | None = None) -> int:
        """Send undelivered results, of these jobs or of all (of that `owner`), once more; returns how many."""
        replayed = await self.store.replay(job_ids, self.clock(), owner)
        self._deliverer.wake()
        return replayed

    async def _sweep(self) -> None:
        while True:
            try:
                if self.store.failure is not None:
                    await self.store.check()
                while expired := await self.store.expire(EXPIRED_PER_CALL, now := self.clock()):
                    for job in expired:
                        record_end(job, JobStatus.EXPIRED, now)
                    self.tell_change([job.job_id for job in expired])
                    self._deliverer.wake()
                    await checkpoint()  # so that other tasks run between two steps of a store in memory
                await self.store.remove_finished(self.clock() - self._result_ttl_s)
                await self.store.remove_old_documents(self.clock() - self._result_ttl_s - DOCUMENT_GRACE_S)
            except JobStoreError:
                logger.exception("Old jobs could not be removed; trying again in %g s", self._sweep_interval_s)
            await anyio.sleep(self._sweep_interval_s)
