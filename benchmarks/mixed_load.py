"""Single requests beside a backlog of jobs, over HTTP, with the bundled model: how each affects the other.

Run it with ``python -m modalkit.benchmarks.mixed_load``; ``--help`` lists the options. Each rate is measured without
jobs and beside a backlog, in turn with jobs alone. The server is a separate process; the clients run in this one. HTTP
and the clients use the same cores as the model. So each rate is also measured with a model that does nothing: the jobs
that end meanwhile are an upper bound for any scheduler.
"""

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
import uvloop

from modalkit.benchmarks.jobs import metric, rate, serving
from modalkit.benchmarks.texts import CORPUS, TextsOption, read_texts

CONFIGURATION = """
app_settings:
  async_config: {store_path: jobs.db}
  queue_config: {backend: none}
model_settings:
  model_entries:
    sentiment: {pipeline: "modalkit.pipelines.sentiment:SentimentPipeline", model_path: bundled}
    nothing: {pipeline: "modalkit.benchmarks.nothing:NothingPipeline"}
"""
NOTHING = "?model_name=nothing"
LIST_LENGTH = 1000
SUCCEEDED = 'modalkit_jobs{status="succeeded"}'


class Caller:
    """Sends single requests over kept connections at given times, without waiting for earlier ones."""

    def __init__(self, url: str, query: str = "") -> None:
        parts = urlsplit(url)
        self._head = (
            f"POST /sync/predict{query} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        ).encode()
        self._address = parts.hostname or "", parts.port or 80
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.latencies_s: list[float] = []

    async def send_all(self, texts: list[str], per_second: float, duration_s: float) -> None:
        """Send texts at random times (a Poisson process) for `duration_s` seconds, and wait for all answers."""
        chance, due_s, sent = random.Random(1), 0.0, []  # noqa: S311  # a repeatable load
        started_s = time.perf_counter()
        while (due_s := due_s + chance.expovariate(per_second)) < duration_s:
            await asyncio.sleep(max(0.0, started_s + due_s - time.perf_counter()))
            sent.append(asyncio.create_task(self._send(chance.choice(texts), started_s + due_s)))
        await asyncio.gather(*sent)

    async def _send(self, text: str, due_s: float) -> None:
        while self._idle and self._idle[-1][0].at_eof():
            self._idle.pop()  # the server closes connections that were idle for some seconds
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        body = json.dumps({"text": text}).encode()
        writer.write(self._head + b"%d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {head!r}")
        self.latencies_s.append(time.perf_counter() - due_s)
        self._idle.append((reader, writer))


def p99_s(url: str, texts: list[str], per_second: float, duration_s: float, query: str = "") -> tuple[float, int]:
    """The 99th percentile of the latencies of such requests, and the number of requests."""
    caller = Caller(url, query)
    uvloop.run(caller.send_all(texts, per_second, duration_s))
    return statistics.quantiles(caller.latencies_s, n=100)[98], len(caller.latencies_s)


@contextmanager
def jobs_per_s(url: str) -> Iterator[list[float]]:
    """Put the jobs that ended per second, while the block ran, into a list."""
    found: list[float] = []
    before, started_s = metric(url, SUCCEEDED), time.perf_counter()
    yield found
    found.append((metric(url, SUCCEEDED) - before) / (time.perf_counter() - started_s))


def main(
    rates: Annotated[str, typer.Option(help="Single requests per second.")] = "20,60,100",
    jobs: Annotated[int, typer.Option(help="Jobs that wait.")] = 60_000,
    seconds: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 20.0,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 1,
    texts: TextsOption = CORPUS,
) -> None:
    """Print p99 with and without jobs, and the throughput of both beside that of jobs alone."""
    chosen = read_texts(texts, 4000)
    wanted = [float(part) for part in rates.split(",")]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), CONFIGURATION) as url:
        p99_s(url, chosen, 50, 5)
        alone = {per_second: p99_s(url, chosen, per_second, seconds)[0] for per_second in wanted}
        chance = random.Random(2)  # noqa: S311
        bodies = [
            json.dumps([{"message": {"text": chance.choice(chosen)}} for _ in range(LIST_LENGTH)]).encode()
            for _ in range(jobs // LIST_LENGTH)
        ]
        rate(f"{url}/async/predict", bodies, 1, jobs)
        time.sleep(10)  # meanwhile the planner learns how short bulk batches should be
        for _ in range(rounds):
            for per_second in wanted:
                with jobs_per_s(url) as alone_before:
                    time.sleep(seconds)
                with jobs_per_s(url) as beside:
                    found_s, answered = p99_s(url, chosen, per_second, seconds)
                with jobs_per_s(url) as beside_nothing:
                    p99_s(url, chosen, per_second, seconds, NOTHING)
                with jobs_per_s(url) as alone_after:
                    time.sleep(seconds)
                both = beside[0] + answered / seconds
                only_jobs = (alone_before[0] + alone_after[0]) / 2
                print(
                    f"{per_second:g}/s: p99 {found_s * 1000:.0f} ms over jobs, {alone[per_second] * 1000:.0f} ms "
                    f"without: {found_s / alone[per_second]:.2f} x; both {both:.0f}/s, jobs alone {only_jobs:.0f}/s: "
                    f"{both / only_jobs:.2f} x; jobs beside requests that do nothing {beside_nothing[0]:.0f}/s: "
                    f"{both / beside_nothing[0]:.2f} x",
                    flush=True,
                )


if __name__ == "__main__":
    typer.run(main)
