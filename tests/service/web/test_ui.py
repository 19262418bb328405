"""The routes of the page: its files, who may see what it shows, and what it is told once a second."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import AuthConfig, KeyConfig, KeyScope, Settings
from modalkit.service.web import create_app
from modalkit.service.web.ui import samples
from modalkit.service.web.ui.routes import FOLDER
from modalkit.service.web.ui.samples import PAGE_TRACES, Sampler
from tests.support.http_client import assert_problem, job
from tests.support.http_server import serving

pytestmark = pytest.mark.anyio

TRACE = PAGE_TRACES + "0" * 15 + "1"
HEADERS = {"traceparent": f"00-{TRACE}-00000000000000a1-01"}


@pytest.fixture(autouse=True)
def _short_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "PERIOD_S", 0.1)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[LocalGateway]:
    settings = Settings(
        app_settings={
            "async_config": {"store_path": tmp_path / "jobs.db"},
            "batch_config": {"calibration": {"enabled": False}},
        },
        model_settings={"model_entries": {"lengths": {"pipeline": "tests.support.length_model:LengthPipeline"}}},
    )
    async with LocalGateway(settings) as opened:
        await opened.wait_until_ready()
        yield opened


async def samples_of(
    client: httpx.AsyncClient, headers: dict[str, str] | None = None
) -> AsyncGenerator[dict[str, Any]]:
    async with client.stream("GET", "/ui/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


async def test_the_page_runs_its_own_files_only_and_needs_nothing_from_elsewhere(gateway: LocalGateway) -> None:
    async with serving(create_app(gateway, owns_gateway=False)) as client:
        page = await client.get("/")
        assert page.content == (await client.get("/ui")).content == (FOLDER / "index.html").read_bytes()
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        for file in FOLDER.iterdir():
            answer = await client.get(f"/ui/{file.name}")
            assert answer.content == file.read_bytes()
            assert "http://" not in answer.text.replace("http://www.w3.org/", "")
            assert "https://" not in answer.text
            again = await client.get(f"/ui/{file.name}", headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        for name in ("other.js", "..%2froutes.py"):
            assert_problem(await client.get(f"/ui/{name}"), 404)


async def test_the_schemas_of_models_are_made_once_however_often_they_are_asked_for(
    gateway: LocalGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This needs no key, and one takes a millisecond or more."""
    input_model, made = gateway.models["lengths"].input_model, list[dict[str, Any]]()
    make = input_model.model_json_schema

    def counted() -> dict[str, Any]:
        made.append(make())
        return made[-1]

    async with serving(create_app(gateway, owns_gateway=False)) as client:
        monkeypatch.setattr(input_model, "model_json_schema", counted)
        answers = [(await client.get("/ui/service")).json()["models"] for _ in range(3)]
    assert answers == [[{"name": "lengths", "schema": made[0]}]] * 3
    assert len(made) == 1


async def test_the_page_can_be_switched_off(gateway: LocalGateway) -> None:
    async with serving(create_app(gateway, owns_gateway=False, ui=False)) as client:
        assert (await client.get("/")).headers["location"] == "docs"
        for path in ("/ui", "/ui/events", "/ui/service", "/ui/page.js"):
            assert_problem(await client.get(path), 404)


async def test_what_the_page_shows_needs_a_key_with_the_scope_of_metrics(gateway: LocalGateway) -> None:
    auth = AuthConfig(
        auth_header="X-Key",
        keys={
            "watcher": KeyConfig.model_validate({"api_key": "watcher-key", "scopes": [KeyScope.METRICS]}),
            "caller": KeyConfig.model_validate({"api_key": "caller-key", "scopes": [KeyScope.PREDICT]}),
        },
    )
    async with serving(create_app(gateway, auth=auth, owns_gateway=False)) as client:
        assert (await client.get("/")).status_code == 200
        told = (await client.get("/ui/service")).json()
        assert told["key_header"] == "X-Key"
        assert told["models"] == [
            {"name": "lengths", "schema": gateway.models["lengths"].input_model.model_json_schema()}
        ]
        assert_problem(await client.get("/ui/events"), 401)
        assert_problem(await client.get("/ui/events?key=watcher-key"), 401)
        assert_problem(await client.get("/ui/events", headers={"X-Key": "caller-key"}), 403)
        async with aclosing(samples_of(client, {"X-Key": "watcher-key"})) as told_samples:
            assert "lengths" in (await anext(told_samples))["models"]


