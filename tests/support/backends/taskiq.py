"""TaskIQ, on Redis."""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from redis.asyncio import Redis

from modalkit.benchmarks.redis_server import RedisServer
from modalkit.service.queue_backends.taskiq import TaskIQBackend
from tests.support.backends.under_test import BackendUnderTest


@asynccontextmanager
async def opened() -> AsyncIterator[BackendUnderTest]:
    read_to = dict[str, bytes]()
    with RedisServer() as server:
        backend = TaskIQBackend(server.url)
        redis: Any  # redis-py's types do not tell str from bytes
        async with Redis.from_url(f"{server.url}?protocol=2") as redis:

            async def received(queue_name: str, count: int) -> list[str]:
                stream = f"modalkit:{queue_name}"
                texts: list[str] = []
                while more := await redis.xread(
                    {stream: read_to.get(queue_name, b"0")}, block=1000 if len(texts) < count else None
                ):
                    for _, entries in more:
                        for entry_id, fields in entries:
                            read_to[queue_name] = entry_id
                            texts += json.loads(fields[b"data"])["args"]
                return texts

            async def stop() -> None:
                await anyio.to_thread.run_sync(server.stop)

            async def start() -> None:
                await anyio.to_thread.run_sync(server.start)

            yield BackendUnderTest(backend, lambda: f"queue-{uuid.uuid4()}", received, None, stop, start)
            await backend.aclose()
