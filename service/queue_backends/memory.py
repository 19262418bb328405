"""Queues in this process: for tests, and for results that the same program reads."""

import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from sys import getsizeof

import anyio

from modalkit.service.queue_backends.protocol import QueueBackendError, QueueMessage

logger = logging.getLogger(__name__)


class QueueEmptyError(QueueBackendError):
    """Raised by `receive_nowait` when the queue is empty."""


class InMemoryBackend:
    """Queues in this process: for tests, and for results that the same program reads.

    The first message to a queue creates it. A queue holds at most `max_messages_per_queue` messages; further ones
    remove the oldest. There are at most `max_queues` queues; a further one removes the queue whose last message is the
    oldest. All messages together take at most `max_bytes` of memory; a further one removes others, of that queue first.
    So memory is limited even where no code reads. The first removals are logged. Without `is_read`, no code is known to
    read them, as with the configured backend: deliveries then count as `memory`.
    """

    def __init__(
        self,
        max_messages_per_queue: int = 100_000,
        *,
        max_queues: int = 1000,
        max_bytes: int = 128 * 2**20,
        is_read: bool = True,
    ) -> None:
        limits = {"max_messages_per_queue": max_messages_per_queue, "max_queues": max_queues, "max_bytes": max_bytes}
        for name, limit in limits.items():
            if limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit!r}")
        self._max_messages = max_messages_per_queue
        self._max_queues = max_queues
        self._max_bytes = max_bytes
        self._is_read = is_read
        # All mutable state: the queues, the one with the newest message last; the bytes of their messages; the queues
        # whose removals were logged, and whether others were; what wakes the receivers that wait.
        self._queues: OrderedDict[str, deque[str]] = OrderedDict()
        self._bytes = 0
        self._dropping: set[str] = set()
        self._drops_queues = self._drops_bytes = False
        self._arrivals: dict[str, anyio.Event] = {}

    def keeps_in_process(self, queue_name: str) -> bool:  # noqa: ARG002  # the same for all queues
        """Whether no code is known to read the messages of this queue."""
        return not self._is_read

    async def send_message(self, queue_name: str, message: str) -> bool:
        """Put a message at the end of a queue; always accepted."""
        queue = self._queues.setdefault(queue_name, deque())
        self._queues.move_to_end(queue_name)
        queue.append(message)
        self._bytes += getsizeof(message)
        if len(queue) > self._max_messages:
            self._take(queue)
            if queue_name not in self._dropping:
                self._dropping.add(queue_name)
                logger.warning("Queue %.80r in memory is full: from now on its oldest messages are dropped", queue_name)
        self._drop_bytes()
        if len(self._queues) > self._max_queues:
            dropped, messages = self._queues.popitem(last=False)
            self._bytes -= sum(map(getsizeof, messages))
            self._dropping.discard(dropped)
            if not self._drops_queues:
                self._drops_queues = True
                logger.warning("There are more than %d queues in memory: old ones are dropped now", self._max_queues)
        if arrived := self._arrivals.pop(queue_name, None):
            arrived.set()
        return True

    async def send_messages(self, messages: Sequence[QueueMessage]) -> list[None]:
        """Put messages at the ends of their queues; all are always accepted."""
        for message in messages:
            await self.send_message(message.queue_name, message.body)
        return [None] * len(messages)

    def receive_nowait(self, queue_name: str) -> str:
        """Remove and return the oldest message of a queue. Raises `QueueEmptyError`."""
        queue = self._queues.get(queue_name)
        if not queue:
            raise QueueEmptyError(f"queue {queue_name!r} is empty")
        message = self._take(queue)
        if not queue:  # else it would take the place of one with messages
            del self._queues[queue_name]
            self._dropping.discard(queue_name)
        return message

    async def receive(self, queue_name: str) -> str:
        """Wait for a message, then remove and return the oldest one. A cancelled call removes none."""
        while not self.depth(queue_name):
            arrived = self._arrivals.setdefault(queue_name, anyio.Event())
            try:
                await arrived.wait()
            finally:
                if self._arrivals.get(queue_name) is arrived:  # it was cancelled; the others make another event
                    self._arrivals.pop(queue_name).set()
        return self.receive_nowait(queue_name)

    def messages(self, queue_name: str) -> list[str]:
        """The messages in a queue, the oldest first; they stay there."""
        return list(self._queues.get(queue_name, ()))

    def queue_names(self) -> list[str]:
        """The names of the queues that hold messages, in alphabetical order."""
        return sorted(self._queues)

    def depth(self, queue_name: str) -> int:
        """The number of messages in a queue."""
        return len(self._queues.get(queue_name, ()))

    def clear(self) -> None:
        """Remove all queues and their messages."""
        self._queues.clear()
        self._bytes = 0
        self._dropping.clear()

    def _take(self, queue: deque[str]) -> str:
        message = queue.popleft()
        self._bytes -= getsizeof(message)
        return message

    def _drop_bytes(self) -> None:
        """Drop messages while all take too many bytes, but not the newest one."""
        while self._bytes > self._max_bytes:
            name, queue = next(iter(self._queues.items()))
            if len(self._queues) == len(queue) == 1:
                return
            if not self._drops_bytes:
                self._drops_bytes = True
                logger.warning("The queues in memory hold %d bytes: old messages are dropped now", self._max_bytes)
            self._take(queue)
            if not queue:
                del self._queues[name]
                self._dropping.discard(name)
