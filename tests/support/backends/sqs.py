"""SQS, on moto's server."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
import pytest
from aiobotocore.session import get_session  # type: ignore[import-untyped]  # ships no types

from modalkit.service.queue_backends import SQSBackend
from tests.support.backends.under_test import BackendUnderTest
from tests.support.sqs_server import REGION, SqsServer, forget_aws_settings


async def receive(client: Any, queue_url: str, count: int) -> list[str]:
    """Take messages until there are `count`, and those beyond that are there already."""
    texts: list[str] = []
    while True:
        answer = await client.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10)
        found = answer.get("Messages", [])
        texts += [message["Body"] for message in found]
        for message in found:
            await client.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
        if not found and len(texts) >= count:
            return texts


@asynccontextmanager
async def opened() -> AsyncIterator[BackendUnderTest]:
    server = SqsServer()
    server.start()
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            forget_aws_settings(monkeypatch)
            backend = SQSBackend(region=REGION, endpoint_url=server.url, create_missing_queues=True)
            session = get_session()
            async with session.create_client("sqs", region_name=REGION, endpoint_url=server.url) as client:

                async def received(queue_name: str, count: int) -> list[str]:
                    queue_url = (await client.get_queue_url(QueueName=queue_name))["QueueUrl"]
                    return await receive(client, queue_url, count)

                async def stop() -> None:
                    await anyio.to_thread.run_sync(server.stop)

                async def start() -> None:
                    await anyio.to_thread.run_sync(server.start)

                yield BackendUnderTest(
                    backend, lambda: f"queue-{uuid.uuid4()}", received, "not JSON: \x00", stop, start
                )
                await backend.aclose()
    finally:
        server.stop()
