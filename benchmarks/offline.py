"""A list of texts through the scheduler, beside a plain loop over the same pipeline in order of arrival.

Run it with ``python -m modalkit.benchmarks.offline``; ``--help`` lists the options.
"""

import statistics
import time
from functools import partial
from typing import Annotated

import anyio
import typer
from pydantic import BaseModel

from modalkit.batching import Failure, Priority, SchedulerStatistics
from modalkit.benchmarks.measurement import in_own_thread
from modalkit.benchmarks.texts import CORPUS, TextsOption, read_texts
from modalkit.pipelines import InferencePipeline
from modalkit.service.cli.common import ConfigFiles, model_source
from modalkit.service.jobs import MemoryJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker

LOOP_BATCH = 32


def plain_loop_s(pipeline: InferencePipeline, items: list[BaseModel]) -> float:
    """Seconds for batches of `LOOP_BATCH` items in the order of the list."""
    started_s = time.perf_counter()
    for start in range(0, len(items), LOOP_BATCH):
        pipeline.run_inference(items[start : start + LOOP_BATCH])
    return time.perf_counter() - started_s


def sorted_loop_s(pipeline: InferencePipeline, items: list[BaseModel]) -> float:
    """Seconds for such batches of the items sorted by size, which is possible if all are known in advance."""
    started_s = time.perf_counter()
    by_size = sorted(items, key=pipeline.item_size)
    for start in range(0, len(by_size), LOOP_BATCH):
        pipeline.run_inference(by_size[start : start + LOOP_BATCH])
    return time.perf_counter() - started_s


async def scheduler_s(
    pipeline: InferencePipeline, items: list[BaseModel], settings: Settings
) -> tuple[float, SchedulerStatistics]:
    """Seconds for all items through a worker, in chunks that fit its queue, as in ``modalkit predict``."""
    async with (
        JobManager(MemoryJobStore()) as jobs,
        InferenceWorker(pipeline, settings=settings, jobs=jobs, owns_pipeline=False) as worker,
    ):
        started_s = time.perf_counter()

        async def run(chunk: list[BaseModel]) -> None:
            outcomes = await worker.predict_many(chunk, priority=Priority.BULK)
            if failed := [outcome for outcome in outcomes if isinstance(outcome, Failure)]:
                raise failed[0].error

        limit = anyio.CapacityLimiter(2)

        async def run_when_free(chunk: list[BaseModel]) -> None:
            async with limit:
                await run(chunk)

        async with anyio.create_task_group() as task_group:
            for start in range(0, len(items), 4096):
                task_group.start_soon(run_when_free, items[start : start + 4096])
        return time.perf_counter() - started_s, worker.statistics()


def main(
    texts: TextsOption = CORPUS,
    limit: Annotated[int | None, typer.Option(help="Use only the first N texts.")] = None,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 3,
    config: ConfigFiles = None,
) -> None:
    """Print items/s of each contender and their ratios, as medians of all rounds."""
    settings = Settings.load(config)
    source = model_source(settings, None)
    pipeline = source.load()
    items: list[BaseModel] = [source.input_model(text=text) for text in read_texts(texts, limit)]
    in_own_thread(partial(pipeline.run_inference, items[:LOOP_BATCH]))
    loop: list[float] = []
    scheduled: list[float] = []
    in_order: list[float] = []
    for _ in range(rounds):
        loop.append(in_own_thread(partial(plain_loop_s, pipeline, items)))
        elapsed_s, done = anyio.run(scheduler_s, pipeline, items, settings)
        scheduled.append(elapsed_s)
        in_order.append(in_own_thread(partial(sorted_loop_s, pipeline, items)))
        print(
            f"round: loop {len(items) / loop[-1]:.0f}/s, scheduler {len(items) / elapsed_s:.0f}/s "
            f"({done.batches} batches, {done.mean_batch_size:.1f} items each, {done.padding_share:.1%} padding), "
            f"sorted loop {len(items) / in_order[-1]:.0f}/s"
        )
    loop_s, scheduled_s, sorted_s = map(statistics.median, (loop, scheduled, in_order))
    print(
        f"{len(items)} items, median of {rounds}: loop {len(items) / loop_s:.0f}/s, scheduler "
        f"{len(items) / scheduled_s:.0f}/s ({loop_s / scheduled_s:.2f} x the loop, {sorted_s / scheduled_s:.2f} x the "
        f"sorted loop)"
    )


if __name__ == "__main__":
    typer.run(main)
