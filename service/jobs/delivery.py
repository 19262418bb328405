"""Sends the results of finished jobs to the queues they named."""

import logging
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.errors import describe_error
from modalkit.service.jobs.errors import JobStoreError
from modalkit.service.jobs.gathering import Gathering
from modalkit.service.jobs.messages import result_message, utc_timestamp
from modalkit.service.jobs.model import DeliveryRecord, DeliveryStatus, Job
from modalkit.service.jobs.store import JobStore
from modalkit.service.queue_backends import BatchQueueBackend, QueueBackend, QueueMessage, UndeliverableError
from modalkit.service.queue_backends.sending import send_all
from modalkit.service.queue_backends.webhook_urls import shown_queue_name

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.5
LONGEST_RETRY_S = 300.0
MESSAGES_PER_CALL = 100
CALLS_AT_ONCE = 8
SINGLE_MESSAGES_AT_ONCE = 64
LARGEST_GROUP = 100
"""Most messages that are sent together after the process died sending them."""
BYTES_UNDER_WAY = 256 * 2**20
"""So many bytes of jobs are under way before the next wait, whatever the number of places."""
LONGEST_SLEEP_S = 1.0


def backoff_with_jitter(attempt: int, first_s: float = FIRST_RETRY_S) -> float:
    """Seconds to wait after failed attempt number `attempt`: four times as long each time, up to five minutes.

    Half of it is chance, which keeps what failed together from coming back together ("equal jitter", AWS Architecture
    Blog, "Exponential Backoff And Jitter", 2015). After `first_s` of 0.5, eight attempts last 6 to 13 minutes.
    """
    ceiling_s = min(LONGEST_RETRY_S, math.ldexp(first_s, 2 * (min(attempt, 64) - 1)))
    return ceiling_s * (0.5 + random.random() / 2)  # noqa: S311  # spreads load, keeps no secret


