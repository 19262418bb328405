"""What trying limits on the real scheduler tells."""

from typing import Any

import pytest
from pydantic import BaseModel

from batching import MeasuredCostModel
from service.settings import BatchConfig, Settings
from service.tuning.errors import TuningError
from service.tuning.trial import Bench
from tests.support.length_model import LengthPipeline

pytestmark = pytest.mark.anyio


class Picky(LengthPipeline):
    """Fails for texts of 16 characters and more."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if any(len(text) >= 16 for text in preprocessed_data["texts"]):
            raise ValueError("too long")
        return super().predict(input_list, preprocessed_data)


def bench(pipeline: LengthPipeline) -> Bench:
    return Bench(pipeline, Settings.load([], environ={}), MeasuredCostModel())


async def test_all_sizes_are_sent_and_all_results_counted() -> None:
    pipeline = LengthPipeline()
    trial = await bench(pipeline).open_loop(BatchConfig(max_batch_size=2), [8, 16], rate_per_s=500, duration_s=0.1)
    assert (trial.sent, trial.failed, trial.unfinished, trial.first_error) == (50, 0, 0, None)
    assert 0 < trial.p50_s <= trial.p99_s
    assert trial.items_per_s > 0
    assert {len(text) for texts in pipeline.batches for text in texts} >= {8, 16}
    assert max(map(len, pipeline.batches)) <= 2, "the limits on trial hold"


async def test_the_same_requests_are_sent_each_time() -> None:
    sizes = []
    for pipeline in (LengthPipeline(), LengthPipeline()):
        await bench(pipeline).open_loop(BatchConfig(), [8, 16, 32], rate_per_s=500, duration_s=0.1)
        sizes.append(sorted(len(text) for texts in pipeline.batches for text in texts))
    assert sizes[0] == sizes[1]


async def test_failed_requests_are_counted_and_told_of() -> None:
    trial = await bench(Picky()).open_loop(BatchConfig(), [8, 16], rate_per_s=500, duration_s=0.1)
    assert 0 < trial.failed < trial.sent == 50
    assert trial.unfinished == 0
    assert trial.first_error == "ValueError: too long"
    assert trial.p99_s == float("inf")


async def test_what_a_lone_request_costs_beside_its_batch_is_measured_in_batches_of_one() -> None:
    pipeline = LengthPipeline()
    assert await bench(pipeline).seconds_beside_the_batch(8, 10) > 0
    assert {len(texts) for texts in pipeline.batches} == {1}


async def test_a_lone_request_that_fails_is_told_of() -> None:
    with pytest.raises(TuningError, match="a lone request of size 16 failed: ValueError: too long"):
        await bench(Picky()).seconds_beside_the_batch(16, 10)
