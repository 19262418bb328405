"""``modalkit serve`` against clients that send or take too much, too slowly or nothing, over real connections."""

import json
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import httpx
import pytest

from tests.support.command_line import CONFIGURATION, serving
from tests.support.processes import ROOT

MAX_CONNECTIONS = 20
LIMITS = {
    "MAX_CONNECTIONS": str(MAX_CONNECTIONS),
    "HEADER_TIMEOUT_SECONDS": "0.3",
    "BODY_TIMEOUT_SECONDS": "0.3",
    "ANSWER_TIMEOUT_SECONDS": "0.3",
    "IDLE_TIMEOUT_SECONDS": "0.3",
}
HEAD = b"POST /sync/predict HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with short limits."""
    folder = tmp_path_factory.mktemp("connections")
    (folder / "modalkit.yaml").write_text(CONFIGURATION)
    environment = {
        "PYTHONPATH": str(ROOT),
        **{f"MODALKIT_APP_SETTINGS__SERVER_CONFIG__{name}": value for name, value in LIMITS.items()},
    }
    with serving(folder, environment) as (_, opened):
        yield opened


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    address = (client.base_url.host, client.base_url.port or 80)
    with closing(socket.create_connection(address, timeout=60)) as connection:
        yield connection


def answer_to(client: httpx.Client, *parts: bytes) -> tuple[int, str]:
    """The status of the answer to what is sent, and its detail; 0 where the connection is closed without one."""
    with connected(client) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except ConnectionError:
                break
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, str]:
    received = b""
    try:
        while part := connection.recv(2**16):
            received += part
    except ConnectionError:
        assert received, "the server cut the connection before its answer could be read"
    if not received:
        return 0, ""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["detail"]


def assert_serves(client: httpx.Client) -> None:
    with httpx.Client(base_url=client.base_url, timeout=60) as other:
        assert other.post("/sync/predict", json={"text": "four"}).json()["length"] == 4


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([b"GET /", *[b"x" * 2**16] * 64], id="an endless path"),
        pytest.param([HEAD, b"X-A: ", *[b"x" * 2**16] * 64], id="an endless value"),
        pytest.param([HEAD, *[b"x" * 2**16] * 64], id="an endless name"),
        pytest.param([HEAD, *[b"a: b\r\n" * 10_000] * 64], id="endlessly many"),
        pytest.param([HEAD, b"a: b\r\n" * 100, b"\r\n"], id="101"),
        pytest.param([HEAD, b"X-A: ", b"x" * 65_000, b"\r\nX-B: ", b"x" * 1000, b"\r\n\r\n"], id="64 KiB in all"),
    ],
)
def test_too_many_or_too_large_headers_are_refused_before_anything_else(
    client: httpx.Client, parts: list[bytes]
) -> None:
    status, detail = answer_to(client, *parts)
    assert status == 431
    assert "65536 bytes" in detail
    assert_serves(client)


def test_a_hundred_headers_of_nearly_64_kib_are_accepted(client: httpx.Client) -> None:
    names = {f"x-{number}": "x" * 600 for number in range(90)}
    assert client.post("/sync/predict", json={"text": "four"}, headers=names).status_code == 200


def test_a_large_body_that_arrives_with_its_headers_is_no_large_header(client: httpx.Client) -> None:
    answer = client.post("/sync/predict", content=b" " * 2**20 + b'{"text": "four"}')
    assert answer.json()["length"] == 4


@pytest.mark.parametrize("trailer", [b"a: b\r\n", b"x" * 2**10])
def test_endless_trailers_are_refused(client: httpx.Client, trailer: bytes) -> None:
    begun = HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n1\r\n0\r\n"
    status, _ = answer_to(client, begun, *[trailer * 2**10] * 64)
    assert status in (400, 431)


def test_what_is_no_http_is_answered_with_problem_details(client: httpx.Client) -> None:
    status, detail = answer_to(client, b"rubbish\r\n\r\n")
    assert status == 400
    assert "HTTP/1.1" in detail


def test_headers_that_do_not_end_in_time_are_answered_with_408(client: httpx.Client) -> None:
    assert answer_to(client, HEAD) == (408, "the headers were not complete within 0.3 s")


def test_a_connection_that_sends_nothing_is_closed(client: httpx.Client) -> None:
    assert answer_to(client) == (0, "")


def test_a_body_that_does_not_go_on_is_answered_with_408(client: httpx.Client) -> None:
    status, detail = answer_to(client, HEAD, b"Content-Length: 100\r\n\r\n{")
    assert status == 408
    assert "too slowly" in detail
    assert_serves(client)


def test_a_body_that_is_answered_already_must_end(client: httpx.Client) -> None:
    with connected(client) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        while connection.recv(2**16):
            pass


def test_a_connection_without_a_request_is_closed_after_a_while(client: httpx.Client) -> None:
    with connected(client) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        received = b""
        while part := connection.recv(2**16):
            received += part
    assert received.startswith(b"HTTP/1.1 200")


def test_a_client_that_never_reads_its_answers_is_cut(client: httpx.Client) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
    with connected(client) as connection:
        ends = select.poll()
        ends.register(connection, select.POLLERR | select.POLLHUP | select.POLLRDHUP)
        connection.sendall(request * 900)
        assert ends.poll(60_000)
    assert_serves(client)


def test_connections_beyond_the_limit_are_refused_with_503(client: httpx.Client) -> None:
    with ExitStack() as opened:
        connections = [opened.enter_context(connected(client)) for _ in range(MAX_CONNECTIONS + 5)]
        status, detail = read_answer(connections[-1])
        assert (status, detail) == (503, "there are too many connections; try again later")
    while httpx.get(f"{client.base_url}/health/live").status_code == 503:
        pass  # the server has not noticed yet that they were closed
    assert_serves(client)
