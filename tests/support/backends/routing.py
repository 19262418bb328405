"""Routes, to two backends of which one has no more than `send_message`."""

import itertools
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from modalkit.service.queue_backends import InMemoryBackend, QueueMessage, RoutingBackend, UndeliverableError
from tests.support.backends.under_test import BackendUnderTest

REFUSED = "refused"


class OneByOne:
    """What a user writes: a single method."""

    def __init__(self, queues: InMemoryBackend) -> None:
        self._queues = queues

    async def send_message(self, queue_name: str, message: str) -> bool:
        if message == REFUSED:
            raise UndeliverableError("refused")
        return await self._queues.send_message(queue_name, message)


class Together(OneByOne):
    """What a user writes who has many messages: several at once, of which some may fail."""

    async def send_messages(self, messages: list[QueueMessage]) -> list[Exception | None]:
        outcomes: list[Exception | None] = []
        for message in messages:
            try:
                await self.send_message(message.queue_name, message.body)
            except UndeliverableError as error:
                outcomes.append(error)
            else:
                outcomes.append(None)
        return outcomes


@asynccontextmanager
async def opened() -> AsyncIterator[BackendUnderTest]:
    queues = InMemoryBackend()
    prefixes = itertools.cycle(["one", "many"])

    async def received(queue_name: str, count: int) -> list[str]:
        return [await queues.receive(queue_name) for _ in range(max(count, queues.depth(queue_name)))]

    backend = RoutingBackend({"one-*": OneByOne(queues), "many-*": Together(queues)})
    yield BackendUnderTest(backend, lambda: f"{next(prefixes)}-{uuid.uuid4()}", received, REFUSED)
    await backend.aclose()
