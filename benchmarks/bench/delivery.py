"""From the acceptance of jobs to their delivery through a queue: the receivers, and what is counted."""

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import httpx
import numpy as np
import uvloop

from modalkit.benchmarks.load import BenchError, Endpoint, Measured, OptionError
from modalkit.benchmarks.load.client import direct_client
from modalkit.benchmarks.load.endpoint import Item, model_query
from modalkit.pipelines.extras import install_command
from modalkit.service.errors import describe_error

QUEUE = "bench-results"
STREAM = f"modalkit:{QUEUE}"
"""The Redis stream of that queue, see `make_taskiq_broker`."""
QUIET_S = 15.0
"""After so long without a delivery, what is missing is lost."""
_JOB_ID = re.compile(rb'job_id[\\"]+: ?[\\"]+([0-9a-zA-Z.:_-]+)')
_SLOT = re.compile(rb'"job_id": ?"([^"]+)"')


@dataclass
class Receiver:
    """What reads a queue: its name for requests, the settings that a server needs for it, and what arrived."""

    queue_name: str
    variables: Mapping[str, str]
    arrivals: list[tuple[bytes, float]] = field(default_factory=list)
    """The job's id and the time of each message, by `time.perf_counter`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What became of the accepted jobs, those of the warm-up included."""

    accepted: int
    delivered: int
    delivered_per_s: float
    """From the begin of the load until the last delivery."""
    in_time_per_s: float
    """What was delivered in the measured time alone."""
    duplicates: int
    """Messages beyond the first of each job."""
    lost: int
    """Jobs that were accepted and not delivered."""
    p50_s: float
    """From the answer 202 until the message arrived."""
    p99_s: float


def jobs_endpoint(url: str, model: str | None, queue_name: str, list_length: int) -> Endpoint:
    """Where jobs are submitted, for a queue."""
    job = {"message": "$item", "success_queue": queue_name, "failure_queue": queue_name}
    return Endpoint(
        f"{url}/async/predict{model_query(model)}",
        job if list_length == 1 else {"$each": job},
        list_length=list_length,
        error_mark=b'"status":"error"' if list_length > 1 else b"",
    )


def require_delivery(url: str, endpoint: Endpoint, items: Sequence[Item], receiver: Receiver, timeout_s: float) -> None:
    """Submit a request of jobs, and wait until the result of the first arrives. Raises `BenchError` where it does not.

    That is so where the job takes longer than `timeout_s`, or where the service that was measured has another queue
    backend, or may not send to this address.
    """
    content = endpoint.content(endpoint.items_of(items, 0))
    headers = {"Content-Type": endpoint.content_type, **endpoint.headers}
    with direct_client(base_url=url, headers=headers, timeout=60) as client:
        try:
            job_id = _SLOT.findall(client.post(endpoint.url, content=content).raise_for_status().content)[0]
            deadline_s, is_done, reason = time.perf_counter() + timeout_s, False, None
            while job_id not in dict(receiver.arrivals) and not reason:
                job = client.get(f"/jobs/{job_id.decode()}", params={"wait": 5}).raise_for_status().json()
                reason = "they stay in its memory" if job["delivery"] == "memory" else job["delivery_error"]
                if job["finished_at"] is not None:
                    deadline_s = deadline_s if is_done else time.perf_counter() + QUIET_S
                    is_done = True
                    time.sleep(0.02)
                if time.perf_counter() > deadline_s:
                    if not is_done:
                        raise BenchError(f"{url}: the first job was not done within {timeout_s:g} s (--start-timeout)")
                    reason = f"none came within {QUIET_S:g} s"
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise BenchError(f"{url}: the first job failed: {describe_error(error)}") from error
    if reason:
        raise BenchError(
            f"{url} does not send results of jobs to --queue: {reason}; set its queue_config as docs/benchmarking.md "
            "says, or leave the target out: then bench starts a service that does"
        )


def wait_for_deliveries(
    measured: Measured, receiver: Receiver, on_wait: Callable[[int], object] = lambda _: None
) -> Delivery:
    """Wait until all accepted jobs were delivered, or nothing more comes, and count.

    `on_wait` is told again and again how many were delivered.
    """
    accepted_s = {job_id: at_s for _, at_s, body in measured.kept for job_id in _SLOT.findall(body)}
    begin_s, end_s = min(accepted_s.values(), default=0.0), max(accepted_s.values(), default=0.0)
    missing, first_s, seen = set(accepted_s), dict[bytes, float](), Counter[bytes]()
    place, last_s = 0, 0.0
    while True:
        # Each message is looked at once: its receiver is a thread of this process, and the looking takes its time.
        for job_id, at_s in (new := receiver.arrivals[place:]):
            seen[job_id] += 1
            first_s.setdefault(job_id, at_s)
            missing.discard(job_id)
            last_s = max(last_s, at_s)
        place += len(new)
        on_wait(len(accepted_s) - len(missing))
        if not missing or time.perf_counter() > max(last_s, end_s) + QUIET_S:
            break
        time.sleep(0.05)
    delays_s = [max(0.0, first_s[job_id] - at_s) for job_id, at_s in accepted_s.items() if job_id in first_s]
    since_begin_s = [first_s[job_id] - measured.begin_s for job_id in accepted_s if job_id in first_s]
    p50_s, p99_s = np.quantile(delays_s, (0.5, 0.99)).tolist() if delays_s else (float("nan"),) * 2
    return Delivery(
        accepted=len(accepted_s),
        delivered=len(delays_s),
        delivered_per_s=len(delays_s) / max(1e-9, last_s - begin_s),
        in_time_per_s=sum(0 <= at_s <= measured.elapsed_s for at_s in since_begin_s) / measured.elapsed_s,
        duplicates=sum(seen[job_id] - 1 for job_id in accepted_s if job_id in seen),
        lost=len(accepted_s) - len(delays_s),
        p50_s=p50_s,
        p99_s=p99_s,
    )