async def test_samples_tell_batches_once_with_their_requests_and_the_traces_of_the_page(gateway: LocalGateway) -> None:
    async with serving(create_app(gateway, owns_gateway=False)) as client:
        await client.post("/batch/predict", json=[{"text": "four"}, {"text": "eleven here"}], headers=HEADERS)
        await client.post(
            "/sync/predict", json={"text": "one"}, headers={"traceparent": f"00-{'ab' * 16}-{'1' * 16}-01"}
        )
        async with aclosing(samples_of(client)) as told:
            first = (await anext(told))["models"]["lengths"]
            assert [batch["number"] for batch in first["recent"]] == list(range(1, first["batches"] + 1))
            listed = [batch for batch in first["recent"] if batch["traces"]]
            assert {trace for batch in listed for trace in batch["traces"]} == {TRACE}
            requests = [request for batch in listed for request in batch["requests"]]
            assert sorted((lane, size) for lane, size, _ in requests) == [("interactive", 4), ("interactive", 11)]
            await client.post("/sync/predict", json={"text": "more"})
            numbers = list[int]()
            while first["batches"] + 1 not in numbers:
                numbers += [batch["number"] for batch in (await anext(told))["models"]["lengths"]["recent"]]
            last = await anext(told)
        assert last["models"]["lengths"]["recent"] == []
        assert last["models"]["lengths"]["succeeded"] == 4
        assert last["models"]["lengths"]["limits"]["max_batch_size"] == 32
        assert last["jobs"]["statuses"]["succeeded"] == 0


async def test_jobs_that_run_with_a_request_are_told_as_bulk(gateway: LocalGateway) -> None:
    async with serving(create_app(gateway, owns_gateway=False)) as client:
        job_id = (await client.post("/async/predict", json=job("four"), headers=HEADERS)).json()["job_id"]
        await client.get(f"/jobs/{job_id}?wait=30")
        async with aclosing(samples_of(client)) as told:
            (batch,) = (await anext(told))["models"]["lengths"]["recent"]
    assert (batch["bulk"], batch["traces"], batch["requests"][0][:2]) == (1, [TRACE], ["bulk", 4])


async def test_all_who_watch_share_one_sample_and_are_told_of_the_end(gateway: LocalGateway) -> None:
    sampler, calls, told = Sampler(gateway), list[None](), list[list[bytes]]()
    model: Any = gateway.models["lengths"]
    statistics = model.statistics

    def counted() -> Any:
        calls.append(None)
        return statistics()

    model.statistics = counted

    async def watch() -> None:
        events = list[bytes]()
        told.append(events)
        async for event in sampler.watch():
            events.append(event)
            if len(told) == 5 and min(map(len, told)) >= 3:
                gateway.drain()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(watch)
    later = [event for events in told for event in events[1:]]
    assert len(calls) == 5 + len(set(later)), "each has a first sample of its own"
    assert len(set(later)) < len(later), "and later ones are shared"


async def test_a_viewer_that_leaves_takes_no_batch_from_the_others(
    gateway: LocalGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, counting, model = Sampler(gateway), anyio.Event(), gateway.models["lengths"]

    async def count_without_end() -> None:
        counting.set()
        await anyio.sleep_forever()

    async with aclosing(sampler.watch()) as leaving, aclosing(sampler.watch()) as staying:
        await anext(leaving)
        await anext(staying)
        await model.predict(model.input_model.model_validate({"text": "four"}))
        with monkeypatch.context() as patched:
            patched.setattr(gateway.jobs, "counts", count_without_end)
            async with anyio.create_task_group() as group:
                group.start_soon(leaving.__anext__)
                await counting.wait()
                group.cancel_scope.cancel()
        told = (await anext(staying)).decode()
    sample = json.loads(next(line for line in told.splitlines() if line.startswith("data: ")).removeprefix("data: "))
    assert [batch["count"] for batch in sample["models"]["lengths"]["recent"]] == [1]


async def test_a_model_that_is_not_loaded_is_told_without_figures(gateway: LocalGateway) -> None:
    gateway.models["lengths"].worker, worker = None, gateway.models["lengths"].worker
    try:
        async with serving(create_app(gateway, owns_gateway=False)) as client, aclosing(samples_of(client)) as told:
            sample = await anext(told)
    finally:
        gateway.models["lengths"].worker = worker
    assert sample["models"]["lengths"] == {"readiness": "loading", "problem": None, "engine": None, "limits": None}
