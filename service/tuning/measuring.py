"""Measures how long a pipeline's batches take, more thoroughly than a worker does at start."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from time import perf_counter

from pydantic import BaseModel

from modalkit.batching import CostFeature, MeasuredCostModel
from modalkit.batching.calibration import Calibration, Measurement
from modalkit.pipelines import InferencePipeline
from modalkit.pipelines.inference_pipeline import awaited
from modalkit.service.errors import describe_with_line
from modalkit.service.pipeline_batches import at_full_load, is_asynchronous_pipeline, is_too_large, max_in_flight_of
from modalkit.service.settings import BatchConfig
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.samples import MadeUpSamples, Samples

MAX_COUNT = 128
STEP = 2
ROUNDS = 5
MEASURING_SHARE = 0.6  # of all time, at most
TRIAL_BATCHES = 7.5  # the time that is kept for trying limits, in batches of one request (`TrialPlan`)


def measure(
    pipeline: InferencePipeline,
    config: BatchConfig,
    max_s: float,
    *,
    samples: Samples | None = None,
    on_shape: Callable[[Measurement], None] = lambda _: None,
    clock: Callable[[], float] = perf_counter,
) -> Calibration[BaseModel]:
    """Warm the pipeline up and run batches of many counts and sizes, with `samples` or made-up items.

    Takes at most three fifths of `max_s` seconds plus one batch, and less if batches are so slow that no time would be
    left for trying limits. Batches keep to ``max_batch_tokens``, but may be larger than ``max_batch_size``, which is to
    be chosen. Raises `TuningError` if the pipeline is asynchronous or makes up no items, no batch fits the limits, or
    the pipeline fails for another reason than memory or the size of items.
    """
    if is_asynchronous_pipeline(pipeline):
        raise TuningError(
            f"{type(pipeline).__name__} is asynchronous: its batches wait for another server, so nothing is measured "
            "here; set batch_config.max_batch_size and max_in_flight to what that server allows"
        )
    started_s = clock()
    samples = samples or MadeUpSamples(pipeline)
    calibration = Calibration(
        run=at_full_load(pipeline, max_in_flight_of(pipeline, config)),
        sample_items=samples.of_size,
        item_size=pipeline.item_size,
        max_count=min(max(config.max_batch_size, MAX_COUNT), config.max_queue_size),
        max_tokens=config.max_batch_tokens,
        sizes=samples.sizes,
        step=STEP,
        rounds=ROUNDS,
        is_too_large=is_too_large,
        clock=clock,
    )
    measurements = calibration.measurements
    try:
        if inspect.isawaitable(warming_up := pipeline.warm_up()):
            asyncio.run(awaited(warming_up))
        if samples.sizes is not None:  # the pipeline may make up no items, and then cannot warm up by itself
            pipeline.run_inference(samples.of_size(1, samples.sizes[0]))
        calibration.max_s = MEASURING_SHARE * max_s - (clock() - started_s)
        for shape in calibration.measure():
            on_shape(shape)
            lone_s = max(shape.seconds for shape in measurements if shape.count == 1)
            if clock() - started_s + (1 + TRIAL_BATCHES) * lone_s > max_s:
                break
    except Exception as error:
        after = f" after a batch of {measurements[-1].count} of size {measurements[-1].longest}" if measurements else ""
        raise TuningError(f"measuring failed{after}: {describe_with_line(error)}") from error
    if not measurements:
        raise TuningError(
            f"nothing could be measured within --max-seconds {max_s:g} and max_batch_tokens "
            f"{config.max_batch_tokens or 'null'}: warming up took {clock() - started_s:,.1f} s; raise --max-seconds "
            "or batch_config.max_batch_tokens"
        )
    return calibration


def fitted_costs(pipeline: InferencePipeline, measurements: Sequence[Measurement]) -> MeasuredCostModel:
    """The cost model of the pipeline, fitted to all measurements."""
    model = MeasuredCostModel(CostFeature(pipeline.cost_feature))
    for shape in measurements:
        if shape.seconds > 0:
            model.calibrate(shape.count, shape.longest, shape.total, shape.seconds)
    return model
