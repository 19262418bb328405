"""TaskIQ's broker on Redis streams, changed so that neither side loses results."""

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic_core import from_json, to_json
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError, ResponseError
from taskiq import AckableMessage, TaskiqMessage, TaskiqMiddleware
from taskiq.abc.serializer import TaskiqSerializer
from taskiq_redis import RedisStreamBroker

from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.errors import describe_error
from modalkit.service.queue_backends.protocol import QueueBackendError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

QUEUE_NAME = "{queue_name}"
ENTRIES_PER_READ = 20  # few, because messages that wait in a worker count as being handled there
ENTRIES_PER_CLAIM = 100
MAX_READ_MS = 2000
MAX_RECONNECT_S = 2.0
MAX_CLAIM_INTERVAL_S = 30.0
BEGINNING = "0-0"

# One script, so that no group can start reading, and no entry become pending, between the look and the cut. Ids are
# compared as texts of one length: Lua's numbers do not hold 64 bits.
_TRIM = """
local function comparable(id)
  return (id:gsub('%d+', function(digits) return ('0'):rep(20 - #digits) .. digits end))
end
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local needed = {}
for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  table.insert(needed, group['last-delivered-id'])
  table.insert(needed, redis.call('XPENDING', KEYS[1], group['name'])[2] or nil)
end
table.sort(needed, function(a, b) return comparable(a) < comparable(b) end)
return needed[1] and redis.call('XTRIM', KEYS[1], 'MINID', '~', needed[1]) or 0
"""

# Makes what a worker has not acknowledged claimable at once; without that, it leaves the group. Deleting a consumer
# deletes what is pending for it, so this is one script as well. ARGV: the group, the consumer, the idle time in ms.
_GIVE_BACK = """
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 10000, ARGV[2])
if #pending == 0 then return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2]) end
for _, entry in ipairs(pending) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1], 'IDLE', ARGV[3], 'JUSTID')
end
"""


class _Labels(TaskiqMiddleware):
    """Gives messages their stream when they are sent, and the labels of their task when they are run."""

    broker: "ResultBroker"

    def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        """Add the stream of its queue to a message without one, as sent by `kiq`, a retry or a schedule."""
        found = self.broker.task_pattern.fullmatch(message.task_name)
        if found and found.lastindex and "queue_name" not in message.labels:
            message.labels["queue_name"] = self.broker.stream_of(found[1])
        return message

    def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Add the labels of ``@broker.task(...)``: TaskIQ takes labels from the sender alone, which has no tasks."""
        if task := self.broker.find_task(message.task_name):
            message.labels = {**task.labels, **message.labels}
        return message


class _Serializer(TaskiqSerializer):
    """Writes and reads the JSON of TaskIQ's own serializer, ten times as fast."""

    def dumpb(self, value: Any) -> bytes:
        return to_json(value, inf_nan_mode="constants")

    def loadb(self, value: bytes) -> Any:
        return from_json(value)


