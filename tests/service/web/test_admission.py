"""What one client may send cannot stop the others, and what is refused costs little."""

import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import anyio
import httpx
import pytest
from anyio import to_thread
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint
from fastapi import FastAPI
from fastapi.responses import Response
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modalkit.batching import DeadlineUnreachableError, Failure, QueueFullError, Success
from modalkit.pipelines import AsyncInputModel
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import AuthConfig, RequestConfig, Settings
from modalkit.service.settings.settings import ModelSettings
from modalkit.service.web import bodies, create_app
from modalkit.service.web.admission import FREE_BYTES, STEP_ITEMS, Admission, Reception, RefusalPace
from modalkit.service.web.bodies import BodyParser
from modalkit.service.web.direct import DirectResponse, list_response
from modalkit.service.web.events import EventStream
from modalkit.service.web.problems import TYPE_PREFIX, ProblemError, error_json, error_response
from tests.support.http_client import assert_problem, job
from tests.support.http_server import serving
from tests.support.length_model import REJECTED, LengthPipeline, Text

pytestmark = pytest.mark.anyio

LARGE = 4 * FREE_BYTES


def list_of(count: int, text: str = "x" * 80) -> bytes:
    return json.dumps([{"text": text}] * count).encode()


@pytest.fixture
async def limited(settings: Settings) -> AsyncIterator[tuple[httpx.AsyncClient, LocalGateway]]:
    limits = RequestConfig(max_items=1000, max_item_bytes=5000, max_item_values=500, max_pending_bytes=LARGE)
    gateway = LocalGateway(settings)
    async with gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, limits=limits, owns_gateway=False)) as client:
            yield client, gateway


# One request cannot hold up the others.


@pytest.mark.parametrize("content", [b"1", b'{"text":"x"}', b'{"text":"%b"}' % (b"x" * 80)])
@pytest.mark.parametrize("path", ["/batch/predict", "/async/predict"])
async def test_a_list_with_too_many_items_is_refused_with_the_remedy(
    limited: tuple[httpx.AsyncClient, LocalGateway], content: bytes, path: str
) -> None:
    refused = await limited[0].post(path, content=b"[" + b",".join([content] * 1001) + b"]")
    assert "more than 1000 items: send several lists, or jobs as a stream" in assert_problem(refused, 413)["detail"]


@pytest.mark.parametrize(
    ("item", "told"), [({"text": "x" * 5000}, "5000 bytes"), ({"text": "x", "n": [1] * 501}, "500 brackets and commas")]
)
async def test_a_large_item_is_refused_alone_and_in_a_list(
    limited: tuple[httpx.AsyncClient, LocalGateway], item: dict[str, Any], told: str
) -> None:
    for path, body in (
        ("/sync/predict", item),
        ("/async/predict", {"message": item}),
        ("/batch/predict", [{"text": "a"}, item]),
        ("/batch/predict", [{"text": "a" * 100}] * 800 + [item]),
    ):
        refused = await limited[0].post(path, json=body)
        assert f"an item has more than {told}" in assert_problem(refused, 413)["detail"]


async def test_others_have_their_turn_while_a_large_list_is_parsed() -> None:
    parser, turns = BodyParser(Text), 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    for content in (list_of(10_000), list_of(10_000, ""), b"[" + b"1," * 9_999 + b"1]"):
        turns = 0
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(count_turns)
            assert len(await parser.items(content)) == 10_000
            task_group.cancel_scope.cancel()
        assert turns > len(content) // bodies.SLICE_BYTES
        assert turns > 10 or content.startswith(b'[{"text": "x')


async def test_others_have_their_turn_after_each_large_item_of_a_short_list() -> None:
    now_s, turns = 0.0, 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    def take_a_second(items: Sequence[int]) -> list[int]:
        nonlocal now_s
        now_s += 1
        return [-item for item in items]

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(count_turns)
        found = await Admission(now=lambda: now_s).map(take_a_second, range(10 * STEP_ITEMS))
        task_group.cancel_scope.cancel()
    assert found == [-item for item in range(10 * STEP_ITEMS)]
    assert turns >= 9


