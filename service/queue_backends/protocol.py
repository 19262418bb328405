"""What the delivery of results needs of a queue, and what it can use where a queue offers more."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from modalkit.service.errors import ServiceError


class QueueBackendError(ServiceError):
    """The root of the errors that a queue backend of ours raises."""


class UndeliverableError(QueueBackendError):
    """Raised when a message was refused for a reason that no later attempt can change, such as its size."""


class QueueNameError(UndeliverableError):
    """Raised when a queue's name is none that its backend could ever send to."""

    def __init__(self, queue_name: str, problem: str) -> None:
        super().__init__(f"queue {queue_name!r}: {problem}")
        self.queue_name = queue_name


@dataclass(frozen=True, slots=True)
class QueueMessage:
    """A message on its way to a queue. `body` is a JSON text."""

    queue_name: str
    body: str
    job_id: str
    """The same at each attempt, so that a queue which can drop duplicates has something to tell them by."""


@runtime_checkable
class QueueBackend(Protocol):
    """Sends messages to queues; any object with this method will do.

    It may have more, which is then used: `send_messages` (see `BatchQueueBackend`), and `check_queue_name` (see
    `NamedQueueBackend`). ``async def aclose()`` is called where the configuration made the backend; whoever makes one
    in code closes it.
    """

    async def send_message(self, queue_name: str, message: str) -> bool:
        """Send a JSON text; False or an exception means that it was not taken, and is tried again later.

        Called concurrently, and cancelled when it takes too long. After a crash a message may come a second time: its
        ``job_id`` tells. `UndeliverableError` says that there is no use in trying again.
        """
        ...


@runtime_checkable
class BatchQueueBackend(QueueBackend, Protocol):
    """A queue backend that sends many messages, to any queues, for less than the price of each."""

    async def send_messages(self, messages: Sequence[QueueMessage]) -> Sequence[Exception | None]:
        """Send messages; returns, in the same order, None for each that was taken and its error for each other.

        An exception means that none of them is known to have been taken. Called concurrently, and cancelled when it
        takes too long: then nobody learns what became of any of them, so a backend does well to bound its own attempts.
        """
        ...


@runtime_checkable
class NamedQueueBackend(QueueBackend, Protocol):
    """A queue backend that can tell from a name alone that it could never send there."""

    def check_queue_name(self, queue_name: str) -> None:
        """Raise `QueueNameError` for a name that can be no queue of this backend; called before a job is accepted."""
        ...


_SAFE = re.compile(r"[A-Za-z0-9_-]{1,128}")


def safe_id(job_id: str) -> str:
    """A job's id in characters that every queue and header accepts: the id itself, or else its SHA-256."""
    return job_id if _SAFE.fullmatch(job_id) else id_of_text(job_id)


def id_of_text(text: str) -> str:
    """The id of a message without a job's id: the SHA-256 of its text, in hexadecimal."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
