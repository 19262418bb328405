"""What every engine promises, and what a frontend and a worker make of it when the engine fails."""

import json
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from modalkit.batching import Failure, Success
from modalkit.pipelines import AsyncInputModel
from modalkit.service.calls.engine import CallOptions, CallState
from modalkit.service.calls.in_process import Faults
from modalkit.service.errors import ContainerFaultError, RemoteCallError
from modalkit.service.jobs import JobStatus, JobStoreError
from tests.service.calls.conftest import MODEL, OpenStand, Stand
from tests.support.length_model import POISON, LengthPipeline, Text

pytestmark = pytest.mark.anyio

JOBS = CallOptions(accepted_at=1_700_000_000.0)
FAULT = "fault"


class Fragile(LengthPipeline):
    """Its device breaks when it meets one text; this is told as torch tells it."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if FAULT in preprocessed_data["texts"]:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().predict(input_list, preprocessed_data)


def item(text: str) -> dict[str, Any]:
    return {"message": {"text": text}}


def job(text: str, **options: Any) -> dict[str, Any]:
    return {"message": {"text": text}, "success_queue": "ok", "failure_queue": "bad"} | options


def asked(text: str, **options: Any) -> AsyncInputModel:
    return AsyncInputModel(**job(text, **options))


async def submitted(stand: Stand, *texts: str, **options: Any) -> list[str]:
    async with stand.jobs() as jobs:
        outcomes = await jobs.submit([asked(text, **options) for text in texts], model_name=MODEL)
    return [outcome.value for outcome in outcomes if isinstance(outcome, Success)]


async def status_of(stand: Stand, job_id: str, wait_s: float = 30.0) -> str | None:
    found = await stand.jobs().get(job_id, wait_s)
    return None if found is None else str(found.status)


def delivered(stand: Stand, queue_name: str = "ok") -> list[str]:
    return [json.loads(text)["job_id"] for text in stand.queue.messages(queue_name)]


async def entered(pipeline: LengthPipeline) -> None:
    assert await anyio.to_thread.run_sync(pipeline.entered.acquire, True, 30)


async def test_a_call_returns_an_outcome_for_each_entry(stand: Stand) -> None:
    outcomes = await stand.engine.call(MODEL, [item("a"), item(POISON), item("ccc")], CallOptions())
    assert [outcome.get("length") for outcome in outcomes] == [1, None, 3]
    assert outcomes[1]["error"] == "ValueError: this batch is poisoned"


async def test_a_kept_call_is_pending_until_it_returns_and_keeps_its_outcomes(stand: Stand) -> None:
    stand.pipeline.gate.clear()
    call_id = await stand.engine.enqueue(MODEL, [job("four")], JOBS)
    assert (await stand.engine.result(call_id, 0.0)).state is CallState.PENDING
    assert (await stand.engine.result(call_id, 0.01)).state is CallState.PENDING
    stand.pipeline.gate.set()
    for _ in range(2):
        result = await stand.engine.result(call_id, 30.0)
        assert result.state is CallState.RETURNED
        assert [outcome["job_id"] for outcome in result.outcomes] == [f"{call_id}.0"]


async def test_a_call_that_was_never_made_is_unknown(stand: Stand) -> None:
    assert (await stand.engine.result("fc-other", 0.0)).state is CallState.UNKNOWN
    assert (await stand.engine.result("nothing-of-ours", 0.0)).state is CallState.UNKNOWN


async def test_a_kept_call_is_cancelled_once_and_its_worker_goes_on(stand: Stand) -> None:
    stand.pipeline.gate.clear()
    call_id = await stand.engine.enqueue(MODEL, [job("four")], JOBS)
    await entered(stand.pipeline)
    await stand.engine.cancel(call_id)
    assert (await stand.engine.result(call_id, 30.0)).state is CallState.CANCELLED
    stand.pipeline.gate.set()
    (outcome,) = await stand.engine.call(MODEL, [item("works")], CallOptions())
    assert outcome["length"] == 5
    assert delivered(stand) == []


async def test_what_a_call_raises_is_its_failure_and_no_other_calls(stand: Stand) -> None:
    wrong = CallOptions(timeouts_s=[1.0, 2.0])
    with pytest.raises(RemoteCallError, match="2 values for 1 entries"):
        await stand.engine.call(MODEL, [item("a")], wrong)
    call_id = await stand.engine.enqueue(MODEL, [item("a")], wrong)
    result = await stand.engine.result(call_id, 30.0)
    assert (result.state, "2 values for 1 entries" in str(result.error)) == (CallState.FAILED, True)


async def test_a_broken_device_fails_the_call_and_nothing_is_sent(open_stand: OpenStand) -> None:
    async with open_stand(Fragile, retries=1) as stand:
        with pytest.raises(ContainerFaultError, match="device-side assert triggered"):
            await stand.engine.call(MODEL, [item(FAULT)], CallOptions())
        assert stand.queue.queue_names() == []


async def test_the_last_run_of_a_call_tells_the_queues_of_its_jobs_that_the_device_broke(
    open_stand: OpenStand,
) -> None:
    async with open_stand(Fragile, retries=1) as stand:
        (job_id,) = await submitted(stand, FAULT)
        found = await stand.jobs().get(job_id, 30.0)
        assert found is not None
        assert (found.status, str(found.delivery)) == (JobStatus.FAILED, "delivered")
        assert "device" in str(found.error)
        assert delivered(stand, "bad") == [job_id]
        assert [call.runs for call in stand.kept_calls] == [2]


async def test_a_result_that_is_no_longer_kept_is_told_from_a_job_that_never_was(stand: Stand) -> None:
    (job_id,) = await submitted(stand, "four")
    assert await status_of(stand, job_id) == "succeeded"
    stand.carrier.forget_results()
    forgotten = await stand.jobs().get(job_id)
    assert forgotten is not None
    assert forgotten.status is JobStatus.EXPIRED
    assert "kept" in str(forgotten.error)


async def test_a_call_whose_worker_is_lost_before_it_ran_runs_again(stand: Stand) -> None:
    stand.carrier.faults.workers_lost_before_a_run = 2
    (job_id,) = await submitted(stand, "four")
    assert await status_of(stand, job_id) == "succeeded"
    assert delivered(stand) == [job_id]
    assert [call.runs for call in stand.kept_calls] == [3]


async def test_a_call_whose_worker_is_lost_after_it_ran_runs_and_delivers_again_under_the_same_ids(
    stand: Stand,
) -> None:
    stand.carrier.faults.workers_lost_after_a_run = 1
    job_ids = await submitted(stand, "one", "three")
    assert [await status_of(stand, job_id) for job_id in job_ids] == ["succeeded"] * 2
    assert sorted(delivered(stand)) == sorted([*job_ids, *job_ids])


async def test_a_call_whose_worker_is_lost_while_it_runs_runs_again(stand: Stand) -> None:
    stand.pipeline.gate.clear()
    job_ids = await submitted(stand, "one", "three")
    await entered(stand.pipeline)
    stand.carrier.lose_worker()
    stand.pipeline.gate.set()
    assert [await status_of(stand, job_id) for job_id in job_ids] == ["succeeded"] * 2
    assert sorted(delivered(stand)) == sorted(job_ids)


async def test_a_call_that_runs_twice_delivers_twice_and_keeps_its_first_outcomes(stand: Stand) -> None:
    stand.carrier.faults.duplicated_runs = 1
    (job_id,) = await submitted(stand, "four")
    assert await status_of(stand, job_id) == "succeeded"
    with anyio.fail_after(30):
        while len(delivered(stand)) < 2:
            await anyio.sleep(0.001)
    assert delivered(stand) == [job_id] * 2
    assert await status_of(stand, job_id) == "succeeded"


async def test_a_cancelled_job_stays_cancelled_when_its_call_runs_again(stand: Stand) -> None:
    stand.pipeline.gate.clear()
    first, second = await submitted(stand, "one", "three")
    await entered(stand.pipeline)
    cancelled = await stand.jobs().cancel(first)
    assert cancelled is not None
    stand.carrier.lose_worker()
    stand.pipeline.gate.set()
    assert [await status_of(stand, job_id) for job_id in (first, second)] == ["cancelled", "succeeded"]
    assert delivered(stand) == [second]


async def test_calls_that_the_engine_refuses_are_errors_of_their_items_and_jobs(stand: Stand) -> None:
    stand.carrier.faults.refuses_calls = True
    async with stand.model() as model, stand.jobs(model) as jobs:
        outcomes = await model.predict_many([Text(text="one"), Text(text="two")])
        assert [type(outcome.error) for outcome in outcomes if isinstance(outcome, Failure)] == [RemoteCallError] * 2
        (refused,) = await jobs.submit([asked("four")], model_name=MODEL)
        assert isinstance(refused, Failure)
        assert isinstance(refused.error, JobStoreError)
        assert "did not accept the call" in str(refused.error)


async def test_an_engine_that_cannot_be_asked_says_nothing_of_a_job(stand: Stand) -> None:
    (job_id,) = await submitted(stand, "four")
    assert await status_of(stand, job_id) == "succeeded"
    stand.carrier.faults.is_unreachable = True
    for ask in (stand.jobs().get, stand.jobs().cancel):
        with pytest.raises(JobStoreError, match="could not be asked"):
            await ask(job_id)
    stand.carrier.faults.is_unreachable = False
    assert await status_of(stand, job_id) == "succeeded"


async def test_a_call_that_cannot_reach_the_key_value_store_fails_as_a_whole_and_sends_nothing(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    """Its jobs could have been cancelled. That they were accepted holds: the engine has their call."""
    stand.carrier.faults.store_is_unreachable = True
    (job_id,) = await submitted(stand, "four")
    assert "could not be recorded" in caplog.text
    (call,) = stand.kept_calls
    await call.ended.wait()
    with pytest.raises(JobStoreError):
        await stand.jobs().get(job_id)
    stand.carrier.faults.store_is_unreachable = False
    found = await stand.jobs().get(job_id)
    assert found is not None
    assert found.status is JobStatus.FAILED
    assert "reach" in str(found.error)
    assert stand.queue.queue_names() == []


async def test_a_slow_key_value_store_delays_jobs_and_loses_none(stand: Stand) -> None:
    stand.carrier.faults.store_delay_s = 0.01
    job_ids = await submitted(stand, "one", "three", idempotency_key=None)
    assert [await status_of(stand, job_id) for job_id in job_ids] == ["succeeded"] * 2


async def test_faults_are_off_unless_they_are_switched_on() -> None:
    assert Faults() == Faults(
        workers_lost_before_a_run=0,
        workers_lost_after_a_run=0,
        duplicated_runs=0,
        refuses_calls=False,
        is_unreachable=False,
        store_is_unreachable=False,
        store_delay_s=0.0,
    )