@pytest.mark.parametrize("parse", [BodyParser.item_lines, BodyParser.job_lines])
async def test_of_many_streams_one_is_parsed_in_a_pass_of_the_event_loop(parse: Any) -> None:
    parser, ends, turns = BodyParser(Text), list[int](), 0

    async def parse_lines() -> None:
        await parse(parser, [b'{"text": 1}'] * 10)
        ends.append(turns)

    async def count_turns() -> None:
        nonlocal turns
        while len(ends) < 20:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as task_group:
        for _ in range(20):
            task_group.start_soon(parse_lines)
        task_group.start_soon(count_turns)
    assert len(set(ends)) == 20


async def test_a_nested_item_is_looked_at_in_slices_until_it_is_too_large() -> None:
    parser, turns = BodyParser(Text, Admission(RequestConfig(max_item_values=100_000))), 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(count_turns)
        with pytest.raises(ProblemError, match="more than 100000 brackets"):
            await parser.items(b"[[" + b"[]," * 1_000_000 + b"1]]")
        task_group.cancel_scope.cancel()
    assert turns >= 100_000 // bodies.SLICE_MARKS


async def test_a_list_of_invalid_items_has_a_bounded_answer() -> None:
    item = json.dumps({f"unknown field number {number}": 1 for number in range(20)})
    slots = await BodyParser(Text).items(b"[%b]" % ",".join([item] * 2000).encode())
    answers = [error_json(slot.error) for slot in slots if isinstance(slot, Failure)]
    assert len(answers) == 2000
    assert b"unknown field number 7: unknown field" in answers[0]
    assert b"is invalid, as others before it are" in answers[-1]
    assert sum(map(len, answers)) < 2 * bodies.MAX_EXPLAINED_BYTES
    held = [slot.error for slot in slots if isinstance(slot, Failure)]
    assert {(error.__context__, error.__cause__, error.__traceback__) for error in held} == {(None, None, None)}


