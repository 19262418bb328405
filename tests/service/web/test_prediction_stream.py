"""Streams of items to /batch/predict, over real sockets: answers while the stream goes on, and flow control."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import SocketAttribute, SocketStream

from modalkit.batching import Priority
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import RequestConfig, Settings
from modalkit.service.web import create_app, lines, prediction_stream
from tests.support.http_client import assert_problem
from tests.support.http_server import limit_buffers, serving
from tests.support.length_model import POISON, REJECTED, LengthPipeline
from tests.support.odd_model import BARE

pytestmark = pytest.mark.anyio

NDJSON = {"Content-Type": "application/x-ndjson"}
HEAD = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[LocalGateway]:
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        for model in gateway.models.values():
            pipeline = model.ready_worker().pipeline
            assert isinstance(pipeline, LengthPipeline)
            pipeline.batches.clear()  # those of the calibration
        yield gateway


@pytest.fixture
async def client(gateway: LocalGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(create_app(gateway, owns_gateway=False), socket_buffer_bytes=2**16) as opened:
        yield opened


@pytest.fixture
def pipeline(gateway: LocalGateway) -> Iterator[LengthPipeline]:
    pipeline = gateway.models["lengths"].ready_worker().pipeline
    assert isinstance(pipeline, LengthPipeline)
    yield pipeline
    pipeline.gate.set()


def body_of(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def read(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


@asynccontextmanager
async def connected(client: httpx.AsyncClient, path: bytes = b"/batch/predict") -> AsyncIterator[SocketStream]:
    """A connection on which a request has begun whose body comes in chunks."""
    async with await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0) as stream:
        limit_buffers(stream.extra(SocketAttribute.raw_socket), 2**16)  # noqa: S610  # of anyio, not of Django
        await stream.send(HEAD % path)
        yield stream


async def send_chunk(stream: SocketStream, content: bytes) -> None:
    await stream.send(b"%x\r\n%s\r\n" % (len(content), content))


async def receive_until(stream: SocketStream, *expected: bytes) -> bytes:
    received, missing = bytearray(), set(expected)
    with anyio.fail_after(60):
        while missing:
            chunk = await stream.receive()
            received += chunk
            recent = received[-len(chunk) - 100 :]  # a part may have begun in the chunk before
            missing = {part for part in missing if part not in recent}
    return bytes(received)


async def until(reached: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not reached():
            await anyio.sleep(0.01)


async def test_each_item_is_answered_with_its_index(client: httpx.AsyncClient) -> None:
    """Blank lines are no items; an envelope is taken, as in other bodies."""
    body = body_of("a") + b"\n  \r\n" + b'{"message": {"text": "abc"}}\n' + body_of("four").rstrip()
    found = read(await client.post("/batch/predict", content=body, headers=NDJSON))
    assert sorted((line["index"], line["status"], line["length"]) for line in found) == [
        (0, "success", 1),
        (1, "success", 3),
        (2, "success", 4),
    ]


async def test_an_output_without_fields_is_answered_with_its_index(client: httpx.AsyncClient) -> None:
    answer = await client.post("/batch/predict?model_name=odd", content=body_of(BARE), headers=NDJSON)
    assert read(answer) == [{"index": 0}]


@pytest.mark.parametrize("ordered", [True, False])
async def test_answers_that_are_written_in_several_steps_all_come(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """Each step writes two answers."""
    monkeypatch.setattr(prediction_stream, "WRITE_ITEMS", 2)
    monkeypatch.setattr(prediction_stream, "WRITE_BYTES", 1)
    texts = ["x" * length for length in range(1, 50)]
    found = read(
        await client.post("/batch/predict", params={"ordered": ordered}, content=body_of(*texts), headers=NDJSON)
    )
    lengths = [(line["index"], line["length"]) for line in found]
    assert (lengths if ordered else sorted(lengths)) == list(enumerate(range(1, 50)))


async def test_an_error_is_told_as_problem_details_and_leaves_the_others_alone(client: httpx.AsyncClient) -> None:
    huge = json.dumps({"text": "x" * RequestConfig().max_line_bytes}).encode() + b"\n"
    body = body_of("a", POISON, REJECTED, "") + b"{\n" + b'{"text": "a", "text": "b"}\n' + huge + body_of("b")
    found = {line["index"]: line for line in read(await client.post("/batch/predict", content=body, headers=NDJSON))}
    assert [found[index]["status"] for index in range(8)] == ["success", *["error"] * 6, "success"]
    problems = [found[index]["problem"] for index in range(1, 7)]
    assert [problem["status"] for problem in problems] == [500, 422, 422, 400, 400, 413]
    assert all(problem["title"] and problem["detail"] == found[n]["error"] for n, problem in enumerate(problems, 1))
    assert problems[2]["errors"][0]["field"] == "text"
    assert problems[3]["detail"].startswith("the line is not JSON")
    assert problems[4]["detail"].startswith('the line has the key "text" twice')


async def test_answers_come_while_the_stream_goes_on(client: httpx.AsyncClient) -> None:
    async with connected(client) as stream:
        for index in range(3):
            await send_chunk(stream, body_of("x" * (index + 1)))
            await receive_until(stream, b'{"index":%d,"status":"success"' % index)


async def test_results_come_as_they_are_done_or_in_order(client: httpx.AsyncClient, pipeline: LengthPipeline) -> None:
    """The error of the second line is known before the result of the first."""
    pipeline.gate.clear()
    async with connected(client) as stream, connected(client, b"/batch/predict?ordered=true") as ordered:
        for each in (ordered, stream):
            await send_chunk(each, body_of("a", ""))
        assert b'"index":0' not in await receive_until(stream, b'"index":1')
        pipeline.gate.set()
        await receive_until(stream, b'"index":0')
        in_order = await receive_until(ordered, b'"index":0', b'"index":1')
    assert in_order.index(b'"index":0') < in_order.index(b'"index":1')


@pytest.mark.parametrize("query", ["", "?ordered=true"])
async def test_a_stream_is_longer_than_the_queue_of_the_model(client: httpx.AsyncClient, query: str) -> None:
    """It waits for room, and so do other streams; a queue of 100 is never full for them."""
    texts = ["x" * (1 + n % 50) for n in range(600)]
    answers: list[list[dict[str, Any]]] = []

    async def post() -> None:
        answers.append(read(await client.post(f"/batch/predict{query}", content=body_of(*texts), headers=NDJSON)))

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(post)
        task_group.start_soon(post)
    for found in answers:
        indices = [line["index"] for line in found]
        assert (indices if query else sorted(indices)) == list(range(600))
        assert all(line["length"] == len(texts[line["index"]]) for line in found)


@pytest.mark.parametrize("path", [b"/batch/predict", b"/batch/predict?ordered=true", b"/async/predict"])
async def test_a_client_that_reads_no_answers_is_not_read_any_more(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: bytes
) -> None:
    """And once it reads, it gets all of them."""
    monkeypatch.setattr(lines.Spool.__init__, "__defaults__", (100_000, lines.SPOOL_MEMORY_BYTES, None))
    is_full = anyio.Event()
    wait_for_room, largest = lines.Spool.wait_for_room, 0

    async def noticed(spool: lines.Spool) -> None:
        nonlocal largest
        largest = max(largest, lines.Spool.size_of_all)
        if spool._max_bytes <= spool._size and spool._max_bytes == 100_000:  # noqa: SLF001  # not the body's
            is_full.set()
        await wait_for_room(spool)

    monkeypatch.setattr(lines.Spool, "wait_for_room", noticed)
    item = b'{"text": "four"}' if path.startswith(b"/batch") else b'{"message": {"text": "four"}}'
    sent, chunk, count = 0, (item.ljust(400) + b"\n") * 1000, 10
    async with connected(client, path) as stream, anyio.create_task_group() as task_group:

        async def send_all() -> None:
            nonlocal sent
            for _ in range(count):
                await send_chunk(stream, chunk)
                sent += 1
            await stream.send(b"0\r\n\r\n")

        task_group.start_soon(send_all)
        with anyio.fail_after(60):
            await is_full.wait()
        assert sent < count
        received = await receive_until(stream, b"\r\n0\r\n\r\n")
    assert received.count(b'"index"' if path.startswith(b"/batch") else b'"job_id"') == count * 1000
    assert largest < 100_000 + lines.READ_AHEAD_BYTES + 2 * prediction_stream.MAX_ITEMS_IN_FLIGHT * 100 + 2**20
    assert lines.Spool.size_of_all == 0


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_client_that_leaves_takes_its_items_out_of_the_queue(
    client: httpx.AsyncClient, gateway: LocalGateway, pipeline: LengthPipeline, is_whole: bool
) -> None:
    statistics = gateway.models["lengths"].ready_worker().statistics
    pipeline.gate.clear()
    async with connected(client) as stream:
        await send_chunk(stream, body_of(*["x"] * 90))
        if is_whole:
            await stream.send(b"0\r\n\r\n")
        await until(lambda: statistics().queue_depth > 0)
    await until(lambda: statistics().queue_depth == 0)
    pipeline.gate.set()
    assert (await client.post("/sync/predict", json={"text": "goes on"})).status_code == 200
    assert sum(map(len, pipeline.batches)) < 90


async def test_single_requests_go_before_a_stream_unless_it_says_otherwise(
    client: httpx.AsyncClient, gateway: LocalGateway, pipeline: LengthPipeline
) -> None:
    statistics = gateway.models["lengths"].ready_worker().statistics
    pipeline.gate.clear()
    async with connected(client) as stream:
        await send_chunk(stream, body_of(*["x"] * 90))
        await until(lambda: statistics().queued[Priority.BULK] > 0)
        assert statistics().queued[Priority.INTERACTIVE] == 0
        pipeline.gate.set()
        await receive_until(stream, b'"index":89')
    answer = await client.post("/batch/predict", content=body_of("a"), headers={**NDJSON, "X-Priority": "interactive"})
    assert len(read(answer)) == 1


async def test_an_item_that_takes_too_long_is_told_so_at_once(
    client: httpx.AsyncClient, pipeline: LengthPipeline
) -> None:
    """Though its batch, and the one before, have not ended; also where it waits for room in the queue."""
    pipeline.gate.clear()
    headers = {**NDJSON, "X-Request-Timeout": "0.05"}
    found = read(await client.post("/batch/predict", content=body_of(*["late"] * 200), headers=headers))
    assert {(line["problem"]["status"], line["error"]) for line in found} == {
        (504, "no result within 0.05 s; allow more time, or send less at once")
    }
    assert len(found) == 200


async def test_a_stream_whose_items_have_little_time_does_nothing_while_none_runs(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had looked a thousand times a second whether one had begun."""
    sleep, slept, timeout_s = anyio.sleep, list[float](), 1e-9

    async def noted(delay_s: float) -> None:
        slept.append(delay_s)
        await sleep(delay_s)

    monkeypatch.setattr(anyio, "sleep", noted)
    async with await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0) as stream:
        host = b"Host: x\r\n"
        await stream.send((HEAD % b"/batch/predict").replace(host, host + b"X-Request-Timeout: %g\r\n" % timeout_s))
        await client.post("/batch/predict", content=body_of(*"abc"), headers=NDJSON)
        assert timeout_s not in slept
        for _ in range(2):
            await send_chunk(stream, body_of("a"))
            await receive_until(stream, b'"index":')