class ResultBroker(RedisStreamBroker):
    """A `RedisStreamBroker` with a stream for each queue, which loses and blocks no results (`make_taskiq_broker`).

    Differences from its base class:

    - A worker reads its streams from their beginning, and does not start before each queue has a task.
    - A message for a task that the worker does not have stays in the stream, unacknowledged; the base class loses it.
    - A worker reads on after Redis was away, refused to answer or lost its groups; the base class ends the process.
    - A deleted entry does not end the worker.
    - Messages of dead workers are claimed at intervals, from all pending ones; the base class looks through the first
      thousand after each read.
    - At shutdown a worker gives back the messages that it has not finished.
    - Messages that all groups have acknowledged are trimmed.
    - After `shutdown` it can be started again, even in another event loop.
    """

    def __init__(
        self,
        url: str,
        queue_names: Sequence[str],
        *,
        task_name: str,
        stream_name: str,
        group_name: str,
        idle_timeout_s: float,
        trim_interval_s: float | None,
        timeout_s: float,
        max_connections: int,
    ) -> None:
        if isinstance(queue_names, str):
            raise TypeError(f"queue_names must be a list of names, as in [{queue_names!r}], not a text")
        if QUEUE_NAME not in stream_name:
            raise ValueError(f"stream_name must contain {QUEUE_NAME}, or queues would share a stream: {stream_name!r}")
        for name, seconds in (("idle_timeout_s", idle_timeout_s), ("timeout_s", timeout_s)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, got {seconds!r}")
        _check_url(url)
        self.queue_names = tuple(dict.fromkeys(queue_names))
        self.task_name = task_name
        self.task_pattern = re.compile(re.escape(task_name).replace(re.escape(QUEUE_NAME), "(.+)", 1), re.DOTALL)
        self._stream_name = stream_name
        self._streams = [self.stream_of(queue_name) for queue_name in self.queue_names]
        super().__init__(
            url,
            # The stream of tasks that belong to no queue, such as a worker's own.
            queue_name=self._streams[0] if self._streams else "modalkit",
            consumer_group_name=group_name,
            consumer_id="0",
            idle_timeout=round(idle_timeout_s * 1000),
            # So that a waiting read ends before the socket's timeout.
            xread_block=max(1, min(MAX_READ_MS, round(timeout_s * 500))),
        )
        self._new_pool = partial(
            BlockingConnectionPool.from_url,
            url,
            max_connections=max_connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            socket_keepalive=True,
            protocol=2,
            # Senders retry later; these two retries are for a server that restarts.
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.1), 2),
        )
        self._connect()
        if self.connection_pool.connection_kwargs["protocol"] != 2:
            raise ValueError("taskiq-redis reads protocol 2 only: leave protocol= out of the broker's URL")
        self._trim_interval_s = trim_interval_s
        self.serializer = _Serializer()
        self.add_middlewares(_Labels())

    def stream_of(self, queue_name: str) -> str:
        """The Redis key of a queue's stream."""
        return self._stream_name.replace(QUEUE_NAME, queue_name)

    async def startup(self) -> None:
        """Create the consumer groups of the queues. Raises `QueueBackendError` in a worker that lacks a task."""
        if self.is_worker_process:
            self._check_tasks()
        await super().startup()

    async def shutdown(self) -> None:
        """Close the connections; a worker first gives back the messages that it has not finished."""
        if self.is_worker_process:
            try:
                for stream in self._streams:
                    group, consumer, idle_ms = self.consumer_group_name, self.consumer_name, self.idle_timeout
                    await self._redis.eval(_GIVE_BACK, 1, stream, group, consumer, idle_ms)
            except RedisError as error:
                logger.warning("Unfinished messages wait for %g s: %s", self.idle_timeout / 1000, error)
        await super().shutdown()
        self._connect()  # a pool stays bound to the event loop in which it first waited

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """Yield messages: those of workers that died, and new ones."""
        claim_interval_s = min(MAX_CLAIM_INTERVAL_S, self.idle_timeout / 4000)
        claim_at = trim_at = 0.0  # on the monotonic clock
        searched_to = dict.fromkeys(self._streams, BEGINNING)
        while True:
            if time.monotonic() >= claim_at:
                for stream in self._streams:
                    claim = partial(self._claim, stream, searched_to[stream])
                    searched_to[stream], messages = await self._until_answered(claim)
                    for message in messages:
                        yield message
                if all(position == BEGINNING for position in searched_to.values()):
                    claim_at = time.monotonic() + claim_interval_s
            for message in await self._until_answered(partial(self._read, claim_at)):
                yield message
            if self._trim_interval_s is not None and time.monotonic() >= trim_at:
                trim_at = time.monotonic() + self._trim_interval_s
                try:
                    for queue_name in self.queue_names:
                        await self.trim_acknowledged(queue_name)
                except RedisError as error:
                    logger.warning("The streams could not be trimmed; retrying later: %s", describe_error(error))

    async def trim_acknowledged(self, queue_name: str) -> int:
        """Remove the oldest entries of a queue's stream, up to the first that some group has not acknowledged.

        Returns their number. Entries are removed by the hundred, so up to a hundred acknowledged ones stay. A group
        that is no longer used prevents all removal: ``XGROUP DESTROY`` it.
        """
        removed = 0
        while more := await self._redis.eval(_TRIM, 1, self.stream_of(queue_name)):
            removed += int(more)
        return removed

    def _connect(self) -> None:
        self.connection_pool = self._new_pool()
        self._redis: Any = Redis(connection_pool=self.connection_pool)  # its types do not tell str from bytes

    def _check_tasks(self) -> None:
        if not self.queue_names:
            raise QueueBackendError(
                'this broker was made for no queue; name those of the worker: make_taskiq_broker(url, ["my_results"])'
            )
        tasks = self.get_all_tasks()
        for queue_name in self.queue_names:
            task_name = self.task_name.replace(QUEUE_NAME, queue_name)
            if task_name not in tasks:
                raise QueueBackendError(
                    f"queue {queue_name!r} has no task: write @broker.task(task_name={task_name!r}) in a module that "
                    f"the worker imports, or do not name the queue; there are: {', '.join(tasks) or 'none'}"
                )

    async def _declare_consumer_group(self) -> None:  # the base class ignores every error of Redis
        for stream in self._streams:
            try:
                await self._redis.xgroup_create(stream, self.consumer_group_name, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def _until_answered(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Ask Redis until it answers; creates the groups again if Redis has lost them."""
        groups_are_lost = False
        attempt = 0
        while True:
            try:
                if groups_are_lost:
                    await self._declare_consumer_group()
                    groups_are_lost = False
                answer = await ask()
            except RedisError as error:
                # It is away, full, read-only in a failover, or lacks replicas. Ending would kill the running tasks.
                groups_are_lost |= str(error).startswith("NOGROUP")
                problem = "has lost the group, and maybe messages" if groups_are_lost else "gives no messages"
                logger.warning("Redis %s; retrying: %s", problem, describe_error(error))
            else:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # Until Python 3.12, asyncio.wait_for (in redis-py) can lose a cancellation: no worker would stop.
                    raise asyncio.CancelledError
                return answer
            attempt += 1
            await asyncio.sleep(backoff_with_jitter(attempt, first_s=0.1, longest_s=MAX_RECONNECT_S, factor=2))

    async def _claim(self, stream: str, start_id: str) -> tuple[str, list[AckableMessage]]:
        """Claim messages that were idle in another worker for too long: it died, or is slow. Also: where to go on."""
        position, entries, *_ = await self._redis.xautoclaim(
            stream, self.consumer_group_name, self.consumer_name, self.idle_timeout, start_id, ENTRIES_PER_CLAIM
        )
        return position.decode(), self._messages(stream, entries)

    async def _read(self, claim_at: float) -> list[AckableMessage]:
        streams = dict.fromkeys(self._streams, ">")
        block_ms = max(1, min(self.block, round((claim_at - time.monotonic()) * 1000)))
        answer = await self._redis.xreadgroup(
            self.consumer_group_name, self.consumer_name, streams, ENTRIES_PER_READ, block_ms
        )
        return [message for stream, entries in answer for message in self._messages(stream.decode(), entries)]

    def _messages(self, stream: str, entries: Iterable[tuple[Any, dict[bytes, bytes]]]) -> list[AckableMessage]:
        messages = []
        for entry_id, fields in entries:
            if not entry_id:
                logger.error("A message in stream %r was deleted before it was acknowledged", stream)
            elif problem := self._problem(fields):
                # TaskIQ's receiver would acknowledge it.
                logger.error("Entry %s stays in stream %r: it %s", entry_id.decode(), stream, problem)
            else:
                acknowledge = partial(self._redis.xack, stream, self.consumer_group_name, entry_id)
                messages.append(AckableMessage(data=fields[b"data"], ack=acknowledge))
        return messages

    def _problem(self, fields: dict[bytes, bytes]) -> str | None:
        """Why this worker cannot run a message, or None if it can."""
        try:
            task_name = self.formatter.loads(fields[b"data"]).task_name
        except Exception:  # noqa: BLE001  # whatever the formatter raises means the same
            return "is no message of TaskIQ's"
        return None if self.find_task(task_name) else f"is for the task {task_name!r}, which this worker does not have"


def _check_url(url: str) -> None:
    """Raise `ValueError`, without the password, for a URL with which no connection can be made."""
    if problem := _problem_of_url(url):
        shown = re.sub(r"^(\w+://)?.*@", r"\1***@", url, flags=re.DOTALL).partition("?")[0]
        raise ValueError(f"broker_url {shown!r}: {problem}; an example is redis://localhost:6379/0")


def _problem_of_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # whose text may have a part of the password
        return "the port must be a number, and in a password / ? # and @ must be written as %2F %3F %23 and %40"
    if parts.scheme not in ("redis", "rediss"):
        return "it must begin with redis:// or rediss://"
    if not re.fullmatch(r"/?[0-9]*/?", parts.path):
        return "after the host, it may have the number of a database only"
    try:
        BlockingConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]  # opened later
    except (TypeError, ValueError) as error:
        return str(error)
    return None
