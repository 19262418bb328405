"""Sends the results of a call's jobs to the queues that they name, before the call returns."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import anyio

from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.jobs.delivery import MAX_BATCH_CALLS, MESSAGES_PER_CALL, log_failed_attempts
from modalkit.service.jobs.life import after_delivery_attempt, record_delivery
from modalkit.service.jobs.model import DeliveryStatus, Job
from modalkit.service.jobs.telemetry import Sending
from modalkit.service.queue_backends import BatchQueueBackend, QueueBackend, QueueMessage
from modalkit.service.queue_backends.protocol import keeps_in_process
from modalkit.service.queue_backends.sending import SEND_TIMEOUT_S, send_all

MAX_CALLS = 100
"""Calls of the backend that are under way at once."""


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
    runs again delivers again. Each queue has attempts of its own, so that one that hangs holds up no message for
    another one; only more than `MAX_CALLS` queues wait for each other. `clock` gives wall-clock Unix seconds. Raises
    nothing that the backend raises. When cancelled, any of the messages may have been sent.
    """
    done = list(jobs)
    pending_by_queue: defaultdict[str, list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        if job.delivery is DeliveryStatus.PENDING:
            pending_by_queue[job.delivery_queue or ""].append(index)
    attempts_at_once = anyio.CapacityLimiter(MAX_CALLS)
    max_concurrent = max(1, MAX_CALLS // max(1, len(pending_by_queue)))  # calls of one attempt

    async def send_to(queue: str, pending: list[int]) -> None:
        delivered = DeliveryStatus.MEMORY if keeps_in_process(backend, queue) else DeliveryStatus.DELIVERED
        attempt = 0
        while pending:
            attempt += 1
            async with attempts_at_once:
                sending = Sending([done[index] for index in pending], clock())
                errors = await _attempt(backend, sending.messages, until_s, max_concurrent)
            pause_s, now = backoff_s(attempt), clock()
            is_last = anyio.current_time() + pause_s >= until_s
            records = [
                after_delivery_attempt(
                    done[index],
                    error,
                    max_attempts=max_attempts,
                    now=now,
                    is_last=is_last,
                    backoff_s=backoff_s,
                    delivered=delivered,
                )
                for index, error in zip(pending, errors, strict=True)
            ]
            for index, record in zip(pending, records, strict=True):
                done[index] = record_delivery(done[index], record) or done[index]
            sending.end(records, now)
            log_failed_attempts([(queue, record) for record in records])
            pending = [index for index in pending if done[index].delivery is DeliveryStatus.PENDING]
            if pending:
                await anyio.sleep(pause_s)

    async with anyio.create_task_group() as task_group:
        for queue, pending in pending_by_queue.items():
            task_group.start_soon(send_to, queue, pending)
    return done


async def _attempt(
    backend: QueueBackend, messages: Sequence[QueueMessage], until_s: float, max_concurrent: int
) -> Sequence[Exception | None]:
    timeout_s = max(0.0, min(SEND_TIMEOUT_S, until_s - anyio.current_time()))
    errors: list[Exception | None] = [TimeoutError(f"no answer within {timeout_s:.3g} s")] * len(messages)
    in_a_call = MESSAGES_PER_CALL if isinstance(backend, BatchQueueBackend) else len(messages)
    calls = anyio.CapacityLimiter(min(MAX_BATCH_CALLS, max_concurrent))

    async def send(start: int) -> None:
        async with calls:
            some = messages[start : start + in_a_call]
            errors[start : start + in_a_call] = await send_all(backend, some, max_concurrent=max_concurrent)

    with anyio.move_on_after(timeout_s):
        async with anyio.create_task_group() as task_group:
            for start in range(0, len(messages), in_a_call):
                task_group.start_soon(send, start)
    return errors
