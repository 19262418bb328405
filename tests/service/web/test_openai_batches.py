"""OpenAI's Python client uploads a file, runs it as a batch, and reads the results."""

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest

from modalkit.service.errors import NotReadyError, Readiness
from modalkit.service.jobs import JobStore, JobStoreError, SqliteJobStore
from modalkit.service.jobs.errors import JobStoreFullError
from modalkit.service.jobs.manager import JobManager
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import RequestConfig, Settings
from modalkit.service.web import create_app
from modalkit.service.web.adapters import openai_submission
from modalkit.service.web.adapters.openai_submission import BATCH, read_request
from modalkit.service.web.auth import Caller
from modalkit.service.web.bodies import BodyParser
from modalkit.service.web.lines import LINES_AT_ONCE, Line
from modalkit.service.web.problems import ProblemError
from tests.service.web.test_adapters import ENTRIES, make_settings
from tests.service.web.test_keys import serving_keys
from tests.support.http_client import assert_problem
from tests.support.http_server import serving
from tests.support.length_model import POISON, LengthPipeline

pytestmark = pytest.mark.anyio


def request(custom_id: str, url: str = "/sync/predict", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def client_of(client: httpx.AsyncClient, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0)


async def uploaded(client: openai.AsyncOpenAI, *lines: Any) -> str:
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    return (await client.files.create(file=("requests.jsonl", content), purpose="batch")).id


async def ran(client: openai.AsyncOpenAI, file_id: str, endpoint: Any = "/sync/predict") -> Any:
    """The batch of a file, once it has ended."""
    return await while_status(client, await created(client, file_id, endpoint), "validating", "in_progress")


async def created(client: openai.AsyncOpenAI, file_id: str, endpoint: Any = "/sync/predict") -> Any:
    return await client.batches.create(
        input_file_id=file_id, endpoint=endpoint, completion_window="24h", metadata={"of": "a test"}
    )


async def while_status(client: openai.AsyncOpenAI, batch: Any, *statuses: str) -> Any:
    """A batch, once it has another status than these."""
    with anyio.fail_after(60):
        while batch.status in statuses:
            await anyio.sleep(0.01)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def content_of(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    lines = (await client.files.content(file_id)).text.splitlines()
    return {line["custom_id"]: line for line in map(json.loads, filter(None, lines))}


@pytest.fixture
async def gateway() -> AsyncIterator[LocalGateway]:
    async with LocalGateway(make_settings(**ENTRIES)) as opened:
        await opened.wait_until_ready()
        yield opened


@pytest.fixture
async def client(gateway: LocalGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(create_app(gateway, owns_gateway=False)) as opened:
        yield opened


async def test_a_file_becomes_a_batch_with_results_and_errors_by_custom_id(client: httpx.AsyncClient) -> None:
    async with client_of(client) as ask:
        file_id = await uploaded(
            ask,
            request("a", text="four", model="lengths"),
            request("b", text=POISON, model="lengths"),
            request("c", text=7),
            request("d", text="x", model="none"),
            request("e", text="x", model=["lengths"]),
        )
        batch = await ran(ask, file_id)
        assert (batch.status, batch.metadata) == ("completed", {"of": "a test"})
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (5, 1, 4)
        assert (await content_of(ask, batch.output_file_id))["a"]["response"]["body"]["length"] == 4
        errors = await content_of(ask, batch.error_file_id)
        assert errors["b"]["error"] == {"code": "failed", "message": "ValueError: this batch is poisoned"}
        assert errors["c"]["response"]["status_code"] == 422
        assert errors["d"]["response"]["status_code"] == 404
        assert errors["e"]["response"]["status_code"] == 422
        assert (await ask.files.retrieve(batch.output_file_id)).purpose == "batch_output"
        assert [each.id for each in (await ask.batches.list()).data] == [batch.id]
        with pytest.raises(openai.NotFoundError):
            await ask.batches.list(after="batch_removed")
        other_id = await uploaded(ask, "")
        assert [each.id async for each in ask.files.list(purpose="batch", limit=1)] == [other_id, file_id]
        assert (await ask.files.list(purpose="batch_output")).data == []
        await ask.files.delete(file_id)
        with pytest.raises(openai.NotFoundError):
            await ask.files.retrieve(file_id)


async def test_embeddings_are_answered_in_their_own_shape(client: httpx.AsyncClient) -> None:
    async with client_of(client) as ask:
        lines = [
            request("a", "/v1/embeddings", input="two words", model="all"),
            request("b", "/v1/embeddings", input=7),
        ]
        batch = await ran(ask, await uploaded(ask, *lines), "/v1/embeddings")
        answer = (await content_of(ask, batch.output_file_id))["a"]["response"]["body"]
        assert answer["data"] == [{"object": "embedding", "index": 0, "embedding": [9, 2]}]
        assert list(await content_of(ask, batch.error_file_id)) == ["b"]


async def test_a_job_that_was_added_to_a_batch_by_itself_does_not_break_its_files(client: httpx.AsyncClient) -> None:
    async with client_of(client) as ask:
        batch = await ran(
            ask, await uploaded(ask, request("a", "/v1/embeddings", input="x", model="all")), "/v1/embeddings"
        )
        asked = {"batch_id": batch.id, "first_line": 9, "model_name": "lengths"}
        added = await client.post("/async/predict", params=asked, json={"message": {"text": "four"}})
        await client.get(f"/jobs/{added.json()['job_id']}", params={"wait": 30})
        assert list(await content_of(ask, batch.output_file_id)) == ["a", None]


async def test_a_file_with_a_wrong_line_runs_nothing(client: httpx.AsyncClient) -> None:
    async with client_of(client) as ask:
        lines = [request("a", text="x"), "no json", request("a", text="y"), request("b", "/v1/embeddings", input="z")]
        batch = await ran(ask, await uploaded(ask, *lines))
        assert batch.status == "failed"
        assert [error.line for error in batch.errors.data] == [2, 3, 4]
        assert (await ran(ask, await uploaded(ask, ""))).status == "failed"
    assert (await client.get("/jobs")).json()["jobs"] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'\xef\xbb\xbf{"custom_id": "a", "url": "/sync/predict", "body": {}}',
            "the line is not JSON: it begins with a byte order mark",
        ),
        (b'{"custom_id": 1, "url": "/sync/predict", "body": {}}', "custom_id: must be a text, a JSON string"),
        (b'{"url": "/sync/predict", "body": []}', "custom_id: is missing: add it; body: must be a JSON object"),
        (
            b'{"custom_id": "a", "url": "/sync/predict", "body": {"text": "a", "text": "b"}}',
            'the line has the key "text" twice in one object',
        ),
        (b'{"custom_id": "a", "url": "/predict", "body": {}}', "url: must be that of the batch, /sync/predict"),
    ],
)
async def test_an_error_tells_what_is_wrong_with_its_line(client: httpx.AsyncClient, line: bytes, message: str) -> None:
    async with client_of(client) as ask:
        file = await ask.files.create(file=("requests.jsonl", line), purpose="batch")
        (error,) = (await ran(ask, file.id)).errors.data
        assert error.message.startswith(message)


