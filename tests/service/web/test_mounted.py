"""The application inside another one: who runs its lifespan, and what callers get where nothing does."""

import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette

from modalkit import create_app, lifespan_of
from modalkit.service.errors import Readiness
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import Settings
from modalkit.testing import client_of
from tests.support.http_client import assert_problem

pytestmark = pytest.mark.anyio


async def test_a_mounted_application_is_started_and_ended_by_the_outer_one(settings: Settings) -> None:
    gateway = LocalGateway(settings)
    models = create_app(gateway)
    app = FastAPI(lifespan=lifespan_of(models))
    app.mount("/models", models)
    async with client_of(app) as client:
        await gateway.wait_until_ready()
        assert (await client.get("/models/health/ready")).json()["status"] == "ready"
        answer = await client.post("/models/sync/predict", json={"text": "four"})
        assert answer.json()["length"] == 4
        page = (await client.get("/models/")).text
        assert page == (await client.get("/models/ui")).text
        (script,) = re.findall('<script type="module" src="([^"]+)"', page)
        assert (await client.get(f"/models/{script}")).status_code == 200
        assert_problem(await client.get("/models/nothing"), 404)
    assert gateway.models["lengths"].readiness is Readiness.DRAINING


@pytest.mark.parametrize("path", ["/模型", "/my models"])
async def test_a_job_has_its_address_below_any_path(settings: Settings, path: str) -> None:
    gateway = LocalGateway(settings)
    models = create_app(gateway)
    app = FastAPI(lifespan=lifespan_of(models))
    app.mount(path, models)
    async with client_of(app) as client:
        await gateway.wait_until_ready()
        accepted = await client.post(f"{path}/async/predict", json={"message": {"text": "four"}})
        assert accepted.status_code == 202
        location = accepted.headers["location"]
        assert location == quote(f"{path}/jobs/{accepted.json()['job_id']}")
        assert (await client.get(location)).json()["job_id"] == accepted.json()["job_id"]


async def test_several_are_started_in_order_and_ended_in_the_opposite_one() -> None:
    events: list[str] = []

    def app(name: str) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            events.append(f"{name} starts")
            yield
            events.append(f"{name} ends")

        return Starlette(lifespan=lifespan)

    async with lifespan_of(app("a"), app("b"))(None):
        events.append("both run")
    assert events == ["a starts", "b starts", "both run", "b ends", "a ends"]


@pytest.mark.parametrize("path", ["/sync/predict", "/health/ready", "/docs"])
async def test_where_nothing_starts_it_each_request_says_what_to_write_and_the_log_says_it_once(
    settings: Settings, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    app = FastAPI()
    app.mount("/models", create_app(LocalGateway(settings)))
    with caplog.at_level(logging.ERROR, "modalkit"):
        async with client_of(app) as client:
            answers = [await client.get(f"/models{path}") for _ in range(3)]
    problem, *_ = [assert_problem(answer, 503) for answer in answers]
    assert "app = FastAPI(lifespan=lifespan_of(models))" in problem["detail"]
    assert "from modalkit import lifespan_of" in problem["detail"]
    (record,) = caplog.records
    assert problem["detail"] in record.getMessage()


async def test_with_a_gateway_that_its_owner_opens_there_is_nothing_to_start(settings: Settings) -> None:
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        app = FastAPI()
        app.mount("/models", create_app(gateway, owns_gateway=False))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            assert (await client.post("/models/sync/predict", json={"text": "four"})).json()["length"] == 4


@pytest.mark.parametrize("root_path", ["", "/", "/models", "/models/"])
async def test_the_root_path_of_a_server_that_strips_it_changes_no_answer(settings: Settings, root_path: str) -> None:
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        transport = httpx.ASGITransport(create_app(gateway, owns_gateway=False), root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            # Without the header of JSON, FastAPI itself would refuse it.
            assert (await client.post("/sync/predict", content=b'{"text": "four"}')).json()["length"] == 4
            assert_problem(await client.post("/sync/predict/", content=b"{}"), 404)
            assert_problem(await client.get("/sync/predict"), 405)
