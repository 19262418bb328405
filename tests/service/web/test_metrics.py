"""What `/metrics` says of requests, batches and jobs, and how many series callers can make."""

import re
from collections.abc import Mapping
from functools import partial

import anyio
import anyio.lowlevel
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from modalkit.batching import Priority
from modalkit.service.jobs import Job, MemoryJobStore
from modalkit.service.jobs.model import new_job_id
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import AuthConfig, Settings
from modalkit.service.web import create_app
from modalkit.service.web.metrics import own_exposition
from tests.support.http_client import ended, job
from tests.support.http_server import serving
from tests.support.length_model import POISON, LengthPipeline

pytestmark = pytest.mark.anyio

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


async def samples(client: httpx.AsyncClient) -> Samples:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    found = [sample for family in families for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}


def growth(before: Samples, after: Samples, name: str, **labels: str) -> float:
    """By how much a counter has grown; other tests of this process have counted, too."""
    key = (name, frozenset(labels.items()))
    return after.get(key, 0.0) - before.get(key, 0.0)


async def test_requests_are_measured_by_route_and_outcome(client: httpx.AsyncClient) -> None:
    before = await samples(client)
    sent = [
        ("POST", "/sync/predict", {"text": "four"}, "/sync/predict", "succeeded"),
        ("POST", "/sync/predict", {}, "/sync/predict", "invalid"),
        ("POST", "/sync/predict", {"text": POISON}, "/sync/predict", "failed"),
        ("POST", "/batch/predict", [{"text": POISON}], "/batch/predict", "succeeded"),
        ("POST", "/batch/predict", [{"text": "four"}] * 101, "/batch/predict", "invalid"),
        ("GET", f"/jobs/{new_job_id()}", None, "/jobs/{job_id}", "invalid"),
        ("GET", "/jobs", None, "/jobs", "succeeded"),
        ("HEAD", "/jobs/some/events", None, "/jobs/{job_id}/events", "invalid"),
        ("PUT", "/jobs", None, "/jobs", "invalid"),
        ("GET", "/health/ready", None, "/health/ready", "succeeded"),
    ]
    for method, path, content, _, _ in sent:
        await client.request(method, path, json=content)
    after = await samples(client)
    name = "modalkit_request_seconds_count"
    for _, _, _, route, outcome in sent:
        assert growth(before, after, name, route=route, outcome=outcome) == 1
    name = "modalkit_request_seconds_sum"
    assert 0 < growth(before, after, name, route="/sync/predict", outcome="succeeded") < 60


async def test_a_read_of_a_job_that_is_refused_is_measured_by_its_route(settings: Settings) -> None:
    async with serving(create_app(LocalGateway(settings), auth=AuthConfig(api_key="s3cret"))) as client:
        before = await samples(client)
        assert (await client.get(f"/jobs/{new_job_id()}")).status_code == 401
        after = await samples(client)
    assert growth(before, after, "modalkit_request_seconds_count", route="/jobs/{job_id}", outcome="invalid") == 1


async def test_a_request_is_measured_by_its_route_though_that_begins_as_the_root_path_does(settings: Settings) -> None:
    """Of a server that removes the root path itself."""
    transport = httpx.ASGITransport(create_app(LocalGateway(settings), owns_gateway=False), root_path="/s")
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        before = await samples(client)
        assert (await client.post("/sync/predict", json={"text": "four"})).status_code == 503
        after = await samples(client)
    assert growth(before, after, "modalkit_request_seconds_count", route="/sync/predict", outcome="refused") == 1


async def test_callers_cannot_add_series(client: httpx.AsyncClient) -> None:
    await client.get("/none")
    await samples(client)
    before = await samples(client)  # the first has a series of its own
    for path in ("/other", "/static-offline-docs/nothing", "/jobs/x/y/z", "/sync/predict/", "/%00", "/metrics/x"):
        for method in ("GET", "PATCH", "TRACE"):
            await client.request(method, path, headers={"X-Request-ID": f"{method}{path}"})
    await client.post("/sync/predict?model_name=none", json={"text": "four"})
    await client.get("/jobs/none/events")
    after = await samples(client)
    new = {labels for name, labels in after.keys() - before.keys() if name == "modalkit_request_seconds_count"}
    routes = {dict(labels)["route"] for labels in new}
    assert routes <= {"/sync/predict", "/jobs/{job_id}", "/jobs/{job_id}/events", "/docs", "/metrics", "other"}


async def test_batches_are_counted_by_reason_and_their_waits_by_lane(client: httpx.AsyncClient) -> None:
    before = await samples(client)
    assert (await client.post("/batch/predict", json=[{"text": "four"}] * 40)).status_code == 200
    bulk = {"X-Priority": "bulk"}
    assert (await client.post("/sync/predict", json={"text": "four"}, headers=bulk)).status_code == 200
    after = await samples(client)

    def grown(name: str, **labels: str) -> float:
        return growth(before, after, name, model="lengths", **labels)

    batches = grown("modalkit_batch_size_count")
    assert batches >= 3
    assert grown("modalkit_batch_size_sum") == 41
    assert grown("modalkit_padding_share_count") == batches
    assert grown("modalkit_queue_wait_seconds_count", priority="interactive") == 40
    assert grown("modalkit_queue_wait_seconds_count", priority="bulk") == 1
    assert (
        sum(grown("modalkit_batches_total", reason=reason) for reason in ("full", "budget", "age", "idle")) == batches
    )
    assert grown("modalkit_stage_seconds_count", stage="predict") == batches
    assert grown("modalkit_predicted_seconds_total") > 0
    assert 0 < grown("modalkit_stage_seconds_sum", stage="predict") <= grown("modalkit_measured_seconds_total")


