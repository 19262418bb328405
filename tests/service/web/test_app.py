"""The application as a whole: life cycle, health, who may call, documentation, overload and clients that go away."""

import inspect
import logging
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import numpy as np
import pytest
from anyio import to_thread
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.types import Message

from modalkit.batching import MeasuredCostModel, SchedulerStatistics
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.service.loading import LoadError
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import AuthConfig, KeyScope, Settings
from modalkit.service.web import create_app, lifespan_of
from modalkit.service.web.auth import configured_keys
from modalkit.testing import client_of
from tests.support.http_client import assert_problem
from tests.support.http_server import serving
from tests.support.length_model import POISON, LengthPipeline

pytestmark = pytest.mark.anyio


class Gated(LengthPipeline):
    """Tells the test about its instance, and waits for the test before it is loaded, where told to."""

    instances: list["Gated"] = []  # noqa: RUF012  # shared on purpose

    def __init__(self, *args: Any, **model_entry: Any) -> None:
        super().__init__(*args, **model_entry)
        self.instances.append(self)


@pytest.fixture
def gated_settings(tmp_path: Path) -> Settings:
    Gated.instances.clear()
    return Settings(
        app_settings={
            "batch_config": {"max_batch_size": 1, "max_queue_size": 1, "calibration": {"enabled": False}},
            "async_config": {"store_path": tmp_path / "jobs.db"},
        },
        model_settings={"model_entries": {"gated": {"pipeline": f"{__name__}:Gated"}}},
    )


def statistics(gateway: LocalGateway) -> SchedulerStatistics:
    found = gateway.models["gated"].statistics()
    assert found is not None
    return found


async def until_ready(client: httpx.AsyncClient) -> None:
    while (await client.get("/health/ready")).status_code != 200:
        await anyio.sleep(0.01)


async def test_the_application_opens_and_closes_its_gateway(settings: Settings) -> None:
    gateway = LocalGateway(settings)
    async with serving(create_app(gateway)) as client:
        assert (await client.get("/health/live")).json() == {"status": "live"}
        await until_ready(client)
        ready = (await client.get("/health/ready")).json()
        assert ready == {"status": "ready", "models": {"lengths": "ready", "Lengths-2": "ready", "odd": "ready"}}
        job_id = (await client.post("/async/predict", json={"message": {"text": "four"}})).json()["job_id"]
    async with serving(create_app(LocalGateway(settings))) as client:
        job = (await client.get(f"/jobs/{job_id}?wait=30")).json()
        assert job["result"]["length"] == 4


class Weather(LengthPipeline):
    retryable_errors = (ConnectionError,)

    def warm_up(self) -> None: ...

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        raise ConnectionError("the database is down")


async def test_callers_are_told_to_try_again_where_an_error_passes() -> None:
    settings = Settings(
        app_settings={"async_config": {"store": "memory"}, "batch_config": {"calibration": {"enabled": False}}},
        model_settings={"model_entries": {"weather": {"pipeline": f"{__name__}:Weather"}}},
    )
    async with serving(create_app(LocalGateway(settings))) as client:
        await until_ready(client)
        answer = await client.post("/sync/predict", json={"text": "four"})
    assert assert_problem(answer, 503)["detail"] == "ConnectionError: the database is down"
    assert answer.headers["retry-after"]


async def test_a_service_whose_store_fails_is_not_ready_until_it_can_be_written_again(settings: Settings) -> None:
    gateway = LocalGateway(settings)
    async with serving(create_app(gateway)) as client:
        await until_ready(client)
        gateway.jobs.store._database.execute("PRAGMA query_only = 1")  # noqa: SLF001  # stands in for a broken disk
        assert (await client.post("/async/predict", json={"message": {"text": "four"}})).status_code == 503
        refused = await client.get("/health/ready")
        assert refused.status_code == 503
        assert "jobs.db cannot be used" in refused.json()["reasons"]["jobs"]
        assert (await client.get("/health/live")).status_code == 200, "a new process would have the same disk"
        gateway.jobs.store._database.execute("PRAGMA query_only = 0")  # noqa: SLF001  # as above
        await until_ready(client)


