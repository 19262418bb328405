"""The routes that list, replay and remove jobs, and the metrics, over a real HTTP server."""

import json
import logging
import re
import time
from typing import Any

import anyio
import httpx
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st
from pydantic import RootModel

from modalkit.pipelines import AsyncInputModel, EngineChoice
from modalkit.service.jobs import Job, JobStoreError
from modalkit.service.jobs.manager import JobManager
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import AuthConfig, ModelEntry, Settings
from modalkit.service.web import create_app, job_routes
from modalkit.service.web.admission import SLICE_ITEMS
from modalkit.service.web.answers import JobDetails, JobView, job_json
from modalkit.testing import client_of
from tests.support.http_client import assert_problem, ended, job
from tests.support.http_server import serving
from tests.support.length_model import POISON, Length, LengthPipeline
from tests.support.odd_model import NAN

pytestmark = pytest.mark.anyio


class Stubborn:
    """Takes nothing until it is told to."""

    def __init__(self) -> None:
        self.takes = False

    async def send_message(self, queue_name: str, message: str) -> bool:
        return self.takes


async def submit(client: httpx.AsyncClient, text: str, **fields: Any) -> str:
    answer = await client.post("/async/predict", json=job(text, **fields))
    return str(answer.json()["job_id"])


async def test_jobs_are_listed_by_state_in_pages(client: httpx.AsyncClient) -> None:
    good = [await submit(client, "x" * n) for n in range(1, 4)]
    bad = await submit(client, POISON)
    for job_id in (*good, bad):
        await ended(client, job_id)
    first = (await client.get("/jobs", params={"limit": 3})).json()
    assert [found["job_id"] for found in first["jobs"]] == [bad, *reversed(good[1:])]
    second = (await client.get("/jobs", params={"limit": 3, "cursor": first["next_cursor"]})).json()
    assert ([found["job_id"] for found in second["jobs"]], second["next_cursor"]) == (good[:1], None)
    failed = (await client.get("/jobs?status=failed&status=expired")).json()
    assert [(found["job_id"], found["error"]) for found in failed["jobs"]] == [
        (bad, "ValueError: this batch is poisoned")
    ]
    assert (await client.get("/jobs?model_name=odd")).json()["jobs"] == []
    assert "status" in assert_problem(await client.get("/jobs?status=lost"), 422)["detail"]
    assert "limit" in assert_problem(await client.get("/jobs?limit=0"), 422)["detail"]


async def test_a_number_that_json_does_not_have_is_shown_as_null(client: httpx.AsyncClient) -> None:
    accepted = await client.post("/async/predict?model_name=odd", json=job(NAN))
    found = await ended(client, accepted.json()["job_id"])
    assert (found["status"], found["result"]["score"]) == ("succeeded", None)


JSON = st.recursive(
    st.none()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet='a":\\{}né')
    | st.just("NaN"),
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(st.sampled_from(["message", "meta", "result", "a"]), each, max_size=3)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from(["message", "meta", "result", "a"]), JSON, max_size=3)


@given(st.text(alphabet='a":\\{}é'), OBJECTS, OBJECTS, st.none() | OBJECTS)
def test_a_job_is_shown_with_what_is_stored_whatever_that_looks_like(
    name: str, message: Any, meta: Any, result: Any
) -> None:
    stored = Job(job_id=name, model_name=name, message_json=json.dumps(message), created_at=0.0)
    stored.error, stored.meta_json = '"result":null', json.dumps(meta)
    stored.result_json = None if result is None else json.dumps(result)
    for view in (JobView, JobDetails):
        assert json.loads(job_json(stored, view)) == view.model_validate(stored).model_dump(mode="json")


def test_what_json_does_not_have_is_shown_as_null() -> None:
    stored = Job(job_id="a", model_name="a", created_at=0.0, message_json='{"a": [NaN, -Infinity, "NaN"]}')
    assert json.loads(job_json(stored, JobDetails))["message"] == {"a": [None, None, "NaN"]}


async def test_others_have_their_turn_while_many_jobs_are_listed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, turns, seen = SLICE_ITEMS + 1, 0, set[int]()

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    def written(job: Job) -> bytes:
        seen.add(turns)
        return job_json(job)

    monkeypatch.setattr(job_routes, "job_json", written)
    gateway = LocalGateway(settings)
    async with client_of(gateway) as client, anyio.create_task_group() as task_group:
        await gateway.jobs.submit([AsyncInputModel(message={"text": "a"})] * count, model_name="lengths")
        task_group.start_soon(count_turns)
        assert len((await client.get("/jobs?limit=1000")).json()["jobs"]) == count
        task_group.cancel_scope.cancel()
    assert len(seen) > 1


