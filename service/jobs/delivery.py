"""Sends the results of finished jobs to the queues they named."""

import logging
import math
import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from batching.task_groups import plain_task_group
from service.errors import describe_error
from service.jobs.errors import JobStoreError
from service.jobs.messages import result_message
from service.jobs.model import DeliveryRecord, DeliveryStatus, Job
from service.jobs.store import JobStore
from service.queue_backends import QueueBackend

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.5
LONGEST_RETRY_S = 300.0
RECOVERY_PAGE = 1000


def backoff_with_jitter(attempt: int) -> float:
    """Seconds to wait after failed attempt number `attempt`: doubled each time, up to five minutes, half of it chance.

    The random half keeps many deliveries that failed together from coming back together ("equal jitter", AWS
    Architecture Blog, "Exponential Backoff And Jitter", 2015).
    """
    ceiling_s = min(LONGEST_RETRY_S, math.ldexp(FIRST_RETRY_S, min(attempt, 64) - 1))
    return ceiling_s * (0.5 + random.random() / 2)  # noqa: S311  # spreads load, keeps no secret


class Deliverer:
    """Delivers finished jobs concurrently, each until it is delivered or out of attempts.

    Never raises for a failed send and never makes anybody wait: `enqueue` returns at once. What is still undelivered
    when the context is left stays ``pending`` in the store, and is delivered after the next start: at least once.
    """

    def __init__(
        self,
        backend: QueueBackend,
        store: JobStore,
        *,
        max_attempts: int = 8,
        max_concurrent: int = 64,
        backoff_s: Callable[[int], float] = backoff_with_jitter,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._store = store
        self._max_attempts = max_attempts
        self._sending = anyio.Semaphore(max_concurrent)
        self._backoff_s = backoff_s
        self._clock = clock
        self._closing = anyio.Event()
        self._tasks = plain_task_group()
        self._task_group: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        self._task_group = await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Let sends under way finish; retries that are due later wait for the next start of a durable store."""
        self._closing.set()
        return await self._tasks.__aexit__(exc_type, exc, traceback)

    async def recover(self) -> None:
        """Deliver what an earlier process left pending, a page at a time, so that any number of jobs fits in memory."""
        last: Job | None = None
        while jobs := await self._store.pending_deliveries(RECOVERY_PAGE, last):
            async with anyio.create_task_group() as page:
                for job in jobs:
                    page.start_soon(self._deliver, job)
            last = jobs[-1]

    def enqueue(self, job: Job) -> None:
        """Deliver a job whose delivery is pending; returns at once."""
        self._opened().start_soon(self._deliver, job)

    def _opened(self) -> TaskGroup:
        if self._task_group is None:
            raise RuntimeError("a Deliverer is used inside its 'async with' block")
        return self._task_group

    async def _deliver(self, job: Job) -> None:
        attempt = job.delivery_attempts
        while True:
            attempt += 1
            async with self._sending:
                error = await self._send(job)
            if error is None:
                return await self._record(job, DeliveryStatus.DELIVERED, attempt, None)
            logger.warning(
                "Delivery of job %s to %r failed (attempt %d): %s", job.job_id, job.delivery_queue, attempt, error
            )
            if attempt >= self._max_attempts:
                logger.error("Job %s is set aside as undelivered after %d attempts", job.job_id, attempt)
                return await self._record(job, DeliveryStatus.UNDELIVERED, attempt, error)
            await self._record(job, DeliveryStatus.PENDING, attempt, error)
            with anyio.move_on_after(self._backoff_s(attempt)):
                await self._closing.wait()
                if not self._store.durable:
                    logger.error(
                        "The result of job %s is lost: its delivery failed, and the store is not durable", job.job_id
                    )
                return None

    async def _send(self, job: Job) -> str | None:
        """Try once; returns what went wrong, or None."""
        if job.delivery_queue is None:
            raise AssertionError(f"job {job.job_id} names no queue, yet is to be delivered: this is a bug in modalkit")
        try:
            accepted = await self._backend.send_message(job.delivery_queue, result_message(job, self._clock()))
        except Exception as error:  # noqa: BLE001  # a backend may raise anything; the caller logs and retries
            return describe_error(error)
        return None if accepted else "the backend did not take the message"

    async def _record(self, job: Job, status: DeliveryStatus, attempts: int, error: str | None) -> None:
        record = DeliveryRecord(job_id=job.job_id, status=status, attempts=attempts, error=error)
        try:
            await self._store.record_delivery([record])
        except JobStoreError:
            logger.exception("The delivery of job %s (%s) could not be noted: it may be repeated", job.job_id, status)
