"""Results to TaskIQ: each message runs a task, in a worker process of its own."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from modalkit.pipelines.extras import install_command
from modalkit.service.errors import describe_error
from modalkit.service.queue_backends.protocol import QueueBackendError, QueueMessage, QueueNameError
from modalkit.service.queue_backends.sending import ConnectedBackend

if TYPE_CHECKING:
    from taskiq import AsyncBroker

    from modalkit.service.queue_backends.taskiq_broker import ResultBroker
    from modalkit.service.queue_backends.taskiq_sending import TaskSender

DEFAULT_BROKER_URL = "redis://localhost:6379"
DEFAULT_TASK_NAME = "process_{queue_name}"
MAX_QUEUE_NAME = 256


def make_taskiq_broker(
    url: str = DEFAULT_BROKER_URL,
    queue_names: Sequence[str] = (),
    *,
    task_name: str = DEFAULT_TASK_NAME,
    stream_name: str = "modalkit:{queue_name}",
    group_name: str = "taskiq",
    idle_timeout_s: float = 600.0,
    trim_interval_s: float | None = 10.0,
    timeout_s: float = 5.0,
    max_connections: int = 32,
) -> "ResultBroker":
    """A TaskIQ broker on Redis streams (Redis 6.2 or newer), for workers that handle results and for the sender.

    ``taskiq worker your_module:broker`` runs a task for each of `queue_names`. The name of the task is `task_name`, and
    that of the Redis stream is `stream_name`, both with the queue's name put in; both sides must use the same two. A
    worker does not start while a queue has no task. Each `group_name` gets every message once, from the oldest that
    the stream still holds.

    A message is acknowledged when its task has ended, with or without an error, and is given to another worker after
    `idle_timeout_s`. So it is delivered at least once, and a task that takes longer runs twice at the same time. Every
    `trim_interval_s` seconds, messages that all groups have acknowledged are removed from the stream (None: only by
    the broker's `trim_acknowledged`). When Redis does not answer within `timeout_s`, sending raises an error, and a
    worker waits until Redis is back. `url` may have ``rediss://``, a user and a password.

    Raises `QueueBackendError` if taskiq or taskiq-redis is not installed, and `ValueError` for other bad arguments.
    """
    try:
        from modalkit.service.queue_backends.taskiq_broker import ResultBroker
    except ImportError as error:
        raise _not_installed(error) from error
    return ResultBroker(
        url,
        queue_names,
        task_name=task_name,
        stream_name=stream_name,
        group_name=group_name,
        idle_timeout_s=idle_timeout_s,
        trim_interval_s=trim_interval_s,
        timeout_s=timeout_s,
        max_connections=max_connections,
    )


class TaskIQBackend(ConnectedBackend):
    """Sends each result to TaskIQ, as the one argument of the task ``process_{queue_name}``.

    A separate worker that has a task of that name runs it (`make_taskiq_broker`, which also makes the broker here, from
    `broker_url`). `broker` is a TaskIQ broker of your own instead, such as an `InMemoryBroker` in tests; it gets all
    messages in its one queue, with its own guarantees. The job's id is the task's. Over Redis streams many messages go
    in one request, over other brokers several at a time.

    The first message starts the broker, `aclose` shuts it down, and the next message starts it again, even in another
    event loop; only taskiq-redis's own brokers stay in one event loop. With ``start=False`` your code starts and shuts
    it down. Needs the extra ``taskiq``, and asyncio. Raises `QueueBackendError` where either is missing.
    """

    _needs_asyncio = True

    def __init__(
        self,
        broker_url: str | None = None,
        *,
        broker: "AsyncBroker | None" = None,
        task_name: str | None = None,
        start: bool = True,
    ) -> None:
        if broker is not None and broker_url is not None:
            raise ValueError("give TaskIQBackend a broker_url or a broker, not both")
        if broker is None:
            broker = make_taskiq_broker(broker_url or DEFAULT_BROKER_URL, task_name=task_name or DEFAULT_TASK_NAME)
        try:
            from taskiq_redis.redis_broker import BaseRedisBroker

            from modalkit.service.queue_backends.taskiq_broker import ResultBroker
            from modalkit.service.queue_backends.taskiq_sending import TaskSender
        except ImportError as error:
            raise _not_installed(error) from error
        if isinstance(broker, ResultBroker):
            if task_name not in (None, broker.task_name):
                raise ValueError(f"the broker's task_name is {broker.task_name!r}: give {task_name!r} to it instead")
            task_name = broker.task_name
        else:
            self._stays_in_one_loop = isinstance(broker, BaseRedisBroker)  # which keeps its connections at a shutdown
        self.broker: AsyncBroker = broker
        """The broker that messages are sent through."""
        self._sender = TaskSender(broker, task_name or DEFAULT_TASK_NAME)
        self._start = start

    def check_queue_name(self, queue_name: str) -> None:
        """Raise `QueueNameError` for a name that no task and no Redis key can have."""
        if not 1 <= len(queue_name) <= MAX_QUEUE_NAME or not queue_name.isprintable():
            raise QueueNameError(queue_name, f"a TaskIQ queue's name has 1 to {MAX_QUEUE_NAME} printable characters")

    async def send_messages(self, messages: Sequence[QueueMessage]) -> list[Exception | None]:
        """Send messages; returns the outcome of each. Raises `QueueBackendError` where none can be sent."""
        sender: TaskSender = await self._connection().get()
        return await sender.send(messages)

    async def _connect(self, stack: AsyncExitStack) -> "TaskSender":
        if self._start:
            stack.push_async_callback(self.broker.shutdown)
            try:
                await self.broker.startup()
            except Exception as error:
                raise QueueBackendError(f"TaskIQ's broker did not start: {describe_error(error)}") from error
        return self._sender


def _not_installed(error: ImportError) -> QueueBackendError:
    return QueueBackendError(f"TaskIQBackend needs taskiq and taskiq-redis ({error}): {install_command('taskiq')}")
