"""Tries limits on the real scheduler, in process: single requests, and an open loop of many."""

import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median

import anyio
from pydantic import BaseModel

from modalkit.batching import BatchRecord, MeasuredCostModel, QueueFullError
from modalkit.pipelines import InferencePipeline
from modalkit.service.errors import describe_error
from modalkit.service.settings import BatchConfig, Settings
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.measuring import MEASURING_SHARE
from modalkit.service.tuning.samples import Samples
from modalkit.service.worker import InferenceWorker, short_lived_worker

MAX_LONE_REQUESTS = 50
TRIAL_S = 5.0  # of sending; longer if batches are long
BATCHES_IN_A_TRIAL = 8
MIN_BATCHES = 3  # with fewer, hardly any request arrives while a batch runs
SENDING_SHARE = 0.5  # of a trial's time; the rest is for the last requests to finish
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The results of an open loop: of `sent` requests, `failed` got an error and `unfinished` had no result in time.

    Latencies start when a request was due, even if it was sent later; that of an unfinished request is infinite.
    """

    sent: int
    failed: int
    unfinished: int
    p50_s: float
    p99_s: float
    items_per_s: float
    first_error: str | None

    @property
    def is_complete(self) -> bool:
        """Whether every request got its result."""
        return not (self.failed or self.unfinished)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """A trial: `rate_per_s` requests per second for `duration_s`, then up to `patience_s` for the last to finish."""

    rate_per_s: float
    duration_s: float
    patience_s: float

    @classmethod
    def within(cls, rate_per_s: float, batch_s: float, left_s: float) -> "TrialPlan | None":
        """A trial of several batches of `batch_s` seconds that ends within `left_s`; None if that is too short.

        It takes half of the time, so that another trial is possible, or all of it where batches are long.
        """
        left_s -= batch_s  # the worker warms up
        wanted_s = min(max(TRIAL_S, BATCHES_IN_A_TRIAL * batch_s), SENDING_SHARE * left_s / 2)
        duration_s = max(wanted_s, MIN_BATCHES * batch_s)
        if left_s <= 0 or duration_s > SENDING_SHARE * left_s:
            return None
        patience_s = min(duration_s + 1, left_s - duration_s)
        return cls(rate_per_s=rate_per_s, duration_s=duration_s, patience_s=patience_s)

    @staticmethod
    def min_s(batch_s: float) -> float:
        """The minimum seconds of a trial."""
        return (MIN_BATCHES / SENDING_SHARE + 1) * batch_s


@dataclass(frozen=True, slots=True)
class Bench:
    """A pipeline with the settings and costs for its scheduler, and items to send."""

    pipeline: InferencePipeline
    settings: Settings
    costs: MeasuredCostModel
    samples: Samples

    @asynccontextmanager
    async def worker(
        self, config: BatchConfig, on_batch: Callable[[BatchRecord], None] | None = None
    ) -> AsyncIterator[InferenceWorker]:
        """A worker with `config` and the known costs, which writes no file."""
        calibration = config.calibration.model_copy(update={"path": None})
        batch_config = config.model_copy(update={"calibration": calibration})
        app_settings = self.settings.app_settings.model_copy(update={"batch_config": batch_config})
        settings = self.settings.model_copy(update={"app_settings": app_settings})
        async with short_lived_worker(self.pipeline, settings, on_batch=on_batch, owns_pipeline=False) as worker:
            worker.costs.restore(self.costs.state())
            yield worker

    async def seconds_beside_the_batch(self, size: int, max_s: float) -> float:
        """The median seconds of a request on an idle worker, without the stages of its batch; of up to 50 requests.

        Takes at most about `max_s` seconds plus one request. Raises `TuningError` when a request fails.
        """
        config = self.settings.app_settings.batch_config.model_copy(update={"wait_ms": 0})
        records: list[BatchRecord] = []
        latencies_s: list[float] = []
        async with self.worker(config, records.append) as worker:
            started_s = anyio.current_time()
            for item in self.samples.of_size(MAX_LONE_REQUESTS, size):
                sent_s = anyio.current_time()
                if sent_s > started_s + max_s and latencies_s:
                    break
                try:
                    await worker.predict(item)
                except Exception as error:
                    raise TuningError(f"a lone request of size {size} failed: {describe_error(error)}") from error
                latencies_s.append(anyio.current_time() - sent_s)
        beside_s = [latency_s - record.measured_s for latency_s, record in zip(latencies_s, records, strict=True)]
        return max(0.0, median(beside_s))

    async def open_loop(self, config: BatchConfig, sizes: Sequence[int], plan: TrialPlan) -> Trial:
        """Send items of mixed `sizes` at random times, at the rate of `plan`, without waiting for earlier ones.

        Requests without a result when the plan's duration and patience are over count as unfinished.
        """
        dice = random.Random(SEED)  # noqa: S311  # a repeatable load is no cryptography
        # A Poisson process whose number of arrivals is known: their times are uniform.
        sent = max(1, round(plan.rate_per_s * plan.duration_s))
        times_s = sorted(dice.uniform(0, plan.duration_s) for _ in range(sent))
        pools = self.samples.mixed(sizes)
        latencies_s: list[float] = []
        errors: list[Exception] = []
        async with self.worker(config) as worker:
            started_s = last_s = anyio.current_time()

            async def send(item: BaseModel, due_s: float) -> None:
                nonlocal last_s
                try:
                    await worker.predict(item)
                except QueueFullError:
                    return  # it counts as unfinished, and a lower load is tried
                except Exception as error:  # noqa: BLE001  # user code may raise anything; it is counted and reported
                    errors.append(error)
                else:
                    last_s = anyio.current_time()
                    latencies_s.append(last_s - due_s)

            with anyio.move_on_after(plan.duration_s + plan.patience_s):
                async with anyio.create_task_group() as task_group:
                    for time_s in times_s:
                        await anyio.sleep_until(started_s + time_s)
                        task_group.start_soon(send, dice.choice(dice.choice(pools)), started_s + time_s)
        all_s = [*sorted(latencies_s), *[math.inf] * (sent - len(latencies_s))]
        return Trial(
            sent=sent,
            failed=len(errors),
            unfinished=sent - len(latencies_s) - len(errors),
            p50_s=all_s[sent // 2],
            p99_s=all_s[min(sent * 99 // 100, sent - 1)],
            items_per_s=len(latencies_s) / (last_s - started_s) if latencies_s else 0.0,
            first_error=describe_error(errors[0]) if errors else None,
        )


def require_complete(trial: Trial | None, batch_s: float, max_s: float) -> None:
    """Raise `TuningError` if there was no trial, or not every request got its result."""
    if trial is None:
        needed_s = math.ceil((TrialPlan.min_s(batch_s) + 2 * batch_s) / (1 - MEASURING_SHARE))
        raise TuningError(
            f"the limits could not be tried, so nothing is written: --max-seconds {max_s:g} leaves too little time for "
            f"batches of {batch_s:.3g} s. Give --max-seconds {max(needed_s, math.ceil(max_s) + 1)} or more"
        )
    if trial.failed:
        raise TuningError(
            f"{trial.failed} of {trial.sent} requests failed under these limits, so nothing is written. The first "
            f"error: {trial.first_error}. Correct what the pipeline cannot run, or give other items by --samples"
        )
    if trial.unfinished:
        raise TuningError(
            f"{trial.unfinished} of {trial.sent} requests were not done in time under these limits, so nothing is "
            f"written: batches take longer than was measured, or vary. Give --max-seconds {math.ceil(2 * max_s)}, for "
            "more to be measured and lower loads to be tried"
        )
