"""Sends the results of a call's jobs to the queues that they name, before the call returns."""

import time
from collections.abc import Callable, Sequence

import anyio

from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.jobs.delivery import log_failed_attempts
from modalkit.service.jobs.life import after_delivery_attempt, record_delivery
from modalkit.service.jobs.model import DeliveryRecord, DeliveryStatus, Job
from modalkit.service.jobs.telemetry import Sending
from modalkit.service.queue_backends import QueueBackend, QueueMessage
from modalkit.service.queue_backends.sending import send_all


async def send_results(
    backend: QueueBackend,
    jobs: Sequence[Job],
    until_s: float,
    *,
    max_attempts: int,
    backoff_s: Callable[[int], float] = backoff_with_jitter,
    clock: Callable[[], float] = time.time,
) -> list[Job]:
    """Send what is pending, and again where that fails, as long as there is time; returns all jobs as they are then.

    `until_s`, by the event loop's clock, is when to stop; what is not delivered by then is undelivered, and a call that
    runs again delivers again. `clock` gives wall-clock Unix seconds. Raises nothing that the backend raises. When
    cancelled, any of the messages may have been sent.
    """
    done = list(jobs)
    pending = [index for index, job in enumerate(jobs) if job.delivery is DeliveryStatus.PENDING]
    attempt = 0
    while pending:
        attempt += 1
        sending = Sending([done[index] for index in pending], clock())
        errors = await _attempt(backend, sending.messages, until_s)
        pause_s, now = backoff_s(attempt), clock()
        is_last = anyio.current_time() + pause_s >= until_s
        attempted: list[tuple[str, DeliveryRecord]] = []
        for index, error in zip(pending, errors, strict=True):
            record = after_delivery_attempt(
                done[index], error, max_attempts=max_attempts, now=now, is_last=is_last, backoff_s=backoff_s
            )
            attempted.append((done[index].delivery_queue or "", record))
            done[index] = record_delivery(done[index], record) or done[index]
        sending.end([record for _, record in attempted], now)
        log_failed_attempts(attempted)
        pending = [index for index in pending if done[index].delivery is DeliveryStatus.PENDING]
        if pending:
            await anyio.sleep(pause_s)
    return done


async def _attempt(
    backend: QueueBackend, messages: Sequence[QueueMessage], until_s: float
) -> Sequence[Exception | None]:
    with anyio.CancelScope(deadline=until_s):
        return await send_all(backend, messages)
    return [TimeoutError("no answer in the time that the call has")] * len(messages)
