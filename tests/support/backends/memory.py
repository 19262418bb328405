"""The queues in memory."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from modalkit.service.queue_backends import InMemoryBackend
from tests.support.backends.under_test import BackendUnderTest


@asynccontextmanager
async def opened() -> AsyncIterator[BackendUnderTest]:
    backend = InMemoryBackend()

    async def received(queue_name: str, count: int) -> list[str]:
        return [await backend.receive(queue_name) for _ in range(max(count, backend.depth(queue_name)))]

    yield BackendUnderTest(backend, lambda: f"queue-{uuid.uuid4()}", received)
