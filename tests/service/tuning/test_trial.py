"""What trying limits on the real scheduler tells."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from modalkit.batching import MeasuredCostModel
from modalkit.service.settings import BatchConfig, Settings
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.samples import MadeUpSamples, OwnSamples
from modalkit.service.tuning.trial import Bench, Trial, TrialPlan, require_complete
from tests.support.length_model import LengthPipeline, Text

pytestmark = pytest.mark.anyio


class Picky(LengthPipeline):
    """Fails for texts of 16 characters and more."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if any(len(text) >= 16 for text in preprocessed_data["texts"]):
            raise ValueError("too long")
        return super().predict(input_list, preprocessed_data)


def bench(pipeline: LengthPipeline) -> Bench:
    costs = MeasuredCostModel()
    costs.calibrate(1, 8, 8, 0.001)
    return Bench(pipeline, Settings.load([], environ={}), costs, MadeUpSamples(pipeline))


def plan(duration_s: float = 0.1) -> TrialPlan:
    return TrialPlan(rate_per_s=500, duration_s=duration_s, patience_s=duration_s + 1)


async def test_all_sizes_are_sent_and_all_results_counted() -> None:
    pipeline = LengthPipeline()
    trial = await bench(pipeline).open_loop(BatchConfig(max_batch_size=2), [8, 16], plan())
    assert (trial.sent, trial.failed, trial.unfinished, trial.first_error) == (50, 0, 0, None)
    assert 0 < trial.p50_s <= trial.p99_s
    assert trial.items_per_s > 0
    assert {len(text) for texts in pipeline.batches for text in texts} >= {8, 16}
    assert max(map(len, pipeline.batches)) <= 2, "the limits on trial hold"


async def test_the_same_requests_are_sent_each_time() -> None:
    sizes = []
    for pipeline in (LengthPipeline(), LengthPipeline()):
        await bench(pipeline).open_loop(BatchConfig(), [8, 16, 32], plan())
        sizes.append(sorted(len(text) for texts in pipeline.batches for text in texts))
    assert sizes[0] == sizes[1]


async def test_failed_requests_are_counted_and_told_of() -> None:
    trial = await bench(Picky()).open_loop(BatchConfig(), [8, 16], plan())
    assert 0 < trial.failed < trial.sent == 50
    assert trial.unfinished == 0
    assert not trial.is_complete
    assert trial.first_error == "ValueError: too long"
    assert trial.p99_s == float("inf")


async def test_what_a_lone_request_costs_beside_its_batch_is_measured_in_batches_of_one() -> None:
    pipeline = LengthPipeline()
    assert await bench(pipeline).seconds_beside_the_batch(8, 10) > 0
    assert {len(texts) for texts in pipeline.batches} == {1}


async def test_a_lone_request_that_fails_is_told_of() -> None:
    with pytest.raises(TuningError, match="a lone request of size 16 failed: ValueError: too long"):
        await bench(Picky()).seconds_beside_the_batch(16, 10)


async def test_what_is_not_done_in_time_is_unfinished() -> None:
    pipeline = LengthPipeline()
    running = bench(pipeline)
    hurried = TrialPlan(rate_per_s=500, duration_s=0.1, patience_s=-0.1)
    trial = await running.open_loop(BatchConfig(), [8], hurried)
    assert trial.unfinished == trial.sent == 50
    assert not trial.is_complete
    assert trial.p50_s == float("inf")


async def test_the_users_own_items_are_sent_as_often_as_they_were_given() -> None:
    pipeline = LengthPipeline()
    items = [Text(text="x" * length) for length in (3, 3, 3, 900)]
    own = replace(bench(pipeline), samples=OwnSamples(pipeline, items))
    trial = await own.open_loop(BatchConfig(), [3, 900], plan())
    assert trial.is_complete
    sent = [len(text) for texts in pipeline.batches for text in texts]
    assert set(sent) - {1} == {3, 900}
    assert sent.count(3) > 1.5 * sent.count(900)


@given(rate=st.floats(0.1, 1000), batch_s=st.floats(1e-5, 100), left_s=st.floats(-10, 1000))
def test_a_trial_has_several_batches_and_ends_in_time(rate: float, batch_s: float, left_s: float) -> None:
    trial_plan = TrialPlan.within(rate, batch_s, left_s)
    if trial_plan is None:
        assert left_s <= TrialPlan.min_s(batch_s) * 1.000_001
        return
    assert trial_plan.duration_s >= 3 * batch_s
    assert batch_s + trial_plan.duration_s + trial_plan.patience_s <= left_s * 1.000_001
    assert trial_plan.patience_s >= 0.999_999 * trial_plan.duration_s
    assert trial_plan.rate_per_s == rate


def test_a_trial_of_quick_batches_takes_five_seconds_however_much_time_is_left() -> None:
    assert TrialPlan.within(100, 0.001, 1000) == TrialPlan(rate_per_s=100, duration_s=5, patience_s=6)


def trial(*, failed: int = 0, unfinished: int = 0) -> Trial:
    unknown = math.inf if failed or unfinished else 0.1
    error = "OSError: gone" if failed else None
    return Trial(
        sent=500, failed=failed, unfinished=unfinished, p50_s=0.1, p99_s=unknown, items_per_s=9.0, first_error=error
    )


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (trial(unfinished=429), r"429 of 500 requests were not done in time.*nothing is written.*--max-seconds 120"),
        (trial(failed=3, unfinished=1), r"3 of 500 requests failed.*nothing is written.*OSError: gone"),
        (None, r"--max-seconds 60 leaves too little time for batches of 10 s. Give --max-seconds 225 or more"),
    ],
)
def test_a_trial_that_does_not_complete_is_an_error_with_a_remedy(of: Trial | None, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        require_complete(of, 10.0, 60.0)
    require_complete(trial(), 10.0, 60.0)
