"""Turns messages into TaskIQ's, and sends them to its broker."""

import asyncio
from collections.abc import Sequence

import anyio
from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError
from taskiq import AsyncBroker, TaskiqMessage, TaskiqMiddleware
from taskiq.formatters.proxy_formatter import ProxyFormatter
from taskiq.labels import LabelType
from taskiq.utils import maybe_awaitable
from taskiq_redis import RedisStreamBroker
from taskiq_redis.redis_broker import BaseRedisBroker

from modalkit.service.errors import describe_error
from modalkit.service.queue_backends.protocol import QueueBackendError, QueueMessage
from modalkit.service.queue_backends.sending import outcomes_of
from modalkit.service.queue_backends.taskiq_broker import QUEUE_NAME, ResultBroker

MAX_CONCURRENT_KICKS = 64

# KEYS: the stream of each message; ARGV: its text. One command costs redis-py a third of a hundred in a pipeline.
_ADD = """
local errors = {}
for i, stream in ipairs(KEYS) do
  local answer = redis.pcall('XADD', stream, '*', 'data', ARGV[i])
  errors[i] = type(answer) == 'table' and answer.err or false
end
return errors
"""


class TaskSender:
    """Sends messages through a broker, as calls of the task ``task_name``, in one event loop. Starts it if `start`."""

    def __init__(self, broker: AsyncBroker, task_name: str, *, start: bool) -> None:
        self._broker = broker
        self._task_name = task_name
        self._add: AsyncScript | None = None
        # Only the plain way of adding can be done for many messages: no kick of its own, no trimming while adding.
        if isinstance(broker, RedisStreamBroker) and type(broker).kick is RedisStreamBroker.kick and not broker.maxlen:
            self._stream_broker = broker
            self._redis: Redis = Redis(connection_pool=broker.connection_pool)
            self._add = self._redis.register_script(_ADD)
        self._started = not start
        self._needs_shutdown = False
        self._starting = asyncio.Lock()

    async def send(self, messages: Sequence[QueueMessage]) -> list[Exception | None]:
        """Send messages; returns the outcome of each. Raises `QueueBackendError` where none can be sent."""
        async with self._starting:
            if not self._started:
                self._needs_shutdown = True  # also after a start that failed
                try:
                    await self._broker.startup()
                except Exception as error:
                    raise QueueBackendError(f"TaskIQ's broker did not start: {describe_error(error)}") from error
                self._started = True
        if self._add is None:
            return await outcomes_of(self._kick, messages, anyio.CapacityLimiter(MAX_CONCURRENT_KICKS))
        return await self._add_all(self._add, messages)

    async def aclose(self) -> None:
        """Shut the broker down if this sender started it."""
        if self._needs_shutdown:
            self._needs_shutdown = self._started = False
            await self._broker.shutdown()

    async def _kick(self, message: QueueMessage) -> None:
        try:
            prepared = await self._prepared(message)
            await self._broker.kick(self._broker.formatter.dumps(prepared))
            await self._tell_sent(prepared)
        except Exception as error:
            raise _not_sent(message, error) from error

    async def _add_all(self, add: AsyncScript, messages: Sequence[QueueMessage]) -> list[Exception | None]:
        """Add messages to their streams in one request, as `_kick` does for one."""
        outcomes: list[Exception | None] = [None] * len(messages)
        sent: list[tuple[int, TaskiqMessage]] = []
        streams: list[str] = []
        texts: list[bytes] = []
        for position, message in enumerate(messages):
            try:
                prepared = await self._prepared(message)
                texts.append(self._formatted(prepared))
            except Exception as error:  # noqa: BLE001  # a middleware may raise anything, for its own message
                outcomes[position] = _not_sent(message, error)
                continue
            sent.append((position, prepared))
            streams.append(prepared.labels.get("queue_name") or self._stream_broker.queue_name)
        if self._redis.connection_pool is not self._stream_broker.connection_pool:  # the owner restarted the broker
            self._redis = Redis(connection_pool=self._stream_broker.connection_pool)
        try:
            errors = await add(keys=streams, args=texts, client=self._redis) if sent else []
        except (RedisError, OSError) as error:
            raise QueueBackendError(f"Redis is not known to have taken any message: {describe_error(error)}") from error
        for (position, prepared), error_text in zip(sent, errors, strict=True):
            if error_text is not None:
                outcomes[position] = _not_sent(messages[position], RedisError(error_text.decode()))
                continue
            try:
                await self._tell_sent(prepared)
            except Exception as error:  # noqa: BLE001  # as above
                outcomes[position] = _not_sent(messages[position], error)
        return outcomes

    def _formatted(self, prepared: TaskiqMessage) -> bytes:
        if type(self._broker.formatter) is not ProxyFormatter:
            return self._broker.formatter.dumps(prepared).message
        # The same result as its own dumps, without validating and copying by pydantic.
        return self._broker.serializer.dumpb({name: getattr(prepared, name) for name in TaskiqMessage.model_fields})

    async def _prepared(self, message: QueueMessage) -> TaskiqMessage:
        """The message as `AsyncKicker.kiq` makes it, after the middlewares."""
        labels = {}
        if isinstance(self._broker, ResultBroker):
            labels["queue_name"] = self._broker.stream_of(message.queue_name)
        # Not validated: all its parts are texts made here.
        prepared = TaskiqMessage.model_construct(
            task_id=message.job_id,
            task_name=self._task_name.replace(QUEUE_NAME, message.queue_name),
            labels=labels,
            labels_types=dict.fromkeys(labels, LabelType.STR.value),
            args=[message.body],
            kwargs={},
        )
        for middleware in self._broker.middlewares:
            if type(middleware).pre_send is not TaskiqMiddleware.pre_send:
                prepared = await maybe_awaitable(middleware.pre_send(prepared))
        return prepared

    async def _tell_sent(self, prepared: TaskiqMessage) -> None:
        for middleware in reversed(self._broker.middlewares):
            if type(middleware).post_send is not TaskiqMiddleware.post_send:
                await maybe_awaitable(middleware.post_send(prepared))


def stays_in_one_loop(broker: AsyncBroker) -> bool:
    """Whether a broker keeps, after shutdown, connections that are bound to its event loop."""
    return isinstance(broker, BaseRedisBroker) and not isinstance(broker, ResultBroker)


def _not_sent(message: QueueMessage, error: Exception) -> QueueBackendError:
    return QueueBackendError(f"queue {message.queue_name!r}: {describe_error(error)}")
