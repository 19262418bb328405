"""What the tests of the contract need of a queue backend and of the server behind it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from modalkit.service.queue_backends import QueueBackend


@dataclass(frozen=True)
class BackendUnderTest:
    """A backend with a server behind it."""

    backend: QueueBackend
    make_queue_name: Callable[[], str]
    """The name of a new queue, which can be sent to."""
    received: Callable[[str, int], Awaitable[list[str]]]
    """Takes that many texts from a queue, waiting until they are there, and those that are there beyond them."""
    refused_text: str | None = None
    """A text that the server or the backend always refuses."""
    stop: Callable[[], Awaitable[None]] | None = None
    start: Callable[[], Awaitable[None]] | None = None
    """Stops the server, and starts it again; its queues may have lost what was in them."""
