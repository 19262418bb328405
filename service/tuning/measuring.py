"""Measures thoroughly what a pipeline's batches cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from pydantic import BaseModel

from batching import CostFeature, MeasuredCostModel
from batching.calibration import Calibration, Measurement
from pipelines import InferencePipeline
from service.errors import describe_error
from service.pipeline_batches import is_too_large
from service.settings import BatchConfig
from service.tuning.choice import lone_sizes
from service.tuning.errors import TuningError

LARGEST_COUNT = 128
STEP = 2
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """The shapes that ran, and whether the next larger one was out of memory, or would have taken too long."""

    measurements: Sequence[Measurement]
    memory_was_the_limit: bool
    time_was_the_limit: bool


def measure(
    pipeline: InferencePipeline,
    config: BatchConfig,
    max_s: float,
    on_shape: Callable[[Measurement], None] = lambda _: None,
    clock: Callable[[], float] = perf_counter,
) -> Measured:
    """Warm the pipeline up and run batches of ever more items and sizes, for about `max_s` seconds.

    Batches keep ``max_batch_tokens``, but may be larger than ``max_batch_size``, which is to be chosen. Raises
    `TuningError` where the pipeline makes up no items, nothing fits the limits, or it fails other than for lack of
    memory.
    """
    most = min(max(config.max_batch_size, LARGEST_COUNT), config.max_queue_size)
    measurements: list[Measurement] = []
    memory_was_the_limit = False
    try:
        _require_samples(pipeline)
        pipeline.warm_up()
        for shape in _calibration(pipeline, config, most, max_s, clock).measure():
            measurements.append(shape)
            on_shape(shape)
    except TuningError:
        raise
    except Exception as error:
        if not (measurements and is_too_large(error)):
            raise TuningError(f"measuring failed{_after(measurements)}: {describe_error(error)}") from error
        memory_was_the_limit = True
    if not measurements:
        raise TuningError(
            f"nothing could be measured within {max_s:.3g} s and max_batch_tokens "
            f"{config.max_batch_tokens or 'null'}: raise --max-seconds or batch_config.max_batch_tokens"
        )
    wanted = min(most * max(lone_sizes(measurements)), config.max_batch_tokens or 2**62)
    is_short = STEP * max(shape.count * shape.longest for shape in measurements) <= wanted
    return Measured(measurements, memory_was_the_limit, is_short and not memory_was_the_limit)


def fitted_costs(pipeline: InferencePipeline, measurements: Sequence[Measurement]) -> MeasuredCostModel:
    """The cost model of the pipeline, fitted to all the measurements."""
    model = MeasuredCostModel(CostFeature(pipeline.cost_feature))
    for shape in measurements:
        model.calibrate(shape.count, shape.longest, shape.total, shape.seconds)
    return model


def median_error(model: MeasuredCostModel, measurements: Sequence[Measurement]) -> float:
    """The median of how far predictions are from the measured seconds, relative to these."""
    return median(
        abs(model.predict_s(shape.count, shape.longest, shape.total) / shape.seconds - 1) for shape in measurements
    )


def _after(measurements: Sequence[Measurement]) -> str:
    return f" after a batch of {measurements[-1].count} of size {measurements[-1].longest}" if measurements else ""


def _calibration(
    pipeline: InferencePipeline, config: BatchConfig, most: int, max_s: float, clock: Callable[[], float]
) -> Calibration[BaseModel]:
    return Calibration(
        run=pipeline.run_inference,
        sample_items=pipeline.sample_items,
        item_size=pipeline.item_size,
        max_count=most,
        max_tokens=config.max_batch_tokens,
        max_s=max_s,
        step=STEP,
        rounds=ROUNDS,
        clock=clock,
    )


def _require_samples(pipeline: InferencePipeline) -> None:
    if not pipeline.sample_items(1, 1):
        raise TuningError(
            f"{type(pipeline).__name__} makes up no items to measure: implement sample_items(n, size), which returns a "
            "list of n items of about that size"
        )
