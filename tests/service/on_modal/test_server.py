"""The worker as a server of its own: real HTTP from a class under `app.server`."""

import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import modal
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from modalkit.modal_config import ModalConfig
from modalkit.modal_service import ModalServer, ModalService, ModalWebServer
from modalkit.service.loading import LoadError
from modalkit.service.on_modal import container as container_module
from modalkit.service.on_modal import server as server_module
from modalkit.service.on_modal.engine import takes_one_input_at_a_time
from modalkit.service.serving import AddressError
from tests.support.http_client import assert_problem
from tests.support.http_server import serving
from tests.support.length_model import Length, LengthPipeline, Text
from tests.support.modal_container import as_modal_runs_it, in_a_container
from tests.support.modal_objects import inner
from tests.support.ports import free_port

pytestmark = pytest.mark.anyio

MakeConfig = Callable[..., ModalConfig]


@pytest.fixture
def anyio_backend() -> str:
    """Modal and uvicorn run asyncio alone."""
    return "asyncio"


class Fragile(LengthPipeline):
    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if "fault" in preprocessed_data["texts"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().predict(input_list, preprocessed_data)


class LengthServer(ModalServer):
    inference_implementation = Fragile
    host = "127.0.0.1"


def make(config: ModalConfig, **attributes: Any) -> ModalServer:
    defined: type[ModalServer] = type(
        "Defined", (LengthServer,), {"modal_utils": config, "port": free_port(), **attributes}
    )
    return defined()


@asynccontextmanager
async def client_of(server: ModalServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as client:
        yield client


async def test_it_answers_http_while_it_is_open(make_config: MakeConfig) -> None:
    server = make(make_config())
    async with server, client_of(server) as client:
        answer = await client.post("/sync/predict", json={"text": "four"})
        assert (answer.status_code, answer.json()["length"]) == (200, 4)
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["models"]) == (200, {"Fragile": "ready"})
        batch = await client.post("/batch/predict", json=[{"text": "a"}, {"text": ""}])
        assert [slot["status"] for slot in batch.json()] == ["success", "error"]
    async with client_of(server) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("/health/live")


async def test_its_connections_have_the_limits_of_modalkit_serve(make_config: MakeConfig) -> None:
    server = make(make_config())
    async with server, client_of(server) as client:
        refused = await client.get("/health/live", headers={f"x-{number}": "1" for number in range(101)})
        assert_problem(refused, 431)


async def test_a_server_without_a_model_serves_the_endpoints_of_its_class(make_config: MakeConfig) -> None:
    service = type("Service", (ModalService,), {"inference_implementation": Fragile, "modal_utils": make_config()})
    web_cls = type("Web", (ModalWebServer,), {"app_cls": service, "host": "127.0.0.1", "port": free_port()})
    registered = modal.App("web").server(port=8000, **make_config().get_web_server_settings())(web_cls)
    assert isinstance(registered, modal.Server)
    web = web_cls()
    async with (
        as_modal_runs_it(web),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{web.port}", timeout=30) as client,
    ):
        while (await client.get("/health/ready")).status_code != 200:
            await anyio.lowlevel.checkpoint()
        assert (await client.post("/sync/predict", json={"text": "four"})).json()["length"] == 4
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{web.port}/health/live")


async def test_modal_starts_and_stops_it_by_its_hooks(make_config: MakeConfig) -> None:
    with in_a_container(is_server=True):
        server = make(make_config())
        async with as_modal_runs_it(server), client_of(server) as client:
            assert (await client.post("/sync/predict", json={"text": "four"})).json()["length"] == 4
            assert not takes_one_input_at_a_time()


async def test_without_a_job_service_jobs_are_refused_with_the_remedy(make_config: MakeConfig) -> None:
    server = make(make_config())
    async with server, client_of(server) as client:
        answer = await client.post("/async/predict", json={"message": {"text": "a"}})
        assert answer.status_code == 501
        assert "give it job_service" in answer.json()["detail"]
        assert (await client.get("/jobs/fc-unknown")).status_code == 404


async def test_items_are_validated_and_documented_by_the_models_of_the_class(make_config: MakeConfig) -> None:
    class Shout(Text):
        loud: bool

    class Documented(Length):
        """What is answered."""

    server = make(make_config(), input_model=Shout, output_model=Documented)
    async with server, client_of(server) as client:
        refused = await client.post("/sync/predict", json={"text": "a"})
        assert refused.status_code == 422
        assert "loud" in refused.text
        assert (await client.post("/sync/predict", json={"text": "a", "loud": True})).status_code == 200
        assert "Documented" in (await client.get("/openapi.json")).text


async def test_open_requests_are_finished_when_it_stops(make_config: MakeConfig) -> None:
    server = make(make_config())
    answers: list[int] = []
    async with client_of(server) as client, anyio.create_task_group() as task_group:
        async with server:
            pipeline: Any = server.running().worker.pipeline
            pipeline.gate.clear()
            while pipeline.entered.acquire(blocking=False):
                pass

            async def request() -> None:
                answers.append((await client.post("/sync/predict", json={"text": "abc"})).json()["length"])

            task_group.start_soon(request)
            await anyio.to_thread.run_sync(pipeline.entered.acquire)
            pipeline.gate.set()
    assert answers == [3]


async def test_requests_that_do_not_end_take_their_time_from_the_workers_grace(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "GRACE_S", 0.3)
    monkeypatch.setattr(container_module, "GRACE_S", 0.001)
    server = make(make_config())
    async with client_of(server) as client, anyio.create_task_group() as task_group:
        async with server:
            pipeline: Any = server.running().worker.pipeline
            pipeline.gate.clear()
            while pipeline.entered.acquire(blocking=False):
                pass
            task_group.start_soon(partial(client.post, "/sync/predict", json={"text": "abc"}))
            await anyio.to_thread.run_sync(pipeline.entered.acquire)
        pipeline.gate.set()
        task_group.cancel_scope.cancel()
    assert "could not be finished within 0 s" in caplog.text


async def test_a_port_that_is_taken_is_an_error_and_leaves_nothing_behind(make_config: MakeConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = make(make_config(), port=taken.getsockname()[1])
        with pytest.raises(AddressError, match="in use"):
            await server.__aenter__()
        with pytest.raises(RuntimeError, match="not running"):
            server.running()


async def test_an_application_that_cannot_start_is_an_error_and_ends_no_process() -> None:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        raise LoadError("the API key cannot be read")
        yield

    with pytest.raises(LoadError, match="cannot be read"):
        async with server_module.serving(FastAPI(lifespan=lifespan), "127.0.0.1", free_port()):
            raise AssertionError("it serves")


async def test_a_broken_device_ends_the_container_as_modal_does(make_config: MakeConfig) -> None:
    with in_a_container(is_server=True), anyio.open_signal_receiver(signal.SIGTERM) as signals:
        server = make(make_config())
        async with as_modal_runs_it(server), client_of(server) as client:
            assert (await client.post("/sync/predict", json={"text": "fault"})).status_code == 500
            with anyio.fail_after(30):
                async for received in signals:
                    assert received == signal.SIGTERM
                    break
            assert (await client.get("/health/ready")).status_code == 503


def test_modal_takes_the_class(make_config: MakeConfig) -> None:
    config = make_config()

    @modal.App("app").server(port=8000, **config.get_server_settings(), serialized=True)
    class Registered(LengthServer):
        modal_utils: ModalConfig = config

    assert issubclass(inner(Registered)._get_user_cls(), LengthServer)  # noqa: SLF001  # there is no other way


async def test_a_service_class_serves_http_by_itself_as_well(make_config: MakeConfig) -> None:
    config = make_config()

    class Service(ModalService):
        inference_implementation = LengthPipeline
        modal_utils = config

    async with Service() as service, serving(service.web_app()) as client:
        answer = await client.post("/sync/predict", json={"text": "four"})
        assert (answer.status_code, answer.json()["length"]) == (200, 4)
        assert (await client.get("/health/ready")).json()["models"] == {"LengthPipeline": "ready"}
