from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import Settings
from modalkit.service.web import create_app
from tests.support.http_server import serving


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"  # uvicorn runs on asyncio alone


def settings_in(folder: Path) -> Settings:
    return Settings(
        _config_files=[],
        app_settings={
            "batch_config": {"max_queue_size": 100},
            "async_config": {"store_path": folder / "jobs.db"},
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


@asynccontextmanager
async def client_of(settings: Settings, queue: InMemoryBackend) -> AsyncGenerator[httpx.AsyncClient]:
    async with LocalGateway(settings, queue_backend=queue) as gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, owns_gateway=False)) as opened:
            yield opened


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
def queue() -> InMemoryBackend:
    return InMemoryBackend()


@pytest.fixture
async def client(settings: Settings, queue: InMemoryBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(settings, queue) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared_queue() -> InMemoryBackend:
    return InMemoryBackend()


@pytest.fixture(scope="module")
async def shared_client(
    tmp_path_factory: pytest.TempPathFactory, shared_queue: InMemoryBackend
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of one service for all tests of a file, of which none minds what the others sent."""
    async with client_of(settings_in(tmp_path_factory.mktemp("service")), shared_queue) as opened:
        yield opened