@contextmanager
def webhook_receiver() -> Iterator[Receiver]:
    """A web server of this process, in a thread of its own, that takes results as webhooks."""
    receiver = Receiver("", {})
    ready, done = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Webhook(receiver.arrivals), "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        receiver.queue_name = f"http://{address}/results"
        receiver.variables = _queue_variables(
            BACKEND="webhook", WEBHOOK__ALLOWED_HOSTS=json.dumps([address]), WEBHOOK__ALLOW_PRIVATE_ADDRESSES="true"
        )
        loops.append(loop)
        ready.set()
        async with server:
            await done.wait()

    thread = threading.Thread(target=lambda: uvloop.run(serve()), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield receiver
    finally:
        loops[0].call_soon_threadsafe(done.set)
        thread.join()


class _Webhook(asyncio.Protocol):
    """Takes each message as delivered."""

    def __init__(self, arrivals: list[tuple[bytes, float]]) -> None:
        self._arrivals = arrivals
        self._parser = httptools.HttpRequestParser(self)
        self._job_id = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"webhook-id":
            self._job_id = value

    def on_message_complete(self) -> None:
        self._arrivals.append((self._job_id, time.perf_counter()))
        self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")


@contextmanager
def redis_receiver(url: str) -> Iterator[Receiver]:
    """Reads the stream that TaskIQ's results go to, from now on. Raises `BenchError` where redis is missing or away."""
    try:
        import redis
    except ImportError:
        raise BenchError(f"--queue redis needs the client of Redis: {install_command('taskiq')}") from None
    receiver = Receiver(QUEUE, _queue_variables(BACKEND="taskiq", BROKER_URL=url))
    stopped = threading.Event()
    try:
        client = redis.Redis.from_url(url)
    except ValueError as error:
        raise OptionError(f"--queue {url!r}: {error}; give the URL of a Redis, as redis://127.0.0.1:6379") from error
    with client:
        try:
            info: Any = client.xinfo_stream(STREAM) if client.exists(STREAM) else {"last-generated-id": "0-0"}
        except redis.RedisError as error:
            raise BenchError(f"--queue {url}: {error}; start that Redis, or give the URL of one that runs") from error
        thread = threading.Thread(
            target=_read_stream, args=(client, info["last-generated-id"], receiver, stopped), daemon=True
        )
        thread.start()
        try:
            yield receiver
        finally:
            stopped.set()
            thread.join()


def _read_stream(client: Any, last_id: Any, receiver: Receiver, stopped: threading.Event) -> None:
    with suppress(OSError):
        while not stopped.is_set():
            for _, entries in client.xread({STREAM: last_id}, count=5000, block=100):
                now_s = time.perf_counter()
                last_id = entries[-1][0]
                for _, fields in entries:
                    if match := _JOB_ID.search(fields[b"data"]):
                        receiver.arrivals.append((match[1], now_s))


@contextmanager
def receiving(queue: str) -> Iterator[Receiver]:
    """The receiver that ``--queue`` names: ``webhook``, ``redis`` (a server of its own), or the URL of a Redis."""
    if queue == "webhook":
        with webhook_receiver() as receiver:
            yield receiver
    elif queue == "redis":
        from modalkit.benchmarks.redis_server import RedisServer

        try:
            server = RedisServer()
            server.start()
        except FileNotFoundError as error:
            raise BenchError(f"--queue redis: {error}; or give the URL of a Redis that runs") from error
        with server, redis_receiver(server.url) as receiver:
            yield receiver
    elif queue.startswith(("redis://", "rediss://", "unix://")):
        with redis_receiver(queue) as receiver:
            yield receiver
    else:
        raise OptionError(f"--queue {queue!r}: give webhook, redis, or the URL of a Redis server")


def _queue_variables(**settings: str) -> dict[str, str]:
    return {f"MODALKIT_APP_SETTINGS__QUEUE_CONFIG__{name}": value for name, value in settings.items()}
