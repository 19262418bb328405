"""Webhooks, to an HTTP server of this machine."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread

from modalkit.service.queue_backends import WebhookBackend
from tests.support.backends.under_test import BackendUnderTest
from tests.support.webhook_receiver import WebhookReceiver

REFUSED = "refused"


@asynccontextmanager
async def opened() -> AsyncIterator[BackendUnderTest]:
    receiver = WebhookReceiver()
    receiver.refused_bodies[REFUSED.encode()] = 422
    receiver.start()
    backend = WebhookBackend(allowed_hosts=[f"127.0.0.1:{receiver.port}"], allow_private_addresses=True)
    taken = dict[str, int]()

    async def received(queue_name: str, count: int) -> list[str]:
        # A message was sent once it was answered: there is nothing to wait for.
        texts = [each.body.decode() for each in receiver.received if queue_name.endswith(each.path)]
        already = taken.get(queue_name, 0)
        taken[queue_name] = len(texts)
        return texts[already:]

    async def stop() -> None:
        await anyio.to_thread.run_sync(receiver.stop)

    async def start() -> None:
        await anyio.to_thread.run_sync(receiver.start)

    def make_queue_name() -> str:
        return f"http://127.0.0.1:{receiver.port}/{uuid.uuid4()}"

    try:
        yield BackendUnderTest(backend, make_queue_name, received, REFUSED, stop, start)
        await backend.aclose()
    finally:
        receiver.stop()