async def test_the_client_shows_why_a_request_fails(client: httpx.AsyncClient) -> None:
    async with client_of(client) as ask:
        with pytest.raises(openai.NotFoundError, match="there is no 'file-none': it is wrong, or was removed"):
            await ask.files.retrieve("file-none")
        with pytest.raises(openai.UnprocessableEntityError, match="limit: Input should be less than or equal to 100"):
            await ask.batches.list(limit=1000)
        with pytest.raises(openai.UnprocessableEntityError, match="endpoint: "):
            await ran(ask, "file-none", "/v1/responses")
        with pytest.raises(openai.NotFoundError, match="'none'"):
            await ask.models.retrieve("none")


async def test_files_of_results_go_with_the_jobs_of_their_batch(client: httpx.AsyncClient) -> None:
    async with client_of(client) as ask:
        batch = await ran(ask, await uploaded(ask, request("a", text="four", model="lengths"), request("b", text=7)))
        for file_id in (batch.output_file_id, batch.error_file_id):
            with pytest.raises(openai.ConflictError, match=f"remove these by DELETE /batches/{batch.id}"):
                await ask.files.delete(file_id)


async def test_a_batch_whose_requests_expired_says_when(client: httpx.AsyncClient, gateway: LocalGateway) -> None:
    worker = gateway.models["lengths"].worker
    assert worker is not None
    assert isinstance(worker.pipeline, LengthPipeline)
    worker.pipeline.gate.clear()
    async with client_of(client) as ask:
        file_id = await uploaded(ask, request("a", text="x", model="lengths"))
        batch = await while_status(ask, await created(ask, file_id), "validating")
        ended_at = batch.created_at + 90_000
        gateway.jobs.clock = lambda: float(ended_at)
        with anyio.fail_after(60):
            while batch.status == "in_progress":
                await anyio.sleep(0.01)
                batch = await ask.batches.retrieve(batch.id)
        assert (batch.status, batch.expired_at, batch.completed_at) == ("expired", ended_at, None)
        assert (await content_of(ask, batch.error_file_id))["a"]["error"]["code"] == "expired"
    worker.pipeline.gate.set()


