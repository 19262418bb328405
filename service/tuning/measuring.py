"""Measures how long a pipeline's batches take, more thoroughly than a worker does at start."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from pydantic import BaseModel

from modalkit.batching import CostFeature, MeasuredCostModel
from modalkit.batching.calibration import Calibration, Measurement, SizeFailure
from modalkit.pipelines import InferencePipeline
from modalkit.service.errors import describe_error
from modalkit.service.pipeline_batches import is_too_large
from modalkit.service.settings import BatchConfig
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.samples import MadeUpSamples, Samples

MAX_COUNT = 128
STEP = 2
ROUNDS = 5
MEASURING_SHARE = 0.6  # of all time, at most
TRIAL_BATCHES = 7.5  # the time that is kept for trying limits, in batches of one request (`TrialPlan`)


@dataclass(frozen=True, slots=True)
class Measured:
    """The shapes that were measured, and why others were not.

    `too_large_tokens` is the size of the smallest batch that was out of memory; `failure` is the smallest size at which
    a single request failed; `time_was_the_limit` says whether there was no time for other shapes.
    """

    measurements: Sequence[Measurement]
    too_large_tokens: int | None
    failure: SizeFailure | None
    time_was_the_limit: bool


def measure(
    pipeline: InferencePipeline,
    config: BatchConfig,
    max_s: float,
    *,
    samples: Samples | None = None,
    on_shape: Callable[[Measurement], None] = lambda _: None,
    clock: Callable[[], float] = perf_counter,
) -> Measured:
    """Warm the pipeline up and run batches of many counts and sizes, with `samples` or made-up items.

    Takes at most three fifths of `max_s` seconds plus one batch, and less if batches are so slow that no time would be
    left for trying limits. Batches keep to ``max_batch_tokens``, but may be larger than ``max_batch_size``, which is to
    be chosen. Raises `TuningError` if the pipeline makes up no items, no batch fits the limits, or the pipeline fails
    for another reason than memory or the size of items.
    """
    started_s = clock()
    samples = samples or MadeUpSamples(pipeline)
    measurements: list[Measurement] = []
    with _explained(measurements):
        _warm_up(pipeline, samples)
        left_s = MEASURING_SHARE * max_s - (clock() - started_s)
        calibration = _calibration(pipeline, config, samples, left_s, clock)
        for shape in calibration.measure():
            measurements.append(shape)
            on_shape(shape)
            lone_s = max(shape.seconds for shape in measurements if shape.count == 1)
            if clock() - started_s + (1 + TRIAL_BATCHES) * lone_s > max_s:
                break
    if not measurements:
        raise TuningError(
            f"nothing could be measured within --max-seconds {max_s:g} and max_batch_tokens "
            f"{config.max_batch_tokens or 'null'}: warming up took {clock() - started_s:,.1f} s; raise --max-seconds "
            "or batch_config.max_batch_tokens"
        )
    return Measured(measurements, calibration.too_large_tokens, calibration.failure, not calibration.is_complete)


def fitted_costs(pipeline: InferencePipeline, measurements: Sequence[Measurement]) -> MeasuredCostModel:
    """The cost model of the pipeline, fitted to all measurements."""
    model = MeasuredCostModel(CostFeature(pipeline.cost_feature))
    for shape in measurements:
        if shape.seconds > 0:
            model.calibrate(shape.count, shape.longest, shape.total, shape.seconds)
    return model


def median_error(model: MeasuredCostModel, measurements: Sequence[Measurement]) -> float:
    """The median relative difference between predicted and measured seconds."""
    return median(
        abs(model.predict_s(shape.count, shape.longest, shape.total) / shape.seconds - 1) for shape in measurements
    )


@contextmanager
def _explained(measurements: Sequence[Measurement]) -> Iterator[None]:
    """Turn an error into a `TuningError` that names the batch measured last."""
    try:
        yield
    except Exception as error:
        last = measurements[-1] if measurements else None
        after = f" after a batch of {last.count} of size {last.longest}" if last else ""
        raise TuningError(f"measuring failed{after}: {describe_error(error)}") from error


def _warm_up(pipeline: InferencePipeline, samples: Samples) -> None:
    pipeline.warm_up()
    if samples.sizes is not None:  # the pipeline may make up no items, and then cannot warm up by itself
        pipeline.run_inference(samples.of_size(1, samples.sizes[0]))


def _calibration(
    pipeline: InferencePipeline, config: BatchConfig, samples: Samples, max_s: float, clock: Callable[[], float]
) -> Calibration[BaseModel]:
    return Calibration(
        run=pipeline.run_inference,
        sample_items=samples.of_size,
        item_size=pipeline.item_size,
        max_count=min(max(config.max_batch_size, MAX_COUNT), config.max_queue_size),
        max_tokens=config.max_batch_tokens,
        sizes=samples.sizes,
        max_s=max_s,
        step=STEP,
        rounds=ROUNDS,
        is_too_large=is_too_large,
        clock=clock,
    )