async def test_a_model_that_broke_down_fails_liveness_and_ends_the_gateway_when_it_was_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the process would answer 503 for ever, and no probe would have it replaced."""

    def fail(*_: Any) -> float:
        raise ZeroDivisionError

    settings = Settings(
        app_settings={"async_config": {"store_path": tmp_path / "jobs.db"}},
        model_settings={"model_entries": {"lengths": {"pipeline": "tests.support.length_model:LengthPipeline"}}},
    )
    gateway = LocalGateway(settings)
    async with serving(create_app(gateway)) as client:
        await until_ready(client)
        monkeypatch.setattr(MeasuredCostModel, "predict_s", fail)
        for _ in range(3):
            assert (await client.post("/sync/predict", json={"text": "four"})).status_code == 500
        with anyio.fail_after(30):
            await gateway.wait_until_broken()
        assert (await client.post("/sync/predict", json={"text": "four"})).status_code == 503
        live = await client.get("/health/live")
        assert (live.status_code, live.json()) == (503, {"status": "broken", "models": ["lengths"]})
        ready = (await client.get("/health/ready")).json()
        assert ready["models"] == {"lengths": "broken"}
        assert "its scheduler broke down" in ready["reasons"]["lengths"]
    assert "broke down" in caplog.text


async def test_a_model_that_cannot_be_loaded_leaves_the_others_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        app_settings={"async_config": {"store_path": tmp_path / "jobs.db"}},
        model_settings={
            "model_entries": {
                "good": {"pipeline": "tests.support.length_model:LengthPipeline"},
                "bad": {"pipeline": "tests.support.length_model:UnloadablePipeline"},
            }
        },
    )
    gateway = LocalGateway(settings)
    async with serving(create_app(gateway)) as client:
        with pytest.raises(LoadError, match="bad: UnloadablePipeline cannot be loaded: RuntimeError: the weights are"):
            await gateway.wait_until_ready()
        await until_ready(client)
        ready = (await client.get("/health/ready")).json()
        assert ready == {"status": "ready", "models": {"good": "ready", "bad": "failed"}}
        assert (await client.post("/sync/predict", json={"text": "four"})).status_code == 200
        for path, body in (("/sync/predict", {"text": "four"}), ("/async/predict", {"message": {"text": "four"}})):
            problem = assert_problem(await client.post(f"{path}?model_name=bad", json=body), 503)
            assert "it is failed (RuntimeError: the weights are not there)" in problem["detail"]
    assert "the weights are not there" in caplog.text
    strict = LocalGateway(settings)
    async with serving(create_app(strict, require_all_models=True)) as client:
        await strict.wait_until_settled()
        ready_not = await client.get("/health/ready")
        assert ready_not.status_code == 503
        answer = ready_not.json()
        assert (answer["status"], answer["models"]) == ("not ready", {"good": "ready", "bad": "failed"})
        assert "the weights are not there" in answer["reasons"]["bad"]


async def test_a_service_whose_only_model_failed_is_not_ready(tmp_path: Path) -> None:
    support = "tests.support.length_model"
    settings = Settings(
        app_settings={"async_config": {"store_path": tmp_path / "jobs.db"}},
        model_settings={"model_entries": {"bad": {"pipeline": f"{support}:UnloadablePipeline"}}},
    )
    gateway = LocalGateway(settings)
    async with serving(create_app(gateway)) as client:
        await gateway.wait_until_settled()
        assert (await client.get("/health/ready")).status_code == 503


async def test_a_full_queue_is_429_and_the_deadline_504(gated_settings: Settings) -> None:
    gateway = LocalGateway(gated_settings)
    async with serving(create_app(gateway)) as client:
        await until_ready(client)
        (pipeline,) = Gated.instances
        pipeline.gate.clear()
        statuses: list[int] = []

        async def call(text: str) -> None:
            statuses.append((await client.post("/sync/predict", json={"text": text})).status_code)

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(call, "runs")
            await to_thread.run_sync(pipeline.entered.acquire)
            await to_thread.run_sync(pipeline.entered.acquire)  # the first was the warm-up
            late = await client.post("/sync/predict", json={"text": "late"}, headers={"X-Request-Timeout": "0.01"})
            assert "0.01 s" in assert_problem(late, 504)["detail"]
            task_group.start_soon(call, "waits")
            while not any(statistics(gateway).queued.values()):
                await anyio.sleep(0.01)
            full = await client.post("/sync/predict", json={"text": "refused"})
            assert_problem(full, 429)
            assert full.headers["retry-after"] == "1"
            pipeline.gate.set()
        assert statuses == [200, 200]
        assert pipeline.batches[1:] == [["runs"], ["waits"]]


async def test_a_client_that_goes_away_takes_its_request_out_of_the_queue(
    gated_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = LocalGateway(gated_settings)
    async with serving(create_app(gateway)) as client:
        await until_ready(client)
        (pipeline,) = Gated.instances
        pipeline.gate.clear()
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(lambda: client.post("/sync/predict", json={"text": "runs"}))
            await to_thread.run_sync(pipeline.entered.acquire)
            await to_thread.run_sync(pipeline.entered.acquire)
            with anyio.CancelScope() as scope:

                async def go_away() -> None:
                    while not any(statistics(gateway).queued.values()):
                        await anyio.sleep(0.01)
                    scope.cancel()

                task_group.start_soon(go_away)
                await client.post("/sync/predict", json={"text": "abandoned"})
            while statistics(gateway).cancelled == 0:
                await anyio.sleep(0.01)
            pipeline.gate.set()
        assert pipeline.batches[1:] == [["runs"]]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("auth", "header", "good"),
    [
        (AuthConfig(api_key="s3cret"), "Authorization", "Bearer s3cret"),
        (AuthConfig(api_key="s3cret", auth_header="x-api-key"), "X-Api-Key", "s3cret"),
    ],
)
async def test_only_callers_with_the_key_get_in(settings: Settings, auth: AuthConfig, header: str, good: str) -> None:
    app = create_app(LocalGateway(settings), auth=auth)
    async with serving(app) as client:
        await until_ready(client)
        for headers in ({}, {header: "Bearer wrong"}, {header: "wrong"}, {header: "Bearer s3cret "[:-2]}):
            refused = await client.post("/sync/predict", json={"text": "four"}, headers=headers)
            assert "API key" in assert_problem(refused, 401)["detail"]
            assert "s3cret" not in refused.text
        assert_problem(await client.get("/jobs/x"), 401)
        accepted = await client.post("/sync/predict", json={"text": "four"}, headers={header: good})
        assert accepted.status_code == 200


@pytest.mark.parametrize(
    ("variable", "sent"),
    [
        ("s3cret", b"s3cret"),
        ("12345", b"12345"),
        ("yes: no", b"yes: no"),
        ("s3cret\n", b"s3cret"),
        ("voilà", b"voil\xc3\xa0"),
    ],
)
async def test_a_key_from_a_variable_such_as_a_modal_secret_sets_lets_its_owner_in(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, variable: str, sent: bytes
) -> None:
    monkeypatch.setenv("MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY", variable)
    auth = Settings.load([]).app_settings.auth_config
    async with serving(create_app(LocalGateway(settings), auth=auth)) as client:
        await until_ready(client)
        assert_problem(await client.post("/sync/predict", json={"text": "four"}), 401)
        for key, status in ((b"wrong", 401), (sent, 200)):
            headers = {b"authorization": b"Bearer " + key}
            assert (await client.post("/sync/predict", json={"text": "four"}, headers=headers)).status_code == status


@pytest.mark.parametrize("key", [" \n", "two\nlines"])
def test_a_key_that_no_header_can_carry_is_refused_at_once(key: str) -> None:
    with pytest.raises(LoadError, match=r"app_settings\.auth_config\.api_key: it (is empty|has a line break)"):
        configured_keys(AuthConfig(api_key=key))


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_checking_a_key_costs_no_thread(header: str) -> None:
    keys = configured_keys(AuthConfig(api_key="s3cret", auth_header=header))
    assert all(
        inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(called).__call__)
        for called in (depends.dependency for depends in keys.requires(KeyScope.JOBS))
    )


async def test_an_unexpected_error_is_a_problem_without_internals_and_is_logged(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = LocalGateway(settings)

    async def fail(*_: Any) -> None:
        raise LookupError("the password is swordfish")

    monkeypatch.setattr(gateway.jobs, "get", fail)
    async with serving(create_app(gateway)) as client:
        problem = assert_problem(await client.get("/jobs/x"), 500)
    assert "LookupError" in problem["detail"]
    assert "swordfish" not in str(problem)
    logged = capsys.readouterr().err  # where uvicorn, as configured in this test, logs
    assert "Traceback" in logged
    assert "swordfish" in logged


async def test_the_documentation_needs_no_other_server(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assets = [part.split('"')[0] for part in page.split('="/')[1:]]
    assert any("swagger-ui-bundle" in asset for asset in assets)
    for asset in assets:
        assert (await client.get(f"/{asset}")).status_code == 200


async def test_users_own_routes_are_documented_as_they_are(settings: Settings) -> None:
    """Also where their parameters have the names of ours."""
    app = create_app(LocalGateway(settings), owns_gateway=False)

    @app.get("/customers/{name}")
    async def customer(name: str, model_name: str) -> str:
        return name + model_name

    async with client_of(app) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    parameters = paths["/customers/{name}"]["get"]["parameters"]
    assert {parameter["name"]: "enum" in parameter["schema"] for parameter in parameters} == {
        "name": False,
        "model_name": False,
    }
    ours = paths["/admin/models/{name}"]["get"]["parameters"] + paths["/sync/predict"]["post"]["parameters"]
    assert {parameter["name"] for parameter in ours if "enum" in parameter["schema"]} >= {"name", "model_name"}


async def test_the_documentation_works_on_a_server_that_leaves_root_path_out(settings: Settings) -> None:
    app = create_app(LocalGateway(settings))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/docs", "query_string": b"", "headers": []}
    async with lifespan_of(app)(None):
        await app(scope, receive, send)
    page = b"".join(message.get("body", b"") for message in sent).decode()
    assert '"/static-offline-docs/swagger-ui-bundle.js"' in page
    assert "None" not in page


async def test_the_schema_is_made_once_however_often_it_is_asked_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many clients who ask for it do not keep others waiting."""
    app, made = create_app(LocalGateway(settings)), list[dict[str, Any]]()
    make = app.openapi

    def counted() -> dict[str, Any]:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(app, "openapi", counted)
    async with serving(app) as client:
        answers = [(await client.get("/openapi.json")).json() for _ in range(3)]
    assert answers == [made[0]] * 3
    assert len(made) == 1


