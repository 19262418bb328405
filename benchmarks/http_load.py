"""Concurrent HTTP clients with one item per request, beside the same server with batches of one.

Run it with ``python -m modalkit.benchmarks.http_load``; ``--help`` lists the options. Each
server is a separate process, ``modalkit serve``, one after the other; the clients run in this process.
"""

import os
import re
import signal
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Annotated

import anyio
import httpx
import typer

from modalkit.benchmarks.drivers import Call, closed_loop
from modalkit.benchmarks.texts import CORPUS, TextsOption, read_texts

UNBATCHED = {"MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE": "1"}


@contextmanager
def served(variables: dict[str, str]) -> Iterator[str]:
    """The address of a server that is ready. At the end of the block it is stopped, and its summary is printed."""
    command = [sys.executable, "-P", "-c", "from modalkit.service.cli import main; main()", "serve", "--port", "0"]
    environment = {"MODALKIT_APP_SETTINGS__ASYNC_CONFIG__STORE": "memory", **os.environ, **variables}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        if process.stderr is None:
            raise RuntimeError("the server's output is not connected")
        output = ""
        while not re.search(r"^Ready", output, re.MULTILINE):
            line = process.stderr.readline()
            if not line:
                raise RuntimeError(f"the server did not start: {output}")
            output += line
        address = re.search(r"http://[\w.:]+\d", output)
        if address is None:
            raise RuntimeError(f"the server printed no address: {output}")
        try:
            yield address.group()
        finally:
            process.send_signal(signal.SIGINT)
            print(f"  {process.stderr.read().strip().splitlines()[-1]}")


async def load(url: str, texts: list[str], clients: int) -> list[float]:
    """The latency of each request in seconds, with `clients` requests at a time."""
    context = ssl.create_default_context()

    def sender(client: httpx.AsyncClient) -> Call[str]:
        async def send(text: str) -> None:
            (await client.post("/sync/predict", json={"text": text})).raise_for_status()

        return send

    async with AsyncExitStack() as stack:
        # One client per sender: the overhead of a client's connection pool grows with the number of connections.
        senders = [
            sender(await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=600, verify=context)))
            for _ in range(clients)
        ]
        return await closed_loop(senders, texts)


def measure(label: str, variables: dict[str, str], texts: list[str], clients: int) -> float:
    """Measure one server; return items per second."""
    with served(variables) as url:
        anyio.run(load, url, texts[: 4 * clients], clients)
        started_s = time.perf_counter()
        latencies_ms = [latency_s * 1000 for latency_s in anyio.run(load, url, texts, clients)]
        rate = len(texts) / (time.perf_counter() - started_s)
        percentiles = statistics.quantiles(latencies_ms, n=100)
        print(f"{label}: {rate:.0f} items/s; latency p50 {percentiles[49]:.0f} ms, p99 {percentiles[98]:.0f} ms")
    return rate


def main(
    clients: Annotated[int, typer.Option(help="Requests at a time.")] = 64,
    texts: TextsOption = CORPUS,
    limit: Annotated[int, typer.Option(help="Use only the first N texts.")] = 4000,
) -> None:
    """Print items/s and latencies with batching and without, and their ratio."""
    chosen = read_texts(texts, limit)
    unbatched = measure("batches of one", UNBATCHED, chosen, clients)
    batched = measure("batched", {}, chosen, clients)
    print(f"{len(chosen)} items from {clients} clients: {batched / unbatched:.2f} x the server without batching")


if __name__ == "__main__":
    typer.run(main)
