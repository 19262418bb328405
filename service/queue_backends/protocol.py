"""The interface of queue backends: what each must have, and what delivery also uses where it is there."""

import hashlib
import inspect
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from modalkit.batching.errors import users_error
from modalkit.service.errors import ServiceError

logger = logging.getLogger(__name__)


class QueueBackendError(ServiceError):
    """The root of the errors of modalkit's queue backends."""


class NotSentError(QueueBackendError):
    """Raised when a message was not sent at all, because others took too long: it is sent later, and no attempt."""


class UndeliverableError(QueueBackendError):
    """Raised when a message was refused for a reason that no later attempt can change, such as its size."""


class QueueNameError(UndeliverableError):
    """Raised for a queue name that its backend can never send to; `field` is the one of a request that has it."""

    def __init__(self, queue_name: str, problem: str, *, field: str | None = None) -> None:
        super().__init__(f"{'' if field is None else f'{field}: '}queue {queue_name!r}: {problem}")
        self.queue_name = queue_name
        self.problem = problem
        self.field = field


@dataclass(frozen=True, slots=True)
class QueueMessage:
    """A message for a queue. `body` is a JSON text."""

    queue_name: str
    body: str
    job_id: str
    """The same at each attempt, so that a queue or a receiver can drop duplicates."""
    traceparent: str | None = None
    """The trace that the message belongs to, as W3C's header has it."""
    ended_at: float | None = None
    """When the job ended, in Unix seconds. One that runs once more ends again, and sends a second message."""


@runtime_checkable
class QueueBackend(Protocol):
    """Sends messages to queues; any object with this method will do.

    Optional methods: `send_messages` (`BatchQueueBackend`), `check_queue_name` (`NamedQueueBackend`), and
    ``async def aclose()``, which is called on a backend that the configuration made. Code that makes a backend itself
    closes it.
    """

    async def send_message(self, queue_name: str, message: str) -> bool:
        """Send a JSON text. After False or an exception it is sent again later, unless that is `UndeliverableError`.

        `NotSentError` makes it no attempt. Called concurrently, and cancelled after a time limit. After a crash a
        message may be sent a second time, with the same ``job_id`` in it.
        """
        ...


@runtime_checkable
class BatchQueueBackend(QueueBackend, Protocol):
    """A queue backend that sends many messages, to any queues, in one call."""

    async def send_messages(self, messages: Sequence[QueueMessage]) -> Sequence[Exception | None]:
        """Send messages; returns, in the same order, None for each accepted message and an error for each other one.

        After an exception all of them count as not sent. Called concurrently, and cancelled after a time limit; then
        all count as not sent too, so a backend should have a shorter time limit for each message.
        """
        ...


@runtime_checkable
class NamedQueueBackend(QueueBackend, Protocol):
    """A queue backend that refuses queue names."""

    def check_queue_name(self, queue_name: str) -> None:
        """Raise `QueueNameError` for a name that this backend can never send to; called before a job is accepted."""
        ...


def check_backend(name: str, backend: object) -> None:
    """Raise `TypeError` for what is no backend, such as a class or one whose `send_message` is synchronous."""
    is_class = isinstance(backend, type)  # which has the method too, as a function
    if is_class or not (isinstance(backend, QueueBackend) and inspect.iscoroutinefunction(backend.send_message)):
        given = f"the class {backend.__name__}" if isinstance(backend, type) else f"a {type(backend).__name__}"
        raise TypeError(
            f"{name} must be a backend with a method 'async send_message(queue_name, message) -> bool', not {given}"
        )


def keeps_in_process(backend: QueueBackend, queue_name: str) -> bool:
    """Whether messages to this queue stay in the memory of the process, by the backend's optional method of this name.

    Then a delivery counts as `memory` instead of `delivered`. What that method raises is logged, and means that they
    do not.
    """
    asked = getattr(backend, "keeps_in_process", None)
    try:
        return asked is not None and bool(asked(queue_name))
    except BaseException as error:
        failed = "%s.keeps_in_process failed; the result counts as delivered"
        logger.exception(failed, type(backend).__name__, exc_info=users_error(error))
        return False


_SAFE = re.compile(r"[A-Za-z0-9_-]{1,128}")


def safe_id(job_id: str) -> str:
    """A job's id in characters that every queue and header accepts: the id itself, or else its SHA-256."""
    return job_id if _SAFE.fullmatch(job_id) else id_of_text(job_id)


def id_of_text(text: str) -> str:
    """The id of a message without a job's id: the SHA-256 of its text, in hexadecimal."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