async def test_a_model_that_takes_nothing_refuses_the_stream_as_a_whole(settings: Settings) -> None:
    async with serving(create_app(LocalGateway(settings), owns_gateway=False)) as client:
        answer = await client.post("/batch/predict", content=body_of("a"), headers=NDJSON)
    assert "loading" in assert_problem(answer, 503)["detail"]


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("ordered=yes", "ordered: must be true or false, got 'yes'"),
        ("order=1", "'order': there is no such query parameter; this route has: model_name, ordered"),
    ],
)
async def test_a_bad_query_is_refused(client: httpx.AsyncClient, query: str, detail: str) -> None:
    answer = await client.post(f"/batch/predict?{query}", content=body_of("a"), headers=NDJSON)
    assert assert_problem(answer, 422)["detail"] == detail


async def test_the_schema_documents_streams(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    operation = schema["paths"]["/batch/predict"]["post"]
    item = operation["requestBody"]["content"]["application/json"]["schema"]["items"]
    assert operation["requestBody"]["content"]["application/x-ndjson"]["schema"] == item
    line = operation["responses"]["200"]["content"]["application/x-ndjson"]["schema"]
    result, failure = line["allOf"][1]["anyOf"]
    assert [option["$ref"].rsplit("/", 1)[1] for option in result["anyOf"]] == ["Length", "FailedItem"]
    assert failure["$ref"].endswith("FailedSlot")
    assert "ordered" in {parameter["name"] for parameter in operation["parameters"]}