async def test_a_batch_is_cancelled(client: httpx.AsyncClient, gateway: LocalGateway) -> None:
    worker = gateway.models["lengths"].worker
    assert worker is not None
    assert isinstance(worker.pipeline, LengthPipeline)
    worker.pipeline.gate.clear()
    async with client_of(client) as ask:
        file_id = await uploaded(ask, *[request(str(n), text="x", model="lengths") for n in range(40)])
        batch = await while_status(ask, await created(ask, file_id), "validating")
        assert batch.status == "in_progress"
        assert (await ask.batches.cancel(batch.id)).status == "cancelled"
        worker.pipeline.gate.set()
        assert len(await content_of(ask, (await ask.batches.retrieve(batch.id)).error_file_id)) == 40


async def test_a_batch_that_is_asked_for_while_it_is_cancelled_keeps_the_time_of_that(
    client: httpx.AsyncClient, gateway: LocalGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, count, calls = gateway.models["lengths"].worker, JobStore.batch, itertools.count()
    assert worker is not None
    assert isinstance(worker.pipeline, LengthPipeline)
    is_asked, is_cancelled = anyio.Event(), anyio.Event()

    async def count_after_the_cancellation(store: JobStore, *arguments: Any) -> Any:
        if not next(calls):
            is_asked.set()
            await is_cancelled.wait()
        return await count(store, *arguments)

    worker.pipeline.gate.clear()
    async with client_of(client) as ask:
        file_id = await uploaded(ask, request("a", text="x", model="lengths"))
        batch = await while_status(ask, await created(ask, file_id), "validating")
        monkeypatch.setattr(JobStore, "batch", count_after_the_cancellation)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(ask.batches.retrieve, batch.id)
            await is_asked.wait()
            await ask.batches.cancel(batch.id)
            is_cancelled.set()
        assert (await ask.batches.retrieve(batch.id)).cancelling_at is not None
    worker.pipeline.gate.set()


async def test_a_batch_that_cannot_be_submitted_whole_runs_nothing(
    client: httpx.AsyncClient, gateway: LocalGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, submit, calls = gateway.models["lengths"].worker, gateway.jobs.submit, itertools.count()
    assert worker is not None
    assert isinstance(worker.pipeline, LengthPipeline)
    worker.pipeline.gate.clear()

    async def submit_once(*args: Any, **options: Any) -> Any:
        if next(calls):
            raise ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, "full")
        return await submit(*args, **options)

    monkeypatch.setattr(gateway.jobs, "submit", submit_once)
    async with client_of(client) as ask:
        lines = [request(str(n), text="x", model="lengths") for n in range(2 * LINES_AT_ONCE)]
        batch = await ran(ask, await uploaded(ask, *lines))
        assert (batch.status, [error.message for error in batch.errors.data]) == ("failed", ["full"])
        with anyio.fail_after(60):  # its requests are cancelled behind its end
            while (await client.get(f"/batches/{batch.id}")).json()["statuses"]["cancelled"] < LINES_AT_ONCE:
                await anyio.sleep(0.01)
    worker.pipeline.gate.set()
    assert {job["status"] for job in (await client.get("/jobs?limit=1000")).json()["jobs"]} == {"cancelled"}


@pytest.fixture
def second_step(monkeypatch: pytest.MonkeyPatch) -> tuple[anyio.Event, anyio.Event]:
    """An event that is set when the second step of a batch is submitted, which waits for the other event."""
    submit, calls = JobManager.submit, itertools.count(1)
    has_begun, may_go_on = anyio.Event(), anyio.Event()

    async def submit_second_later(*args: Any, **options: Any) -> Any:
        if next(calls) == 2:
            has_begun.set()
            await may_go_on.wait()
        return await submit(*args, **options)

    monkeypatch.setattr(JobManager, "submit", submit_second_later)
    return has_begun, may_go_on


def steps(count: int) -> list[dict[str, Any]]:
    return [request(str(n), text="x", model="lengths") for n in range(count * LINES_AT_ONCE)]


async def test_a_batch_is_there_before_its_requests_are_submitted_and_its_file_stays_until_then(
    client: httpx.AsyncClient, second_step: tuple[anyio.Event, anyio.Event]
) -> None:
    has_begun, may_go_on = second_step
    async with client_of(client) as ask:
        batch = await created(ask, file_id := await uploaded(ask, *steps(2)))
        await has_begun.wait()
        batch = await ask.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert (batch.status, batch.request_counts.total, batch.output_file_id) == ("validating", 1024, None)
        with pytest.raises(openai.ConflictError, match=f"remove it once {batch.id} is no longer `validating`"):
            await ask.files.delete(file_id)
        may_go_on.set()
        batch = await while_status(ask, batch, "validating", "in_progress")
        assert (batch.status, batch.request_counts.completed) == ("completed", 1024)
        await ask.files.delete(file_id)


async def test_no_request_is_submitted_after_the_cancellation_of_its_batch(
    client: httpx.AsyncClient, gateway: LocalGateway, second_step: tuple[anyio.Event, anyio.Event]
) -> None:
    worker = gateway.models["lengths"].worker
    assert worker is not None
    assert isinstance(worker.pipeline, LengthPipeline)
    worker.pipeline.gate.clear()
    has_begun, may_go_on = second_step
    async with client_of(client) as ask:
        file_id = await uploaded(ask, *steps(4))
        batch = await created(ask, file_id)
        await has_begun.wait()
        batch = await ask.batches.cancel(batch.id)
        assert batch.request_counts is not None
        assert (batch.status, batch.request_counts.total) == ("cancelled", 2048)
        may_go_on.set()
        await ask.files.delete(file_id)  # nothing reads it any more
        assert len(await content_of(ask, batch.error_file_id)) == 512
        worker.pipeline.gate.set()
        assert (await client.get(f"/batches/{batch.id}")).json()["statuses"]["cancelled"] == 512


async def test_what_a_process_left_of_a_batch_is_submitted_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had not noted its last step. Each request becomes one job, or is told in the error file, once."""
    put, has_failed, puts = JobStore.put_document, anyio.Event(), itertools.count(1)

    async def put_three_times(store: JobStore, document_id: str, part: int, *arguments: Any) -> None:
        if document_id.startswith(BATCH) and not part and next(puts) > 3:  # new, checked, and after the first step
            has_failed.set()
            raise JobStoreError("the process dies")
        await put(store, document_id, part, *arguments)

    lines = steps(3)
    for step in range(3):
        lines[step * LINES_AT_ONCE] = request(f"refused {step}", text=7, model="lengths")
    async with opened(tmp_path) as client, client_of(client) as ask:
        file_id = await uploaded(ask, *lines)
        with monkeypatch.context() as patched:
            patched.setattr(JobStore, "put_document", put_three_times)
            batch = await created(ask, file_id)
            await has_failed.wait()
            assert (await ask.batches.retrieve(batch.id)).status == "validating"
    async with opened(tmp_path) as client, client_of(client) as ask:
        batch = await while_status(ask, await ask.batches.retrieve(batch.id), "validating", "in_progress")
        counts = batch.request_counts
        assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 1536, 1533, 3)
        errors = (await ask.files.content(batch.error_file_id)).text.splitlines()
        assert [json.loads(line)["custom_id"] for line in errors] == ["refused 0", "refused 1", "refused 2"]
        assert (await client.get(f"/batches/{batch.id}")).json()["jobs"] == 1533


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A service over the store in this folder."""
    store = SqliteJobStore(folder / "jobs.db")
    async with LocalGateway(make_settings(**ENTRIES), job_store=store) as gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, owns_gateway=False)) as client:
            yield client