async def test_a_job_is_answered_the_same_with_and_without_a_query(client: httpx.AsyncClient) -> None:
    """What only asks for a job does not pass through FastAPI."""
    job_id = await submit(client, "four", meta={"result": None})
    shown = await ended(client, job_id)
    answer, head = await client.get(f"/jobs/{job_id}"), await client.head(f"/jobs/{job_id}")
    assert (answer.json(), answer.headers["content-type"]) == (shown, "application/json")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == answer.headers["content-length"]
    for query in ("", "?", "?wait=0"):
        again = await client.get(f"/jobs/{job_id}{query}", headers={"Content-Encoding": "gzip"})
        assert (again.status_code, again.content) == (200, answer.content), "it has no body that could be compressed"
    unknown = job_id.translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    problems = [assert_problem(await client.get(path), 404) for path in (f"/jobs/{unknown}", f"/jobs/{unknown}?wait=0")]
    assert problems[0] == problems[1]
    assert_problem(await client.post(f"/jobs/{job_id}"), 405)
    metrics = (await client.get("/metrics")).text
    for outcome in ("succeeded", "invalid"):
        assert f'modalkit_request_seconds_count{{outcome="{outcome}",route="/jobs/{{job_id}}"}}' in metrics


async def test_an_undelivered_result_is_seen_and_replayed(settings: Settings) -> None:
    backend = Stubborn()
    app_settings = settings.app_settings.model_copy(
        update={"async_config": settings.app_settings.async_config.model_copy(update={"max_delivery_attempts": 1})}
    )
    gateway = LocalGateway(
        Settings(app_settings=app_settings, model_settings=settings.model_settings), queue_backend=backend
    )
    async with serving(create_app(gateway)) as client:
        await gateway.wait_until_ready()
        job_ids = [await submit(client, "four", success_queue="ok") for _ in range(3)]
        while len((await client.get("/jobs?delivery=undelivered")).json()["jobs"]) < 3:
            pass
        assert 'modalkit_deliveries{delivery="undelivered"} 3.0' in (await client.get("/metrics")).text
        backend.takes = True
        assert (await client.post(f"/jobs/{job_ids[0]}/replay")).json()["job_id"] == job_ids[0]
        while (await client.get(f"/jobs/{job_ids[0]}")).json()["delivery"] != "delivered":
            pass
        again = assert_problem(await client.post(f"/jobs/{job_ids[0]}/replay"), 409)
        assert "is delivered; only an undelivered result can be sent once more" in again["detail"]
        assert_problem(await client.post("/jobs/unknown/replay"), 404)
        assert (await client.post("/jobs/replay")).json() == {"replayed": 2}
        while len((await client.get("/jobs?delivery=delivered")).json()["jobs"]) < 3:
            pass


async def test_ended_jobs_are_purged_as_asked_for(client: httpx.AsyncClient) -> None:
    good, bad = await submit(client, "four"), await submit(client, POISON)
    for job_id in (good, bad):
        await ended(client, job_id)
    assert "say which jobs to remove" in assert_problem(await client.delete("/jobs"), 422)["detail"]
    assert (await client.delete("/jobs?status=failed&older_than=3600")).json() == {"purged": 0}
    assert (await client.delete("/jobs?status=failed")).json() == {"purged": 1}
    assert [found["job_id"] for found in (await client.get("/jobs")).json()["jobs"]] == [good]
    for bad in ("-1", "1e13"):
        assert "older_than" in assert_problem(await client.delete(f"/jobs?older_than={bad}"), 422)["detail"]


async def test_the_age_of_an_end_is_told_by_the_clock_that_the_end_was_told_by(settings: Settings) -> None:
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        gateway.jobs.clock = lambda: time.time() - 7200  # the machine's was set forward after the start
        async with serving(create_app(gateway, owns_gateway=False)) as client:
            await ended(client, await submit(client, "four"))
            assert (await client.delete("/jobs?older_than=3600")).json() == {"purged": 0}


async def test_metrics_tell_of_models_batches_and_jobs(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = EngineChoice(engine="openvino", dtype="bfloat16", reason="the fastest")
    monkeypatch.setattr(LengthPipeline, "engine_choice", choice)
    await client.post("/sync/predict", json={"text": "four"})
    await ended(client, await submit(client, "four"))
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for line in (
        'modalkit_model_ready{model="lengths"} 1.0',
        'modalkit_engine_info{dtype="bfloat16",engine="openvino",model="lengths"} 1.0',
        'modalkit_requests_total{model="lengths",outcome="succeeded"} 2.0',
        'modalkit_jobs{status="succeeded"} 1.0',
        'modalkit_jobs{status="queued"} 0.0',
        'modalkit_deliveries{delivery="undelivered"} 0.0',
    ):
        assert line in lines
    assert "modalkit_job_store_up 1.0" in lines
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)


async def test_metrics_of_the_models_are_there_when_the_store_is_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise JobStoreError("the disk is gone")

    gateway = LocalGateway(settings)
    monkeypatch.setattr(gateway.jobs.administration, "counts", fail)
    async with serving(create_app(gateway)) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    lines = answer.text.splitlines()
    assert "modalkit_job_store_up 0.0" in lines
    assert any(line.startswith('modalkit_model_ready{model="lengths"}') for line in lines)


