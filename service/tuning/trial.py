"""Tries limits on the real scheduler, in process: what a lone request costs, and an open loop of many."""

import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median

import anyio
from pydantic import BaseModel

from batching import BatchRecord, MeasuredCostModel
from pipelines import InferencePipeline
from service.errors import describe_error
from service.jobs import MemoryJobStore
from service.jobs.manager import JobManager
from service.settings import BatchConfig, Settings
from service.tuning.errors import TuningError
from service.worker import InferenceWorker

FEWEST_LONE_REQUESTS = 5
MOST_LONE_REQUESTS = 50
ITEMS_OF_EACH_SIZE = 16
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How an open loop went: of `sent` requests, `failed` got an error and `unfinished` none in time.

    Latencies count from when a request was due, whether it could be sent then or not; an unfinished one's is infinite.
    """

    sent: int
    failed: int
    unfinished: int
    p50_s: float
    p99_s: float
    items_per_s: float
    first_error: str | None


@dataclass(frozen=True, slots=True)
class Bench:
    """A pipeline, with the settings and the known costs that its scheduler is to have."""

    pipeline: InferencePipeline
    settings: Settings
    costs: MeasuredCostModel

    @asynccontextmanager
    async def worker(
        self, config: BatchConfig, on_batch: Callable[[BatchRecord], None] | None = None
    ) -> AsyncIterator[InferenceWorker]:
        """A worker under `config` that knows the costs."""
        app_settings = self.settings.app_settings.model_copy(update={"batch_config": config})
        settings = self.settings.model_copy(update={"app_settings": app_settings})
        async with (
            JobManager(MemoryJobStore()) as jobs,
            InferenceWorker(self.pipeline, settings=settings, jobs=jobs, on_batch=on_batch, calibrate=False) as worker,
        ):
            worker.costs.restore(self.costs.state())
            yield worker

    async def seconds_beside_the_batch(self, size: int, max_s: float) -> float:
        """What a lone request on an idle worker costs beside the stages of its batch: the median of some 50.

        Takes about `max_s` seconds at most. Raises `TuningError` when a request fails.
        """
        config = self.settings.app_settings.batch_config.model_copy(update={"wait_ms": 0})
        records: list[BatchRecord] = []
        latencies_s: list[float] = []
        async with self.worker(config, records.append) as worker:
            started_s = anyio.current_time()
            for item in self.pipeline.sample_items(MOST_LONE_REQUESTS, size):
                sent_s = anyio.current_time()
                if sent_s > started_s + max_s and len(latencies_s) >= FEWEST_LONE_REQUESTS:
                    break
                try:
                    await worker.predict(item)
                except Exception as error:
                    raise TuningError(f"a lone request of size {size} failed: {describe_error(error)}") from error
                latencies_s.append(anyio.current_time() - sent_s)
        beside_s = [latency_s - record.measured_s for latency_s, record in zip(latencies_s, records, strict=True)]
        return max(0.0, median(beside_s))

    async def open_loop(
        self, config: BatchConfig, sizes: Sequence[int], *, rate_per_s: float, duration_s: float
    ) -> Trial:
        """Send items of mixed `sizes` at random times, on average `rate_per_s`, whatever becomes of earlier ones.

        After `duration_s` seconds nothing more is sent; what is not done within as long again is unfinished.
        """
        dice = random.Random(SEED)  # noqa: S311  # a repeatable load is no cryptography
        # A Poisson process whose number of arrivals is known: their times are uniform.
        times_s = sorted(dice.uniform(0, duration_s) for _ in range(max(1, round(rate_per_s * duration_s))))
        pools = [self.pipeline.sample_items(ITEMS_OF_EACH_SIZE, size) for size in sizes]
        load = [(due_s, dice.choice(dice.choice(pools))) for due_s in times_s]
        async with self.worker(config) as worker:
            loop = _OpenLoop(worker)
            with anyio.move_on_after(2 * duration_s + 1):
                await loop.run(load)
        return loop.result(len(load))


class _OpenLoop:
    def __init__(self, worker: InferenceWorker) -> None:
        self._worker = worker
        self._latencies_s: list[float] = []
        self._errors: list[Exception] = []
        self._started_s = self._last_s = 0.0

    async def run(self, load: Sequence[tuple[float, BaseModel]]) -> None:
        """Send each item so many seconds after the start, and wait for all."""
        self._started_s = self._last_s = anyio.current_time()
        async with anyio.create_task_group() as task_group:
            for due_s, item in load:
                await anyio.sleep_until(self._started_s + due_s)
                task_group.start_soon(self._send, item, self._started_s + due_s)

    async def _send(self, item: BaseModel, due_s: float) -> None:
        try:
            await self._worker.predict(item)
        except Exception as error:  # noqa: BLE001  # user code may raise anything; it is counted and told
            self._errors.append(error)
        else:
            self._last_s = anyio.current_time()
            self._latencies_s.append(self._last_s - due_s)

    def result(self, sent: int) -> Trial:
        done, failed = len(self._latencies_s), len(self._errors)
        latencies_s = [*sorted(self._latencies_s), *[math.inf] * (sent - done)]
        return Trial(
            sent=sent,
            failed=failed,
            unfinished=sent - done - failed,
            p50_s=latencies_s[sent // 2],
            p99_s=latencies_s[min(sent * 99 // 100, sent - 1)],
            items_per_s=done / (self._last_s - self._started_s) if done else 0.0,
            first_error=describe_error(self._errors[0]) if failed else None,
        )
