from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from redis.asyncio import Redis

from modalkit.benchmarks.redis_server import RedisServer


@pytest.fixture(scope="module")
def _module_redis() -> Iterator[RedisServer]:
    # One entry to a node, so that what can be trimmed is trimmed to the entry.
    with RedisServer(settings={"stream-node-max-entries": "1"}) as server:
        yield server


@pytest.fixture
async def redis(_module_redis: RedisServer) -> AsyncIterator[Any]:
    """A client of an empty Redis; its types, which do not tell str from bytes, are of no use to tests."""
    async with Redis.from_url(f"{_module_redis.url}?protocol=2") as client:
        await client.flushall()
        yield client


@pytest.fixture
def redis_url(_module_redis: RedisServer) -> str:
    return _module_redis.url
