"""Spans by OpenTelemetry's SDK, and the `traceparent` from a request through its job to its message."""

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from modalkit import enable_tracing
from modalkit.pipelines import AsyncInputModel
from modalkit.pipelines.extras import install_command
from modalkit.service import tracing
from modalkit.service.jobs import JobStatus, SqliteJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.model import new_job_id
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import Settings
from modalkit.service.tracing import checked_traceparent, enable_tracing_from_environment
from modalkit.service.version import VERSION
from modalkit.service.web import create_app
from modalkit.service.worker import InferenceWorker
from tests.support.http_client import ended, job
from tests.support.http_server import serving
from tests.support.length_model import POISON, LengthPipeline
from tests.support.panic import Panic

pytestmark = pytest.mark.anyio

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
HEADERS = {"traceparent": TRACEPARENT}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        app_settings={"async_config": {"store_path": tmp_path / "jobs.db"}},
        model_settings={"model_entries": {"lengths": {"pipeline": "tests.support.length_model:LengthPipeline"}}},
    )


@pytest.fixture
def queue() -> InMemoryBackend:
    return InMemoryBackend()


@pytest.fixture
async def client(settings: Settings, queue: InMemoryBackend) -> AsyncIterator[httpx.AsyncClient]:
    gateway = LocalGateway(settings, queue_backend=queue)
    async with serving(create_app(gateway)) as opened:
        await gateway.wait_until_ready()
        yield opened


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    monkeypatch.setattr(tracing, "_tracing", None)  # and so it is again after the test
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    enable_tracing(provider)
    return exporter


def spans(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def id_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"{context.span_id:016x}"


def trace_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}"


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


async def test_a_request_continues_the_trace_of_its_caller_and_its_batch_is_linked_to_it(
    exporter: InMemorySpanExporter, client: httpx.AsyncClient
) -> None:
    answer = await client.post("/sync/predict", json={"text": "four"}, headers=HEADERS)
    (request,) = spans(exporter, "POST /sync/predict")
    assert (trace_of(request), parent_of(request), request.kind) == (TRACE_ID, SPAN_ID, SpanKind.SERVER)
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/sync/predict",
        "http.response.status_code": 200,
        "modalkit.request_id": answer.headers["x-request-id"],
    }
    (batch,) = spans(exporter, "batch lengths")
    assert parent_of(batch) is None
    assert [f"{link.context.span_id:016x}" for link in batch.links] == [id_of(request)]
    assert batch.attributes is not None
    assert batch.attributes["modalkit.batch.size"] == 1
    assert batch.start_time is not None
    assert batch.end_time is not None
    assert batch.start_time <= batch.end_time


async def test_a_batch_is_linked_once_to_each_request_that_ran_in_it(
    exporter: InMemorySpanExporter, client: httpx.AsyncClient
) -> None:
    await client.post("/batch/predict", json=[{"text": "four"}] * 5, headers=HEADERS)
    (request,) = spans(exporter, "POST /batch/predict")
    for batch in spans(exporter, "batch lengths"):
        assert [f"{link.context.span_id:016x}" for link in batch.links] == [id_of(request)]


async def test_what_fails_is_an_error_in_its_spans_without_the_text(
    exporter: InMemorySpanExporter, client: httpx.AsyncClient
) -> None:
    await client.post("/sync/predict", json={"text": POISON})
    (request,) = spans(exporter, "POST /sync/predict")
    (batch,) = spans(exporter, "batch lengths")
    assert request.status.status_code is batch.status.status_code is StatusCode.ERROR
    assert parent_of(request) is None
    await client.post("/sync/predict", json={"texts": "a secret"}, headers={"X-Request-ID": "one"})
    assert spans(exporter, "POST /sync/predict")[-1].status.status_code is StatusCode.UNSET, "the caller's fault"
    everything = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert POISON not in everything.replace("poisoned", "")
    assert "a secret" not in everything


