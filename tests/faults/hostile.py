"""Hostile clients of a real service: how long each request delays others, and what hundreds of connections cost.

``python -m tests.faults.hostile`` sends each of the requests that once blocked the service, while another client
measures how long it waits, and then keeps 500 hostile connections busy for half a minute. It ends with an error where a
client waits for more than 100 ms for one request, where memory reaches 1 GiB, and where a good client gets no answer.
"""

import argparse
import gzip
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import anyio
import httpx
from anyio.abc import SocketStream

from tests.support.http_client import NO_TLS
from tests.support.killed_server import KilledServer

CONFIGURATION = """
app_settings:
  async_config: {store_path: jobs.db}
  batch_config: {calibration: {enabled: false}}
model_settings:
  model_entries:
    tasks: {pipeline: "tests.support.task_pipelines:AllTasksPipeline"}
"""
MAX_DELAY_S = 0.1
MAX_RESIDENT_MIB = 1024
MIB = 2**20
JSON, NDJSON = "application/json", "application/x-ndjson"


class Probe:
    """A good client: it sends `request` every few milliseconds, from a thread, while the context is open."""

    def __init__(self, port: int, request: bytes) -> None:
        self.latencies_s: list[float] = []
        self.statuses = Counter[str]()
        self._port = port
        self._request = request
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def is_served(self) -> bool:
        """Whether all its requests have their results."""
        return self.statuses.keys() == {"200"}

    def _ask(self) -> None:
        with closing(socket.create_connection(("127.0.0.1", self._port), timeout=60)) as connection:
            while not self._is_over.wait(0.005):
                began_s = time.perf_counter()
                connection.sendall(self._request)
                self.statuses[connection.recv(2**16)[9:12].decode() or "cut"] += 1
                self.latencies_s.append(time.perf_counter() - began_s)


