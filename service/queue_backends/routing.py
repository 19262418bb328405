"""Sends the results for different queues through different backends."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import anyio

from modalkit.batching.task_groups import await_users_code
from modalkit.service.queue_backends.protocol import (
    NamedQueueBackend,
    QueueBackend,
    QueueMessage,
    QueueNameError,
    check_backend,
    keeps_in_process,
)
from modalkit.service.queue_backends.sending import ATTEMPT_S, send_all
from modalkit.service.queue_backends.webhook_urls import shown_queue_name


class RoutingBackend:
    """Sends each message through the backend of the first pattern that its queue's name matches.

    Patterns are those of `fnmatch`, case-sensitive: ``{"ml_*": first, "*": second}``. A name that matches none is
    refused. A backend may have several patterns. `send_timeout_s` limits each call of a backend that has only
    `send_message`; other backends have time limits of their own. Raises `ValueError` if there is no route, and
    `TypeError` for a route to an object that is no backend.
    """

    def __init__(self, routes: Mapping[str, QueueBackend], *, send_timeout_s: float = ATTEMPT_S) -> None:
        if not routes:
            raise ValueError('routes must have at least one entry, as in {"ml_*": backend}')
        for pattern, backend in routes.items():
            check_backend(f"routes[{pattern!r}]", backend)
        if not send_timeout_s > 0:
            raise ValueError(f"send_timeout_s must be above 0, got {send_timeout_s!r}")
        self._routes = dict(routes)
        self._backends = {id(backend): backend for backend in routes.values()}
        self._send_timeout_s = send_timeout_s

    def check_queue_name(self, queue_name: str) -> None:
        """Raise `QueueNameError` for a name that no route matches, or that the backend of its route refuses."""
        backend = self._backend_for(queue_name)
        if isinstance(backend, NamedQueueBackend):
            backend.check_queue_name(queue_name)

    def keeps_in_process(self, queue_name: str) -> bool:
        """Whether the backend of a queue keeps its messages in memory, as `keeps_in_process` says."""
        return keeps_in_process(self._backend_for(queue_name), queue_name)

    async def send_message(self, queue_name: str, message: str) -> bool:
        """Send a JSON text by its route. Raises `QueueNameError`, and the backend's own errors."""
        return await self._backend_for(queue_name).send_message(queue_name, message)

    async def send_messages(self, messages: Sequence[QueueMessage]) -> list[Exception | None]:
        """Send messages by their routes, all backends concurrently; returns the outcome of each message."""
        outcomes: list[Exception | None] = [None] * len(messages)
        positions_by_backend = defaultdict[int, list[int]](list)  # by id(): a backend need not be hashable
        for position, message in enumerate(messages):
            try:
                positions_by_backend[id(self._backend_for(message.queue_name))].append(position)
            except QueueNameError as error:
                outcomes[position] = error

        async def send(backend: QueueBackend, positions: list[int]) -> None:
            own = [messages[position] for position in positions]
            sent = await send_all(backend, own, timeout_s=self._send_timeout_s)
            for position, outcome in zip(positions, sent, strict=True):
                outcomes[position] = outcome

        async with anyio.create_task_group() as task_group:
            for key, positions in positions_by_backend.items():
                task_group.start_soon(send, self._backends[key], positions)
        return outcomes

    async def aclose(self) -> None:
        """Close each backend that has `aclose`, once. Raises their errors together, after the last."""
        errors: list[Exception] = []
        for backend in self._backends.values():
            if hasattr(backend, "aclose"):
                try:
                    await await_users_code(backend.aclose())
                except Exception as error:  # noqa: BLE001  # raised below, once the others are closed
                    errors.append(error)
        if errors:
            raise ExceptionGroup("queue backends could not be closed", errors)

    def _backend_for(self, queue_name: str) -> QueueBackend:
        for pattern, backend in self._routes.items():
            if fnmatchcase(queue_name, pattern):
                return backend
        routes = ", ".join(self._routes)
        raise QueueNameError(
            shown_queue_name(queue_name), f"matches no route; add one to queue_config.routes, which has: {routes}"
        )
