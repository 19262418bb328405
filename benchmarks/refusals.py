"""What it costs to refuse requests, and whether good work falls where many are refused.

Run it with ``python -m modalkit.benchmarks.refusals``. In process it measures the processor time of a request that is
refused because the queue is full, next to one that is run: by a pipeline that does nothing, and by the bundled model.
Over HTTP, 500 clients ask again as soon as they are answered, with room in the queue for all of them and for a fifth.
"""

import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from fastapi import FastAPI

from modalkit.batching import QueueFullError
from modalkit.benchmarks.jobs import TEXT, serving, told
from modalkit.benchmarks.load import Endpoint, Load, run_load
from modalkit.benchmarks.nothing import NeverPipeline, Text
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import Settings
from modalkit.service.web import create_app

BODY = json.dumps({"text": TEXT}).encode()
CLIENTS = 500
QUEUE_SIZES = (10_000, 100)
CONFIGURATION = """
app_settings:
  async_config: {{store: memory}}
  batch_config: {{max_queue_size: {max_queue_size}}}
model_settings:
  model_entries:
    nothing: {{pipeline: "modalkit.benchmarks.nothing:NothingPipeline"}}
"""


async def ask(app: FastAPI, statuses: Counter[int]) -> None:
    """Send a request to the application, without a server."""
    body = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not body:
            await asyncio.Event().wait()  # the client stays
        return body.pop()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses[int(message["status"])] += 1

    headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/sync/predict",
        "query_string": b"model_name=measured",
        "headers": headers,
    }
    await app(scope, receive, send)


async def cost_us(pipeline: str, expected: int, rounds: int, at_once: int = 1000) -> float:
    """Microseconds of processor time for each of `at_once` requests that come together; the median of some rounds."""
    settings = Settings(
        app_settings={"async_config": {"store": "memory"}, "batch_config": {"max_queue_size": at_once}},
        model_settings={"model_entries": {"measured": {"pipeline": pipeline}}},
    )
    gateway = LocalGateway(settings)
    async with gateway:
        await gateway.wait_until_ready()
        app, model = create_app(gateway, owns_gateway=False), gateway.models["measured"]
        waiting = list[asyncio.Task[Any]]()
        if expected == 429:
            with suppress(QueueFullError):
                while True:
                    model.check_room()
                    waiting.append(asyncio.create_task(model.predict(Text(text=TEXT))))
                    await asyncio.sleep(0)
        costs_us = []
        for _ in range(rounds):
            statuses = Counter[int]()
            began_s = time.process_time()
            await asyncio.gather(*(ask(app, statuses) for _ in range(at_once)))
            costs_us.append((time.process_time() - began_s) / at_once * 1e6)
            if statuses != {expected: at_once}:
                raise RuntimeError(f"{pipeline} answered {statuses}")
        NeverPipeline.released.set()
        await asyncio.gather(*waiting)
    return statistics.median(costs_us)


def in_process(rounds: int) -> None:
    """Tell what a refused request and one that is run cost."""
    refused_us = asyncio.run(cost_us("modalkit.benchmarks.nothing:NeverPipeline", 429, rounds))
    print(f"refused, as the queue is full: {refused_us:.0f} us of processor time")
    for name, pipeline in (
        ("a pipeline that does nothing", "modalkit.benchmarks.nothing:NothingPipeline"),
        ("the bundled model", "modalkit.pipelines.sentiment:SentimentPipeline"),
    ):
        run_us = asyncio.run(cost_us(pipeline, 200, rounds))
        print(f"run by {name}: {run_us:.0f} us; to refuse costs {refused_us / run_us:.2f} of it")


def over_http(rounds: int, seconds: float) -> None:
    """Tell how many requests succeed with room for all clients and for a fifth of them, in turns."""
    succeeded: dict[int, list[int]] = {size: [] for size in QUEUE_SIZES}
    for _ in range(rounds):
        for size in QUEUE_SIZES:
            configuration = CONFIGURATION.format(max_queue_size=size)
            with tempfile.TemporaryDirectory() as folder, serving(Path(folder), configuration) as url:
                load = Load(clients=CLIENTS, seconds=seconds, warm_up_s=0, processes=1)
                found = run_load(Endpoint(f"{url}/sync/predict"), [{"text": TEXT}], load)
            succeeded[size].append(found.answered)
            print(
                f"  {CLIENTS} clients for {seconds:g} s, max_queue_size {size}: {found.answered}, {dict(found.errors)}"
            )
    ratios = [small / large for large, small in zip(*succeeded.values(), strict=True)]
    print(told("successes with a queue of 100, beside one of 10,000", ratios))


def main(
    rounds: Annotated[int, typer.Option(help="How often each pair is measured, in turns.")] = 3,
    seconds: Annotated[float, typer.Option(help="Seconds of each run over HTTP.")] = 12,
) -> None:
    """Print the costs of refusals."""
    in_process(rounds)
    over_http(rounds, seconds)


if __name__ == "__main__":
    typer.run(main)
