"""The rules for the queues that a job may name."""

import fnmatch
from collections.abc import Sequence

from modalkit.batching.errors import users_error
from modalkit.service.errors import ServiceError, describe_error
from modalkit.service.queue_backends import NamedQueueBackend, QueueBackend, QueueNameError
from modalkit.service.queue_backends.webhook_urls import shown_queue_name

MAX_KNOWN_QUEUES = 1000


class QueueNotAllowedError(ServiceError):
    """Raised when a job names a queue that ``allowed_queues`` does not cover."""

    def __init__(self, field: str, queue_name: str, allowed: Sequence[str]) -> None:
        super().__init__(
            f"{field}: queue {queue_name!r} is not allowed; allowed are: {', '.join(allowed) or 'none'} "
            "(queue_config.allowed_queues)"
        )
        self.field = field
        self.queue_name = queue_name


class QueueRules:
    """Checks names of queues against the patterns of `allowed_queues` and by the backend; remembers allowed names."""

    def __init__(self, allowed_queues: Sequence[str], backend: QueueBackend | None) -> None:
        self._allowed_queues = allowed_queues
        self._backend = backend
        self._known_queues: set[str | None] = {None}

    def check(self, success_queue: str | None, failure_queue: str | None) -> None:
        """Raise `QueueNotAllowedError` or `QueueNameError` for a queue that may not or cannot be sent to."""
        if success_queue in self._known_queues and failure_queue in self._known_queues:
            return
        for field, queue_name in (("success_queue", success_queue), ("failure_queue", failure_queue)):
            if queue_name is None:
                continue
            if not any(fnmatch.fnmatchcase(queue_name, pattern) for pattern in self._allowed_queues):
                raise QueueNotAllowedError(field, queue_name, self._allowed_queues)
            if isinstance(self._backend, NamedQueueBackend):
                _check_by(self._backend, field, queue_name)
            if len(self._known_queues) < MAX_KNOWN_QUEUES:
                self._known_queues.add(queue_name)


def _check_by(backend: NamedQueueBackend, field: str, queue_name: str) -> None:
    try:
        backend.check_queue_name(queue_name)
    except QueueNameError as error:
        raise QueueNameError(error.queue_name, error.problem, field=field) from error
    except BaseException as error:
        reason = describe_error(users_error(error))
        raise QueueNameError(
            shown_queue_name(queue_name), f"its backend cannot check the name: {reason}", field=field
        ) from error