@pytest.mark.parametrize("readiness", [Readiness.LOADING, Readiness.BROKEN])
async def test_a_batch_waits_until_its_model_takes_jobs(
    client: httpx.AsyncClient, gateway: LocalGateway, monkeypatch: pytest.MonkeyPatch, readiness: Readiness
) -> None:
    """Where it is broken, the process is about to be replaced."""
    submit, calls = gateway.jobs.submit, itertools.count()
    monkeypatch.setattr(openai_submission, "backoff_with_jitter", lambda *_, **__: 0)

    async def refuse_once(*args: Any, **options: Any) -> Any:
        if not next(calls):
            raise NotReadyError("lengths", readiness)
        return await submit(*args, **options)

    monkeypatch.setattr(gateway.jobs, "submit", refuse_once)
    async with client_of(client) as ask:
        batch = await ran(ask, await uploaded(ask, request("a", text="x", model="lengths")))
        assert (batch.status, batch.request_counts.completed) == ("completed", 1)


async def test_a_batch_waits_while_its_key_is_over_its_limit_of_items(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after another batch, whose requests were counted after this one was accepted."""
    take, calls = Caller.take_items, itertools.count()
    monkeypatch.setattr(openai_submission, "backoff_with_jitter", lambda *_, **__: 0)

    def refuse_once(caller: Caller, count: int) -> None:
        if count and not next(calls):
            raise ProblemError(HTTPStatus.TOO_MANY_REQUESTS, "this API key has reached its limit")
        take(caller, count)

    monkeypatch.setattr(Caller, "take_items", refuse_once)
    async with client_of(client) as ask:
        batch = await ran(ask, await uploaded(ask, request("a", text="x", model="lengths")))
        assert (batch.status, batch.request_counts.completed) == ("completed", 1)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NotReadyError("lengths", Readiness.FAILED), "model 'lengths' takes no requests now: it is failed"),
        (JobStoreFullError(9, 1, 9), "the job store holds 9 of at most 9 jobs"),
        (KeyError("a bug"), "KeyError: 'a bug'"),
    ],
)
async def test_a_batch_that_no_model_or_store_will_take_fails(
    client: httpx.AsyncClient, gateway: LocalGateway, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    async def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(gateway.jobs, "submit", refuse)
    async with client_of(client) as ask:
        batch = await ran(ask, await uploaded(ask, request("a", text="x", model="lengths")))
        (shown,) = batch.errors.data
        assert (batch.status, shown.code) == ("failed", "not_submitted")
        assert shown.message.startswith(told)


async def test_a_batch_whose_file_was_removed_meanwhile_fails(
    client: httpx.AsyncClient, gateway: LocalGateway, second_step: tuple[anyio.Event, anyio.Event]
) -> None:
    has_begun, may_go_on = second_step
    async with client_of(client) as ask:
        batch = await created(ask, file_id := await uploaded(ask, *steps(20)))
        await has_begun.wait()
        await gateway.jobs.administration.documents.remove_document(file_id)  # as too old
        may_go_on.set()
        batch = await while_status(ask, batch, "validating", "in_progress")
        assert [error.message for error in batch.errors.data] == [
            f"{file_id} was removed before all its requests were submitted"
        ]


async def test_files_and_batches_belong_to_the_key_that_made_them(settings: Settings) -> None:
    async with (
        serving_keys(settings) as client,
        client_of(client, "s") as shop,
        client_of(client, "b") as blog,
        client_of(client, "wrong") as wrong,
    ):
        file_id = await uploaded(shop, request("a", text="x"))
        batch = await ran(shop, file_id)
        with pytest.raises(openai.AuthenticationError, match="API key"):
            await wrong.batches.list()
        for ask in (blog.files.retrieve(file_id), blog.batches.retrieve(batch.id), blog.files.content(file_id)):
            with pytest.raises(openai.NotFoundError):
                await ask
        with pytest.raises(openai.NotFoundError):
            await created(blog, file_id)
        assert (await blog.batches.list()).data == []


async def test_batches_count_against_the_limit_of_items_of_their_key(settings: Settings) -> None:
    keys = {"slow": {"api_key": "s", "scopes": ["jobs"], "max_items_per_second": 0.001}}
    async with serving_keys(settings, keys=keys) as client, client_of(client, "s") as ask:
        file_id = await uploaded(ask, *[request(str(n), text="x") for n in range(3)])
        await ran(ask, file_id)
        with pytest.raises(openai.RateLimitError):
            await ran(ask, file_id)


async def test_a_file_of_wrong_lines_tells_the_first_hundred(client: httpx.AsyncClient) -> None:
    async with client_of(client) as ask:
        batch = await ran(ask, await uploaded(ask, *["no json"] * 300))
        assert [error.line for error in batch.errors.data] == list(range(1, 101))


async def test_a_batch_whose_results_were_removed_keeps_its_counts(client: httpx.AsyncClient) -> None:
    async with client_of(client) as ask:
        file_id = await uploaded(ask, request("a", text="four", model="lengths"), request("c", text=7))
        seen = await ran(ask, file_id)
        unseen = await created(ask, file_id)
        with anyio.fail_after(60):
            while (await client.get(f"/batches/{unseen.id}")).json().get("finished_at") is None:
                await anyio.sleep(0.01)
        for batch in (seen, unseen):
            assert (await client.delete(f"/batches/{batch.id}")).json() == {"purged": 1}
        seen = await ask.batches.retrieve(seen.id)
        unseen = await while_status(ask, unseen, "validating")
    counts = seen.request_counts
    assert counts is not None
    assert (counts.completed, counts.failed, seen.output_file_id) == (1, 1, None)
    assert (seen.status, seen.errors) == ("completed", None)
    assert unseen.errors is not None
    assert unseen.errors.data is not None
    assert [error.code for error in unseen.errors.data] == ["results_removed"]


async def test_files_and_batches_have_the_times_of_the_clock_by_which_they_are_removed(
    client: httpx.AsyncClient, gateway: LocalGateway
) -> None:
    gateway.jobs.clock = lambda: 4_000_000_000.0  # the machine's was set back after the start
    async with client_of(client) as ask:
        file_id = await uploaded(ask, request("a", text="four", model="lengths"))
        batch = await ran(ask, file_id)
        times = (await ask.files.retrieve(file_id)).created_at, batch.created_at, batch.completed_at
        assert times == (4_000_000_000,) * 3
        assert [each.id for each in (await ask.files.list()).data] == [file_id]


async def test_stored_files_have_a_limit_in_all(gateway: LocalGateway) -> None:
    limits = RequestConfig(max_stored_file_bytes=2000)
    async with serving(create_app(gateway, limits=limits, owns_gateway=False)) as client, client_of(client) as ask:
        file_id = await uploaded(ask, "x" * 1000)
        problem = assert_problem(await client.post("/v1/files", files={"file": b"x" * 1000}), 507)
        assert "remove files that are not needed, or raise request_config.max_stored_file_bytes" in problem["detail"]
        await ask.files.delete(file_id)
        await uploaded(ask, "x" * 1000)


async def test_the_errors_of_refused_requests_count_as_files(gateway: LocalGateway) -> None:
    limits = RequestConfig(max_stored_file_bytes=2000)
    async with serving(create_app(gateway, limits=limits, owns_gateway=False)) as client, client_of(client) as ask:
        file_id = await uploaded(ask, *[request(str(n), text=7) for n in range(10)])
        batch = await ran(ask, file_id)
        (error,) = batch.errors.data
        assert (batch.status, error.code) == ("failed", "not_submitted")
        assert "the stored files would exceed 2000 bytes in all" in error.message


async def test_an_upload_that_ends_while_another_is_checked_counts(
    gateway: LocalGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, count = JobStore.put_document, JobStore.documents_bytes
    first_is_stored, second_has_counted = anyio.Event(), anyio.Event()
    counts, codes = list[int](), list[int]()

    async def put_when_second_has_counted(store: JobStore, *arguments: Any) -> None:
        await second_has_counted.wait()
        await put(store, *arguments)

    async def count_before_first_is_stored(store: JobStore) -> int:
        counts.append(await count(store))
        if len(counts) == 2:
            second_has_counted.set()
            await first_is_stored.wait()
        return counts[0]

    monkeypatch.setattr(JobStore, "put_document", put_when_second_has_counted)
    monkeypatch.setattr(JobStore, "documents_bytes", count_before_first_is_stored)
    limits = RequestConfig(max_stored_file_bytes=2000)
    async with serving(create_app(gateway, limits=limits, owns_gateway=False)) as client:

        async def upload() -> None:
            files = {"file": b"x" * 1000}
            codes.append((await client.post("/v1/files", files=files, data={"purpose": "batch"})).status_code)
            first_is_stored.set()

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(upload)
            task_group.start_soon(upload)
    assert codes == [200, 507]


async def test_a_file_that_cannot_be_stored_whole_leaves_nothing(
    gateway: LocalGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = JobStore.put_document

    async def fail_at_the_end(store: JobStore, document_id: str, part: int, *arguments: Any) -> None:
        if part == 0:
            raise JobStoreError("no space is left")
        await put(store, document_id, part, *arguments)

    monkeypatch.setattr(JobStore, "put_document", fail_at_the_end)
    async with serving(create_app(gateway, owns_gateway=False)) as client:
        answer = await client.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"})
    assert answer.is_server_error
    assert await gateway.jobs.administration.documents.documents_bytes() == 0


async def test_an_upload_that_is_no_file_or_too_large_is_refused(gateway: LocalGateway) -> None:
    limits = RequestConfig(max_file_bytes=1000)
    async with serving(create_app(gateway, limits=limits, owns_gateway=False)) as client:
        assert_problem(await client.post("/v1/files", data={"purpose": "batch"}), 422)
        assert_problem(await client.post("/v1/files", files={"file": b"x"}, data={"purpose": "assistants"}), 422)
        problem = assert_problem(await client.post("/v1/files", files={"file": b"x" * 2000}), 413)
        assert "request_config.max_file_bytes" in problem["detail"]
        assert_problem(await client.post("/v1/batches", content=b" " * (RequestConfig().max_item_bytes + 1)), 413)


@pytest.mark.parametrize(
    ("charset", "name"), [("utf-8", b"\xff"), ("utf-7", b"+2AA-"), ("none", b"\xff"), ("idna", b"\xff")]
)
async def test_a_file_may_have_any_name(client: httpx.AsyncClient, charset: str, name: bytes) -> None:
    """Also half of a surrogate pair, which JSON cannot hold."""
    form = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="%b.jsonl"\r\n\r\n{}\r\n--x--\r\n' % name
    )
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    answer = await client.post("/v1/files", content=form, headers=headers)
    assert answer.status_code == 200
    assert (await client.get(f"/v1/files/{answer.json()['id']}")).json()["filename"].endswith(".jsonl")


async def test_the_limits_of_requests_hold_for_batches_and_their_lines(gateway: LocalGateway) -> None:
    limits = RequestConfig(max_body_bytes=2000, max_item_bytes=500)
    async with serving(create_app(gateway, limits=limits, owns_gateway=False)) as client, client_of(client) as ask:
        problem = assert_problem(await client.post("/v1/batches", content=b" " * 5000), 413)
        assert "request_config.max_body_bytes" in problem["detail"]
        lines = [request("a", text="x" * 400, model="lengths"), request("b", text="x" * 600, model="lengths")]
        batch = await ran(ask, await uploaded(ask, *lines))
        assert list(await content_of(ask, batch.output_file_id)) == ["a"]
        assert (await content_of(ask, batch.error_file_id))["b"]["response"]["status_code"] == 413


async def test_the_lines_of_a_batch_share_the_parser_of_their_model(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To make one takes ten times as long as to parse a line, and the event loop does nothing else meanwhile."""
    make, made = BodyParser.__init__, list[BodyParser]()

    def counted(parser: BodyParser, *args: Any, **options: Any) -> None:
        made.append(parser)
        make(parser, *args, **options)

    monkeypatch.setattr(BodyParser, "__init__", counted)
    async with client_of(client) as ask:
        lines = [request(str(n), text="x", model="lengths") for n in range(20)]
        assert (await ran(ask, await uploaded(ask, *lines))).request_counts.completed == 20
    assert len(made) == 1


def test_an_error_that_many_lines_share_does_not_grow() -> None:
    line = Line(1, ProblemError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the line is too large"))
    for _ in range(3):
        with pytest.raises(ProblemError) as raised:
            read_request(line, "/v1/embeddings")
        assert len(raised.traceback) == 2