async def test_an_item_with_very_many_errors_has_a_bounded_answer() -> None:
    fields = {f"f{number}": 1 for number in range(bodies.MAX_FINDINGS + 1)}
    with pytest.raises(ProblemError, match=r"has 1002 errors, too many to list"):
        BodyParser(Text).item(json.dumps(fields).encode())
    fields = {f"f{number}": 1 for number in range(bodies.MAX_FINDINGS - 1)}
    with pytest.raises(ProblemError) as caught:
        BodyParser(Text).item(json.dumps(fields).encode())
    assert len(caught.value.errors) == bodies.MAX_SHOWN


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(['"', "\\", '\\"', "],[", "{", "\ud7ff"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.lists(values), st.integers(1, 100), st.sampled_from([(",", ":"), (" ,\n ", " : ")]))
def test_the_parts_of_a_list_are_the_list(items: list[Any], slice_bytes: int, separators: tuple[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "SLICE_BYTES", slice_bytes)
        body = json.dumps(items, separators=separators, ensure_ascii=False).encode()
        parts = list(bodies._parts_of(b" \n" + body + b"\t", RequestConfig()))  # noqa: SLF001  # its own claim
    assert [item for part in parts if part for item in json.loads(part)] == items


@given(st.text(alphabet='[]{},:"\\1a \n', max_size=30), st.integers(1, 10))
def test_what_is_no_json_is_not_taken_in_parts_either(text: str, slice_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "SLICE_BYTES", slice_bytes)
        body = f"[{text}]"
        try:
            parts = list(bodies._parts_of(body.encode(), RequestConfig()))  # noqa: SLF001  # as above
            found = [item for part in parts if part for item in json.loads(part)]
        except (ProblemError, ValueError):
            with pytest.raises(json.JSONDecodeError):
                json.loads(body)
        else:
            assert found == json.loads(body)


# Bytes.


async def send_part(
    client: httpx.AsyncClient, size_bytes: int, path: str = "/sync/predict", content_type: str = "text/plain"
) -> anyio.abc.SocketStream:
    """A connection that sends so many bytes of a body of a hundred thousand, and then nothing."""
    stream = await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: 100000\r\n\r\n"
    await stream.send(head.encode() + b"x" * size_bytes)
    return stream


async def until_metric(client: httpx.AsyncClient, line: str) -> None:
    with anyio.fail_after(30):
        while line not in (await client.get("/metrics")).text.splitlines():
            await checkpoint()


@pytest.mark.parametrize(
    ("path", "content_type", "sent_bytes", "held_bytes"),
    [
        ("/sync/predict", "application/json", 99_999, 99_999),
        ("/batch/predict", "application/x-ndjson", 99_999, 99_999),
        ("/v1/batches", "application/json", 99_999, 99_999),
        ("/v1/files", "multipart/form-data; boundary=a", 0, 100_000),  # as much as is declared
    ],
)
async def test_bodies_that_stall_hold_a_bounded_number_of_bytes_and_small_ones_are_served(
    limited: tuple[httpx.AsyncClient, LocalGateway], path: str, content_type: str, sent_bytes: int, held_bytes: int
) -> None:
    client, _ = limited
    held = held_bytes - FREE_BYTES
    count = LARGE // held
    async with AsyncExitStack() as stalled:
        for _ in range(count):
            await stalled.enter_async_context(await send_part(client, sent_bytes, path, content_type))
        await until_metric(client, f"modalkit_held_body_bytes {float(count * held)}")
        refused = await client.post("/batch/predict", content=list_of(990))
        assert "request_config.max_pending_bytes" in assert_problem(refused, 503)["detail"]
        assert refused.headers["retry-after"] == "1"
        assert (await client.post("/sync/predict", json={"text": "small"})).status_code == 200
    await until_metric(client, "modalkit_held_body_bytes 0.0")
    assert (await client.post("/batch/predict", content=list_of(990))).status_code == 413, "the queue holds 100"


async def ask(app: ASGIApp, path: str, method: str = "GET", wait: Callable[[], Any] = checkpoint) -> list[Message]:
    """What an application answers to a client that awaits `wait` with each part of the answer."""
    sent = list[Message]()

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)
        if "body" in message:
            await wait()

    await app({"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}, receive, send)
    return sent


@pytest.mark.parametrize("make", [DirectResponse, lambda content: list_response([content[1:-1]] * 8)])
async def test_answers_that_no_client_takes_hold_a_bounded_number_of_bytes(
    make: Callable[[bytes], DirectResponse],
) -> None:
    """Where they are full, a large answer is a problem, also instead of the first event of a stream."""
    admission, content = Admission(RequestConfig(max_pending_bytes=LARGE)), b"1" * LARGE
    is_taken = anyio.Event()

    async def sent(answer: Response, wait: Callable[[], Any] = checkpoint) -> list[Message]:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            with Reception(admission, scope):
                await answer(scope, receive, send)

        return await ask(app, "/", wait=wait)

    async def events(event: bytes) -> AsyncGenerator[bytes]:
        yield event

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(sent, make(content), is_taken.wait)  # alone, it may be larger than the limit
        await anyio.wait_all_tasks_blocked()
        assert admission.held_bytes >= LARGE - FREE_BYTES
        for large in (make(content), EventStream(events(content))):
            start, body = await sent(large)
            assert (start["status"], json.loads(body["body"])["type"]) == (503, f"{TYPE_PREFIX}service-unavailable")
        assert (await sent(DirectResponse(content, may_be_refused=False)))[0]["status"] == 200
        for small in (DirectResponse(b"1" * FREE_BYTES), EventStream(events(b"data: 1\n\n"))):
            assert (await sent(small))[0]["status"] == 200
        is_taken.set()
    assert admission.held_bytes == 0
    assert (await sent(make(content)))[0]["status"] == 200


async def ask_slowly(app: FastAPI, path: str, is_taken: anyio.Event, task_status: TaskStatus[None]) -> None:
    """Ask as a client that takes the answer once the event is set; started when the answer waits for it."""

    async def wait() -> None:
        task_status.started()
        await is_taken.wait()

    await ask(app, path, wait=wait)


async def test_large_jobs_that_no_client_takes_hold_a_bounded_number_of_bytes(settings: Settings) -> None:
    gateway, is_taken = LocalGateway(settings), anyio.Event()
    async with gateway:
        await gateway.wait_until_ready()
        app = create_app(gateway, limits=RequestConfig(max_pending_bytes=LARGE), owns_gateway=False)
        jobs = [AsyncInputModel(message={"text": "a"}, meta={"a": "x" * size}) for size in (LARGE, 1)]
        large, small = [
            outcome.value if isinstance(outcome, Success) else ""
            for outcome in await gateway.jobs.submit(jobs, model_name="lengths")
        ]
        for job_id in (large, small):
            await gateway.jobs.get(job_id, 30)

        async with anyio.create_task_group() as task_group:
            await task_group.start(ask_slowly, app, f"/jobs/{large}", is_taken)
            assert [(await ask(app, f"/jobs/{job_id}"))[0]["status"] for job_id in (large, small)] == [503, 200]
            told = b"".join(message.get("body", b"") for message in await ask(app, f"/jobs/{large}/events"))
            assert b"event: error" in told
            assert b"request_config.max_pending_bytes" in told
            is_taken.set()
        assert (await ask(app, f"/jobs/{large}"))[0]["status"] == 200
        told = b"".join(message.get("body", b"") for message in await ask(app, f"/jobs/{large}/events"))
        assert b"event: result" in told


@pytest.mark.parametrize(
    ("text", "method", "path", "before", "after"),
    [("a", "DELETE", "", "running", "cancelled"), (REJECTED, "POST", "/retry", "failed", "queued")],
)
async def test_a_change_of_a_large_job_is_refused_before_it_is_made_or_is_answered(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, text: str, method: str, path: str, before: str, after: str
) -> None:
    """Also where other answers fill the memory meanwhile: what was done is told."""
    gateway, is_taken = LocalGateway(settings), anyio.Event()
    async with gateway, anyio.create_task_group() as task_group:
        await gateway.wait_until_ready()
        worker, name = gateway.models["lengths"].worker, {"DELETE": "cancel", "POST": "retry"}[method]
        assert worker is not None
        assert isinstance(worker.pipeline, LengthPipeline)
        app = create_app(gateway, limits=RequestConfig(max_pending_bytes=LARGE), owns_gateway=False)

        async def submit(text: str) -> str:
            job = AsyncInputModel(message={"text": text}, meta={"a": "x" * LARGE})
            (outcome,) = await gateway.jobs.submit([job], model_name="lengths")
            assert isinstance(outcome, Success)
            return outcome.value

        if before == "running":
            worker.pipeline.gate.clear()
        job_id, other_id = await submit(text), await submit("other")
        if before == "failed":
            await gateway.jobs.get(job_id, 30)
        worker.pipeline.gate.clear()
        change = getattr(gateway.jobs, name)

        async def change_slowly(*args: Any) -> Any:
            await task_group.start(ask_slowly, app, f"/jobs/{other_id}", is_taken)
            return await change(*args)

        async with anyio.create_task_group() as others:
            is_taken_first = anyio.Event()
            await others.start(ask_slowly, app, f"/jobs/{other_id}", is_taken_first)
            assert (await ask(app, f"/jobs/{job_id}{path}", method))[0]["status"] == 503
            job = await gateway.jobs.get(job_id)
            assert job is not None
            assert job.status == before
            is_taken_first.set()
        monkeypatch.setattr(gateway.jobs, name, change_slowly)
        start, body = await ask(app, f"/jobs/{job_id}{path}", method)
        assert (start["status"], json.loads(body["body"])["status"]) == (200, after)
        is_taken.set()
        worker.pipeline.gate.set()


async def test_of_many_large_answers_one_is_made_in_a_pass_of_the_event_loop() -> None:
    reception, made, turns = Reception(Admission()), list[int](), 0

    def make() -> bytes:
        made.append(turns)
        return b""

    async def count_turns() -> None:
        nonlocal turns
        while len(made) < 20:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as task_group:
        for _ in range(20):
            task_group.start_soon(reception.write, LARGE, make)
        task_group.start_soon(count_turns)
    assert len(set(made)) == 20


async def test_a_line_for_which_there_is_no_room_is_refused_alone(
    limited: tuple[httpx.AsyncClient, LocalGateway],
) -> None:
    """Of a stream whose line comes in parts, which are held until the line is complete."""
    client, _ = limited
    head = b"POST /batch/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"
    async with AsyncExitStack() as streams:

        async def send_line(held_bytes: int) -> anyio.abc.SocketStream:
            """A stream whose first line, of which so much is held, does not end."""
            stream = await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0)
            await streams.enter_async_context(stream)
            await stream.send(head + b"Transfer-Encoding: chunked\r\n\r\n")
            await send_chunk(stream, b" " * (FREE_BYTES + held_bytes))
            return stream

        async def send_chunk(stream: anyio.abc.SocketStream, content: bytes) -> None:
            await stream.send(b"%x\r\n%b\r\n" % (len(content), content))

        await send_line(LARGE - 1000)
        stream = await send_line(1000)
        await until_metric(client, f"modalkit_held_body_bytes {float(LARGE)}")
        await send_chunk(stream, b" ")
        await until_metric(client, f"modalkit_held_body_bytes {float(LARGE - 1000)}")
        await send_chunk(stream, b'\n{"text": "four"}\n')
        await stream.send(b"0\r\n\r\n")
        received = b""
        with anyio.fail_after(30):
            while b"\r\n0\r\n" not in received:
                received += await stream.receive()
    first, second = re.findall(rb"^{.*}$", received, re.MULTILINE)
    problem = json.loads(first)["problem"]
    assert (problem["status"], problem["type"]) == (503, "urn:problem-type:modalkit:service-unavailable")
    assert json.loads(second)["length"] == 4
    await until_metric(client, "modalkit_held_body_bytes 0.0")


@pytest.mark.parametrize("declared", [b"99999999999", b"0" * 5000 + b"99999999999"])
@pytest.mark.parametrize("path", [b"/sync/predict", b"/v1/files"])
async def test_a_body_that_is_declared_too_large_is_refused_before_it_comes(
    limited: tuple[httpx.AsyncClient, LocalGateway], path: bytes, declared: bytes
) -> None:
    stream = await anyio.connect_tcp("127.0.0.1", limited[0].base_url.port or 0)
    async with stream:
        await stream.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %b\r\n\r\n" % (path, declared))
        with anyio.fail_after(30):
            assert (await stream.receive()).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("path", "content_type", "outcome"),
    [
        ("/sync/predict", "application/json", "disconnected"),
        ("/v1/batches", "application/json", "disconnected"),
        ("/v1/files", "multipart/form-data; boundary=a", "disconnected"),
        ("/batch/predict", "application/x-ndjson", None),  # as many lines as came are answered
        ("/async/predict", "application/x-ndjson", None),
    ],
)
async def test_a_body_that_its_client_cuts_is_a_debug_line_and_a_count(
    limited: tuple[httpx.AsyncClient, LocalGateway],
    path: str,
    content_type: str,
    outcome: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def disconnected() -> float:
        text = (await limited[0].get("/metrics")).text
        label = f'modalkit_request_seconds_count{{outcome="{outcome}",route="{path}"}} '
        return sum(float(line.removeprefix(label)) for line in text.splitlines() if line.startswith(label))

    before = await disconnected()
    with caplog.at_level(logging.DEBUG):
        stream = await send_part(limited[0], 0 if "multipart" in content_type else 7, path, content_type)
        await stream.aclose()
        await until_metric(limited[0], "modalkit_cut_bodies_total 1.0")
        assert outcome is None or await disconnected() == before + 1
    (line,) = [record for record in caplog.records if record.name.startswith("modalkit")]
    assert (line.levelname, line.exc_info) == ("DEBUG", None)
    assert line.getMessage() == f"{path}: the client disconnected before the end of the body"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# Refusing.


async def ask_without_body(app: FastAPI, path: str, **headers: str) -> list[Message]:
    """What the application sends to a request of whose body nothing must be read."""

    async def receive() -> Message:
        raise AssertionError("the body is read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": given}
    await app(scope, receive, send)
    return sent


class Slow(LengthPipeline):
    """Its instance can be held."""

    instance: "Slow"

    def __init__(self, *args: Any, **model_entry: Any) -> None:
        super().__init__(*args, **model_entry)
        type(self).instance = self


@pytest.mark.parametrize("path", ["/sync/predict", "/batch/predict"])
async def test_a_full_queue_refuses_before_the_body_is_read(settings: Settings, path: str) -> None:
    settings = Settings(
        app_settings={
            **settings.app_settings.model_dump(exclude_unset=True),
            "batch_config": {"max_queue_size": 2, "max_batch_size": 1, "calibration": {"enabled": False}},
        },
        model_settings={"model_entries": {"slow": {"pipeline": f"{__name__}:Slow"}}},
    )
    gateway = LocalGateway(settings)
    (unstarted, *_) = await ask_without_body(create_app(gateway), path)
    assert (unstarted["status"], dict(unstarted["headers"])[b"retry-after"]) == (503, b"1")
    app = create_app(gateway, owns_gateway=False)
    (loading, *_) = await ask_without_body(app, path)
    assert loading["status"] == 503
    (loading, *_) = await ask_without_body(app, "/async/predict")
    assert loading["status"] == 503
    async with gateway:
        await gateway.wait_until_ready()
        model, pipeline = gateway.models["slow"], Slow.instance
        pipeline.gate.clear()
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(model.predict, Text(text="runs"))
            for _ in range(2):  # the first is the warm-up
                await to_thread.run_sync(pipeline.entered.acquire)
            for _ in range(2):
                task_group.start_soon(model.predict, Text(text="waits"))
            await anyio.wait_all_tasks_blocked()
            (full, *_) = await ask_without_body(app, path)
            assert full["status"] == 429
            pipeline.gate.set()
    (draining, *_) = await ask_without_body(app, path)
    assert draining["status"] == 503


TEXTS = {
    "/predict": {"inputs": [["a"]] * 3},
    "/embed": {"inputs": ["a"] * 3},
    "/rerank": {"query": "a", "texts": ["a"] * 3},
    "/classify": {"input": ["a"] * 3},
}


async def test_requests_of_clients_of_other_servers_are_refused_by_the_same_rules(settings: Settings) -> None:
    """Before the body is read where the model is known by then, and with 413 where they have too many texts."""
    entry = {"pipeline": "tests.support.task_pipelines:AllTasksPipeline"}

    def gateway_of(*names: str) -> LocalGateway:
        models = ModelSettings.model_validate({"model_entries": dict.fromkeys(names, entry)})
        return LocalGateway(settings.model_copy(update={"model_settings": models}))

    for path in (*TEXTS, "/"):
        (loading, *_) = await ask_without_body(create_app(gateway_of("all"), owns_gateway=False), path)
        assert loading["status"] == 503
    with pytest.raises(AssertionError, match="the body is read"):  # it may name the other one
        await ask_without_body(create_app(gateway_of("one", "two"), owns_gateway=False), "/classify")
    gateway = gateway_of("all")
    app = create_app(gateway, limits=RequestConfig(max_items=2), owns_gateway=False)
    async with gateway, serving(app) as client:
        await gateway.wait_until_ready()
        for path, body in TEXTS.items():
            refused = assert_problem(await client.post(path, json=body), 413)
            assert "more than 2 items" in refused["detail"]


async def test_a_key_over_its_limits_is_refused_before_its_body_is_read(settings: Settings) -> None:
    gateway = LocalGateway(settings)
    keys = {"shop": {"api_key": "s", "max_items_per_second": 0.01}}
    app = create_app(gateway, auth=AuthConfig.model_validate({"keys": keys}), owns_gateway=False)
    async with gateway, serving(app, headers={"Authorization": "Bearer s"}) as client:
        await gateway.wait_until_ready()
        assert (await client.post("/batch/predict", json=[{"text": "a"}] * 3)).status_code == 200
        for path in ("/sync/predict", "/batch/predict", "/async/predict"):
            (refused, *_) = await ask_without_body(app, path, authorization="Bearer s")
            assert refused["status"] == 429


def test_the_answer_says_when_to_come_again() -> None:
    full = QueueFullError(5, 5)
    assert error_response(full).headers["retry-after"] == "1"
    full.retry_after_s = 12.3
    assert error_response(full).headers["retry-after"] == "13"
    late = error_response(DeadlineUnreachableError(2, 8.5))
    assert (late.status_code, late.headers["retry-after"]) == (504, "7")


def test_refusals_wait_only_where_there_are_many() -> None:
    pace = RefusalPace()
    assert [pace.delay_s(0.0) for _ in range(100)] == [0.0] * 100
    delays = [pace.delay_s(0.0) for _ in range(200)]
    assert delays[0] == pytest.approx(0.01)
    assert delays == sorted(delays)
    assert delays[-1] == 1
    assert pace.delay_s(3.0) == 0


async def test_a_request_that_waits_to_be_refused_is_taken_when_there_is_room() -> None:
    admission, full, asked = Admission(now=lambda: 0.0), True, 0

    def check_room() -> None:
        nonlocal asked
        asked += 1
        if full:
            raise QueueFullError(1, 1)

    for _ in range(100):
        with pytest.raises(QueueFullError):
            await admission.check(check_room)
    assert asked == 100

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(admission.check, check_room)
        await anyio.wait_all_tasks_blocked()
        full = False
    assert asked == 102


async def test_a_job_of_a_long_list_can_be_asked_for_while_others_are_made(
    limited: tuple[httpx.AsyncClient, LocalGateway],
) -> None:
    jobs = [job("x" * 80, meta={"n": [1, 2]})] * 999 + [job("")]
    slots = (await limited[0].post("/async/predict", json=jobs)).json()
    assert [("job_id" in slot) for slot in slots] == [True] * 999 + [False]