async def test_the_schema_documents_bodies_and_answers(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    sync = schema["paths"]["/sync/predict"]["post"]
    body = sync["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Text"}
    assert sync["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Length")
    accepted = schema["paths"]["/async/predict"]["post"]["requestBody"]["content"]
    job = accepted["application/x-ndjson"]["schema"]
    assert accepted["application/json"]["schema"]["anyOf"] == [job, {"type": "array", "items": job}]
    properties = schema["components"]["schemas"][job["$ref"].rsplit("/", 1)[1]]["properties"]
    assert set(properties) == {*("message", "success_queue", "failure_queue", "meta"), "idempotency_key", "expires_in"}
    headers = {parameter["name"] for parameter in schema["paths"]["/async/predict"]["post"]["parameters"]}
    assert headers == {"model_name", "batch_id", "first_line", "X-Priority", "Idempotency-Key"}
    assert properties["message"] == {"$ref": "#/components/schemas/Text"}
    problem = sync["responses"]["default"]["content"]["application/problem+json"]["schema"]
    assert problem == {"$ref": "#/components/schemas/Problem"}
    found = schema["paths"]["/jobs/{job_id}"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert found == {"$ref": "#/components/schemas/JobDetails"}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            takes_requests = path.startswith(("/sync", "/batch", "/async", "/jobs", "/admin", "/v1"))
            assert ("default" in operation["responses"]) == takes_requests, path


class Signal(BaseModel):
    """An item with a type for which pydantic has no JSON schema."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    signal: Annotated[np.ndarray[Any, Any], BeforeValidator(np.asarray)] = Field(alias="values")
    unit: str = "V"


class Doubled(InferenceOutputModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    doubled: np.ndarray[Any, Any]


class Doubling(InferencePipeline):
    input_model, output_model = Signal, Doubled

    def run_inference(self, input_list: list[Any]) -> list[InferenceOutputModel]:
        return [Doubled(doubled=2 * item.signal) for item in input_list]


async def test_types_without_a_json_schema_are_documented_by_their_keys(tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text(
        "model_settings:\n"
        "  model_entries:\n"
        f"    doubling: {{pipeline: '{__name__}:Doubling'}}\n"
        "    lengths: {pipeline: 'tests.support.length_model:LengthPipeline'}\n"
    )
    async with client_of(tmp_path / "service.yaml") as client:
        answer = await client.post("/sync/predict", json={"values": [1, 2]})
        described = (await client.get("/openapi.json")).json()["x-models"]
        page = (await client.get("/ui/service")).json()
    assert answer.json()["doubled"] == [2, 4]
    assert list(described["doubling"]["input"]["properties"]) == ["values", "unit"]
    assert described["doubling"]["input"]["required"] == ["values"]
    assert list(described["doubling"]["output"]["properties"]) == ["status", "error", "meta", "doubled"]
    assert described["lengths"]["input"]["properties"]["text"]["type"] == "string"
    assert [model["name"] for model in page["models"]] == ["doubling", "lengths"]


async def test_neither_texts_nor_keys_are_logged(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = LocalGateway(settings)
    key, text = {"Authorization": "Bearer s3cret-key"}, "a private text"
    async with serving(create_app(gateway, auth=AuthConfig(api_key="s3cret-key"))) as client:
        await gateway.wait_until_ready()
        for headers in (key, {"Authorization": "Bearer wrong-key"}):
            for path, content in (
                ("/sync/predict", {"text": text}),
                ("/sync/predict", {"text": [text]}),
                ("/batch/predict", [{"text": text}, {"text": POISON}, {"txt": text}]),
                ("/async/predict", {"message": {"text": text}, "idempotency_key": "my-own-key"}),
            ):
                await client.post(path, json=content, headers=headers)
    assert "poisoned" in caplog.text, "something is logged"
    for secret in (text, "s3cret-key", "wrong-key", "my-own-key"):
        assert secret not in caplog.text
