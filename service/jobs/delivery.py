"""Sends the results of ended jobs to the queues that the jobs named."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Self

import anyio
from anyio import AsyncContextManagerMixin
from anyio.abc import TaskGroup
from structlog.contextvars import bind_contextvars

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.backoff import SteadyClock, backoff_with_jitter
from modalkit.service.jobs.backlog import Backlog
from modalkit.service.jobs.collector import Collector, store_until_closing
from modalkit.service.jobs.errors import JobStoreError
from modalkit.service.jobs.life import after_delivery_attempt
from modalkit.service.jobs.model import DeliveryRecord, DeliveryStatus, Job, JobEnd
from modalkit.service.jobs.store import JobStore
from modalkit.service.jobs.telemetry import Sending
from modalkit.service.queue_backends import BatchQueueBackend, QueueBackend
from modalkit.service.queue_backends.protocol import keeps_in_process
from modalkit.service.queue_backends.sending import SEND_TIMEOUT_S, send_all
from modalkit.service.queue_backends.webhook_urls import shown_queue_name

logger = logging.getLogger(__name__)

MESSAGES_PER_CALL = 100
MAX_BATCH_CALLS = 32
"""Calls of a backend that takes many messages in a call, under way at once."""
MAX_SINGLE_CALLS = 64
"""Calls of a backend that takes one message in a call, under way at once."""
MAX_QUARANTINE_GROUP = 100
APART_S = 1.0
"""Seconds that a group of the quarantine waits for messages under way, and then is sent while nothing else is."""
MAX_BYTES_UNDER_WAY = 256 * 2**20
"""Bytes of the jobs under way beyond which no more are claimed; for the jobs of one queue it is half of that."""
POLL_INTERVAL_S = 1.0
"""Seconds between two polls of the store, if nothing asks for one: an earlier process may have left retries in it."""
POLL_MARGIN_S = 0.001
"""Seconds after a retry is due when the store is polled for it: the store rounds times to the microsecond."""


class _Room:
    """Counts messages that are under way, and the bytes of their jobs, against the limits."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.queue_limit = max(1, limit // 2)
        self._messages_by_queue: Counter[str] = Counter()
        self._bytes_by_queue: Counter[str] = Counter()

    @property
    def messages(self) -> int:
        """How many messages are under way."""
        return self._messages_by_queue.total()

    @property
    def free(self) -> int:
        """How many messages more may be under way."""
        return 0 if self._bytes_by_queue.total() >= MAX_BYTES_UNDER_WAY else self.limit - self.messages

    def free_of(self, queue: str) -> int:
        """How many messages more may be under way to a queue."""
        if self._bytes_by_queue[queue] >= MAX_BYTES_UNDER_WAY // 2:
            return 0
        return self.queue_limit - self._messages_by_queue[queue]

    def free_by_queue(self) -> dict[str, int]:
        """`free_of` each queue that messages are under way to."""
        return {queue: self.free_of(queue) for queue in self._messages_by_queue}

    def count(self, queue: str, jobs: Sequence[Job], sign: int) -> None:
        """The messages of jobs to a queue are under way (1), or are not any more (-1)."""
        self._messages_by_queue[queue] += sign * len(jobs)
        self._bytes_by_queue[queue] += sign * sum([job.size_bytes for job in jobs])
        if not self._messages_by_queue[queue]:
            del self._messages_by_queue[queue], self._bytes_by_queue[queue]


