"""The server with applications that answer in unusual ways, and middleware of users around the routes."""

import asyncio
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
import httpx
import pytest
from anyio.lowlevel import checkpoint
from fastapi import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modalkit.service.local_gateway import LocalGateway
from modalkit.service.serving import AddressError, listening
from modalkit.service.settings import ServerConfig, Settings
from modalkit.service.web import create_app
from modalkit.service.web.connections import MAX_PIPELINED, MAX_WRITE_BYTES
from modalkit.service.web.prediction_stream import PredictionStream
from modalkit.service.web.server import FILES_WITHOUT_LIMIT, LimitedServer, TlsListener, server_of
from tests.support.http_client import NO_TLS, assert_problem
from tests.support.http_server import limit_buffers
from tests.support.length_model import LengthPipeline

pytestmark = pytest.mark.anyio

Headers = list[tuple[bytes, bytes]]


@asynccontextmanager
async def served(app: ASGIApp, socket_buffer_bytes: int | None = None) -> AsyncIterator[httpx.AsyncClient]:
    async with served_by(server_of(app, ServerConfig(), access_log=False), socket_buffer_bytes) as client:
        yield client


@asynccontextmanager
async def served_by(server: LimitedServer, socket_buffer_bytes: int | None = None) -> AsyncIterator[httpx.AsyncClient]:
    server.config.lifespan = "off"
    with listening("127.0.0.1", 0) as listener:
        if socket_buffer_bytes is not None:
            limit_buffers(listener, socket_buffer_bytes)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(server.serve, [listener])
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            try:
                async with httpx.AsyncClient(base_url=url, timeout=60, verify=NO_TLS) as client:
                    yield client
            finally:
                server.should_exit = True


def answering(headers: Headers, *bodies: bytes) -> ASGIApp:
    """An application that sends these parts of an answer; without any it raises once it has begun."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if not bodies:
            raise RuntimeError("after the beginning")
        for number, body in enumerate(bodies, start=1):
            await send({"type": "http.response.body", "body": body, "more_body": number < len(bodies)})

    return app


LENGTH = (b"content-length", b"4")


@pytest.mark.parametrize("parts", [[b"four"], [b"fo", b"ur"]])
@pytest.mark.parametrize("headers", [[LENGTH], [LENGTH, (b"connection", b"close")], []])
async def test_an_answer_arrives_whole_however_it_is_sent(headers: Headers, parts: list[bytes]) -> None:
    async with served(answering([*headers, (b"x-a", b"1")], *parts)) as client:
        for _ in range(2):
            answer = await client.get("/")
            assert (answer.status_code, answer.text, answer.headers["x-a"]) == (200, "four", "1")
        head = await client.head("/")
        assert head.text == ""


async def test_a_large_answer_is_not_sent_before_the_client_has_taken_all_but_its_end() -> None:
    """So that what it holds counts as long as it is held; `answered` is set when the application has ended."""
    part, answered = b"x" * MAX_WRITE_BYTES, anyio.Event()
    body = b"".join([part] * 40 + [b"end"])
    sent_bytes = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answering([(b"content-length", b"%d" % len(body))], body)(scope, receive, send)
        answered.set()

    async with served(app, socket_buffer_bytes=2**16) as client:
        async with client.stream("GET", "/") as answer:
            async for received in answer.aiter_raw(2**16):
                sent_bytes += len(received)
                if sent_bytes == 2**16:
                    for _ in range(100):  # the server has sent what the system buffers
                        await checkpoint()
                    assert not answered.is_set()
        assert sent_bytes == len(body)
        await answered.wait()
        assert (await client.get("/")).content == body
        assert (await client.head("/")).content == b""


@pytest.mark.parametrize("headers", [[LENGTH, (b"x-a", b"1\r\nx-b: 2")], [LENGTH, (b"x-a", b"\0")]])
async def test_a_header_that_would_break_the_answer_is_never_sent(headers: Headers) -> None:
    async with served(answering(headers, b"four")) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="disconnected without sending"):
            await client.get("/")


async def test_an_application_that_fails_before_its_body_is_answered_with_500() -> None:
    async with served(answering([LENGTH])) as client:
        assert (await client.get("/")).status_code == 500


async def unexpected(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("a bug")


@pytest.mark.parametrize("has_cors", [False, True])
async def test_users_middleware_sees_predictions_and_errors_are_problems(
    settings: Settings, has_cors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        app = create_app(gateway, owns_gateway=False)
        if has_cors:
            app.add_middleware(CORSMiddleware, allow_origins=["*"])
        async with served(app) as client:
            origin = {"origin": "https://example.com"}
            answer = await client.post("/sync/predict", json={"text": "four"}, headers=origin)
            assert answer.json()["length"] == 4
            assert answer.headers.get("access-control-allow-origin") == ("*" if has_cors else None)
            monkeypatch.setattr(gateway.jobs, "submit", unexpected)
            monkeypatch.setattr(gateway.jobs, "get", unexpected)
            monkeypatch.setattr(PredictionStream, "answer", unexpected)
            lines = {"content-type": "application/x-ndjson"}
            for answer in (
                await client.post("/async/predict", json={"message": {"text": "four"}}, headers=origin),
                await client.post("/batch/predict", content=b'{"text": "four"}', headers=origin | lines),
                await client.get("/jobs/x", headers=origin),
            ):
                assert "unexpected KeyError" in assert_problem(answer, 500)["detail"]
                assert answer.headers["x-request-id"]
                assert answer.headers["connection"] == "close", "the server closes it, as the error is raised"


@pytest.mark.parametrize("path", ["/sync/predict", "/batch/predict", "/async/predict", "/v1/batches"])
@pytest.mark.parametrize("content_type", ["application/json", "application/x-ndjson"])
async def test_a_limit_of_an_application_around_it_is_answered_as_it_says(
    settings: Settings, caplog: pytest.LogCaptureFixture, path: str, content_type: str
) -> None:
    """FastAPI's `max_body_size` raises such an error where the body is read."""

    async def receive_too_much() -> Message:
        raise HTTPException(413, "too much for the application around it")

    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        app = create_app(gateway, owns_gateway=False)

        async def outer(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope, receive_too_much, send)

        async with served(outer) as client:
            answer = await client.post(path, content=b"{}", headers={"Content-Type": content_type})
    assert assert_problem(answer, 413)["detail"] == "too much for the application around it"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("status", [404, 405, 409, 418, 499])
