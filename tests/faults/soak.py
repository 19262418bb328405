"""Kills a real service, and stops the Redis behind it, at random moments under load; counts what becomes of the jobs.

``make soak`` runs it for 10,000 jobs with 20 kills; a test runs it for a few. It ends with an error when an accepted
job is lost: when its message never comes, or it has not succeeded.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from modalkit.benchmarks.redis_server import RedisServer
from tests.support.killed_server import KilledServer

CONFIGURATION = """
app_settings:
  async_config: {{store_path: jobs.db, max_delivery_attempts: 1000}}
  batch_config: {{calibration: {{enabled: false}}}}
  queue_config: {{backend: taskiq, broker_url: "{redis_url}"}}
model_settings:
  model_entries:
    lengths: {{pipeline: "tests.support.fault_pipelines:Unhurried"}}
"""
QUEUES = ("results", "more_results")
CLIENTS = 8
TIME_LIMIT_S = 240.0


@dataclass
class Report:
    """What became of the jobs of a run."""

    accepted: dict[str, str] = field(default_factory=dict)
    """The id that each key's request was answered with."""
    changed_ids: int = 0
    """Keys that were answered with different ids: must be 0."""
    messages: Counter[str] = field(default_factory=Counter)
    """How many messages came for each job."""
    kills: int = 0
    interrupted: int = 0
    """Kills that found jobs running."""
    broker_stops: int = 0
    not_succeeded: int = 0
    seconds: float = 0.0

    @property
    def lost(self) -> int:
        """Accepted jobs without a message."""
        return sum(not self.messages[job_id] for job_id in self.accepted.values())

    @property
    def duplicated(self) -> int:
        """Accepted jobs with more messages than one."""
        return sum(self.messages[job_id] > 1 for job_id in self.accepted.values())

    def __str__(self) -> str:
        return (
            f"{len(self.accepted)} accepted, {sum(self.messages[i] > 0 for i in self.accepted.values())} delivered, "
            f"{self.duplicated} duplicated, {self.lost} lost, {self.not_succeeded} not succeeded; "
            f"{self.kills} kills of the service, {self.interrupted} of them with jobs running, "
            f"{self.broker_stops} stops of Redis, {self.seconds:.0f} s"
        )


