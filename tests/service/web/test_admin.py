"""The routes for those who run the service."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import Settings
from modalkit.service.web import create_app
from tests.support.http_client import assert_problem
from tests.support.http_server import serving

pytestmark = pytest.mark.anyio

CONFIGURATION = """
app_settings:
  auth_config: {api_key: secret}
  async_config: {store: memory}
  batch_config: {max_batch_size: 8, calibration: {enabled: false}}
model_settings:
  model_entries:
    lengths: {pipeline: "tests.support.length_model:LengthPipeline", more: 1}
    org/other: {pipeline: "tests.support.length_model:LengthPipeline"}
"""
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    path = tmp_path / "modalkit.yaml"
    path.write_text(CONFIGURATION)
    return path


@pytest.fixture
async def client(configuration: Path) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings.load([configuration])
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        app = create_app(gateway, auth=settings.app_settings.auth_config, owns_gateway=False)
        async with serving(app, headers=KEY) as opened:
            yield opened


async def test_a_model_is_reloaded_by_the_configuration_as_it_is_now(
    client: httpx.AsyncClient, configuration: Path
) -> None:
    before, other = (await client.get("/admin/models")).json()
    assert (await client.get("/admin/models/org%2Fother")).json() == other
    assert (await client.post("/admin/models/org%2Fother/reload")).status_code == 200
    assert (before["name"], before["readiness"], before["problem"]) == ("lengths", "ready", None)
    assert before["batch_config"]["max_batch_size"] == 8
    configuration.write_text(CONFIGURATION.replace("max_batch_size: 8", "max_batch_size: 9"))
    answer = await client.post("/admin/models/lengths/reload")
    assert answer.status_code == 200
    assert answer.json() == before | {"batch_config": before["batch_config"] | {"max_batch_size": 9}}
    assert (await client.post("/sync/predict", json={"text": "four"})).json()["length"] == 4


async def test_a_reload_that_is_impossible_is_409_with_the_reason(
    client: httpx.AsyncClient, configuration: Path
) -> None:
    for wrong, why in (
        ("LengthPipeline", "UnloadablePipeline cannot be loaded: RuntimeError: the weights are not there"),
        ("batch_config: {", "the configuration cannot be used"),
    ):
        broken = CONFIGURATION.replace(
            wrong, {"LengthPipeline": "UnloadablePipeline"}.get(wrong, "batch_config: {a: 1, ")
        )
        configuration.write_text(broken)
        assert why in assert_problem(await client.post("/admin/models/lengths/reload"), 409)["detail"]
        assert (await client.post("/sync/predict", json={"text": "four"})).json()["length"] == 4
    assert (await client.get("/admin/models/lengths")).json()["readiness"] == "ready"


async def test_limits_are_changed_while_requests_come(client: httpx.AsyncClient) -> None:
    answer = await client.patch("/admin/models/lengths", content='{"max_batch_size": 64}')
    assert answer.json()["batch_config"]["max_batch_size"] == 64
    assert answer.json()["batch_config"]["max_age_ms"] == 2000
    for body in ("[1]", '{"max_batch_size": 0}', '{"max_batch": 1}', '{"calibration": {}}', "null"):
        assert_problem(await client.patch("/admin/models/lengths", content=body), 422)
    for body in ("no", "", '{"max_batch_size": 1, "max_batch_size": 2}'):
        assert_problem(await client.patch("/admin/models/lengths", content=body), 400)
    assert (await client.get("/admin/models/lengths")).json() == answer.json()


async def test_an_unknown_model_is_404_and_a_wrong_key_401(client: httpx.AsyncClient) -> None:
    for method, path in (("GET", "/admin/models/x"), ("POST", "/admin/models/x/reload")):
        assert "there is no model 'x'" in assert_problem(await client.request(method, path), 404)["detail"]
    assert_problem(await client.get("/admin/models?a=1"), 422)
    wrong = {"Authorization": "Bearer wrong"}
    assert_problem(await client.post("/admin/models/lengths/reload", headers=wrong), 401)


async def test_without_a_key_in_the_configuration_the_routes_are_off(settings: Settings) -> None:
    async with serving(create_app(LocalGateway(settings))) as client:
        for method, path in (("GET", "/admin/models"), ("POST", "/admin/models/lengths/reload")):
            problem = assert_problem(await client.request(method, path, headers=KEY), 403)
            assert "none is configured" in problem["detail"]
