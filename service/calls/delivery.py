"""Sends the results of a call's jobs to the queues that they name, before the call returns."""

import time
from collections.abc import Callable, Sequence

import anyio

from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.jobs.delivery import log_failed_attempts
from modalkit.service.jobs.life import after_delivery_attempt, record_delivery
from modalkit.service.jobs.messages import result_message, utc_timestamp
from modalkit.service.jobs.model import DeliveryStatus, Job
from modalkit.service.queue_backends import QueueBackend, QueueMessage
from modalkit.service.queue_backends.sending import send_all


class CallDelivery:
    """Sends by a backend, and again where that fails, as long as the call has time.

    `clock` gives wall-clock Unix seconds. It keeps nothing: what was not delivered within the call's time is
    undelivered in its outcomes, and a call that runs again delivers again.
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
        """Deliver those of the jobs whose delivery is pending; returns all of them as they are then.

        `until_s`, by the event loop's clock, is when to stop. Raises nothing that the backend raises. When cancelled,
        any of the messages may have been sent.
        """
        done = list(jobs)
        pending = [index for index, job in enumerate(jobs) if job.delivery is DeliveryStatus.PENDING]
        attempt = 0
        while pending:
            attempt += 1
            errors = await self._attempt([done[index] for index in pending], until_s)
            pause_s, now = self._backoff_s(attempt), self._clock()
            is_last = anyio.current_time() + pause_s >= until_s
            records = [
                after_delivery_attempt(
                    done[index],
                    error,
                    max_attempts=self._max_attempts,
                    now=now,
                    is_last=is_last,
                    backoff_s=self._backoff_s,
                )
                for index, error in zip(pending, errors, strict=True)
            ]
            queues = [done[index].delivery_queue or "" for index in pending]
            log_failed_attempts(list(zip(queues, records, strict=True)))
            for index, record in zip(pending, records, strict=True):
                done[index] = record_delivery(done[index], record) or done[index]
            pending = [index for index in pending if done[index].delivery is DeliveryStatus.PENDING]
            if pending:
                await anyio.sleep(pause_s)
        return done

    async def _attempt(self, jobs: Sequence[Job], until_s: float) -> Sequence[Exception | None]:
        timestamp = utc_timestamp(self._clock())
        messages = [QueueMessage(job.delivery_queue or "", result_message(job, timestamp), job.job_id) for job in jobs]
        with anyio.CancelScope(deadline=until_s):
            return await send_all(self._backend, messages)
        return [TimeoutError("no answer in the time that the call has")] * len(jobs)