class Deliverer(AsyncContextManagerMixin):
    """Owns the deliveries from a store: claims what is due, sends it and records the results. An async context manager.

    A limited number of messages is under way at once, half of it for one queue at most, so that a queue that hangs
    leaves room to the others. A backend that can send many messages at once gets up to a hundred in a call. An attempt
    that takes longer than `send_timeout_s` has failed; a failed one is repeated after a pause, `max_attempts` times in
    all.

    Leaving it waits for attempts under way. In a durable store, what was not delivered stays due for the next start; of
    a store that is not durable, all that is due is sent once more before leaving.

    Quarantined deliveries, which were claimed when a process died, are sent at the start: in groups (see
    `quarantine_group_size`), one after the other, so that a message whose backend ends the process is found and not
    sent again. Nothing else is sent in the first second of a group, in which such a backend probably ends the process.
    Later, and between two groups, others are sent. Where the process ends meanwhile, these are the first group at the
    next start, and leave the quarantine.
    """

    def __init__(
        self,
        backend: QueueBackend,
        store: JobStore,
        *,
        max_attempts: int = 8,
        send_timeout_s: float = SEND_TIMEOUT_S,
        backoff_s: Callable[[int], float] = backoff_with_jitter,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._backend = backend
        self._store = store
        self._max_attempts = max_attempts
        self._send_timeout_s = send_timeout_s
        self._backoff_s = backoff_s
        self._clock = clock or SteadyClock()
        sends_many = isinstance(backend, BatchQueueBackend)
        self._messages_per_call = MESSAGES_PER_CALL if sends_many else 1
        # All mutable state.
        self._room = _Room(MESSAGES_PER_CALL * MAX_BATCH_CALLS if sends_many else MAX_SINGLE_CALLS)
        self._due = Backlog()  # deliveries that may be due in the store
        self._next_poll_at = -math.inf  # when to poll the store without being woken, by the event loop's clock
        self._group = set[str]()  # the ids of the quarantined jobs whose messages are under way
        self._has_quarantine = True  # whether there may be more of them in the store
        self._attempted: Collector[tuple[Job, DeliveryRecord]] = Collector()  # results that are not recorded yet
        self._change = anyio.Event()  # wakes the task that polls
        self._closing = anyio.Event()
        self._task_group: TaskGroup

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with plain_task_group() as self._task_group:
            self._task_group.start_soon(self._record)
            self._task_group.start_soon(self._deliver)
            try:
                yield self
            finally:
                self._closing.set()
                self.wake()

    @property
    def under_way(self) -> int:
        """How many messages are being sent."""
        return self._room.messages

    def wake(self) -> None:
        """Poll the store: deliveries may have become due in it."""
        self._due.add()
        self._change.set()

    async def finish(self, ends: Sequence[JobEnd]) -> list[str]:
        """Store how jobs ended, as `JobStore.finish` does, and have their messages sent. Each end has its `job`.

        Messages that there is room for are claimed in the same step, and sent without being read from the store. Raises
        `JobStoreError`; then nothing is sent.
        """
        messages = [end.job for end in ends if end.job is not None and end.job.delivery_queue]
        sending = self._claim_ended(messages)
        claimed = {job.job_id for job in sending}
        try:
            with anyio.CancelScope(shield=True):  # else what is claimed might not be sent until the next start
                ended = await self._store.finish(ends, claimed)
        except JobStoreError:
            self._release(sending)
            raise
        self._due.add(len(messages) - len(sending))
        if len(ended) < len(ends):
            claimed &= set(ended)
            self._release([job for job in sending if job.job_id not in claimed])
            sending = [job for job in sending if job.job_id in claimed]
        self._start_sending(sending)
        self._change.set()
        return ended

    def _claim_ended(self, ended: Sequence[Job]) -> list[Job]:
        """The jobs among these whose messages there is room for; they count as under way from now on."""
        if self._has_quarantine or self._closing.is_set():
            return []
        claimed = list[Job]()
        for queue, jobs in _by_queue(ended).items():
            taken = jobs[: max(0, min(self._room.free, self._room.free_of(queue)) - self._due.at_most)]
            self._room.count(queue, taken, 1)
            claimed += taken
        return claimed

    async def _deliver(self) -> None:
        """Claim what is due and send it, until closed."""
        while not self._must_stop():
            if self._has_room_for_a_group():
                self._has_quarantine = await self._send_quarantined()
            self._change = anyio.Event()
            is_closing = self._closing.is_set()
            claimed = await self._claim() if self._sleep_s() <= 0 else []
            self._send(claimed)
            if claimed or self._has_room_for_a_group():
                continue
            if is_closing and not self._room.messages:
                break
            with anyio.move_on_after(max(0.0, self._sleep_s())):
                await self._change.wait()
        await self._wait_while(lambda: self._room.messages)
        self._attempted.close()
        if not self._store.durable:
            await self._log_lost()

    async def _log_lost(self) -> None:
        try:
            lost = (await self._store.counts()).deliveries[DeliveryStatus.PENDING]
        except JobStoreError:
            logger.exception("Results may be lost: the store is not durable, and cannot be asked what is left in it")
            return
        if lost:
            logger.error("%d results are lost: their deliveries failed, and the store is not durable", lost)

    def _must_stop(self) -> bool:
        return self._closing.is_set() and self._store.durable

    def _sleep_s(self) -> float:
        """Seconds until the store is to be polled; without room, until there is some."""
        if self._room.free <= 0:
            return math.inf
        return 0.0 if self._due.at_most else self._next_poll_at - anyio.current_time()

    def _has_room_for_a_group(self) -> bool:
        return self._has_quarantine and not self._group and self._room.free > 1

    async def _send_quarantined(self) -> bool:
        """Send a group of the quarantine, a while apart from others; returns whether there may be more."""
        with anyio.move_on_after(APART_S):
            await self._wait_while(lambda: self._room.messages)
        try:
            # Half of the room stays for others, whatever queues the group is for.
            group = await self._store.claim_quarantined_deliveries(min(MAX_QUARANTINE_GROUP, self._room.free // 2))
        except JobStoreError as error:
            await self._wait_for_the_store(error)
            return not self._closing.is_set()
        self._group.update(job.job_id for job in group)
        self._send(group)
        with anyio.move_on_after(APART_S):
            await self._wait_while(lambda: self._group)
        return bool(group)

    async def _wait_for_the_store(self, error: JobStoreError) -> None:
        logger.error("Due deliveries could not be read; trying again in %g s", POLL_INTERVAL_S, exc_info=error)
        with anyio.move_on_after(POLL_INTERVAL_S):
            await self._closing.wait()

    async def _wait_while(self, is_under_way: Callable[[], object]) -> None:
        while is_under_way():
            self._change = anyio.Event()
            await self._change.wait()

    async def _claim(self) -> Sequence[Job]:
        """Claim what is due in the store, as much as there is room for; there is some."""
        if self._next_poll_at <= (now := anyio.current_time()):
            self._due.add()
            self._next_poll_at = now + POLL_INTERVAL_S
        try:
            return await self._due.claim(
                self._room.free,
                partial(
                    self._store.claim_deliveries,
                    now=self._clock(),
                    queue_limits=self._room.free_by_queue(),
                    queue_limit=self._room.queue_limit,
                ),
            )
        except JobStoreError as error:
            await self._wait_for_the_store(error)
            return []

    def _release(self, jobs: Sequence[Job]) -> None:
        """Free the room of jobs, and poll the store for deliveries that there was no room for."""
        for queue, own in _by_queue(jobs).items():
            if self._room.free_of(queue) <= 0:
                self.wake()
            self._room.count(queue, own, -1)
        if self._group:
            self._group.difference_update([job.job_id for job in jobs])
        self._change.set()

    def _send(self, claimed: Sequence[Job]) -> None:
        """Send the messages of claimed jobs; returns at once."""
        for queue, jobs in _by_queue(claimed).items():
            self._room.count(queue, jobs, 1)
        self._start_sending(claimed)

    def _start_sending(self, counted: Sequence[Job]) -> None:
        # A call is for one queue, so that a queue that hangs holds up no message for another one.
        for jobs in _by_queue(counted).values():
            for start in range(0, len(jobs), self._messages_per_call):
                self._task_group.start_soon(self._attempt, jobs[start : start + self._messages_per_call])

    async def _attempt(self, jobs: Sequence[Job]) -> None:
        """Send the messages of some jobs, and have the results recorded."""
        if len(jobs) == 1:
            bind_contextvars(job_id=jobs[0].job_id)  # for what the backend logs, in this task
        sending = Sending(jobs, self._clock())
        timed_out = TimeoutError(f"no answer within {self._send_timeout_s:g} s")
        errors: Sequence[Exception | None] = [timed_out] * len(jobs)
        with anyio.move_on_after(self._send_timeout_s):
            errors = await send_all(self._backend, sending.messages)
        now = self._clock()
        stays = None in errors and keeps_in_process(self._backend, _queue_of(jobs[0]))  # a call is for one queue
        records = [
            after_delivery_attempt(
                job,
                error,
                max_attempts=self._max_attempts,
                now=now,
                backoff_s=self._backoff_s,
                delivered=DeliveryStatus.MEMORY if stays else DeliveryStatus.DELIVERED,
            )
            for job, error in zip(jobs, errors, strict=True)
        ]
        sending.end(records, now)
        self._attempted.add(*zip(jobs, records, strict=True))

    async def _record(self) -> None:
        """Record the results of attempts; those that come during one step are recorded together in the next."""
        while attempted := await self._attempted.collect():
            records = [record for _, record in attempted]
            # Those that are not stored are due again after the next start.
            what = f"The results of {len(records)} deliveries"
            await store_until_closing(what, partial(self._store.record_deliveries, records), self._closing)
            log_failed_attempts([(_queue_of(job), record) for job, record in attempted if record.error is not None])
            due_in_s = [record.due_at - self._clock() for record in records if record.status is DeliveryStatus.PENDING]
            if due_in_s:
                poll_at = anyio.current_time() + max(0.0, min(due_in_s)) + POLL_MARGIN_S
                self._next_poll_at = min(self._next_poll_at, poll_at)
            self._release([job for job, _ in attempted])


_STATES_OF_RESULTS = {
    (DeliveryStatus.UNDELIVERED, False): "is undelivered",
    (DeliveryStatus.UNDELIVERED, True): "are undelivered",
    (DeliveryStatus.PENDING, False): "was not taken and is sent again later",
    (DeliveryStatus.PENDING, True): "were not taken and are sent again later",
}


def log_failed_attempts(records: Sequence[tuple[str, DeliveryRecord]]) -> None:
    """Log failed attempts in one line per queue, not per message, because thousands fail when a queue is down."""
    failed = Counter((queue, record.status) for queue, record in records if record.error is not None)
    last = {(queue, record.status): record for queue, record in records}
    for (queue, status), messages in failed.items():
        record, is_last = last[queue, status], status is DeliveryStatus.UNDELIVERED
        logger.log(
            logging.ERROR if is_last else logging.WARNING,
            "%s for %.80r %s; the last one, of job %s, after attempt %d: %s",
            *("1 result" if messages == 1 else f"{messages} results", shown_queue_name(queue)),
            _STATES_OF_RESULTS[status, messages > 1],
            *(record.job_id, record.attempts, record.error),
            extra={"job_id": record.job_id},
        )


def _by_queue(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    by_queue: defaultdict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_queue[_queue_of(job)].append(job)
    return by_queue


def _queue_of(job: Job) -> str:
    if job.delivery_queue is None:
        raise AssertionError(f"job {job.job_id} names no queue, yet is to be delivered: this is a bug in modalkit")
    return job.delivery_queue
