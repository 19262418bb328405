"""Turns messages into TaskIQ's, and sends them to its broker."""

from collections.abc import Sequence
from functools import lru_cache

import anyio
from redis.asyncio import Redis
from redis.exceptions import RedisError
from taskiq import AsyncBroker, TaskiqMessage
from taskiq.formatters.proxy_formatter import ProxyFormatter
from taskiq.labels import LabelType
from taskiq.utils import maybe_awaitable
from taskiq_redis import RedisStreamBroker

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
    """Sends messages through a broker that was started, as calls of the task `task_name`."""

    def __init__(self, broker: AsyncBroker, task_name: str) -> None:
        self._broker = broker
        self._task_name = task_name
        # A client for as long as the broker keeps its pool: it has another one after each shutdown.
        self._redis_of = lru_cache(1)(lambda pool: Redis(connection_pool=pool))

    async def send(self, messages: Sequence[QueueMessage]) -> list[Exception | None]:
        """Send messages; returns the outcome of each. Raises `QueueBackendError` where none can be sent."""
        broker = self._broker
        # Only the plain way of adding can be done for many messages: no kick of its own, no trimming while adding.
        if isinstance(broker, RedisStreamBroker) and type(broker).kick is RedisStreamBroker.kick and not broker.maxlen:
            return await self._add_all(broker, messages)
        return await outcomes_of(self._kick, messages, anyio.CapacityLimiter(MAX_CONCURRENT_KICKS))

    async def _kick(self, message: QueueMessage) -> None:
        try:
            prepared = await self._prepared(message)
            await self._broker.kick(self._broker.formatter.dumps(prepared))
            await self._tell_sent(prepared)
        except Exception as error:
            raise _not_sent(message, error) from error

    async def _add_all(self, broker: RedisStreamBroker, messages: Sequence[QueueMessage]) -> list[Exception | None]:
        """Add messages to their streams in one request, as `_kick` does for one."""
        outcomes: list[Exception | None] = [None] * len(messages)
        sent: dict[int, TaskiqMessage] = {}
        texts: list[bytes] = []
        for position, message in enumerate(messages):
            try:
                prepared = await self._prepared(message)
                texts.append(self._formatted(prepared))
                sent[position] = prepared
            except Exception as error:  # noqa: BLE001  # a middleware may raise anything, for its own message
                outcomes[position] = _not_sent(message, error)
        streams = [prepared.labels.get("queue_name") or broker.queue_name for prepared in sent.values()]
        try:
            redis = self._redis_of(broker.connection_pool)
            errors = await redis.eval(_ADD, len(streams), *streams, *texts) if sent else []
        except (RedisError, OSError) as error:
            raise QueueBackendError(f"Redis is not known to have taken any message: {describe_error(error)}") from error
        for (position, prepared), error_text in zip(sent.items(), errors, strict=True):
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
        return self._broker.serializer.dumpb(vars(prepared))  # the same, without validating and copying by pydantic

    async def _prepared(self, message: QueueMessage) -> TaskiqMessage:
        """The message as `AsyncKicker.kiq` makes it, after the middlewares."""
        broker = self._broker
        labels = {"queue_name": broker.stream_of(message.queue_name)} if isinstance(broker, ResultBroker) else {}
        # Not validated: all its parts are texts made here.
        prepared = TaskiqMessage.model_construct(
            task_id=message.job_id,
            task_name=self._task_name.replace(QUEUE_NAME, message.queue_name),
            labels=labels,
            labels_types=dict.fromkeys(labels, LabelType.STR.value),
            args=[message.body],
            kwargs={},
        )
        for middleware in broker.middlewares:
            prepared = await maybe_awaitable(middleware.pre_send(prepared))
        return prepared

    async def _tell_sent(self, prepared: TaskiqMessage) -> None:
        for middleware in reversed(self._broker.middlewares):
            await maybe_awaitable(middleware.post_send(prepared))


def _not_sent(message: QueueMessage, error: Exception) -> QueueBackendError:
    return QueueBackendError(f"queue {message.queue_name!r}: {describe_error(error)}")
