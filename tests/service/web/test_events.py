"""Server-sent events of predictions and of jobs, over real sockets."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx
import pytest
from anyio.abc import SocketAttribute

from modalkit.service.jobs import JobStore
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import Settings
from modalkit.service.web import create_app, events
from tests.service.test_streams import Piece, Spelling
from tests.support.http_client import assert_problem, job
from tests.support.http_server import limit_buffers, serving
from tests.support.length_model import POISON, LengthPipeline

pytestmark = pytest.mark.anyio

STREAM = {"Accept": "text/event-stream"}


class Event(NamedTuple):
    name: str
    data: Any
    id: str | None


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[LocalGateway]:
    settings = Settings(
        app_settings={
            "async_config": {"store_path": tmp_path / "jobs.db"},
            "batch_config": {"calibration": {"enabled": False}},
        },
        model_settings={
            "model_entries": {
                "lengths": {"pipeline": "tests.support.length_model:LengthPipeline"},
                "spelling": {"pipeline": "tests.service.test_streams:Spelling"},
            }
        },
    )
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        yield gateway


@pytest.fixture
async def client(gateway: LocalGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(create_app(gateway, owns_gateway=False)) as opened:
        yield opened


@pytest.fixture
def lengths(gateway: LocalGateway) -> Iterator[LengthPipeline]:
    pipeline = gateway.models["lengths"].ready_worker().pipeline
    assert isinstance(pipeline, LengthPipeline)
    yield pipeline
    pipeline.gate.set()


@pytest.fixture
def spelling(gateway: LocalGateway) -> Iterator[Spelling]:
    pipeline = gateway.models["spelling"].ready_worker().pipeline
    assert isinstance(pipeline, Spelling)
    yield pipeline
    pipeline.gate.set()


@asynccontextmanager
async def listening(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    *,
    with_comments: bool = False,
) -> AsyncGenerator[AsyncGenerator[Event]]:
    """The events of an answer as they come."""

    async def received(answer: httpx.Response) -> AsyncGenerator[Event]:
        fields: dict[str, str] = {}
        async for line in answer.aiter_lines():
            if line:
                key, _, value = line.partition(": ")  # of a comment, the key is empty
                fields[key] = value
            elif fields:
                data = json.loads(fields["data"]) if "data" in fields else None
                if "" not in fields or with_comments:
                    yield Event(fields.get("event", "comment"), data, fields.get("id"))
                fields = {}

    with anyio.fail_after(60):
        async with client.stream(method, path, json=body, headers={**STREAM, **(headers or {})}) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-cache"
            yield received(answer)


async def until(reached: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not reached():
            await anyio.sleep(0.01)


def pause_after_each(spelling: Spelling) -> None:
    """Clear the gate with each step."""
    make = spelling.pieces

    def pause_after(texts: Any, length: int) -> list[Any]:
        spelling.gate.clear()
        return make(texts, length)

    spelling.pieces = pause_after  # type: ignore[method-assign]  # in place of a class of its own


async def submit(client: httpx.AsyncClient, model: str, text: str) -> str:
    answer = await client.post(f"/async/predict?model_name={model}", json=job(text))
    return str(answer.json()["job_id"])


# Predictions.


async def test_each_piece_comes_before_the_next_is_made_and_the_result_is_last(
    client: httpx.AsyncClient, spelling: Spelling
) -> None:
    pause_after_each(spelling)
    async with listening(client, "POST", "/sync/predict?model_name=spelling", {"text": "abc"}) as received:
        for text in ("a", "ab", "abc"):
            assert await anext(received) == (
                "piece",
                {"status": "success", "error": None, "meta": {}, "text": text},
                None,
            )
            assert spelling.steps == len(text)
            spelling.gate.set()
        assert [(event.name, event.data["text"]) async for event in received] == [("result", "abc")]


async def test_a_pipeline_without_pieces_has_one_event(client: httpx.AsyncClient) -> None:
    async with listening(client, "POST", "/sync/predict", {"text": "four"}) as received:
        assert [(event.name, event.data["length"]) async for event in received] == [("result", 4)]


@pytest.mark.parametrize(
    ("path", "text", "status"),
    [
        ("/sync/predict?model_name=spelling", "?", 422),
        ("/sync/predict", POISON, 500),
        ("/sync/predict", "", 422),
        ("/sync/predict?model_name=none", "a", 404),
    ],
)
async def test_an_error_before_the_first_event_has_its_status(
    client: httpx.AsyncClient, path: str, text: str, status: int
) -> None:
    assert_problem(await client.post(path, json={"text": text}, headers=STREAM), status)


async def test_an_error_after_a_piece_is_the_last_event(client: httpx.AsyncClient) -> None:
    async with listening(client, "POST", "/sync/predict?model_name=spelling", {"text": "a?"}) as received:
        piece, error = [event async for event in received]
    assert piece.data["text"] == "a"
    assert (error.name, error.data["status"], error.data["detail"]) == ("error", 422, "no questions")


async def test_comments_come_in_pauses(
    client: httpx.AsyncClient, lengths: LengthPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.01)
    lengths.gate.clear()
    async with listening(client, "POST", "/sync/predict", {"text": "four"}, with_comments=True) as received:
        for _ in range(3):
            assert (await anext(received)).name == "comment"
        lengths.gate.set()
        assert [event.name async for event in received][-1] == "result"


async def test_when_the_client_leaves_nothing_more_is_made(
    client: httpx.AsyncClient, gateway: LocalGateway, spelling: Spelling
) -> None:
    worker = gateway.models["spelling"].ready_worker()
    pause_after_each(spelling)
    async with listening(client, "POST", "/sync/predict?model_name=spelling", {"text": "z" * 1000}) as received:
        await anext(received)
    await until(lambda: worker.statistics().cancelled == 1)
    spelling.gate.set()
    await until(lambda: spelling.closed == 1)
    assert spelling.steps <= 2, "only the step that waited at the gate is made"


async def test_a_client_that_does_not_read_holds_up_nothing_and_misses_pieces_but_not_the_result(
    gateway: LocalGateway, spelling: Spelling
) -> None:
    async with (
        serving(create_app(gateway, owns_gateway=False), socket_buffer_bytes=2**14) as client,
        await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0) as stream,
    ):
        limit_buffers(stream.extra(SocketAttribute.raw_socket), 2**14)  # noqa: S610  # of anyio, not of Django
        body = json.dumps({"text": "x" * 1000}).encode()
        head = "POST /sync/predict?model_name=spelling HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
        await stream.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: spelling.closed == 1)
        received = b""
        with anyio.fail_after(60):
            while not received.endswith(b"\r\n0\r\n\r\n"):
                received += await stream.receive()
    assert received.count(b"event: piece") < 1000
    assert received.rindex(b"event: result") > received.rindex(b"event: piece")
    assert b"x" * 1000 in received[received.rindex(b"event: result") :]


# Jobs.


async def test_a_job_tells_its_states_its_pieces_and_at_last_its_result(
    client: httpx.AsyncClient, spelling: Spelling
) -> None:
    spelling.gate.clear()
    job_id = await submit(client, "spelling", "ab")
    async with listening(client, "GET", f"/jobs/{job_id}/events") as received:
        first = await anext(received)
        await until(lambda: spelling.batches == [["ab"]])
        spelling.gate.set()
        found = [event async for event in received]
    assert first.name == "status"
    pieces = [event.data for event in found if event.name == "piece"]
    assert pieces[-1] == {"job_id": job_id, "piece": {"status": "success", "error": None, "meta": {}, "text": "ab"}}
    last = found[-1]
    assert (last.name, last.id, last.data["job_id"], last.data["result"]["text"]) == ("result", "s", job_id, "ab")


async def test_a_piece_that_is_no_json_is_left_out_and_the_result_follows(
    client: httpx.AsyncClient, spelling: Spelling
) -> None:
    spelling.gate.clear()
    make = spelling.pieces

    def first_is_no_json(texts: Any, length: int) -> list[Any]:
        made = make(texts, length)
        return [Piece(text="\ud800") for _ in made] if length == 1 else made

    spelling.pieces = first_is_no_json  # type: ignore[method-assign]  # in place of a class of its own
    job_id = await submit(client, "spelling", "ab")
    async with listening(client, "GET", f"/jobs/{job_id}/events") as received:
        await anext(received)
        spelling.gate.set()
        found = [event async for event in received]
    assert [event.data["piece"]["text"] for event in found if event.name == "piece"] == ["ab"]
    assert (found[-1].name, found[-1].data["result"]["text"]) == ("result", "ab")


async def test_several_jobs_are_watched_together_and_an_ended_one_is_told_at_once(
    client: httpx.AsyncClient, lengths: LengthPipeline
) -> None:
    ended = await submit(client, "lengths", "ended")
    await client.get(f"/jobs/{ended}?wait=30")
    lengths.gate.clear()
    bad, good = await submit(client, "lengths", POISON), await submit(client, "lengths", "four")
    async with listening(client, "GET", f"/jobs/events?job_id={bad}&job_id={ended}&job_id={good}") as received:
        results: dict[str, Event] = {}
        while ended not in results:
            event = await anext(received)
            results |= {event.data["job_id"]: event} if event.name == "result" else {}
        assert len(results) == 1
        cancelled = await submit(client, "lengths", "other")
        lengths.gate.set()
        async for event in received:
            results |= {event.data["job_id"]: event} if event.name == "result" else {}
    assert cancelled not in results
    assert {job_id: event.data["status"] for job_id, event in results.items()} == {
        bad: "failed",
        ended: "succeeded",
        good: "succeeded",
    }
    assert event.id == "fss"


async def test_a_client_that_connects_again_gets_only_what_it_has_not_seen(
    client: httpx.AsyncClient, lengths: LengthPipeline
) -> None:
    lengths.gate.clear()
    first, second = await submit(client, "lengths", "a"), await submit(client, "lengths", "b")
    path = f"/jobs/events?job_id={first}&job_id={second}"
    async with listening(client, "GET", path) as received:
        last_id = "qq"
        while last_id != "rr":
            last_id = (await anext(received)).id or ""
    async with listening(client, "GET", path, headers={"Last-Event-ID": "rr"}) as received:
        lengths.gate.set()
        found = [event async for event in received]
    assert [(event.name, event.data["status"]) for event in found] == [("result", "succeeded")] * 2
    assert found[-1].id == "ss"
    again = await client.get(path, headers={"Last-Event-ID": "ss"})
    assert (again.status_code, again.content) == (204, b"")
    async with listening(client, "GET", path, headers={"Last-Event-ID": "of something else"}) as received:
        assert len([event async for event in received]) == 2


async def test_a_cancelled_job_ends_its_stream(client: httpx.AsyncClient, lengths: LengthPipeline) -> None:
    lengths.gate.clear()
    job_id = await submit(client, "lengths", "four")
    async with listening(client, "GET", f"/jobs/{job_id}/events") as received:
        await anext(received)
        await client.delete(f"/jobs/{job_id}")
        assert [event.data["status"] async for event in received][-1] == "cancelled"


async def test_the_store_is_read_only_after_changes(
    client: httpx.AsyncClient, lengths: LengthPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.01)
    reads = 0
    get = JobStore.get

    async def counted(store: JobStore, job_id: str) -> Any:
        nonlocal reads
        reads += 1
        return await get(store, job_id)

    lengths.gate.clear()
    job_id = await submit(client, "lengths", "four")
    with anyio.fail_after(60):
        while (await client.get(f"/jobs/{job_id}")).json()["status"] != "running":
            await anyio.sleep(0.01)
    monkeypatch.setattr(JobStore, "get", counted)
    async with listening(client, "GET", f"/jobs/{job_id}/events", with_comments=True) as received:
        while (found := await anext(received)).name == "comment":
            pass  # on a busy machine, several come before the first state
        assert found.data["status"] == "running"
        for _ in range(5):
            assert (await anext(received)).name == "comment"
        assert reads == 2  # by the check that there is such a job, and at the start of the watch
        lengths.gate.set()
        assert [event async for event in received][-1].name == "result"
    assert reads == 3


async def test_a_closing_service_ends_its_streams(
    client: httpx.AsyncClient, gateway: LocalGateway, lengths: LengthPipeline
) -> None:
    lengths.gate.clear()
    job_id = await submit(client, "lengths", "four")
    async with listening(client, "GET", f"/jobs/{job_id}/events") as received:
        await anext(received)
        gateway.jobs.stop_waiting()
        assert "result" not in [event.name async for event in received]


async def test_unknown_jobs_and_too_many_are_refused(client: httpx.AsyncClient) -> None:
    known = await submit(client, "lengths", "four")
    for path in ("/jobs/no/events", f"/jobs/events?job_id={known}&job_id=no"):
        assert "no job 'no'" in assert_problem(await client.get(path), 404)["detail"]
    assert "job_id" in assert_problem(await client.get("/jobs/events"), 422)["detail"]
    many = "&".join(f"job_id={n}" for n in range(101))
    assert "job_id" in assert_problem(await client.get(f"/jobs/events?{many}"), 422)["detail"]
    assert "there is no such query parameter" in assert_problem(await client.get("/jobs/events?job=a"), 422)["detail"]


async def test_the_schema_documents_events(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    for operation in (
        paths["/sync/predict"]["post"],
        paths["/jobs/events"]["get"],
        paths["/jobs/{job_id}/events"]["get"],
    ):
        assert "text/event-stream" in operation["responses"]["200"]["content"]
        assert "`result`" in operation["description"]