async def test_what_waits_is_told_in_items_in_seconds_and_by_its_age(settings: Settings) -> None:
    gateway = LocalGateway(settings)
    async with serving(create_app(gateway)) as client, anyio.create_task_group() as group:
        await gateway.wait_until_ready()
        worker = gateway.models["lengths"].worker
        assert worker is not None
        pipeline = worker.pipeline
        assert isinstance(pipeline, LengthPipeline)
        pipeline.gate.clear()
        for _ in range(3):
            group.start_soon(partial(client.post, "/sync/predict", json={"text": "four"}))
            await submit_and_let_wait(client)
        while worker.statistics().queue_depth < 2:
            await anyio.lowlevel.checkpoint()
        found = await samples(client)
        pipeline.gate.set()

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset({"model": "lengths", **labels}.items())]

    waiting = {lane: value("modalkit_queued_requests", priority=lane) for lane in ("interactive", "bulk")}
    assert sum(waiting.values()) >= 2
    assert value("modalkit_queue_seconds") > 0
    for lane, count in waiting.items():
        assert (value("modalkit_queue_oldest_seconds", priority=lane) > 0) == (count > 0)


async def submit_and_let_wait(client: httpx.AsyncClient) -> None:
    assert (await client.post("/async/predict", json=job("four"))).status_code == 202


async def test_the_age_of_the_oldest_queued_job_is_told_by_model() -> None:
    store = MemoryJobStore()
    async with store:
        for model, created_at in (("a", 50.0), ("a", 20.0), ("b", 70.0)):
            for priority in Priority:
                added = created_at + (priority is Priority.BULK)
                job_id = new_job_id()
                await store.add(
                    [Job(job_id=job_id, model_name=model, message_json="{}", priority=priority, created_at=added)]
                )
        assert (await store.counts()).oldest_queued_at == {"a": 50.0, "b": 70.0}, "the first of each, in their order"
        await store.claim("b", 10, 80.0)
        assert (await store.counts()).oldest_queued_at == {"a": 50.0}


async def test_the_age_of_the_oldest_queued_job_is_told_by_the_clock_of_jobs(settings: Settings) -> None:
    async with LocalGateway(settings) as gateway:
        gateway.jobs.clock = lambda: 1050.0
        await gateway.jobs.store.add([Job(job_id="a", model_name="none", message_json="{}", created_at=1000.0)])
        assert 'modalkit_oldest_queued_job_seconds{model="none"} 50.0' in await own_exposition(gateway)


async def test_ended_jobs_and_deliveries_are_measured(client: httpx.AsyncClient) -> None:
    before = await samples(client)
    job_ids = [
        (await client.post("/async/predict", json=job(text, success_queue="ok", failure_queue="bad"))).json()["job_id"]
        for text in ("four", POISON)
    ]
    for job_id in job_ids:
        await ended(client, job_id)
        while (await client.get(f"/jobs/{job_id}")).json()["delivery"] != "delivered":
            pass
    after = await samples(client)
    for status in ("succeeded", "failed"):
        assert growth(before, after, "modalkit_job_age_seconds_count", model="lengths", status=status) == 1
    labels = {"model": "lengths", "outcome": "delivered"}
    assert growth(before, after, "modalkit_delivery_seconds_count", **labels) == 2
    assert growth(before, after, "modalkit_delivery_attempts_total", outcome="delivered") == 2


async def test_the_age_of_a_job_that_expired_before_it_ran_is_measured(settings: Settings) -> None:
    gateway = LocalGateway(settings)
    late = Job(job_id="late", model_name="none", message_json="{}", created_at=0.0, expires_at=1.0)
    async with serving(create_app(gateway)) as client:
        before = after = await samples(client)
        await gateway.jobs.store.add([late])
        while not growth(before, after, "modalkit_job_age_seconds_count", model="none", status="expired"):
            after = await samples(client)
        assert (await ended(client, "late"))["status"] == "expired"


async def test_every_answer_has_the_id_of_its_request(client: httpx.AsyncClient) -> None:
    own = [(await client.get(path)).headers["x-request-id"] for path in ("/health/live", "/none", "/metrics")]
    assert len(set(own)) == 3
    for given in ("7f3b/4:abc", "x" * 128):
        answer = await client.post("/sync/predict", json={"text": "x"}, headers={"X-Request-ID": given})
        assert answer.headers["x-request-id"] == given
    for bad in ("with space", "x" * 129, ""):
        answer = await client.get("/health/live", headers={"X-Request-ID": bad})
        assert re.fullmatch("[0-9a-f]{12}-[0-9a-f]+", answer.headers["x-request-id"])