class Run:
    """One run: clients that repeat each request until it is answered, and a task that kills processes."""

    def __init__(self, server: KilledServer, broker: RedisServer, *, jobs: int, seed: int) -> None:
        self.server = server
        self.broker = broker
        self.report = Report()
        self._chance = random.Random(seed)
        self._keys = iter([str(uuid.UUID(int=self._chance.getrandbits(128))) for _ in range(jobs)])

    async def go(self, *, kills: int, broker_stops: int) -> Report:
        """Submit all jobs while things break, wait until every result is there, and count."""
        started_s = time.perf_counter()
        with anyio.fail_after(TIME_LIMIT_S):
            async with anyio.create_task_group() as task_group:
                for _ in range(CLIENTS):
                    task_group.start_soon(self._submit_all)
                task_group.start_soon(self._break, kills, self._kill_the_service)
                task_group.start_soon(self._break, broker_stops, self._stop_the_broker)
            await self._until_all_is_delivered()
        await self._ask_for_states()
        self.report.interrupted = self.server.said.count("that were running when the last process ended")
        self.report.seconds = time.perf_counter() - started_s
        return self.report

    async def _submit_all(self) -> None:
        async with httpx.AsyncClient(base_url=self.server.url, timeout=30) as client:
            while keys := [key for _, key in zip(range(self._chance.randint(1, 40)), self._keys, strict=False)]:
                way = self._chance.choice([self._single, self._list, self._stream])
                await self._until_accepted(client, way, keys)

    async def _until_accepted(self, client: httpx.AsyncClient, way: "Way", keys: list[str]) -> None:
        """Send a request again until each of its jobs has been accepted, as a client with a key may."""
        while keys:
            try:
                async for key, job_id in way(client, keys):
                    self.report.changed_ids += self.report.accepted.setdefault(key, job_id) != job_id
            except (httpx.TransportError, json.JSONDecodeError):
                await anyio.sleep(0.05)
            keys = [key for key in keys if key not in self.report.accepted]

    async def _single(self, client: httpx.AsyncClient, keys: list[str]) -> AsyncIterator[tuple[str, str]]:
        for key in keys:
            body = self._job(key)
            del body["idempotency_key"]
            answer = await client.post("/async/predict", json=body, headers={"Idempotency-Key": key})
            if answer.status_code == 202:
                yield key, answer.json()["job_id"]

    async def _list(self, client: httpx.AsyncClient, keys: list[str]) -> AsyncIterator[tuple[str, str]]:
        answer = await client.post("/async/predict", json=[self._job(key) for key in keys])
        if answer.status_code == 202:
            for key, slot in zip(keys, answer.json(), strict=True):
                yield key, slot["job_id"]

    async def _stream(self, client: httpx.AsyncClient, keys: list[str]) -> AsyncIterator[tuple[str, str]]:
        body = "\n".join(json.dumps(self._job(key)) for key in keys)
        headers = {"Content-Type": "application/x-ndjson"}
        async with client.stream("POST", "/async/predict", content=body, headers=headers) as answer:
            if answer.status_code == 200:
                async for line in answer.aiter_lines():
                    found = json.loads(line)
                    yield keys[found["line"] - 1], found["job_id"]

    def _job(self, key: str) -> dict[str, Any]:
        queue = QUEUES[int(key[0], 16) % len(QUEUES)]
        return {"message": {"text": key}, "success_queue": queue, "failure_queue": queue, "idempotency_key": key}

    async def _break(self, times: int, what: Callable[[], None]) -> None:
        for _ in range(times):
            await anyio.sleep(self._chance.uniform(0.05, 1.0))
            await anyio.to_thread.run_sync(what)

    def _kill_the_service(self) -> None:
        self.server.kill()
        self.report.kills += 1
        self.server.start()

    def _stop_the_broker(self) -> None:
        stop = self._chance.choice([self.broker.stop, self.broker.kill])
        stop()
        self.report.broker_stops += 1
        time.sleep(self._chance.uniform(0.1, 1.0))
        self.broker.start()

    async def _until_all_is_delivered(self) -> None:
        while True:
            self.report.messages = await anyio.to_thread.run_sync(self._read_messages)
            if not self.report.lost:
                return
            await anyio.sleep(0.1)

    def _read_messages(self) -> Counter[str]:
        with redis.Redis.from_url(self.broker.url, retry=Retry(NoBackoff(), 3)) as client:
            return Counter(
                json.loads(json.loads(entry[b"data"])["args"][0])["job_id"]
                for queue in QUEUES
                for _, entry in client.xrange(f"modalkit:{queue}")
            )

    async def _ask_for_states(self) -> None:
        async with httpx.AsyncClient(base_url=self.server.url, timeout=30) as client:
            succeeded = set[str]()
            cursor: dict[str, int] = {}
            while True:
                parameters: dict[str, str | int] = {"status": "succeeded", "limit": 1000, **cursor}
                page = (await client.get("/jobs", params=parameters)).json()
                succeeded |= {job["job_id"] for job in page["jobs"]}
                if page["next_cursor"] is None:
                    break
                cursor = {"cursor": page["next_cursor"]}
        self.report.not_succeeded = len(set(self.report.accepted.values()) - succeeded)


Way = Callable[[httpx.AsyncClient, list[str]], AsyncIterator[tuple[str, str]]]


def soak(folder: Path, *, jobs: int, kills: int, broker_stops: int, seed: int) -> Report:
    """Run once, with a store in `folder`."""
    with RedisServer(append_only=True) as broker:
        (folder / "modalkit.yaml").write_text(CONFIGURATION.format(redis_url=broker.url))
        with KilledServer(folder) as server:
            run = Run(server, broker, jobs=jobs, seed=seed)

            async def go() -> Report:
                return await run.go(kills=kills, broker_stops=broker_stops)

            return anyio.run(go)


def main() -> None:
    """Run as the options say, and say what became of the jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20, help="of the service")
    parser.add_argument("--broker-stops", type=int, default=5, help="of the Redis server")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report = soak(Path(folder), **vars(options))
    sys.stdout.write(f"seed {options.seed}: {report}\n")
    if report.lost or report.changed_ids or report.not_succeeded:
        sys.exit(1)


if __name__ == "__main__":
    main()