@pytest.mark.parametrize("path", ["/jobs/x", f"/jobs/{new_job_id()}"], ids=["id of others", "own id"])
async def test_the_text_of_an_unexpected_error_is_in_no_span(
    exporter: InMemorySpanExporter, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async def fail(*_: Any) -> None:
        raise LookupError("a secret")

    monkeypatch.setattr(JobManager, "get", fail)
    assert (await client.get(path)).status_code == 500
    (request,) = spans(exporter, "GET /jobs/{job_id}")
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 500
    assert "a secret" not in request.to_json()


async def test_a_job_takes_its_trace_to_its_message(
    exporter: InMemorySpanExporter, client: httpx.AsyncClient, queue: InMemoryBackend
) -> None:
    answer = await client.post("/async/predict", json=job("four", success_queue="results"), headers=HEADERS)
    job_id = answer.json()["job_id"]
    await ended(client, job_id)
    message = json.loads(await queue.receive("results"))
    while not spans(exporter, "deliver"):
        await client.get("/health/live")
    (request,), (ran,), (sent,) = (spans(exporter, name) for name in ("POST /async/predict", "job", "deliver"))
    assert trace_of(request) == trace_of(ran) == trace_of(sent) == TRACE_ID
    assert parent_of(ran) == parent_of(sent) == id_of(request)
    assert sent.kind is SpanKind.PRODUCER
    assert message["traceparent"] == f"00-{TRACE_ID}-{id_of(sent)}-01"
    assert ran.attributes is not None
    assert ran.attributes["modalkit.job_id"] == message["job_id"] == job_id
    (batch,) = spans(exporter, "batch lengths")
    assert [f"{link.context.span_id:016x}" for link in batch.links] == [id_of(request)]


@pytest.mark.parametrize("moment", ["on_start", "on_end"])
@pytest.mark.parametrize("error", [ValueError("no collector"), Panic()])
async def test_a_span_processor_that_raises_ends_no_job_and_no_delivery(
    moment: str,
    error: BaseException,
    queue: InMemoryBackend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(SpanProcessor):
        pass

    def fail(*_: object, **__: object) -> None:
        raise error

    setattr(Broken, moment, fail)
    monkeypatch.setattr(tracing, "_tracing", None)
    provider = TracerProvider()
    provider.add_span_processor(Broken())
    enable_tracing(provider)
    async with InferenceWorker(LengthPipeline(), queue_backend=queue, calibrate=False) as worker:
        for _ in range(2):
            job_id = await worker.submit(AsyncInputModel(message={"text": "four"}, success_queue="results"))
            stored = await worker.job(job_id, wait_s=30)
            assert stored is not None
            assert stored.status is JobStatus.SUCCEEDED
            assert json.loads(await queue.receive("results"))["job_id"] == job_id
    assert "A span is incomplete" in caplog.text


async def test_the_span_of_a_program_is_the_parent_of_what_it_asks_a_worker(exporter: InMemorySpanExporter) -> None:
    provider = TracerProvider()
    tracer, queue = provider.get_tracer("test"), InMemoryBackend()
    async with InferenceWorker(LengthPipeline(), queue_backend=queue) as worker:
        with tracer.start_as_current_span("mine") as mine:
            await worker.predict({"text": "four"})
            await worker.submit(AsyncInputModel(message={"text": "four"}, success_queue="results"))
        message = json.loads(await queue.receive("results"))
    assert message["traceparent"].split("-")[1] == f"{mine.get_span_context().trace_id:032x}"
    for batch in spans(exporter, "batch lengths"):
        assert [link.context.span_id for link in batch.links] == [mine.get_span_context().span_id]


async def test_without_tracing_the_traceparent_of_a_request_is_passed_on_as_it_is(
    client: httpx.AsyncClient, queue: InMemoryBackend
) -> None:
    for headers in (HEADERS, {}, {"traceparent": "00-nonsense"}):
        await client.post("/async/predict", json=job("four", success_queue="results"), headers=headers)
        message = json.loads(await queue.receive("results"))
        assert message.get("traceparent") == (TRACEPARENT if headers is HEADERS else None)


async def test_a_stored_job_keeps_its_trace_through_a_restart(tmp_path: Path) -> None:
    token = tracing.given_traceparent.set(TRACEPARENT)
    async with InferenceWorker(LengthPipeline(), job_store=SqliteJobStore(tmp_path / "jobs.db")) as worker:
        job_id = await worker.submit({"message": {"text": "four"}})
    tracing.given_traceparent.reset(token)
    async with SqliteJobStore(tmp_path / "jobs.db") as store:
        stored = await store.get(job_id)
    assert stored is not None
    assert stored.traceparent == TRACEPARENT


@pytest.mark.parametrize(
    "value",
    [
        "",
        "ff" + TRACEPARENT[2:],
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        TRACEPARENT.upper(),
        TRACEPARENT + "-more",
        TRACEPARENT + "\n",
    ],
)
def test_what_is_no_traceparent_is_ignored(value: str) -> None:
    assert checked_traceparent(value) is None
    assert checked_traceparent(TRACEPARENT) == TRACEPARENT


def test_nothing_is_traced_unless_a_collector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.EXPORTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    enable_tracing_from_environment()
    assert tracing.active_tracing() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as variables:
            variables.setenv(name, value)
            enable_tracing_from_environment()
        assert tracing.active_tracing() is None, name


@pytest.mark.parametrize(
    ("variables", "name", "version"),
    [
        ({}, "modalkit", VERSION),
        ({"OTEL_SERVICE_NAME": "reviews"}, "reviews", VERSION),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=reviews,service.version=7"}, "reviews", "7"),
    ],
)
def test_the_service_is_called_as_opentelemetrys_variables_say(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str, version: str
) -> None:
    providers: list[TracerProvider] = []
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)  # the test's own, for the process
    monkeypatch.setattr(trace, "set_tracer_provider", providers.append)
    monkeypatch.setattr(tracing, "_tracing", None)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    for key, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", **variables}.items():
        monkeypatch.setenv(key, value)
    enable_tracing_from_environment()
    attributes = providers[0].resource.attributes
    providers[0].shutdown()
    assert (attributes["service.name"], attributes["service.version"]) == (name, version)


def test_a_missing_extra_is_told_and_leaves_the_service_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    enable_tracing_from_environment()
    assert tracing.active_tracing() is None
    assert install_command("otel") in caplog.text
