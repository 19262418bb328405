"""Sends what became of the jobs of one call to the queues they named, before the call returns."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import anyio

from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.errors import describe_error
from modalkit.service.jobs.messages import result_message, utc_timestamp
from modalkit.service.jobs.model import DeliveryStatus, Job
from modalkit.service.queue_backends import QueueBackend, QueueMessage, UndeliverableError
from modalkit.service.queue_backends.sending import send_all
from modalkit.service.queue_backends.webhook_urls import shown_queue_name

logger = logging.getLogger(__name__)


class ResponseSender:
    """Delivers by a backend, again and again where that fails, as long as the call has time.

    `clock` gives wall-clock Unix seconds. Unlike a `Deliverer` it keeps nothing: what a call does not get rid of in its
    time is noted as undelivered in its result, and a call that runs again delivers again.
    """

    def __init__(
        self,
        backend: QueueBackend,
        *,
        max_attempts: int,
        backoff_s: Callable[[int], float] = backoff_with_jitter,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._max_attempts = max_attempts
        self._backoff_s = backoff_s
        self._clock = clock

    async def send(self, jobs: Sequence[Job], until_s: float) -> list[Job]:
        """Deliver those of the jobs that are due, and return all of them as they are then.

        `until_s`, by the event loop's clock, is when to stop. Raises nothing that the backend raises. When cancelled,
        any of the messages may have been sent.
        """
        done = list(jobs)
        due = [index for index, job in enumerate(jobs) if job.delivery is DeliveryStatus.PENDING]
        attempt = 0
        while due:
            attempt += 1
            errors = await self._attempt([done[index] for index in due], until_s)
            pause_s = self._backoff_s(attempt)
            is_last = attempt >= self._max_attempts or anyio.current_time() + pause_s >= until_s
            for index, error in zip(due, errors, strict=True):
                done[index] = _after_attempt(done[index], error, attempt, is_last=is_last)
            _log_failures([done[index] for index in due])
            due = [index for index in due if done[index].delivery is DeliveryStatus.PENDING]
            if due:
                await anyio.sleep(pause_s)
        return done

    async def _attempt(self, jobs: Sequence[Job], until_s: float) -> Sequence[Exception | None]:
        timestamp = utc_timestamp(self._clock())
        messages = [QueueMessage(job.delivery_queue or "", result_message(job, timestamp), job.job_id) for job in jobs]
        with anyio.CancelScope(deadline=until_s):
            return await send_all(self._backend, messages)
        return [TimeoutError("no answer in the time that the call has")] * len(jobs)


def _after_attempt(job: Job, error: Exception | None, attempt: int, *, is_last: bool) -> Job:
    if error is None:
        return replace(job, delivery=DeliveryStatus.DELIVERED, delivery_attempts=attempt, delivery_error=None)
    gives_up = is_last or isinstance(error, UndeliverableError)
    return replace(
        job,
        delivery=DeliveryStatus.UNDELIVERED if gives_up else DeliveryStatus.PENDING,
        delivery_attempts=attempt,
        delivery_error=describe_error(error),
    )


def _log_failures(jobs: Sequence[Job]) -> None:
    """One line for each queue: one that is down fails many."""
    failed = Counter((job.delivery_queue or "", job.delivery) for job in jobs if job.delivery_error is not None)
    for (queue, delivery), count in failed.items():
        job = next(job for job in reversed(jobs) if (job.delivery_queue, job.delivery) == (queue, delivery))
        shown = shown_queue_name(queue)
        if delivery is DeliveryStatus.UNDELIVERED:
            logger.error(
                "%d results for %r are undelivered; the last one, of job %s, after attempt %d: %s",
                *(count, shown, job.job_id, job.delivery_attempts, job.delivery_error),
            )
        else:
            logger.warning(
                "%d results for %r were not taken and are sent again; the last one, of job %s, attempt %d: %s",
                *(count, shown, job.job_id, job.delivery_attempts, job.delivery_error),
            )