class Deliverer:
    """Delivers what is due in a store, until it is delivered or out of attempts.

    Many deliveries are under way at once, but a bounded number, however many are due; each queue has half of the places
    at most, so that one that hangs leaves the others theirs. A backend that can send many messages at once is given up
    to a hundred. A failed send raises nowhere and makes nobody wait. What is not delivered when the context is left
    stays pending in a durable store, for the next start; from one that is not durable, all that is due is sent once
    more before leaving. An attempt that takes longer than `send_timeout_s` has failed.

    What was being sent when a process died is sent first, in groups while nothing else is (see `suspects_together`), so
    that a message whose backend ends the process is found and set aside. Between two groups others are sent.
    """

    def __init__(
        self,
        backend: QueueBackend,
        store: JobStore,
        *,
        max_attempts: int = 8,
        send_timeout_s: float = 30.0,
        backoff_s: Callable[[int], float] = backoff_with_jitter,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._store = store
        self._max_attempts = max_attempts
        self._send_timeout_s = send_timeout_s
        self._backoff_s = backoff_s
        self._clock = clock
        self._messages_per_call = MESSAGES_PER_CALL if isinstance(backend, BatchQueueBackend) else 1
        self._places = self._messages_per_call * (
            CALLS_AT_ONCE if isinstance(backend, BatchQueueBackend) else SINGLE_MESSAGES_AT_ONCE
        )
        self._places_of_one_queue = max(1, self._places // 2)
        # All mutable state: how many messages are on their way to each queue, and the bytes of their jobs, what became
        # of those that came back, whether no place may be reserved, when the next retry is due, whether the store may
        # have something due and when it was asked, and what wakes the task that takes it.
        self._under_way: Counter[str] = Counter()
        self._total_under_way = 0
        self._bytes: Counter[str] = Counter()
        self._total_bytes = 0
        self._is_taking = True
        self._may_be_due = True
        self._asked_s = -math.inf
        self._records: Gathering[tuple[Job, DeliveryRecord]] = Gathering()
        self._next_retry_at = math.inf
        self._change = anyio.Event()
        self._closing = anyio.Event()
        self._tasks = plain_task_group()
        self._task_group: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        self._task_group = await self._tasks.__aenter__()
        self._task_group.start_soon(self._record)
        self._task_group.start_soon(self._deliver_what_is_due)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Let attempts under way finish, and note how they went."""
        self._closing.set()
        self.wake()
        return await self._tasks.__aexit__(exc_type, exc, traceback)

    @property
    def under_way(self) -> int:
        """How many messages are being sent."""
        return self._total_under_way

    def wake(self) -> None:
        """Look for what is due in the store; called when something may be."""
        self._may_be_due = True
        self._change.set()

    def reserve(self, queue_name: str) -> bool:
        """Keep a place for a message to this queue, if there is one: for `deliver`, or else for `release`."""
        if (
            self._is_taking
            or self.under_way >= self._places
            or self._total_bytes >= BYTES_UNDER_WAY
            or self._room_of(queue_name) <= 0
        ):
            return False
        self._under_way[queue_name] += 1
        self._total_under_way += 1
        return True

    def _room_of(self, queue_name: str) -> int:
        """How many messages more may be on their way to a queue: it has half of the places, and of the bytes."""
        if self._bytes[queue_name] >= BYTES_UNDER_WAY // 2:
            return 0
        return self._places_of_one_queue - self._under_way[queue_name]

    def release(self, queue_names: Iterable[str]) -> None:
        """Give places back."""
        for queue_name in queue_names:
            self._under_way[queue_name] -= 1
            self._total_under_way -= 1
            if not self._under_way[queue_name]:
                del self._under_way[queue_name]
        self._change.set()

    def deliver(self, jobs: Sequence[Job]) -> None:
        """Deliver jobs in hand, for each of which a place is reserved; returns at once."""
        # A call is for one queue: where that hangs, it takes no message for another one along.
        by_queue: defaultdict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            by_queue[_queue_of(job)].append(job)
            self._count_bytes(job, job.size_bytes)
        for of_one in by_queue.values():
            for start in range(0, len(of_one), self._messages_per_call):
                self._opened().start_soon(self._attempt, of_one[start : start + self._messages_per_call])

    def _opened(self) -> TaskGroup:
        if self._task_group is None:
            raise RuntimeError("a Deliverer is used inside its 'async with' block")
        return self._task_group

    async def _deliver_what_is_due(self) -> None:
        """Keep the places filled with what is due, until closed."""
        while not self._must_stop() and await self._deliver_suspects():
            self.deliver(await self._take())
        self._is_taking = False
        while not self._must_stop():
            self._change = anyio.Event()
            closing = self._closing.is_set()
            # Asked only with reason: while it is, what ends goes by way of the store as well.
            taken = await self._take() if self._may_be_due or closing or not self._sleep_s() else []
            self.deliver(taken)
            if taken:
                continue
            if closing and not self.under_way:
                break
            with anyio.move_on_after(self._sleep_s()):
                await self._change.wait()
        await self._until_none_is_under_way()
        self._records.close()
        if not self._store.durable and (lost := (await self._store.counts()).deliveries[DeliveryStatus.PENDING]):
            logger.error("%d results are lost: their deliveries failed, and the store is not durable", lost)

    def _must_stop(self) -> bool:
        return self._closing.is_set() and self._store.durable

    async def _until_none_is_under_way(self) -> None:
        while self.under_way:
            self._change = anyio.Event()
            await self._change.wait()

    async def _deliver_suspects(self) -> bool:
        """Deliver a group of suspects, if there is one, while nothing else is; returns whether there may be more."""
        self._is_taking = True
        await self._until_none_is_under_way()
        try:
            taken = await self._store.take_suspect_deliveries(min(LARGEST_GROUP, self._places_of_one_queue))
        except JobStoreError:
            logger.exception("What is to be delivered could not be read; trying again in %g s", LONGEST_SLEEP_S)
            with anyio.move_on_after(LONGEST_SLEEP_S):
                await self._closing.wait()
            return True
        self._count(taken)
        self.deliver(taken)
        await self._until_none_is_under_way()
        return bool(taken)

    def _count(self, taken: Sequence[Job]) -> None:
        self._under_way.update(_queue_of(job) for job in taken)
        self._total_under_way += len(taken)

    def _count_bytes(self, job: Job, size_bytes: int) -> None:
        queue = _queue_of(job)
        self._bytes[queue] += size_bytes
        self._total_bytes += size_bytes
        if not self._bytes[queue]:
            del self._bytes[queue]

    def _sleep_s(self) -> float:
        """Until the store is to be asked without anybody saying so: retries of an earlier process may be due, too."""
        if self.under_way >= self._places or self._total_bytes >= BYTES_UNDER_WAY:
            return math.inf  # a place that gets free says so
        since_s = anyio.current_time() - self._asked_s
        return max(0.0, min(LONGEST_SLEEP_S - since_s, self._next_retry_at - self._clock()))

    async def _take(self) -> Sequence[Job]:
        free = self._places - self.under_way
        if not free or self._total_bytes >= BYTES_UNDER_WAY:
            return []
        most = self._places_of_one_queue
        places: Mapping[str, int] = {queue: self._room_of(queue) for queue in self._under_way}
        self._may_be_due = min(places.values(), default=most) <= 0  # then there may be more than it is let to give
        self._asked_s = anyio.current_time()
        self._is_taking = True  # the places that it is told of are not given to others meanwhile
        try:
            taken = await self._store.take_deliveries(free, self._clock(), places=places, per_queue=most)
        except JobStoreError:
            logger.exception("What is to be delivered could not be read; trying again in %g s", LONGEST_SLEEP_S)
            return []  # asked again after a while
        finally:
            self._is_taking = False
        self._may_be_due = self._may_be_due or bool(taken)
        self._count(taken)
        if not taken and self._clock() >= self._next_retry_at:
            self._next_retry_at = math.inf
        return taken

    async def _attempt(self, jobs: Sequence[Job]) -> None:
        """Send the messages of some jobs, and have it noted how that went."""
        sent_at = utc_timestamp(self._clock())
        messages = [QueueMessage(_queue_of(job), result_message(job, sent_at), job.job_id) for job in jobs]
        outcomes: Sequence[Exception | None] = [TimeoutError(f"no answer within {self._send_timeout_s:g} s")] * len(
            jobs
        )
        with anyio.move_on_after(self._send_timeout_s):
            outcomes = await send_all(self._backend, messages)
        for job, error in zip(jobs, outcomes, strict=True):
            self._records.add((job, self._outcome(job, error)))

    def _outcome(self, job: Job, error: Exception | None) -> DeliveryRecord:
        attempt = job.delivery_attempts + 1
        if error is None:
            return DeliveryRecord(job_id=job.job_id, status=DeliveryStatus.DELIVERED, attempts=attempt)
        if attempt >= self._max_attempts or isinstance(error, UndeliverableError):
            status, due_at = DeliveryStatus.UNDELIVERED, 0.0
        else:
            status, due_at = DeliveryStatus.PENDING, self._clock() + self._backoff_s(attempt)
            self._next_retry_at = min(self._next_retry_at, due_at)
        return DeliveryRecord(
            job_id=job.job_id, status=status, attempts=attempt, error=describe_error(error), due_at=due_at
        )

    async def _record(self) -> None:
        """Note how attempts went, all those together that came back meanwhile."""
        while records := await self._records.take():
            await self._note([record for _, record in records])
            log_failed_attempts([(_queue_of(job), record) for job, record in records])
            self.release(_queue_of(job) for job, _ in records)
            for job, _ in records:
                self._count_bytes(job, -job.size_bytes)

    async def _note(self, records: Sequence[DeliveryRecord]) -> None:
        while True:
            try:
                return await self._store.record_deliveries(records)
            except JobStoreError:
                logger.exception("How %d deliveries went could not be noted", len(records))
                if self._closing.is_set():
                    return None  # they are due again after the next start
            with anyio.move_on_after(LONGEST_SLEEP_S):
                await self._closing.wait()


def log_failed_attempts(records: Sequence[tuple[str, DeliveryRecord]]) -> None:
    """One line for each queue, not for each message: a queue that is down fails thousands."""
    failed = Counter((queue, record.status) for queue, record in records if record.error is not None)
    last = {(queue, record.status): record for queue, record in records}
    for (queue, status), messages in failed.items():
        record, shown = last[queue, status], shown_queue_name(queue)
        if status is DeliveryStatus.UNDELIVERED:
            logger.error(
                "%d results for %r are undelivered; the last one, of job %s, after attempt %d: %s",
                *(messages, shown, record.job_id, record.attempts, record.error),
            )
        else:
            logger.warning(
                "%d results for %r were not taken and are sent again later; the last one, of job %s, attempt %d: %s",
                *(messages, shown, record.job_id, record.attempts, record.error),
            )


def _queue_of(job: Job) -> str:
    if job.delivery_queue is None:
        raise AssertionError(f"job {job.job_id} names no queue, yet is to be delivered: this is a bug in modalkit")
    return job.delivery_queue
