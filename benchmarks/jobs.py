"""What requests and durable jobs cost, next to a FastAPI service that does nothing, and to one that sends TaskIQ tasks.

Run it with ``python -m modalkit.benchmarks.jobs``; ``--only`` chooses parts. The services are processes of their own
with a pipeline that does nothing, a SQLite store with full synchronisation, and a Redis server of their own.
"""

import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from modalkit.benchmarks.bench.targets import SERVE, is_serving, process
from modalkit.benchmarks.load import Endpoint, Load, Measured
from modalkit.benchmarks.load.client import HttpTarget, direct_client
from modalkit.benchmarks.load.endpoint import LINES
from modalkit.benchmarks.load.processes import run_target
from modalkit.benchmarks.measurement import Figure
from modalkit.benchmarks.redis_server import RedisServer
from modalkit.pipelines.extras import install_command

TEXT = "The room was clean and the staff could not have been kinder to us."
ITEM = json.dumps({"text": TEXT}).encode()
JOB = json.dumps(
    {
        "message": {"text": TEXT},
        "success_queue": "results",
        "failure_queue": "errors",
        "meta": {"user_id": "12345", "request_id": "req_001"},
    }
).encode()
CONFIGURATION = """
app_settings:
  async_config: {{store_path: jobs.db}}
  queue_config: {{backend: {backend}, broker_url: "{redis_url}"}}
model_settings:
  model_entries:
    nothing: {{pipeline: "modalkit.benchmarks.nothing:{pipeline}"}}
"""
BARE = [sys.executable, "-m", "uvicorn", "modalkit.benchmarks.bare_servers:app", "--no-access-log", "--port", "0"]
CLIENTS = 64
LIST_CLIENTS = 4
LISTS = {100: CLIENTS, 1000: LIST_CLIENTS}
"""The connections for lists of each length."""
STREAMS = 4


@contextmanager
def served(
    folder: Path, backend: str = "memory", redis_url: str = "redis://localhost:6379", pipeline: str = "NothingPipeline"
) -> Iterator[str]:
    """The address of ``modalkit serve`` with its store in `folder`."""
    configuration = CONFIGURATION.format(backend=backend, redis_url=redis_url, pipeline=pipeline)
    with serving(folder, configuration) as url:
        yield url


@contextmanager
def serving(folder: Path, configuration: str) -> Iterator[str]:
    """The address of ``modalkit serve`` in `folder` with this configuration."""
    (folder / "modalkit.yaml").write_text(configuration)
    with _process(SERVE, is_serving, folder) as url:
        yield url


@contextmanager
def bare(**variables: str) -> Iterator[str]:
    """The address of the service that stores nothing; it sends tasks with the variable ``BENCHMARK_REDIS_URL``."""
    with _process(BARE, re.compile("running on").search, None, **variables) as url:
        yield url


@contextmanager
def _process(
    command: list[str], is_ready: Callable[[str], object], folder: Path | None, **variables: str
) -> Iterator[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    with process(
        command, environment, is_ready, folder, stop_s=0
    ) as server:  # gently, it would finish what was accepted
        yield server.url


def metric(url: str, name: str) -> float:
    """A number that the service tells Prometheus."""
    with direct_client() as client:
        lines = client.get(f"{url}/metrics").raise_for_status().text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])


def rate(url: str, bodies: list[bytes], clients: int, jobs: int) -> float:
    """Jobs or items accepted per second."""
    return jobs / _sent(Endpoint(url), bodies, clients).elapsed_s


def read_rate(url: str, job_id: str, clients: int, reads: int) -> float:
    """Answers per second to requests for a job."""
    request = f"GET /jobs/{job_id} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n".encode()
    return reads / _answered(HttpTarget(url=url, requests=[request], timeout_s=600), clients, reads).elapsed_s


def _sent(endpoint: Endpoint, bodies: list[bytes], clients: int) -> Measured:
    """Send each body once. Raises `RuntimeError` where one is refused."""
    target = HttpTarget(
        url=endpoint.url,
        requests=[endpoint.request(body) for body in dict.fromkeys(bodies)],
        list_length=endpoint.list_length,
        error_mark=endpoint.error_mark,
        timeout_s=600,
    )
    return _answered(target, clients, len(bodies))


