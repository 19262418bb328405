"""What the end-to-end figures are made of."""

import math

import pytest
from pydantic import BaseModel

from modalkit.batching import Failure, Priority, Success
from modalkit.benchmarks.drivers import work_off
from modalkit.benchmarks.in_process import (
    BatchShape,
    BundledPipeline,
    Records,
    arrival_order_scheduler,
    corpus_items,
    padding_share,
    raise_failures,
    run_sorted,
    worker_of,
)
from modalkit.pipelines import InferenceOutputModel, InferencePipeline


class Batches(InferencePipeline):
    """Notes the lists it is given."""

    def __init__(self) -> None:
        super().__init__("batches", ".", {})
        self.seen: list[list[BaseModel]] = []

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, object]:
        self.seen.append(input_list)
        return {}

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, object]) -> dict[str, object]:
        return {}

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, object]) -> list[InferenceOutputModel]:
        return [InferenceOutputModel(status="success") for _ in input_list]


@pytest.mark.anyio
async def test_the_scheduler_restricted_to_arrival_order_runs_full_batches_of_the_oldest() -> None:
    pipeline, items = Batches(), corpus_items(70)
    async with arrival_order_scheduler(pipeline, 32) as scheduler:
        await scheduler.submit_many(items)
    assert pipeline.seen == [items[:32], items[32:64], items[64:]]


@pytest.mark.anyio
async def test_the_worker_tells_of_every_batch(bundled_pipeline: BundledPipeline) -> None:
    records, items = Records(), corpus_items(12)
    async with worker_of(bundled_pipeline, records, calibration={"enabled": False}) as worker:
        raise_failures(await worker.predict_many(items, priority=Priority.BULK))
        await work_off([worker.predict] * 4, items)
    assert sum(batch.count for batch in records.batches) == 24
    assert sum(shape.rows for shape in records.shapes()) == 24
    assert records.cost_error(0) >= 0
    assert math.isnan(records.cost_error(1_000))


def test_the_offline_loop_runs_every_item_once() -> None:
    pipeline, items = Batches(), corpus_items(11)
    run_sorted(pipeline, items, 4)
    assert [len(batch) for batch in pipeline.seen] == [4, 4, 3]
    assert [item for batch in pipeline.seen for item in batch] == items


def test_the_shapes_are_those_of_the_tensors(bundled_pipeline: BundledPipeline) -> None:
    items = corpus_items(3)
    bundled_pipeline.shapes.clear()
    bundled_pipeline.run_inference(items)
    counts = [bundled_pipeline.token_count(item) for item in items]
    assert bundled_pipeline.shapes == [BatchShape(3, sum(counts), 3 * max(counts))]


def test_padding_counts_for_as_long_as_the_queue_is_long() -> None:
    shapes = [BatchShape(2, 9, 10), BatchShape(2, 8, 10), BatchShape(2, 1, 10)]
    assert padding_share(shapes, queued_at_first=6, least_queued=4) == pytest.approx(0.15)
    assert math.isnan(padding_share(shapes, queued_at_first=6, least_queued=7))


def test_a_failure_is_raised_instead_of_measured() -> None:
    with pytest.raises(OSError, match="no disk"):
        raise_failures([Success(InferenceOutputModel(status="success")), Failure(OSError("no disk"))])