def head(path: str, length: int | None, content_type: str = JSON, **more: str) -> bytes:
    """The head of a POST request; None is a body in chunks."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {content_type}", size]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in more.items()), "", ""]).encode()


def times(item: object, count: int, separator: str = ",") -> bytes:
    """The JSON of an item so many times."""
    return separator.join([json.dumps(item)] * count).encode()


def listed(item: object, count: int) -> bytes:
    """The JSON of a list of so many equal items."""
    return b"[%b]" % times(item, count)


# What good clients send: the first waits for nothing but the process, the second also for the items before it.
ALIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
PREDICT = head("/sync/predict", 21) + b'{"text":"a good one"}'


# One request at a time.


class Large(NamedTuple):
    """A request that costs much: POST, or GET without a body. Its body is made when it is sent."""

    name: str
    path: str
    body: Callable[[], bytes] | None = None
    content_type: str = JSON


WRONG = {f"unknown field {number}": 1 for number in range(20)}
TEXT, LONG_TEXT, META = {"text": "x" * 2400}, {"text": "x" * (15 * MIB)}, {"a": "x" * (15 * MIB)}
ADAPTERS = {"/predict": b"inputs", "/embed": b"inputs", "/classify": b"input", "/rerank": b"texts"}

LARGE = [
    *(
        large
        for path in ("/batch/predict", "/async/predict")
        for large in (
            Large("32 MiB of 1", path, lambda: listed(1, 16 * MIB - 8)),
            Large("10,000 wrong items", path, lambda: listed(WRONG, 10_000)),
            Large("4 MB of bad lines", path, lambda: times({"text": 1}, 330_000, "\n"), NDJSON),
            Large("wrong lines of 1 MB", path, lambda: times(WRONG | {"a": [1] * 300_000}, 8, "\n"), NDJSON),
            Large("lines with 20,000 wrong fields", path, lambda: times(wrong_fields(20_000), 8, "\n"), NDJSON),
        )
    ),
    Large("24 MiB of items", "/batch/predict", lambda: listed(TEXT, 10_000)),
    Large("24 MiB of lines", "/batch/predict", lambda: times(TEXT, 10_000, "\n"), NDJSON),
    Large("24 MiB of jobs", "/async/predict", lambda: listed({"message": TEXT}, 10_000)),
    Large("24 MiB of lines with jobs", "/async/predict", lambda: times({"message": TEXT}, 10_000, "\n"), NDJSON),
    Large("an item of 15 MiB", "/sync/predict", lambda: times(LONG_TEXT, 1)),
    Large("an item of 12 MiB of escapes", "/sync/predict", lambda: times({"text": "\u20ac" * (2 * MIB)}, 1)),
    Large("an item of 99,000 values", "/sync/predict", lambda: times({"text": [1] * 99_000}, 1)),
    Large("an item of 99,000 wrong fields", "/sync/predict", lambda: times(wrong_fields(99_000), 1)),
    Large("an item of 99,000 levels", "/sync/predict", lambda: b'{"text": %b}' % (b"[" * 99_000 + b"]" * 99_000)),
    Large("a job of 15 MiB", "/async/predict", lambda: times({"message": LONG_TEXT}, 1)),
    Large("the newest job", "/jobs/{job_id}?wait=30"),
    Large("events of the newest job", "/jobs/{job_id}/events"),
    Large("a job with 15 MiB of meta", "/async/predict", lambda: times({"message": TEXT, "meta": META}, 1)),
    Large("the newest job", "/jobs/{job_id}?wait=30"),
    Large(
        "a job with 99,000 values of meta",
        "/async/predict",
        lambda: times({"message": TEXT, "meta": {"a": [1] * 99_000}}, 1),
    ),
    Large(
        "60 jobs with 200 KB of meta",
        "/async/predict",
        lambda: listed({"message": TEXT, "meta": {"a": "x" * 200_000}}, 60),
    ),
    Large("a page of these jobs", "/jobs?limit=1000"),
    *(
        Large(
            name, path, partial(lambda field, item, count: b'{"%b":%b}' % (field, listed(item, count)), field, *items)
        )
        for path, field in ADAPTERS.items()
        for name, items in {"32 MiB of 1": (1, 16 * MIB - 16), "49,000 lists": ([1], 49_000)}.items()
    ),
    Large("4,096 texts", "/embed", lambda: b'{"inputs":%b}' % listed("x" * 3000, 4096)),
    Large("4,096 texts", "/predict", lambda: b'{"inputs":%b}' % listed(["x" * 3000], 4096)),
    Large("32 MiB of a list for an object", "/predict", lambda: listed(1, 16 * MIB - 8)),
]
"""Requests that one client might send."""


def wrong_fields(count: int) -> dict[str, int]:
    """An item with so many fields that it may not have."""
    return {f"f{number}": 1 for number in range(count)}


def send(url: str, number: int) -> str:
    """Send one of the large requests, and tell what it was answered with."""
    large = LARGE[number]
    with httpx.Client(base_url=url, timeout=300, verify=NO_TLS) as client:
        path = large.path
        if "{job_id}" in path:
            path = path.format(job_id=client.get("/jobs?limit=1").json()["jobs"][0]["job_id"])
        body, headers = large.body and large.body(), {"Content-Type": large.content_type}
        began_s = time.perf_counter()
        try:
            answer = client.request("POST" if body else "GET", path, content=body, headers=headers)
            told = f"{answer.status_code}, {len(answer.content):,} bytes"
        except httpx.HTTPError as error:
            told = type(error).__name__
        return f"{told} after {time.perf_counter() - began_s:.2f} s"


def delays(server: KilledServer, only: str) -> float:
    """Send each request while a good client measures its latency; tells and returns the longest that one caused."""
    longest_s = 0.0
    # In a process of its own, because this one should do nothing but measure.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as sender:
        for number, large in enumerate(LARGE):
            if only not in f"{large.name} {large.path}":
                continue
            with Probe(server.port, ALIVE) as probe:
                told = sender.submit(send, server.url, number).result()
            slowest_s = max(probe.latencies_s)
            longest_s = max(longest_s, slowest_s)
            sys.stdout.write(
                f"{slowest_s * 1000:7.0f} ms  {large.name} to {large.path}: {told}"
                f"{'' if probe.is_served else f', while others got {dict(probe.statuses)}'}\n"
            )
            sys.stdout.flush()
    return longest_s


# Many connections.


async def slow_headers(connection: SocketStream) -> None:
    """Send a header every second, without end."""
    await connection.send(b"GET / HTTP/1.1\r\n")
    await send_slowly(connection, b"a: b\r\n")


async def slow_body(connection: SocketStream) -> None:
    """Send a byte of the body every second."""
    await connection.send(head("/sync/predict", MIB))
    await send_slowly(connection, b" ")


async def send_slowly(connection: SocketStream, part: bytes) -> None:
    """Send a part every second."""
    while True:
        await connection.send(part)
        await anyio.sleep(1)


async def endless_chunks(connection: SocketStream) -> None:
    """Send a body in chunks, without end."""
    await connection.send(head("/batch/predict", None))
    while True:
        await connection.send(b"10000\r\n%b\r\n" % (b" " * 2**16))


async def endless_lines(connection: SocketStream, path: str = "/batch/predict") -> None:
    """Send lines without end, and read no answer."""
    lines = times({"text": "x", "a": 1}, 1000, "\n") + times({"message": {"text": "x"}, "text": "x"}, 1000, "\n")
    await connection.send(head(path, None, NDJSON))
    while True:
        await connection.send(b"%x\r\n%b\n\r\n" % (len(lines) + 1, lines))


async def stalled_body(connection: SocketStream) -> None:
    """Send 31 MiB of a body but for its last byte, and then nothing."""
    await connection.send(head("/batch/predict", 31 * MIB))
    for _ in range(31 * 16 - 1):
        await connection.send(b" " * 2**16)
    await connection.send(b" " * (2**16 - 1))
    await connection.receive()


async def unread_answers(connection: SocketStream) -> None:
    """Ask for large answers, and read none."""
    while True:
        await connection.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)


async def unread_job(connection: SocketStream) -> None:
    """Ask for a large job, the same for all connections, and read nothing of it."""
    body = times({"message": {"text": "x"}, "meta": {"a": "x" * (4 * MIB)}, "idempotency_key": "large"}, 1)
    await connection.send(head("/async/predict", len(body)) + body)
    job_id = json.loads((await connection.receive()).partition(b"\r\n\r\n")[2])["job_id"]
    await connection.send(b"GET /jobs/%b HTTP/1.1\r\nHost: x\r\n\r\n" % job_id.encode())
    await anyio.sleep(5)


async def flood_of_headers(connection: SocketStream) -> None:
    """Send headers without end, as fast as possible."""
    await connection.send(b"GET / HTTP/1.1\r\n")
    while True:
        await connection.send(b"a: b\r\n" * 10_000)


async def compressed_bomb(connection: SocketStream) -> None:
    """Send a small body that would become a large one."""
    await connection.send(head("/sync/predict", len(BOMB), **{"Content-Encoding": "gzip"}) + BOMB)
    await connection.receive()


async def large_list(connection: SocketStream) -> None:
    """Send 8 MiB of a list without any item that is right."""
    await connection.send(head("/batch/predict", 8 * MIB + 1) + b"[" + b"1," * (4 * MIB - 1) + b"1]")
    await connection.receive()


async def cut_body(connection: SocketStream) -> None:
    """Leave in the middle of a body."""
    await connection.send(head("/sync/predict", 31 * MIB) + b" " * MIB)
    await anyio.sleep(0.5)


async def nothing(connection: SocketStream) -> None:
    """Only hold the connection."""
    await connection.receive()


BOMB = gzip.compress(bytes(64 * MIB))
KINDS = [
    *(slow_headers, slow_body, endless_chunks, endless_lines, stalled_body, unread_answers, unread_job),
    *(flood_of_headers, compressed_bomb, large_list, cut_body, nothing),
]


async def attack(port: int, connections: int) -> None:
    """Hold so many connections, in equal parts of each kind; what is cut or answered begins again."""

    async def repeat(kind: Callable[[SocketStream], Awaitable[None]]) -> None:
        while True:
            with suppress(OSError, anyio.BrokenResourceError, anyio.EndOfStream, KeyError, ValueError):
                async with await anyio.connect_tcp("127.0.0.1", port) as connection:
                    await kind(connection)
            await anyio.sleep(0.1)

    async with anyio.create_task_group() as task_group:
        for number in range(connections):
            task_group.start_soon(repeat, KINDS[number % len(KINDS)])


def resident_mib(server: KilledServer) -> float:
    """The memory that the server says it has."""
    metrics = httpx.get(f"{server.url}/metrics", timeout=60, verify=NO_TLS).text
    line = next(line for line in metrics.splitlines() if line.startswith("process_resident_memory_bytes "))
    return float(line.split()[1]) / MIB


def withstand(server: KilledServer, connections: int, seconds: float) -> tuple[float, Probe]:
    """Have so many hostile connections for a while; the most MiB that the server had, and what good clients got."""
    process = multiprocessing.get_context("spawn").Process(
        target=anyio.run, args=(attack, server.port, connections), daemon=True
    )
    with Probe(server.port, PREDICT) as probe:
        process.start()
        ends_s, most_mib = time.perf_counter() + seconds, 0.0
        while time.perf_counter() < ends_s:
            most_mib = max(most_mib, resident_mib(server))
            time.sleep(0.2)
    process.kill()
    process.join()
    return most_mib, probe


def main() -> None:
    """Do both, and end with an error where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=500, help="0 for none")
    parser.add_argument("--seconds", type=float, default=30, help="for how long the connections are held")
    parser.add_argument(
        "--only", default="", help="only the large requests with this in their name or path; - for none"
    )
    options = parser.parse_args()
    is_good = True
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        Path(folder, "modalkit.yaml").write_text(CONFIGURATION)
        with KilledServer(Path(folder)) as server:
            is_good = delays(server, options.only) <= MAX_DELAY_S
            if options.connections:
                most_mib, probe = withstand(server, options.connections, options.seconds)
                is_good &= most_mib < MAX_RESIDENT_MIB and probe.is_served
                sys.stdout.write(
                    f"{options.connections} hostile connections for {options.seconds:g} s: at most {most_mib:.0f} MiB; "
                    f"a good client got {dict(probe.statuses)}, half of them within "
                    f"{statistics.median(probe.latencies_s) * 1000:.0f} ms, all within "
                    f"{max(probe.latencies_s) * 1000:.0f} ms\n"
                )
    if not is_good:
        sys.exit(1)


if __name__ == "__main__":
    main()
