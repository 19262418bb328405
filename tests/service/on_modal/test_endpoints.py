"""The HTTP service over classes of Modal's, and over one that is not registered; without a network."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, ClassVar

import httpx
import modal
import pytest
from fastapi import FastAPI
from grpclib import Status
from pydantic import BaseModel

from modalkit.modal_service import ModalService, create_web_endpoints
from modalkit.pipelines import InferencePipeline
from modalkit.service.errors import UnknownModelError
from modalkit.service.loading import LoadError
from modalkit.service.on_modal.config import LISTS_AT_A_CONTAINER, ModalConfig
from modalkit.service.on_modal.endpoints import import_path
from modalkit.service.on_modal.engine import connection
from modalkit.service.queue_backends import InMemoryBackend, QueueNameError
from tests.service.on_modal.conftest import CLOSABLE, Closable, MakeConfig
from tests.support.http_server import serving
from tests.support.length_model import Length, LengthPipeline, Text
from tests.support.modal_objects import called_instance, concurrency
from tests.support.modal_server import ModalServer, as_modal_runs_it

pytestmark = pytest.mark.anyio

ENTRIES = {name: {"pipeline": "tests.support.length_model:LengthPipeline"} for name in ("lengths", "other-lengths")}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # uvicorn and Modal's client run on asyncio alone


@pytest.fixture(autouse=True)
def _without_modal(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))


@pytest.fixture
def config(make_config: MakeConfig) -> ModalConfig:
    return make_config({"model_entries": ENTRIES}, queue_config={"allowed_queues": ["ok"]})


class Lengths(ModalService):
    """As users write them: with a constructor that names the model."""

    inference_implementation = LengthPipeline

    def __init__(self, queue_backend: Any = None) -> None:
        super().__init__(queue_backend=queue_backend)
        self.model_name = "text-lengths"


def registered(config: ModalConfig, *, concurrent: bool = False) -> Any:
    class LengthsApp(Lengths):
        modal_utils = config

    decorated = modal.concurrent(max_inputs=16)(LengthsApp) if concurrent else LengthsApp
    return modal.App("lengths").cls(**config.get_app_cls_settings(), serialized=True)(decorated)


def with_parameter(config: ModalConfig, parameter: Any = None) -> Any:
    class Model(ModalService):
        modal_utils = config
        model_name: str = parameter or modal.parameter(default="lengths")

    return modal.App("models").cls(**config.get_app_cls_settings(), serialized=True)(
        modal.concurrent(**config.get_concurrency_settings())(Model)
    )


@asynccontextmanager
async def opened(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(app) as client:
        while True:
            try:
                await client.get("/health/live")
            except httpx.TransportError:
                continue
            break
        yield client


async def models_of(app: FastAPI) -> dict[str, Any]:
    async with opened(app) as client:
        models: dict[str, Any] = (await client.get("/health/ready")).json()["models"]
        return models


async def connected(app_cls: Any, config: ModalConfig, **parameters: str) -> Any:
    """The method that is called."""
    return await connection(app_cls, config, parameters)()


async def test_endpoints_over_a_registered_class_need_no_server_of_modals(config: ModalConfig) -> None:
    assert await models_of(create_web_endpoints(registered(config))) == {"text-lengths": "ready"}


async def test_items_are_documented_and_checked_as_the_endpoints_are_told(config: ModalConfig) -> None:
    app = create_web_endpoints(app_cls=registered(config), input_model=Text, output_model=Length)
    schemas = app.openapi()["components"]["schemas"]
    assert {"Text", "Length"} <= set(schemas)
    async with opened(app) as client:
        assert (await client.post("/sync/predict", json={"txt": "a"})).status_code == 422


async def test_without_models_of_their_own_they_are_those_of_the_pipeline(config: ModalConfig) -> None:
    assert {"Text", "Length"} <= set(create_web_endpoints(registered(config)).openapi()["components"]["schemas"])


async def test_a_call_without_a_token_is_answered_with_what_is_missing(config: ModalConfig) -> None:
    async with opened(create_web_endpoints(registered(config))) as client:
        for path, body in (
            ("/sync/predict", {"text": "four"}),
            ("/async/predict", {"message": {"text": "four"}}),
        ):
            answer = await client.post(path, json=body)
            assert (answer.status_code, "Token missing" in answer.json()["detail"]) == (503, True)
        answer = await client.get("/jobs/fc-01J.0")
        assert (answer.status_code, "Token missing" in answer.json()["detail"]) == (503, True)


async def test_a_class_with_a_parameter_has_the_models_that_are_named_the_first_by_default(
    config: ModalConfig,
) -> None:
    app = create_web_endpoints(with_parameter(config), models=["other-lengths", "lengths"])
    async with opened(app) as client:
        assert list((await client.get("/health/ready")).json()["models"]) == ["other-lengths", "lengths"]
        assert (await client.post("/sync/predict?model_name=third", json={"text": "a"})).status_code == 404


async def test_without_names_a_class_with_a_parameter_has_the_default_of_it(config: ModalConfig) -> None:
    assert list(await models_of(create_web_endpoints(with_parameter(config)))) == ["lengths"]


def test_a_model_that_is_not_configured_is_refused_when_the_endpoints_are_made(config: ModalConfig) -> None:
    with pytest.raises(UnknownModelError, match="'third'"):
        create_web_endpoints(with_parameter(config), models=["lengths", "third"])


def test_models_of_a_class_without_a_parameter_are_refused_with_what_to_declare(config: ModalConfig) -> None:
    with pytest.raises(LoadError, match=r"declare model_name: str = modal\.parameter\(\)"):
        create_web_endpoints(registered(config), models=["lengths"])


def test_a_parameter_without_a_default_needs_names(config: ModalConfig) -> None:
    app_cls = with_parameter(config, modal.parameter())
    with pytest.raises(LoadError, match=r"missing a required argument: 'model_name'; .* models=\['sentiment'\]"):
        create_web_endpoints(app_cls)
    create_web_endpoints(app_cls, models=["lengths"])


WEBHOOKS = {"backend": "webhook", "webhook": {"allowed_hosts": ["hooks.example.com"]}}


class Strict(InMemoryBackend):
    """Refuses all names of queues."""

    def check_queue_name(self, queue_name: str) -> None:
        raise QueueNameError(queue_name, "is not mine")


@pytest.mark.parametrize(("injected", "problem"), [(None, "is no URL of a host"), (Strict(), "is not mine")])
async def test_a_queue_name_that_the_containers_would_refuse_is_refused_by_the_endpoints(
    make_config: MakeConfig, injected: Any, problem: str
) -> None:
    """Whether the backend is configured or injected."""

    class Injecting(Lengths):
        modal_utils = make_config(queue_config=WEBHOOKS)

        def __init__(self) -> None:
            super().__init__(queue_backend=injected)

    app_cls = modal.App("lengths").cls(serialized=True)(Injecting)
    async with opened(create_web_endpoints(app_cls)) as client:
        job = {"message": {"text": "four"}, "success_queue": "results"}
        answer = await client.post("/async/predict", json=job)
    assert (answer.status_code, problem in answer.json()["detail"]) == (422, True), answer.text


async def test_each_model_is_called_with_its_name(config: ModalConfig) -> None:
    _, parameters = called_instance(await connected(with_parameter(config), config, model_name="other-lengths"))
    assert parameters == {"model_name": "other-lengths"}


async def test_a_class_that_is_not_decorated_gets_its_concurrency(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(deployment_config={"max_concurrent_inputs": 32})
    options, _ = called_instance(await connected(registered(config), config))
    assert (options.max_concurrent_inputs, options.target_concurrent_inputs) == (32, LISTS_AT_A_CONTAINER)
    assert caplog.text == ""


async def test_a_configured_target_is_kept(make_config: MakeConfig) -> None:
    config = make_config(deployment_config={"max_concurrent_inputs": 4, "target_concurrent_inputs": 2})
    options, _ = called_instance(await connected(registered(config), config))
    assert (options.max_concurrent_inputs, options.target_concurrent_inputs) == (4, 2)


async def test_a_decorated_class_is_left_as_it_is(config: ModalConfig) -> None:
    app_cls = registered(config, concurrent=True)
    options, _ = called_instance(await connected(app_cls, config))
    assert (options.max_concurrent_inputs, concurrency(app_cls).max_inputs) == (None, 16)


async def test_containers_that_are_kept_warm_in_vain_are_warned_of(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(deployment_config={"min_containers": 1})
    await connected(registered(config, concurrent=True), config)
    assert caplog.text == ""
    await connected(registered(config), config)
    assert "@modal.concurrent(**modal_config.get_concurrency_settings())" in caplog.text


async def test_a_class_that_was_looked_up_needs_no_server_until_the_service_starts(config: ModalConfig) -> None:
    app = create_web_endpoints(modal.Cls.from_name("lengths", "Lengths"), Text, Length)
    assert {"Text", "Length"} <= set(app.openapi()["components"]["schemas"])


@pytest.mark.parametrize("hydrated", [False, True])
@pytest.mark.parametrize("max_inputs", [0, 16])
async def test_a_class_that_was_looked_up_is_called_as_it_is_deployed(
    config: ModalConfig, modal_server: ModalServer, hydrated: bool, max_inputs: int
) -> None:
    modal_server.deploy_class("Lengths", max_concurrent_inputs=max_inputs)
    looked_up = modal.Cls.from_name("lengths", "Lengths")
    if hydrated:
        await looked_up.hydrate.aio()
    assert list(await models_of(create_web_endpoints(looked_up, Text, Length)))
    info = await (await connected(looked_up, config)).info.aio()
    assert info.concurrency_info.max_inputs == (max_inputs or 64)


async def test_where_modal_does_not_say_how_a_class_is_decorated_it_gets_its_concurrency(
    config: ModalConfig, modal_server: ModalServer, caplog: pytest.LogCaptureFixture
) -> None:
    modal_server.deploy_class("Lengths")
    modal_server.refusals["ClassGet"] = Status.RESOURCE_EXHAUSTED
    await connected(modal.Cls.from_name("lengths", "Lengths"), config)
    assert "Modal could not be asked whether the service class is decorated" in caplog.text


async def test_a_class_that_is_not_registered_is_served_by_this_process(make_config: MakeConfig) -> None:
    queue = InMemoryBackend()

    class Here(Lengths):
        modal_utils = make_config(queue_config={"allowed_queues": ["ok"]})
        queue_backend = queue

    async with opened(create_web_endpoints(app_cls=Here, input_model=Text, output_model=Length)) as client:
        while (await client.get("/health/ready")).json() != {"status": "ready", "models": {"text-lengths": "ready"}}:
            pass
        assert (await client.post("/sync/predict", json={"text": "four"})).json()["length"] == 4
        job = {"message": {"text": "four"}, "success_queue": "ok", "meta": {"n": 1}}
        job_id = (await client.post("/async/predict", json=job)).json()["job_id"]
        await queue.receive("ok")
        ended = (await client.get(f"/jobs/{job_id}?wait=30")).json()
        assert (ended["status"], ended["model_name"], ended["result"]["length"]) == ("succeeded", "text-lengths", 4)
        assert [listed["job_id"] for listed in (await client.get("/jobs")).json()["jobs"]] == [job_id]


async def test_a_class_that_is_not_registered_is_served_with_the_models_that_are_named(config: ModalConfig) -> None:
    class Here(ModalService):
        modal_utils = config
        model_name: str = modal.parameter(default="lengths")

    assert list(await models_of(create_web_endpoints(Here))) == ["lengths"]
    assert list(await models_of(create_web_endpoints(Here, models=["other-lengths", "lengths"]))) == [
        "other-lengths",
        "lengths",
    ]


async def test_results_of_a_class_that_is_not_registered_go_through_its_own_methods(make_config: MakeConfig) -> None:
    sent = InMemoryBackend()

    class Here(Lengths):
        modal_utils = make_config()

        async def _send_to_queue(self, queue_name: str, message: str) -> bool:
            return await sent.send_message(f"mine/{queue_name}", message)

    async with opened(create_web_endpoints(Here)) as client:
        while (await client.get("/health/ready")).status_code != 200:
            pass
        await client.post("/async/predict", json={"message": {"text": "four"}, "success_queue": "ok"})
        assert '"length":4' in (await sent.receive("mine/ok")).replace(" ", "")


@pytest.mark.parametrize("name", ["send_async_response", "_send_to_queue"])
async def test_results_reach_the_configured_backend_through_an_overridden_method(
    make_config: MakeConfig, configured_backends: list[Closable], name: str
) -> None:
    class Here(Lengths):
        modal_utils = make_config(queue_config=CLOSABLE)

    async def send(self: Here, queue_name: str, message: str) -> Any:
        return await getattr(Lengths, name)(self, f"mine/{queue_name}", message)

    setattr(Here, name, send)
    async with opened(create_web_endpoints(Here)) as client:
        while (await client.get("/health/ready")).status_code != 200:
            pass
        await client.post("/async/predict", json={"message": {"text": "four"}, "success_queue": "ok"})
        [backend] = configured_backends
        assert '"length":4' in (await backend.receive("mine/ok")).replace(" ", "")
    assert backend.closed == 1


async def test_a_class_that_is_not_registered_refuses_names_and_keeps_messages_as_its_backend_does(
    make_config: MakeConfig,
) -> None:
    """Also where the backend takes one message at a time."""

    class Single:
        async def send_message(self, queue_name: str, message: str) -> bool:
            return True

        def check_queue_name(self, queue_name: str) -> None:
            if queue_name != "ok":
                raise QueueNameError(queue_name, "is not mine")

        def keeps_in_process(self, queue_name: str) -> bool:
            return True

    class Here(Lengths):
        modal_utils = make_config()
        queue_backend = Single()

    async with opened(create_web_endpoints(Here)) as client:
        while (await client.get("/health/ready")).status_code != 200:
            pass
        jobs = [{"message": {"text": "four"}, "success_queue": name} for name in ("ok", "other")]
        answer = await client.post("/async/predict", json=jobs[1])
        assert (answer.status_code, "is not mine" in answer.json()["detail"]) == (422, True)
        job_id = (await client.post("/async/predict", json=jobs[0])).json()["job_id"]
        while (job := (await client.get(f"/jobs/{job_id}?wait=30")).json())["delivery"] == "pending":
            pass
        assert job["delivery"] == "memory"


async def test_who_may_call_is_up_to_the_configuration(make_config: MakeConfig) -> None:
    config = make_config({"model_entries": ENTRIES}, auth_config={"api_key": "s3cret"})
    async with opened(create_web_endpoints(registered(config))) as client:
        assert (await client.get("/jobs/fc-01J.0")).status_code == 401
        assert (await client.post("/sync/predict", json={"text": "four"})).status_code == 401
        answer = await client.get("/jobs/nonsense", headers={"Authorization": "Bearer s3cret"})
        assert answer.status_code == 404


async def test_a_web_container_that_takes_one_request_at_a_time_says_so(
    config: ModalConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("modalkit.service.on_modal.endpoints.takes_one_input_at_a_time", lambda: True)
    with caplog.at_level(logging.INFO):
        create_web_endpoints(registered(config))
    assert "@modal.concurrent(**modal_config.get_handler_concurrency_settings())" in caplog.text


def test_a_container_is_told_where_it_imports_the_class_of_the_items(caplog: pytest.LogCaptureFixture) -> None:
    class Local(Text):
        pass

    assert import_path(None) is None
    assert import_path(Text) == "tests.support.length_model:Text"
    assert caplog.text == ""
    assert import_path(Local) is None
    assert "Local" in caplog.text
    assert "define it at the top level of a module" in caplog.text


class Point(BaseModel):
    x: float


class Typed(BaseModel):
    """Has what JSON has no types for."""

    at: datetime
    point: Point


class Untyped(LengthPipeline):
    """Has no input model of its own, and notes what it gets."""

    input_model: ClassVar[type[BaseModel]] = InferencePipeline.input_model
    got: ClassVar[list[BaseModel]] = []

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        self.got.extend(input_list)
        return {"texts": ["four"] * len(input_list)}

    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        return []


@pytest.mark.parametrize("is_registered", [True, False])
async def test_the_pipeline_gets_items_of_the_endpoints_model_in_the_container_as_it_does_locally(
    make_config: MakeConfig, modal_server: ModalServer, is_registered: bool
) -> None:
    class Here(ModalService):
        inference_implementation = Untyped
        modal_utils = make_config({"model_entries": {"lengths": ENTRIES["lengths"]}})
        model_name = "lengths"

    modal_server.deploy_class("Here", max_concurrent_inputs=16)
    item = {"at": "2024-01-01T00:00:00Z", "point": {"x": 1}}
    async with Here() as service:
        modal_server.engine.attach("lengths", as_modal_runs_it(service))
        Untyped.got.clear()
        app = create_web_endpoints(
            modal.Cls.from_name("app", "Here") if is_registered else Here, input_model=Typed, output_model=Length
        )
        async with opened(app) as client:
            while (await client.get("/health/ready")).status_code != 200:
                pass
            assert (await client.post("/sync/predict", json=item)).json()["length"] == 4
            job_id = (await client.post("/async/predict", json={"message": item})).json()["job_id"]
            assert (await client.get(f"/jobs/{job_id}?wait=30")).json()["status"] == "succeeded"
    assert Untyped.got == [Typed.model_validate(item)] * 2
