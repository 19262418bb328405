"""Single requests beside a backlog of jobs, over HTTP, with the bundled model: how each affects the other.

Run it with ``python -m modalkit.benchmarks.mixed_load``; ``--help`` lists the options. Each rate is measured without
jobs, and then beside a backlog in turn with jobs alone, in short rounds. The server is a separate process; the clients
run in this one. HTTP and the clients use the same cores as the model: ``--bound`` also measures jobs beside requests to
a model that does nothing.
"""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from modalkit.benchmarks.texts import CORPUS, TextsOption, read_texts

from modalkit.benchmarks.jobs import metric, rate, serving
from modalkit.benchmarks.load import Endpoint, Load, run_load

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


def latencies_s(url: str, texts: list[str], per_second: float, duration_s: float, query: str = "") -> list[float]:
    """The latencies of requests at random times (a Poisson process). Raises `RuntimeError` where one fails."""
    load = Load(rate_per_s=per_second, seconds=duration_s, warm_up_s=0, processes=1)
    found = run_load(Endpoint(f"{url}/sync/predict{query}"), [{"text": text} for text in texts], load)
    if found.errors:
        raise RuntimeError(f"the server answered {dict(found.errors)}")
    latencies: list[float] = found.latencies_s.tolist()
    return latencies


def p99_s(latencies: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(latencies, n=100)[98]


@contextmanager
def jobs_per_s(url: str) -> Iterator[list[float]]:
    """Put the jobs that ended per second, while the block ran, into a list."""
    found: list[float] = []
    before, started_s = metric(url, SUCCEEDED), time.perf_counter()
    yield found
    found.append((metric(url, SUCCEEDED) - before) / (time.perf_counter() - started_s))


def main(
    rates: Annotated[str, typer.Option(help="Single requests per second.")] = "20,60,100",
    jobs: Annotated[int, typer.Option(help="Jobs that wait.")] = 150_000,
    seconds: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Measurements of each kind, in turn, for each rate.")] = 5,
    bound: Annotated[bool, typer.Option(help="Also measure jobs beside requests that do nothing.")] = False,
    texts: TextsOption = CORPUS,
) -> None:
    """Print p99 with and without jobs, and the throughput of both beside that of jobs alone."""
    chosen = read_texts(texts, 4000)
    wanted = [float(part) for part in rates.split(",")]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), CONFIGURATION) as url:
        latencies_s(url, chosen, 50, 5)
        without_s = {rate_: p99_s(latencies_s(url, chosen, rate_, rounds * seconds)) for rate_ in wanted}
        chance = random.Random(2)  # noqa: S311
        bodies = [
            json.dumps([{"message": {"text": chance.choice(chosen)}} for _ in range(LIST_LENGTH)]).encode()
            for _ in range(jobs // LIST_LENGTH)
        ]
        rate(f"{url}/async/predict", bodies, 1, jobs)
        time.sleep(10)  # meanwhile the planner learns how short bulk batches should be
        for per_second in wanted:
            measured = Mix(url, chosen, per_second, seconds)
            for _ in range(rounds):
                measured.measure(bound=bound)
            measured.print(without_s[per_second])


class Mix:
    """Jobs with and without single requests at one rate, measured in turn."""

    def __init__(self, url: str, texts: list[str], per_second: float, seconds: float) -> None:
        self._url = url
        self._texts = texts
        self._per_second = per_second
        self._seconds = seconds
        self._latencies_s: list[float] = []
        self._alone = [self._jobs_alone()]
        self._both: list[float] = []
        self._beside_nothing: list[float] = []

    def measure(self, *, bound: bool) -> None:
        """Measure jobs beside requests, and then jobs alone."""
        with jobs_per_s(self._url) as beside:
            latencies = latencies_s(self._url, self._texts, self._per_second, self._seconds)
        self._latencies_s += latencies
        self._both.append(beside[0] + len(latencies) / self._seconds)
        if bound:
            with jobs_per_s(self._url) as beside:
                latencies_s(self._url, self._texts, self._per_second, self._seconds, NOTHING)
            self._beside_nothing.append(beside[0])
        self._alone.append(self._jobs_alone())

    def print(self, without_s: float) -> None:
        """Print the 99th percentile of all latencies, and the median of the rounds' own ratios."""
        found_s = p99_s(self._latencies_s)
        # Each is compared with jobs alone just before and just after.
        alone = [(before + after) / 2 for before, after in pairwise(self._alone)]
        shares = [both / jobs for both, jobs in zip(self._both, alone, strict=True)]
        print(
            f"{self._per_second:g}/s: p99 {found_s * 1000:.0f} ms over jobs, {without_s * 1000:.0f} ms without: "
            f"{found_s / without_s:.2f} x; jobs alone {statistics.median(alone):.0f}/s, both "
            f"{statistics.median(self._both):.0f}/s: {statistics.median(shares):.2f} x "
            f"({min(shares):.2f} .. {max(shares):.2f})",
            flush=True,
        )
        if self._beside_nothing:
            bounds = [nothing / jobs for nothing, jobs in zip(self._beside_nothing, alone, strict=True)]
            print(f"  jobs beside requests that do nothing: {statistics.median(bounds):.2f} x", flush=True)

    def _jobs_alone(self) -> float:
        with jobs_per_s(self._url) as found:
            time.sleep(self._seconds)
        return found[0]


if __name__ == "__main__":
    typer.run(main)
