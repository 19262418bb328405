"""Jobs as the lines of a batch, over a real HTTP server; jobs that run again, and a model for each line."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest

from modalkit.service.jobs.sqlite_batches import RESULTS_PER_READ
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import Settings
from modalkit.service.web import create_app
from tests.service.web.test_adapters import ENTRIES, make_settings
from tests.service.web.test_keys import BLOG, BOSS, SHOP, serving_keys
from tests.support.http_client import assert_problem, ended, job
from tests.support.http_server import serving
from tests.support.length_model import POISON, LengthPipeline

pytestmark = pytest.mark.anyio

NDJSON = {"Content-Type": "application/x-ndjson"}


async def submit(
    client: httpx.AsyncClient, texts: Sequence[str], batch_id: str = "b", **more: Any
) -> list[dict[str, Any]]:
    """Submit texts as lines of a batch; returns the answers."""
    body = "\n".join(json.dumps(job(text)) if text else "" for text in texts)
    query = {"batch_id": batch_id, **more.pop("query", {})}
    answer = await client.post("/async/predict", params=query, content=body, headers=NDJSON | more.pop("headers", {}))
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


async def results(client: httpx.AsyncClient, batch_id: str = "b", **query: Any) -> list[dict[str, Any]]:
    """The results of a batch."""
    answer = await client.get(f"/batches/{batch_id}/results", params=query, timeout=60)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines() if line]


@pytest.fixture
async def gated(settings: Settings) -> AsyncIterator[tuple[httpx.AsyncClient, LengthPipeline]]:
    """A service, and its pipeline, which waits while its gate is cleared."""
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        worker = gateway.models["lengths"].worker
        assert worker is not None
        pipeline = worker.pipeline
        assert isinstance(pipeline, LengthPipeline)
        async with serving(create_app(gateway, owns_gateway=False)) as client:
            yield client, pipeline
            pipeline.gate.set()


async def test_results_come_in_the_order_of_lines_with_errors_in_their_places(client: httpx.AsyncClient) -> None:
    answers = await submit(client, ["four", "", "x" * 5, POISON, "y" * 2000], query={"first_line": "11"})
    assert [answer["line"] for answer in answers] == [1, 3, 4, 5]  # those of the request; blank ones are skipped
    assert answers[-1]["problem"]["status"] == 422
    found = await results(client)
    assert [(line["line"], line["status"]) for line in found] == [(11, "succeeded"), (13, "succeeded"), (14, "failed")]
    assert [line["result"] and line["result"]["length"] for line in found] == [4, 5, None]
    assert found[2]["error"] == "ValueError: this batch is poisoned"
    assert [line["line"] for line in await results(client, after=11)] == [13, 14]
    state = (await client.get("/batches/b")).json()
    assert (state["jobs"], state["statuses"]["succeeded"], state["statuses"]["failed"]) == (3, 2, 1)
    assert state["finished_at"] is not None
    assert state["drain_s"] == 0
    assert (await ended(client, found[0]["job_id"]))["batch_id"] == "b"


async def test_meta_stays_the_callers_own(client: httpx.AsyncClient) -> None:
    await client.post("/async/predict?batch_id=b", json=[job("a", meta={"row": 7}), job("b")])
    assert [line["meta"] for line in await results(client)] == [{"row": 7}, {}]


async def test_lines_that_are_sent_again_become_no_second_job(client: httpx.AsyncClient) -> None:
    first = await submit(client, ["a", "bb", "ccc"])
    again = await submit(client, ["a", "bb", "ccc", "dddd"])
    assert again[:3] == first
    other = await submit(client, ["changed"], query={"first_line": "2"})
    assert "belongs to job" in other[0]["error"]
    elsewhere = await submit(client, ["a"], batch_id="c")
    assert elsewhere[0]["job_id"] != first[0]["job_id"]
    assert [line["line"] for line in await results(client)] == [1, 2, 3, 4]


async def test_a_job_whose_key_belongs_to_a_job_of_no_or_another_batch_is_refused(client: httpx.AsyncClient) -> None:
    """It would be no line of this batch, whose results would lack it."""
    single = job("a", idempotency_key="single")
    assert (await client.post("/async/predict", json=single)).status_code == 202
    in_batch = [single, job("b", idempotency_key="in b")]
    refused, accepted = (await client.post("/async/predict?batch_id=b", json=in_batch)).json()
    assert "which asked for something else" in refused["error"]
    assert (await client.post("/async/predict?batch_id=c", json=in_batch[1])).status_code == 422
    assert [line["job_id"] for line in await results(client)] == [accepted["job_id"]]
    assert (await client.post("/async/predict?batch_id=b", json=in_batch)).json()[1] == accepted


async def test_results_wait_for_their_line_or_come_as_jobs_end(gated: tuple[httpx.AsyncClient, LengthPipeline]) -> None:
    client, pipeline = gated
    await submit(client, ["a", "bb"])
    assert len(await results(client)) == 2
    pipeline.gate.clear()
    await submit(client, ["ccc"], query={"first_line": "3"})
    assert [line["line"] for line in await results(client, wait="false")] == [1, 2]
    assert sorted(line["line"] for line in await results(client, wait="false", ordered="false")) == [1, 2]
    state = (await client.get("/batches/b")).json()
    assert state["finished_at"] is None
    assert state["jobs_per_s"] > 0
    assert state["drain_s"] > 0
    both: dict[str, list[int]] = {}

    async def read(ordered: str) -> None:
        both[ordered] = sorted(line["line"] for line in await results(client, ordered=ordered))

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(read, "true")
        task_group.start_soon(read, "false")
        await anyio.lowlevel.checkpoint()
        pipeline.gate.set()
    assert both == {"true": [1, 2, 3], "false": [1, 2, 3]}


async def test_a_batch_is_cancelled_and_removed_alone(gated: tuple[httpx.AsyncClient, LengthPipeline]) -> None:
    client, pipeline = gated
    pipeline.gate.clear()
    await submit(client, ["a"] * 40)
    (other,) = await submit(client, ["bb"], batch_id="other")
    assert (await client.post("/batches/b/cancel")).json() == {"cancelled": 40}
    assert (await client.post("/batches/b/cancel")).json() == {"cancelled": 0}
    pipeline.gate.set()
    assert (await ended(client, other["job_id"]))["status"] == "succeeded"
    assert {line["status"] for line in await results(client)} == {"cancelled"}
    assert [found["job_id"] for found in (await client.get("/jobs?batch_id=other")).json()["jobs"]] == [other["job_id"]]
    assert (await client.delete("/batches/b")).json() == {"purged": 40}
    assert_problem(await client.get("/batches/b"), 404)
    assert (await client.delete("/jobs?batch_id=other")).json() == {"purged": 1}


async def test_another_key_finds_no_batch_and_may_use_the_same_id(settings: Settings) -> None:
    async with serving_keys(settings) as client:
        await submit(client, ["a", "bb"], headers=SHOP)
        for method, path in (("GET", ""), ("GET", "/results"), ("POST", "/cancel"), ("DELETE", "")):
            problem = assert_problem(await client.request(method, f"/batches/b{path}", headers=BLOG), 404)
            assert problem["type"].endswith(":unknown-batch")
        assert "problem" not in (await submit(client, ["other"], headers=BLOG))[0]
        client.headers.update(SHOP)
        assert [line["result"]["length"] for line in await results(client)] == [1, 2]
        client.headers.update(BOSS)
        assert (await client.get("/batches/b")).json()["jobs"] == 3


async def test_no_result_is_lost_where_jobs_have_the_same_line(settings: Settings) -> None:
    """As those of several keys with one id have, which an admin reads together, in several pages."""
    async with serving_keys(settings) as client:
        for headers in (SHOP, BLOG, BOSS):
            await submit(client, ["four"] * (RESULTS_PER_READ // 2), headers=headers)
        client.headers.update(BOSS)
        found = await results(client)
        assert [line["line"] for line in found] == sorted(3 * list(range(1, RESULTS_PER_READ // 2 + 1)))
        assert len({line["job_id"] for line in found}) == len(found)
        assert len(await results(client, after=RESULTS_PER_READ // 2 - 1)) == 3


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("batch_id=a/b", "batch_id: must be"),
        ("batch_id=b&first_line=0", "first_line: must be"),
        (f"batch_id=b&first_line={'0' * 19}1{'9' * 19}", "first_line: must be"),
        (f"batch_id=b&first_line={'0' * 19}1{'9' * 5000}", "first_line: must be"),
        ("batch=b", "no such"),
    ],
)
async def test_a_wrong_place_is_refused(client: httpx.AsyncClient, query: str, said: str) -> None:
    assert said in assert_problem(await client.post(f"/async/predict?{query}", json=job("a")), 422)["detail"]


# Jobs that run once more.


async def test_a_failed_job_runs_once_more_as_the_same_job(gated: tuple[httpx.AsyncClient, LengthPipeline]) -> None:
    client, _ = gated
    keyed = job(POISON, idempotency_key="k", expires_in=600.0)
    job_id = (await client.post("/async/predict", json=keyed)).json()["job_id"]
    failed = await ended(client, job_id)
    assert failed["status"] == "failed"
    again = (await client.post(f"/jobs/{job_id}/retry")).json()
    assert (again["status"] in ("queued", "running", "failed"), again["expires_at"] > failed["expires_at"]) == (
        True,
        True,
    )
    assert (await ended(client, job_id))["status"] == "failed"
    assert (await client.post("/async/predict", json=keyed)).json()["job_id"] == job_id


async def test_all_failed_jobs_run_once_more_or_those_of_a_batch(client: httpx.AsyncClient) -> None:
    await submit(client, [POISON, "fine"])
    await submit(client, [POISON], batch_id="c")
    await results(client)
    await results(client, "c")
    assert (await client.post("/jobs/retry?batch_id=b")).json() == {"retried": 1}
    await results(client)
    assert (await client.post("/jobs/retry")).json() == {"retried": 2}
    assert (await client.post("/jobs/retry?status=expired")).json() == {"retried": 0}
    assert_problem(await client.post("/jobs/retry?status=succeeded"), 422)
    (fine,) = [line["job_id"] for line in await results(client) if line["status"] == "succeeded"]
    assert "succeeded" in assert_problem(await client.post(f"/jobs/{fine}/retry"), 409)["detail"]


# A model for each line, and the limit of a line.


async def test_a_line_may_name_its_model(client: httpx.AsyncClient) -> None:
    lines = [job("a"), job("bb", model_name="Lengths-2"), job("ccc", model_name="none"), job("d", model_name=7)]
    body = "\n".join(map(json.dumps, lines))
    answer = await client.post("/async/predict?batch_id=b", content=body, headers=NDJSON)
    first, second, unknown, wrong = [json.loads(line) for line in answer.text.splitlines()]
    names = [(await ended(client, line["job_id"]))["model_name"] for line in (first, second)]
    assert names == ["lengths", "Lengths-2"]
    assert "there is no model 'none'" in unknown["error"]
    assert wrong["error"] == "model_name: must be the name of a model, a JSON string"
    assert [line["line"] for line in await results(client)] == [1, 2]


async def test_an_item_of_a_stream_may_name_its_model(client: httpx.AsyncClient) -> None:
    items = [
        {"text": "a"},
        {"text": "bb", "model_name": "Lengths-2"},
        {"message": {"text": "ccc"}, "model_name": "lengths"},
        {"text": "x", "model_name": "none"},
        {"text": "dddd"},
    ]
    body = "\n".join(map(json.dumps, items))
    answer = await client.post("/batch/predict?ordered=true", content=body, headers=NDJSON)
    found = [json.loads(line) for line in answer.text.splitlines()]
    assert [line.get("length") for line in found] == [1, 2, 3, None, 4]
    assert found[3]["problem"]["type"].endswith(":unknown-model")


async def test_the_documentation_says_which_model_takes_and_gives_what() -> None:
    """In a service that is not started: its models need not be loaded."""
    app = create_app(LocalGateway(make_settings(**ENTRIES)))
    schema = app.openapi()
    taken = schema["paths"]["/sync/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert [kind["title"] for kind in taken] == ["lengths", "all"]
    assert "?model_name=all" in taken[1]["description"]
    assert list(schema["x-models"]["lengths"]["input"]["properties"]) == ["text"]
