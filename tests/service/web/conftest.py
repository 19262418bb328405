from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import Settings
from modalkit.service.web import create_app
from tests.support.http_server import serving


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # uvicorn runs on asyncio alone


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        app_settings={
            "batch_config": {"max_queue_size": 100},
            "async_config": {"store_path": tmp_path / "jobs.db"},
            "queue_config": {"allowed_queues": ["ok", "bad"]},
        },
        model_settings={
            "model_entries": {
                "lengths": {"pipeline": "tests.support.length_model:LengthPipeline"},
                "Lengths-2": {"pipeline": "tests.support.length_model:LengthPipeline"},
                "odd": {"pipeline": "tests.support.odd_model:OddPipeline"},
            }
        },
    )


@pytest.fixture
def queue() -> InMemoryBackend:
    return InMemoryBackend()


@pytest.fixture
async def client(settings: Settings, queue: InMemoryBackend) -> AsyncIterator[httpx.AsyncClient]:
    gateway = LocalGateway(settings, queue_backend=queue)
    async with gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, owns_gateway=False)) as opened:
            yield opened