async def test_errors_of_users_own_routes_keep_their_status_and_detail(settings: Settings, status: int) -> None:
    app = create_app(LocalGateway(settings), owns_gateway=False)

    @app.get("/customers/{name}")
    async def customer(name: str) -> None:
        raise HTTPException(status, f"there is no {name}", {"x-a": "1"})

    async with served(app) as client:
        answer = await client.get("/customers/ann")
    assert (answer.status_code, answer.json()["detail"], answer.headers["x-a"]) == (status, "there is no ann", "1")


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_what_waits_at_the_end_of_the_grace_is_told_to_retry(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """What has begun is cut. The server logs a line for all of it."""
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        pipeline = gateway.models["lengths"].ready_worker().pipeline
        assert isinstance(pipeline, LengthPipeline)
        pipeline.gate.clear()
        server = server_of(create_app(gateway, owns_gateway=False), ServerConfig(grace_seconds=0.01), access_log=False)
        answers = list[httpx.Response]()
        async with served_by(server) as client, anyio.create_task_group() as task_group:
            accepted = (await client.post("/async/predict", json={"message": {"text": "four"}})).json()

            async def ask(method: str, path: str, content: Any = None) -> None:
                answers.append(await client.request(method, path, json=content))

            task_group.start_soon(ask, "POST", "/sync/predict", {"text": "four"})
            task_group.start_soon(ask, "GET", f"/jobs/{accepted['job_id']}?wait=60")
            async with client.stream("GET", f"/jobs/{accepted['job_id']}/events") as answer:
                assert answer.status_code == 200
                while len(server.server_state.tasks) < 3:
                    await checkpoint()
                server.should_exit = True
                with pytest.raises(httpx.HTTPError):
                    await answer.aread()
        pipeline.gate.set()
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert (line.exc_info, line.getMessage()) == (None, "Cancel 3 running task(s), timeout graceful shutdown exceeded")
    for answer in answers:
        assert assert_problem(answer, 503)["type"].endswith(":scheduler-closed")
        assert answer.headers["retry-after"] == "1"
    assert len(answers) == 2


async def test_a_connection_with_too_many_pipelined_requests_is_cut_and_logs_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On uvloop, which raises for a write after the end that asyncio's own loop drops."""
    async with served(answering([LENGTH], b"four")) as client:
        async with await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0) as connection:
            await connection.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * (MAX_PIPELINED + 100))
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    await connection.receive()
        assert (await client.get("/")).text == "four"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the path and the body."""
    body, more = b"", True
    while more:
        part = await receive()
        body, more = body + part.get("body", b""), part.get("more_body", False)
    content = scope["path"].encode() + b" " + body
    length = (b"content-length", b"%d" % len(content))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": content})


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
BODY = b"POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n\nUpgrade: a"


async def answers_to(client: httpx.AsyncClient, *parts: bytes) -> bytes:
    """All that a connection answers to these parts, until it is closed."""
    received = b""
    async with await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0) as connection:
        for part in parts:
            await connection.send(part)
            await anyio.wait_all_tasks_blocked()
        with suppress(anyio.EndOfStream):
            while True:
                received += await connection.receive()
    return received


@pytest.mark.parametrize("cut", [-100, -60, -2, -1, 0, 1, 3])
async def test_an_offer_of_another_protocol_is_ignored_and_its_body_stays_a_body(cut: int) -> None:
    head = b"POST /first HTTP/1.1\r\nHost: a\r\n" + OFFER + b"Content-Length: %d\r\n\r\n" % len(BODY)
    chunked = b"POST /second HTTP/1.1\r\nHost: a\r\n" + OFFER + b"Transfer-Encoding: chunked\r\n\r\n"
    last = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    async with served(echo) as client:
        split = len(head) + cut
        request = head + BODY
        answers = await answers_to(client, request[:split], request[split:], chunked, b"2\r\nab\r\n0\r\n\r\n", last)
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert b"/first " + BODY in answers
    assert b"/second ab" in answers
    assert answers.endswith(b"/last ")


async def test_pipelined_offers_are_ignored_too() -> None:
    request = b"POST /%d HTTP/1.1\r\nHost: a\r\n" + OFFER + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    last = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    async with served(echo) as client:
        answers = await answers_to(client, request % 1 + request % 2 + last)
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.endswith(b"/last ")


async def test_connect_is_refused_and_what_follows_is_no_request() -> None:
    async with served(echo) as client:
        answers = await answers_to(client, b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\nContent-Length: 70\r\n\r\n", BODY)
    assert answers.startswith(b"HTTP/1.1 400 ")
    assert b"smuggled" not in answers
    assert b"CONNECT" in answers


async def test_a_body_that_looks_like_an_offer_is_left_as_it_is_wherever_the_head_is_cut() -> None:
    body = b"\nUpgrade: a"
    head = b"POST /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with served(echo) as client:
        assert (await answers_to(client, head[:-1], head[-1:] + body)).endswith(b"/a " + body)


@pytest.mark.parametrize("max_connections", [1, 1000])
async def test_others_have_their_turn_while_many_connections_come_by_tls(max_connections: int) -> None:
    """Also while all but one are refused."""
    context, limits = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ServerConfig(max_connections=max_connections)
    count, left, turns = 50, 0, 5
    with ExitStack() as opened, listening("127.0.0.1", 0) as listener:
        for _ in range(count):
            opened.enter_context(socket.create_connection(listener.getsockname()))
        accepting = TlsListener(listener, context, asyncio.Protocol, (), limits)
        for _ in range(turns):
            await checkpoint()
        accepting.close()
        await accepting.wait_closed()
        with suppress(BlockingIOError):
            while True:
                opened.enter_context(listener.accept()[0])
                left += 1
    assert left >= count - turns


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_name_that_no_host_has_is_an_error_of_the_address(host: str) -> None:
    with pytest.raises(AddressError, match=f"^cannot listen on {host}:0: .*; give an address of this machine"):
        with listening(host, 0):
            pass


def test_connections_are_limited_where_the_system_refuses_more_open_files_than_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = 61_440
    limits = [(256, resource.RLIM_INFINITY)]

    def set_limits(_: int, wanted: tuple[int, int]) -> None:
        if not 0 <= wanted[0] <= most:
            raise ValueError("current limit exceeds maximum limit")  # as macOS does
        limits.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    server_of(answering([]), ServerConfig(), access_log=False)
    assert limits[-1][0] > ServerConfig().max_connections
    limits.append((256, resource.RLIM_INFINITY))
    server_of(answering([]), ServerConfig(max_connections=1_000_000), access_log=False)
    assert limits[-1][0] == FILES_WITHOUT_LIMIT
