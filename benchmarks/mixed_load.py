"""Single requests beside a backlog of jobs, over HTTP, with the bundled model: how each affects the other.

Run it with ``python -m modalkit.benchmarks.mixed_load``; ``--help`` lists the options. Each rate is measured without
jobs, and then beside a backlog in turn with jobs alone, in short rounds. The server is a separate process, and so are
the clients, which use the same cores.
"""

import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.benchmarks.jobs import LIST_CLIENTS, metric, rate, serving, told
from modalkit.benchmarks.load import Endpoint, Load, Measured, run_load

CONFIGURATION = "app_settings: {async_config: {store_path: jobs.db}, queue_config: {backend: none}}"
LIST_LENGTH = 1000
LEARNING_S = 10
"""Seconds in which the planner learns how short bulk batches should be."""
SUCCEEDED = 'modalkit_jobs{status="succeeded"}'


def submit_backlog(url: str, jobs: int) -> None:
    """Submit so many jobs with the texts of mixed lengths."""
    texts = mixed_length_texts()
    random.Random(2).shuffle(texts)  # noqa: S311  # repeatable
    messages = [{"message": {"text": text}} for text in texts]
    bodies = [json.dumps(messages[at : at + LIST_LENGTH]).encode() for at in range(0, len(messages), LIST_LENGTH)]
    rate(f"{url}/async/predict", bodies * (jobs // len(messages)), LIST_CLIENTS, jobs)


@contextmanager
def jobs_per_s(url: str) -> Iterator[list[float]]:
    """Put the jobs that ended per second, while the block ran, into a list."""
    found: list[float] = []
    before, started_s = metric(url, SUCCEEDED), time.perf_counter()
    yield found
    found.append((metric(url, SUCCEEDED) - before) / (time.perf_counter() - started_s))


def jobs_alone(url: str, seconds: float) -> float:
    """The jobs that end per second where nothing else happens."""
    with jobs_per_s(url) as found:
        time.sleep(seconds)
    return found[0]


def requests(url: str, per_second: float, seconds: float) -> Measured:
    """Send single requests at random times (a Poisson process). Raises `RuntimeError` where one fails."""
    load = Load(rate_per_s=per_second, seconds=seconds, warm_up_s=0, processes=1)
    found = run_load(Endpoint(f"{url}/sync/predict"), [{"text": text} for text in mixed_length_texts()], load)
    if found.errors:
        raise RuntimeError(f"the server answered {dict(found.errors)}")
    return found


def beside_jobs(url: str, per_second: float, seconds: float, rounds: int) -> tuple[float, Sequence[float]]:
    """p99 of requests beside jobs, and in each round the throughput of both, beside that of jobs just before and after.

    The jobs must last for as long.
    """
    latencies_s, shares, before = [], [], jobs_alone(url, seconds)
    for _ in range(rounds):
        with jobs_per_s(url) as jobs:
            found = requests(url, per_second, seconds)
        after = jobs_alone(url, seconds)
        latencies_s.append(found.latencies_s)
        shares.append((jobs[0] + found.items_per_s) / ((before + after) / 2))
        before = after
    return float(np.quantile(np.concatenate(latencies_s), 0.99)), shares


def main(
    rates: Annotated[str, typer.Option(help="Single requests per second.")] = "20,60,100",
    jobs: Annotated[int, typer.Option(help="Jobs that wait.")] = 152_000,
    seconds: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Measurements of each kind, in turn, for each rate.")] = 5,
) -> None:
    """Print p99 with and without jobs, and the throughput of both beside that of jobs alone."""
    wanted = [float(part) for part in rates.split(",")]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), CONFIGURATION) as url:
        requests(url, 50, 5)
        without_s = [requests(url, per_second, rounds * seconds).p99_s for per_second in wanted]
        submit_backlog(url, jobs)
        time.sleep(LEARNING_S)
        for per_second, alone_s in zip(wanted, without_s, strict=True):
            p99_s, shares = beside_jobs(url, per_second, seconds, rounds)
            print(
                f"{per_second:g}/s: p99 {p99_s * 1000:.0f} ms over jobs, {alone_s * 1000:.0f} ms without: "
                f"{p99_s / alone_s:.2f} x; {told('both, beside jobs alone', shares)}",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
