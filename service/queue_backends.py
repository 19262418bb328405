"""Where the results of jobs are sent: the protocol, and queues in memory."""

from collections import defaultdict, deque
from typing import Protocol, runtime_checkable

import anyio

from service.errors import ServiceError


class QueueEmptyError(ServiceError):
    """Raised when a message is taken, without waiting, from a queue that has none."""


@runtime_checkable
class QueueBackend(Protocol):
    """Sends messages to queues; any object with this method will do."""

    async def send_message(self, queue_name: str, message: str) -> bool:
        """Send a JSON text; False or an exception means that it was not taken, and is tried again later.

        Called concurrently. After a crash a message may come a second time: its ``job_id`` tells.
        """
        ...


class InMemoryBackend:
    """Queues in this process: for tests, and for results that the same program reads.

    A queue exists once something was sent to it, and holds at most `max_messages_per_queue`: when it is full, messages
    are declined, never dropped.
    """

    def __init__(self, max_messages_per_queue: int = 100_000) -> None:
        if max_messages_per_queue < 1:
            raise ValueError(f"max_messages_per_queue must be at least 1, got {max_messages_per_queue!r}")
        self._limit = max_messages_per_queue
        self._queues: dict[str, deque[str]] = {}
        self._receivers: defaultdict[str, deque[anyio.Event]] = defaultdict(deque)

    async def send_message(self, queue_name: str, message: str) -> bool:
        """Put a message at the end of a queue; False when the queue is full."""
        queue = self._queues.setdefault(queue_name, deque())
        if len(queue) >= self._limit:
            return False
        queue.append(message)
        self._wake_one(queue_name)
        return True

    def receive_nowait(self, queue_name: str) -> str:
        """Take the oldest message of a queue. Raises `QueueEmptyError`."""
        queue = self._queues.get(queue_name)
        if not queue:
            raise QueueEmptyError(f"queue {queue_name!r} is empty")
        return queue.popleft()

    async def receive(self, queue_name: str) -> str:
        """Take the oldest message of a queue, once there is one. A cancelled call takes none."""
        while not self.depth(queue_name):
            arrived = anyio.Event()
            self._receivers[queue_name].append(arrived)
            try:
                await arrived.wait()
            except BaseException:
                if arrived.is_set():
                    self._wake_one(queue_name)  # what woke this receiver is for the next one
                else:
                    self._receivers[queue_name].remove(arrived)
                raise
        return self.receive_nowait(queue_name)

    def messages(self, queue_name: str) -> list[str]:
        """The messages in a queue, the oldest first; they stay there."""
        return list(self._queues.get(queue_name, ()))

    def queue_names(self) -> list[str]:
        """The queues that something was sent to, in alphabetical order."""
        return sorted(self._queues)

    def depth(self, queue_name: str) -> int:
        """How many messages a queue holds."""
        return len(self._queues.get(queue_name, ()))

    def clear(self) -> None:
        """Forget all queues and their messages."""
        self._queues.clear()

    def _wake_one(self, queue_name: str) -> None:
        if receivers := self._receivers.get(queue_name):
            receivers.popleft().set()