async def test_an_engine_without_administration_answers_501_with_what_to_do_instead_and_has_no_metrics_of_jobs(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = (await client.get("/openapi.json")).json()
    monkeypatch.setattr(JobManager, "administration", None)
    for method, path, remedy in (
        ("GET", "/jobs", "ask for each by its id"),
        ("DELETE", "/jobs?status=failed", "removes results by itself"),
        ("POST", "/jobs/replay", "submit the job again"),
        ("POST", "/jobs/some/replay", "submit the job again"),
    ):
        assert remedy in assert_problem(await client.request(method, path), 501)["detail"]
    assert (await ended(client, await submit(client, "four")))["status"] == "succeeded"
    assert not re.search("^modalkit_(jobs|deliveries|job_store_up)", (await client.get("/metrics")).text, re.MULTILINE)
    assert (await client.get("/openapi.json")).json() == schema


async def test_all_that_concerns_jobs_needs_the_key(settings: Settings) -> None:
    auth = AuthConfig(api_key="s3cret")
    async with serving(create_app(LocalGateway(settings), auth=auth)) as client:
        for method, path in (
            *(("GET", "/jobs"), ("DELETE", "/jobs?status=failed"), ("POST", "/jobs/replay"), ("GET", "/jobs/a")),
            *(("DELETE", "/jobs/a"), ("POST", "/jobs/a/replay"), ("POST", "/async/predict"), ("POST", "/sync/predict")),
        ):
            assert_problem(await client.request(method, path, json=job("four")), 401)
        headers = {"Authorization": "Bearer s3cret"}
        assert (await client.get("/jobs", headers=headers)).json() == {"jobs": [], "next_cursor": None}


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("GET", "/jobs/some?wait=0&wait=1", "wait"),
        ("GET", "/jobs?limit=1&limit=2", "limit"),
        ("DELETE", "/jobs?older_than=1&older_than=2", "older_than"),
        ("POST", "/sync/predict?model_name=odd&model_name=odd", "model_name"),
        ("POST", "/batch/predict?ordered=true&ordered=false", "ordered"),
        ("POST", "/async/predict?batch_id=a&batch_id=b", "batch_id"),
    ],
)
async def test_a_query_parameter_that_is_given_twice_is_refused(
    client: httpx.AsyncClient, method: str, path: str, name: str
) -> None:
    answer = await client.request(method, path, json={"text": "four"} if method == "POST" else None)
    assert assert_problem(answer, 422)["detail"] == f"{name}: is given twice; remove one of the two"
    assert (await client.get("/jobs?status=failed&status=queued")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("DELETE", "/jobs?status=succeeded&older_then=604800", "older_then"),
        ("GET", "/jobs?statu=failed", "statu"),
        ("POST", "/async/predict?modelname=odd", "modelname"),
        ("POST", "/sync/predict?model=odd", "model"),
    ],
)
async def test_a_misspelt_query_parameter_is_refused_and_changes_nothing(
    client: httpx.AsyncClient, method: str, path: str, name: str
) -> None:
    """A filter that is not applied would remove, list or run something else than what was asked for."""
    kept = await submit(client, "x")
    await ended(client, kept)
    detail = assert_problem(await client.request(method, path, json=job("y")), 422)["detail"]
    assert f"'{name}': there is no such query parameter; this route has:" in detail
    assert [found["job_id"] for found in (await client.get("/jobs")).json()["jobs"]] == [kept]


@pytest.mark.parametrize("path", ["/sync/predict", "/batch/predict", "/async/predict"])
async def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_error_of_the_service(
    client: httpx.AsyncClient, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has no traceback for it, which any client could repeat at will."""
    host, port = client.base_url.host, client.base_url.port or 80
    async with await anyio.connect_tcp(host, port) as stream:
        await stream.send(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 10\r\n\r\n[{{}}".encode())
    await ended(client, await submit(client, "x"))  # the server has gone on
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


class Words(RootModel[list[str]]):
    pass


class CountPipeline(LengthPipeline):
    input_model = Words

    def sample_items(self, n: int, size: int) -> list[Any]:
        return []

    def item_size(self, item: Any) -> int:
        return len(item.root)

    def preprocess(self, input_list: list[Any]) -> Any:
        return None

    def predict(self, input_list: list[Any], preprocessed_data: Any) -> Any:
        return [Length(length=len(words.root)) for words in input_list]

    def postprocess(self, input_list: list[Any], raw_output: Any) -> Any:
        return raw_output


async def test_a_job_tells_an_item_that_is_no_object(settings: Settings) -> None:
    entry = {"pipeline": "tests.service.web.test_jobs:CountPipeline"}
    models = settings.model_settings.model_copy(update={"model_entries": {"words": ModelEntry.model_validate(entry)}})
    settings = settings.model_copy(update={"model_settings": models})
    async with LocalGateway(settings, queue_backend=InMemoryBackend()) as gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, owns_gateway=False)) as client:
            job_id = (await client.post("/async/predict", json={"message": ["a", "b"]})).json()["job_id"]
            found = await client.get(f"/jobs/{job_id}", params={"wait": 30})
            assert found.json()["message"] == ["a", "b"]
            assert found.json()["result"]["length"] == 2
            assert (await client.delete(f"/jobs/{job_id}")).status_code < 500
