"""The bundled model by several engines, in turn: sorted batches, callers in this process, and clients over HTTP.

Run it with ``python -m modalkit.benchmarks.engines``; ``--help`` lists the options. The first way is the one that the
others are compared with. Each server is a separate process; its clients, which do little, run in this one.
"""

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated

import anyio
import typer
from pydantic import BaseModel

from modalkit.benchmarks.drivers import timed_s, work_off
from modalkit.benchmarks.http_load import served
from modalkit.benchmarks.in_process import BundledPipeline, Records, run_sorted, worker_of
from modalkit.benchmarks.measurement import Rounds
from modalkit.benchmarks.raw_http import post_all
from modalkit.benchmarks.texts import CORPUS, TextsOption, read_texts
from modalkit.pipelines.engines.kept import processor
from modalkit.pipelines.sentiment import SentimentRequest

DEFAULT_WAYS = "torch/float32,torch-packed,auto"
MEASURES = ("bulk", "callers", "http")
BATCH_SIZE = 16
CALLERS = 64


class Way:
    """One engine and number format: a pipeline in this process and a server."""

    def __init__(self, name: str, items: Sequence[BaseModel], stack: ExitStack) -> None:
        engine, _, dtype = name.partition("/")
        entry = {"engine": engine, "dtype": dtype or "auto"}
        self.name = name
        self._items = items
        self._pipeline = BundledPipeline(**entry)
        self._by_size = sorted(items, key=self._pipeline.item_size)
        self._bodies = [json.dumps({"text": item.model_dump()["text"]}).encode() for item in items]
        variables = {f"MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__sentiment__{k.upper()}": v for k, v in entry.items()}
        self._url = stack.enter_context(served(variables)) + "/sync/predict"
        print(f"{name}: {self._pipeline.engine_choice}")

    def measure(self, what: str) -> Mapping[str, float]:
        """Items per second."""
        seconds = {"bulk": self._bulk_s, "callers": self._callers_s, "http": self._http_s}[what]()
        return {f"{self.name} {what}": len(self._items) / seconds}

    def _bulk_s(self) -> float:
        started_s = time.perf_counter()
        run_sorted(self._pipeline, self._by_size, BATCH_SIZE)
        return time.perf_counter() - started_s

    def _callers_s(self) -> float:
        return anyio.run(self._call)

    async def _call(self) -> float:
        async with worker_of(self._pipeline, Records()) as worker:
            return await timed_s(work_off([worker.predict] * CALLERS, self._items))

    def _http_s(self) -> float:
        started_s = time.perf_counter()
        statuses = asyncio.run(post_all(self._url, self._bodies, CALLERS))
        if set(statuses) != {200}:
            raise RuntimeError(f"the server answered with {statuses}")
        return time.perf_counter() - started_s


def main(
    ways: Annotated[str, typer.Option(help="Engines and number formats, separated by commas.")] = DEFAULT_WAYS,
    measures: Annotated[str, typer.Option(help="Which of bulk, callers and http.")] = ",".join(MEASURES),
    texts: TextsOption = CORPUS,
    limit: Annotated[int, typer.Option(help="Use only the first N texts.")] = 800,
    rounds: Annotated[int, typer.Option(help="Number of rounds; an even number, because the order alternates.")] = 2,
) -> None:
    """Print items/s of each way and its ratio to the first, as medians of all rounds."""
    items: list[BaseModel] = [SentimentRequest(text=text) for text in read_texts(texts, limit)]
    print(f"{os.cpu_count()} cores, {processor_line()}")
    with ExitStack() as stack:
        all_ways = [Way(name, items, stack) for name in ways.split(",")]
        for what in measures.split(","):
            contenders = Rounds([partial(way.measure, what) for way in all_ways])
            for _ in range(rounds):
                contenders.run()
            base = all_ways[0].name
            for way in all_ways:
                rate = contenders.figure(f"{way.name} {what}", "", "items/s").value
                ratio = contenders.ratio(f"{way.name} {what}", f"{base} {what}", "").value
                print(f"{what:8} {way.name:20} {rate:7.0f} items/s  {ratio:5.2f} x")


def processor_line() -> str:
    """The name of the processor, without the list of its instructions."""
    import torch

    return processor(torch.device("cpu")).partition("  ")[0]


if __name__ == "__main__":
    typer.run(main)