def _answered(target: HttpTarget, clients: int, requests: int) -> Measured:
    """Send so many requests. Raises `RuntimeError` where one is refused."""
    sent = run_target(target, Load(clients=clients, requests=requests, processes=1, timeout_s=600))
    if sent.errors:
        raise RuntimeError(f"{target.url} answered {dict(sent.errors)}")
    return sent


def lists(jobs: int, length: int = 1000) -> list[bytes]:
    """The bodies of requests that submit so many jobs as lists."""
    return [b"[" + b",".join([JOB] * length) + b"]"] * (jobs // length)


def wait_until(reached: Callable[[], bool], timeout_s: float = 300.0) -> None:
    """Ask again and again."""
    deadline_s = time.perf_counter() + timeout_s
    while not reached():
        if time.perf_counter() > deadline_s:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.02)


def told(name: str, ratios: Sequence[float]) -> str:
    """A line with the median and the range of a ratio."""
    return f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"


class HttpStudy:
    """Single requests to a pipeline that does nothing, beside a route that validates and answers with its models."""

    name = "http"

    def __init__(self, items: int = 12_000) -> None:
        self._bodies = [ITEM] * items
        self._rates: list[tuple[float, float]] = []

    def warm_up(self) -> None:
        """Nothing: the servers start with each round."""

    def run_round(self) -> None:
        """Measure both, on servers of their own."""
        with tempfile.TemporaryDirectory() as folder, bare() as plain, served(Path(folder)) as url:
            urls = [f"{url}/sync/predict", f"{plain}/echo"]
            for each in urls:
                rate(each, self._bodies[: len(self._bodies) // 10], CLIENTS, 1)
            ours, reference = (rate(each, self._bodies, CLIENTS, len(self._bodies)) for each in urls)
        self._rates.append((ours, reference))

    def figures(self) -> list[Figure]:
        """Rates and their ratio."""
        ours, reference = zip(*self._rates, strict=True)
        ratios = tuple(mine / other for mine, other in self._rates)
        return [
            Figure(name=f"requests to a pipeline that does nothing, {CLIENTS} clients", rounds=ours, unit="requests/s"),
            Figure(name="requests to a bare FastAPI route", rounds=reference, unit="requests/s"),
            Figure(name="our requests / those of the bare route", rounds=ratios, at_least=1.5),
        ]


def singles(rounds: int, jobs: int) -> None:
    """Single durable submissions, next to a route that validates the same model and stores nothing."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder, bare() as plain, served(Path(folder)) as url:
        for _ in range(rounds):
            reference = rate(f"{plain}/validate", [JOB] * jobs, CLIENTS, jobs)
            ours = rate(f"{url}/async/predict", [JOB] * jobs, CLIENTS, jobs)
            ratios.append(ours / reference)
            print(f"  bare {reference:.0f}/s, durable {ours:.0f}/s")
    print(told(f"single submissions, {CLIENTS} clients, beside a route that stores nothing", ratios))


def reads(rounds: int, count: int) -> None:
    """A job that has ended, which is asked for by its id, next to a route that validates and answers."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder, bare() as plain, served(Path(folder)) as url:
        with direct_client(base_url=url, timeout=90) as client:
            job_id = client.post("/async/predict", content=JOB).raise_for_status().json()["job_id"]
            client.get(f"/jobs/{job_id}", params={"wait": 60}).raise_for_status()
        for _ in range(rounds):
            reference = rate(f"{plain}/echo", [ITEM] * count, CLIENTS, count)
            ours = read_rate(url, job_id, CLIENTS, count)
            ratios.append(ours / reference)
            print(f"  bare {reference:.0f}/s, reads {ours:.0f}/s")
    print(told(f"reads of a job that has ended, {CLIENTS} clients, beside a route that validates and answers", ratios))


def many(rounds: int, jobs: int) -> None:
    """Durable submissions as lists."""
    for length, clients in LISTS.items():
        with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as url:
            rates = [rate(f"{url}/async/predict", lists(jobs, length), clients, jobs) for _ in range(rounds)]
        median, spread = statistics.median(rates), f"{min(rates):.0f} .. {max(rates):.0f}"
        print(f"lists of {length}, {clients} clients: {median:.0f} jobs/s ({spread})")


def streams(rounds: int, items: int) -> None:
    """Items in a stream (NDJSON) to a pipeline that does nothing, alone and beside others."""
    line = ITEM + b"\n"
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as url:
        for count in (1, STREAMS):
            endpoint = Endpoint(
                f"{url}/batch/predict",
                list_length=items // count,
                content_type=LINES,
                error_mark=b'"status":"error"',
            )
            sent = [_sent(endpoint, [line * (items // count)] * count, count) for _ in range(rounds)]
            rates = [found.answered / found.elapsed_s for found in sent]
            print(f"{count} streams: {statistics.median(rates):.0f} items/s ({min(rates):.0f} .. {max(rates):.0f})")


def through_redis(rounds: int, jobs: int) -> None:
    """From acceptance to the message in a Redis stream, next to a task for each item from its route."""
    try:
        import redis
    except ImportError:
        raise typer.BadParameter(f"redis needs the client of Redis: {install_command('taskiq')}") from None
    ratios = []
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer() as broker,
        redis.Redis.from_url(broker.url) as client,
        bare(BENCHMARK_REDIS_URL=broker.url) as plain,
        served(Path(folder), "taskiq", broker.url) as url,
    ):
        for _ in range(rounds):
            reference = rate(f"{plain}/send", [JOB] * (jobs // 10), CLIENTS, jobs // 10)
            client.flushall()
            started_s = time.perf_counter()
            rate(f"{url}/async/predict", lists(jobs), LIST_CLIENTS, jobs)
            wait_until(lambda: client.xlen("modalkit:results") >= jobs)
            ours = jobs / (time.perf_counter() - started_s)
            wait_until(lambda: metric(url, 'modalkit_deliveries{delivery="pending"}') == 0)
            ratios.append(ours / reference)
            print(f"  .kiq() for each item {reference:.0f}/s, accepted to delivered {ours:.0f}/s")
    print(told("accepted to delivered through Redis, beside .kiq() for each item", ratios))


def backlog(jobs: int) -> None:
    """A million jobs that wait: memory, and the first result after a restart."""
    with tempfile.TemporaryDirectory() as folder:
        with served(Path(folder), pipeline="NeverPipeline") as url:
            before = metric(url, "process_resident_memory_bytes")
            for part in range(10):
                rate(f"{url}/async/predict", lists(jobs // 10), LIST_CLIENTS, jobs // 10)
                grown = (metric(url, "process_resident_memory_bytes") - before) / 2**20
                print(f"  {(part + 1) * jobs // 10} queued: {before / 2**20:.0f} MiB + {grown:.0f} MiB")
        started_s = time.perf_counter()
        with served(Path(folder)) as url:
            wait_until(lambda: metric(url, 'modalkit_jobs{status="succeeded"}') > 0)
            first_s = time.perf_counter() - started_s
            resident = metric(url, "process_resident_memory_bytes") / 2**20
            queued = metric(url, 'modalkit_jobs{status="queued"}')
    print(f"{jobs} queued jobs, killed and started again: the first result after {first_s:.1f} s, start of the process")
    print(f"included, with {queued:.0f} still queued and {resident:.0f} MiB resident")


def main(
    only: Annotated[str | None, typer.Option(help="single, reads, lists, streams, redis or backlog.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each pair is measured, in turns.")] = 5,
) -> None:
    """Print what requests and durable jobs cost."""
    parts: dict[str, Callable[[], None]] = {
        "single": lambda: singles(rounds, 6000),
        "reads": lambda: reads(rounds, 12_000),
        "lists": lambda: many(rounds, 40_000),
        "streams": lambda: streams(rounds, 100_000),
        "redis": lambda: through_redis(rounds, 40_000),
        "backlog": lambda: backlog(1_000_000),
    }
    if only is not None and only not in parts:
        raise typer.BadParameter(f"{only!r} is none of {', '.join(parts)}", param_hint="--only")
    for name, part in parts.items():
        if only in (None, name):
            part()


if __name__ == "__main__":
    typer.run(main)
