"""Keeps a real service busy, breaks something every minute, and counts errors by cause, memory and jobs.

``python -m tests.faults.saturation`` runs it for 20 minutes, ``make soak`` for 3, with a fault more often. It ends with
an error for an answer that nothing explains, for an accepted job that is lost, and for memory that grows: at the end
more than 1.1 times what it was after five minutes.
"""

import argparse
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import redis.asyncio

from modalkit.benchmarks.redis_server import RedisServer
from tests.support.fault_pipelines import HANG_S, HANGING
from tests.support.http_client import NO_TLS
from tests.support.killed_server import KilledServer
from tests.support.length_model import POISON

CONFIGURATION = """
app_settings:
  async_config: {{store_path: jobs.db, result_ttl: 60}}
  auth_config:
    keys:
      traffic: {{api_key: traffic}}
      faults: {{api_key: faults}}
      greedy: {{api_key: greedy, max_requests_per_second: 20}}
      operator: {{api_key: operator, scopes: [admin]}}
  batch_config:
    {{max_batch_size: 16, max_queue_size: 120, batch_timeout_seconds: 2, calibration: {{enabled: false}}}}
  queue_config: {{backend: taskiq, broker_url: "{redis_url}"}}
model_settings:
  model_entries:
    lengths: {{pipeline: "tests.support.fault_pipelines:Faulty"}}
"""
SINGLES, LISTS, STREAMS, SUBMITTERS = 24, 2, 1, 2
"""How many clients send single items, lists of items, streams of items and lists of jobs, each without a pause."""
MAX_PENDING_JOBS = 500
"""Jobs without a message above which no more are submitted: otherwise, jobs would only gather."""
BASE_S = 300.0
"""Seconds after which memory counts as that of a service that has warmed up; half of a shorter run."""
MAX_GROWTH = 1.1
MIN_FAULTS = 10
"""Faults of a run; of one that is longer than as many minutes, one a minute."""
DELIVERY_TIMEOUT_S = 120.0

EXPECTED = {
    "traffic": {"200", "202", "success", "429 queue-full"},
    "poisoned": {"500 pipeline-error", "ValueError: this batch is poisoned", "202", "429 queue-full"},
    "hanging": {"504 batch-timeout", "202", "429 queue-full"},
    "reload": {"200"},
    "greedy": {"200", "429 too-many-requests", "429 queue-full"},
    "wrong key": {"401 unauthorized", "429 too-many-requests"},
}
"""The causes that are right for each kind of request."""


@dataclass
class Report:
    """What became of the requests and jobs of a run."""

    causes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Answers, of lists and streams those to each item, by the kind of the request and the cause."""
    accepted: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    """Accepted jobs that are to fail."""
    messages: Counter[str] = field(default_factory=Counter)
    """How many messages came for each job."""
    succeeded: set[str] = field(default_factory=set)
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, and MiB resident then."""
    slowest_s: float = 0.0
    """The slowest single request since it was last told."""

    @property
    def unexpected(self) -> list[tuple[str, str]]:
        """Causes that nothing explains."""
        return [(kind, cause) for kind, cause in self.causes if cause not in EXPECTED[kind]]

    @property
    def lost(self) -> int:
        """Accepted jobs without a message."""
        return len(self.accepted - self.messages.keys())

    @property
    def duplicated(self) -> int:
        """Accepted jobs with more messages than one."""
        return sum(self.messages[job_id] > 1 for job_id in self.accepted)

    @property
    def wrongly_ended(self) -> int:
        """Jobs that failed and should not have, or the opposite."""
        return len((self.accepted - self.failing) ^ (self.succeeded & self.accepted))

    @property
    def growth(self) -> float:
        """Memory at the end as a multiple of that of the warm service."""
        base_s = min(BASE_S, self.memory[-1][0] / 2)
        return self.memory[-1][1] / next(mib for at_s, mib in self.memory if at_s >= base_s)

    @property
    def is_good(self) -> bool:
        """Whether all was as promised."""
        return not (self.unexpected or self.lost or self.wrongly_ended) and self.growth <= MAX_GROWTH

    def __str__(self) -> str:
        causes = "\n".join(
            f"  {kind}: {cause}: {count}{'' if cause in EXPECTED[kind] else '  UNEXPECTED'}"
            for (kind, cause), count in sorted(self.causes.items())
        )
        return (
            f"answers by cause:\n{causes}\n"
            f"jobs: {len(self.accepted)} accepted, {len(self.accepted & self.messages.keys())} delivered, "
            f"{self.lost} lost, {self.duplicated} delivered twice, {self.wrongly_ended} ended wrongly; "
            f"{len(self.failing)} of them were to fail\n"
            f"memory: {self.growth:.2f} times that of the warm service at the end"
        )


