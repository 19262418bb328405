"""Whether each route answers what the OpenAPI schema says: schemathesis sends valid and invalid requests to all."""

import sys
from pathlib import Path

import anyio
import pytest

from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import AuthConfig, Settings
from modalkit.service.web import create_app
from tests.support.http_server import serving

pytestmark = pytest.mark.anyio

RUN = "from schemathesis.cli import schemathesis; schemathesis()"
CONFIG = Path(__file__).with_name("schemathesis.toml")


async def test_each_route_answers_as_the_openapi_schema_says() -> None:
    entry = {"pipeline": "tests.support.task_pipelines:AllTasksPipeline"}
    settings = Settings(
        app_settings={"async_config": {"store": "memory"}},
        model_settings={"model_entries": {"all": entry, "changed": entry}},
    )
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, auth=AuthConfig(api_key="secret"), owns_gateway=False)) as client:
            command = [sys.executable, "-c", RUN, "--config-file", str(CONFIG), "run", "--seed", "1"]
            done = await anyio.run_process([*command, f"{client.base_url}/openapi.json"], check=False)
    report = done.stdout.decode()
    print("\n".join(line[:1000] for line in report.splitlines()))  # noqa: T201  # shown where the test fails
    assert done.returncode == 0
    assert "Tested: " in report