class Run:
    """One run: clients that never pause, a fault now and then, and a reader of the queues."""

    def __init__(self, server: KilledServer, broker: RedisServer, seed: int) -> None:
        self.report = Report()
        self._server = server
        self._broker = broker
        self._chance = random.Random(seed)
        self._started_s = time.perf_counter()
        self._told = Counter[str]()
        self._is_over = False

    async def go(self, minutes: float) -> Report:
        """Run for so many minutes, wait until every accepted job has its message, and count."""
        fault_every_s = min(60.0, minutes * 60 / MIN_FAULTS)
        faults = [self._drop_connections, self._poison, self._hang, self._reload, self._be_greedy]
        sys.stdout.write("  time  fault                answered  refused  jobs taken  delivered  slowest  resident\n")
        async with anyio.create_task_group() as readers:
            readers.start_soon(self._read_messages)
            async with anyio.create_task_group() as clients:
                ways = {self._single: SINGLES, self._list: LISTS, self._stream: STREAMS, self._jobs: SUBMITTERS}
                for send, count in ways.items():
                    for _ in range(count):
                        clients.start_soon(self._repeat, send)
                number = 0
                while self._now_s() < minutes * 60 - 1:
                    fault = faults[number % len(faults)]
                    with anyio.move_on_after(fault_every_s, shield=True):
                        await fault()
                        await anyio.sleep_forever()
                    await self._tell(fault.__name__.strip("_").replace("_", " "))
                    number += 1
                self._is_over = True
            with anyio.move_on_after(DELIVERY_TIMEOUT_S):
                while self.report.lost:
                    await anyio.sleep(0.1)
            await anyio.sleep(1)  # for messages that come twice
            await self._tell("the end")
            readers.cancel_scope.cancel()
        return self.report

    def _now_s(self) -> float:
        return time.perf_counter() - self._started_s

    def _client(self, key: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self._server.url, timeout=60, headers=headers, verify=NO_TLS)

    async def _ask(self, kind: str, client: httpx.AsyncClient, path: str, **request: Any) -> httpx.Response | None:
        """The answer to a POST request, counted by its cause unless its slots are; None for one that failed."""
        try:
            answer = await client.post(path, **request)
        except httpx.HTTPError as error:
            self.report.causes[kind, type(error).__name__] += 1
            return None
        if answer.is_success:
            if "json" not in request or not isinstance(request["json"], list) or path == "/async/predict":
                self.report.causes[kind, str(answer.status_code)] += 1
            return answer
        problem = answer.json()["type"].rpartition(":")[2]
        self.report.causes[kind, f"{answer.status_code} {problem}"] += 1
        await anyio.sleep(0.1)
        return None

    # Traffic.

    def _text(self) -> str:
        return "x" * min(1000, 1 + int(self._chance.expovariate(1 / 60)))

    async def _repeat(self, send: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        async with self._client("traffic") as client:
            while not self._is_over:
                await send(client)

    async def _single(self, client: httpx.AsyncClient) -> None:
        began_s = time.perf_counter()
        await self._ask("traffic", client, "/sync/predict", json={"text": self._text()})
        self.report.slowest_s = max(self.report.slowest_s, time.perf_counter() - began_s)

    async def _list(self, client: httpx.AsyncClient, kind: str = "traffic", poisoned: int = 0) -> None:
        texts = [self._text() for _ in range(20 - poisoned)] + [POISON] * poisoned
        self._chance.shuffle(texts)
        answer = await self._ask(kind, client, "/batch/predict", json=[{"text": text} for text in texts])
        if answer is not None:
            self._count_slots(kind, texts, answer.json())

    async def _stream(self, client: httpx.AsyncClient) -> None:
        texts = [self._text() for _ in range(200)]
        body = "\n".join(json.dumps({"text": text}) for text in texts)
        answer = await self._ask(
            "traffic", client, "/batch/predict", content=body, headers={"Content-Type": "application/x-ndjson"}
        )
        if answer is not None:
            self._count_slots("traffic", texts, [json.loads(line) for line in answer.text.splitlines()])

    def _count_slots(self, kind: str, texts: list[str], slots: list[dict[str, Any]]) -> None:
        """Count the answers to items: those that are poisoned as `kind`, all others as traffic."""
        if len(slots) != len(texts):
            self.report.causes["traffic", f"{len(slots)} answers to {len(texts)} items"] += 1
            return
        for place, slot in enumerate(slots):
            which = kind if texts[slot.get("index", place)] == POISON else "traffic"
            self.report.causes[which, slot["error"] if slot["status"] == "error" else slot["status"]] += 1

    async def _jobs(self, client: httpx.AsyncClient) -> None:
        if self.report.lost > MAX_PENDING_JOBS:
            await anyio.sleep(0.1)
        else:
            await self._submit("traffic", client, [self._text() for _ in range(20)])

    async def _submit(self, kind: str, client: httpx.AsyncClient, texts: list[str]) -> None:
        jobs = [{"message": {"text": text}, "success_queue": "good", "failure_queue": "bad"} for text in texts]
        answer = await self._ask(kind, client, "/async/predict", json=jobs)
        if answer is not None:
            ids = [slot["job_id"] for slot in answer.json()]
            self.report.accepted.update(ids)
            self.report.failing.update(ids if kind != "traffic" else ())

    async def _read_messages(self) -> None:
        last: dict[Any, Any] = {"modalkit:good": "0", "modalkit:bad": "0"}
        async with redis.asyncio.Redis.from_url(self._broker.url) as client:
            while True:
                found: Any = await client.xread(last, block=1000)
                for stream, entries in found:
                    for entry_id, entry in entries:
                        message = json.loads(json.loads(entry[b"data"])["args"][0])
                        self.report.messages[message["job_id"]] += 1
                        if message["status"] == "success":
                            self.report.succeeded.add(message["job_id"])
                        last[stream.decode()] = entry_id
                    await client.xdel(stream, *(entry_id for entry_id, _ in entries))

    # Faults.

    async def _drop_connections(self) -> None:
        """Storms of clients that reset their connections in the middle of a body, or before the answer."""
        item = {"text": "x" * 900}
        bodies = {
            "/sync/predict": json.dumps(item),
            "/batch/predict": json.dumps([item]),
            "/async/predict": json.dumps([{"message": item, "success_queue": "dropped"}]),
        }
        requests = [
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer faults\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
            for path, body in bodies.items()
        ]

        def storm() -> None:
            connections = [socket.create_connection(("127.0.0.1", self._server.port)) for _ in range(100)]
            for connection in connections:
                request = self._chance.choice(requests).encode()
                connection.sendall(request[: self._chance.choice([10, 500, len(request)])])
            for connection in connections:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

        for _ in range(10):
            await anyio.to_thread.run_sync(storm)
            await anyio.sleep(0.2)

    async def _poison(self) -> None:
        """Items that make their batches fail: alone, among good ones, and as jobs."""
        async with self._client("faults") as client:
            for share in (1, 5, 19):
                for _ in range(5):
                    await self._ask("poisoned", client, "/sync/predict", json={"text": POISON})
                    await self._list(client, "poisoned", share)
                await self._submit("poisoned", client, [POISON] * 5)

    async def _hang(self) -> None:
        """An item on which the pipeline hangs for longer than the batch timeout, and later a job of this kind."""
        async with self._client("faults") as client:
            await self._ask("hanging", client, "/sync/predict", json={"text": HANGING})
            await anyio.sleep(HANG_S + 2)  # three calls that hang at once would restart the pipeline
            await self._submit("hanging", client, [HANGING])

    async def _reload(self) -> None:
        async with self._client("operator") as client:
            for _ in range(5):
                await self._ask("reload", client, "/admin/models/lengths/reload")

    async def _be_greedy(self) -> None:
        """A key far beyond its rate, and as many wrong keys."""
        ends_s = time.perf_counter() + 5

        async def ask(kind: str, key: str) -> None:
            async with self._client(key) as client:
                while time.perf_counter() < ends_s:
                    await self._ask(kind, client, "/sync/predict", json={"text": self._text()})

        async with anyio.create_task_group() as task_group:
            for _ in range(10):
                task_group.start_soon(ask, "greedy", "greedy")
                task_group.start_soon(ask, "wrong key", "guessed")

    # What is told.

    async def _tell(self, fault: str) -> None:
        async with self._client("operator") as client:
            metrics = (await client.get("/metrics")).text
        resident = next(line for line in metrics.splitlines() if line.startswith("process_resident_memory_bytes "))
        self.report.memory.append((self._now_s(), float(resident.split()[1]) / 2**20))
        totals = Counter(
            answered=sum(count for (_, cause), count in self.report.causes.items() if cause in ("200", "success")),
            refused=sum(count for (_, cause), count in self.report.causes.items() if cause.startswith("429")),
            accepted=len(self.report.accepted),
            delivered=len(self.report.messages),
        )
        now = totals - self._told
        sys.stdout.write(
            f"{self._now_s():5.0f}s  {fault:18} {now['answered']:10} {now['refused']:8} {now['accepted']:11} "
            f"{now['delivered']:10} {self.report.slowest_s:7.2f}s {self.report.memory[-1][1]:5.0f} MiB\n"
        )
        sys.stdout.flush()
        self._told, self.report.slowest_s = totals, 0.0


def saturate(folder: Path, *, minutes: float, seed: int) -> Report:
    """Run once, with a store in `folder`."""
    with RedisServer() as broker:
        (folder / "modalkit.yaml").write_text(CONFIGURATION.format(redis_url=broker.url))
        with KilledServer(folder) as server:
            return anyio.run(Run(server, broker, seed).go, minutes)


def main() -> None:
    """Run as the options say, and tell what became of all requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report = saturate(Path(folder), **vars(options))
    sys.stdout.write(f"seed {options.seed}\n{report}\n")
    if not report.is_good:
        sys.exit(1)


if __name__ == "__main__":
    main()
