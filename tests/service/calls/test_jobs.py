"""Jobs as calls, where what they rely on fails."""

from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from modalkit.service.on_modal.call_jobs import CallJobs, JobSpawner
from modalkit.service.on_modal.ledger import CallLedger, MemoryTable
from modalkit.service.on_modal.lists import EAGER_LISTS
from modalkit.service.on_modal.remote import CallResult

from modalkit.batching import Priority
from modalkit.pipelines import AsyncInputModel
from modalkit.service.errors import RemoteCallError
from modalkit.service.jobs import JobStatus, JobStoreError
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.settings import BatchConfig
from tests.support.length_model import LengthPipeline
from tests.support.modal_in_process import ModalInProcess

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # the service's hooks run on asyncio alone


class FailingTable(MemoryTable):
    """Does not write what is under keys that have `failing` in them."""

    failing = ""

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        if self.failing and self.failing in key and not (isinstance(value, dict) and "reserved_at" in value):
            raise JobStoreError("the table is gone")
        return await super().put(key, value, skip_if_exists=skip_if_exists)


class Unreachable:
    """What Modal is without a network."""

    async def result(self, call_id: str, wait_s: float) -> CallResult:
        raise RemoteCallError("Modal could not be asked")

    async def cancel(self, call_id: str) -> None:
        raise RemoteCallError("Modal could not cancel the call")


class Uncancellable(ModalInProcess):
    """Modal, which answers and cannot cancel."""

    async def cancel(self, call_id: str) -> None:
        raise RemoteCallError("Modal could not cancel the call")


def spawner(calls: ModalInProcess, ledger: CallLedger, **config: Any) -> JobSpawner:
    rules, batches = QueueRules(["*"], None), BatchConfig(**{"max_batch_size": 32} | config)
    return JobSpawner(calls.remote, ledger, rules, batches, model_name="lengths")


def asked(text: str, **fields: Any) -> AsyncInputModel:
    return AsyncInputModel(message={"text": text}, **fields)


async def test_submissions_of_many_callers_share_calls(calls: ModalInProcess) -> None:
    """A call costs a round trip: while as many are under way as hide it, what comes waits for company."""
    job_ids: dict[str, str] = {}

    async def submit(spawner: JobSpawner, text: str) -> None:
        job_ids[text] = await spawner.submit(asked(text), Priority.BULK)

    calls.may_call = anyio.Event()
    async with spawner(calls, calls.ledger) as jobs, anyio.create_task_group() as task_group:
        for n in range(1, EAGER_LISTS + 65):
            task_group.start_soon(submit, jobs, "x" * n)
            for _ in range(5):  # one caller after the other
                await checkpoint()
        calls.may_call.set()
    assert len(calls.calls) == EAGER_LISTS + 2
    assert sorted(len(call.entries) for call in calls.calls.values()) == [1] * EAGER_LISTS + [32] * 2
    told = CallJobs(calls, calls.ledger)
    for text, job_id in job_ids.items():
        job = await told.job(job_id, 30)
        assert job is not None
        assert (job.message, (job.result or {})["length"]) == ({"text": text}, len(text))


async def test_more_jobs_are_accepted_than_items_may_wait_for_a_worker(calls: ModalInProcess) -> None:
    """That bound is one of a container's queue, and Modal has another."""
    job_ids: set[str] = set()

    async def submit(jobs: JobSpawner) -> None:
        job_ids.add(await jobs.submit(asked("four"), Priority.BULK))

    async with spawner(calls, calls.ledger, max_queue_size=32) as jobs, anyio.create_task_group() as task_group:
        for _ in range(256):
            task_group.start_soon(submit, jobs)
    assert len(job_ids) == 256


async def test_a_job_that_could_not_be_noted_is_accepted_all_the_same(
    calls: ModalInProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Modal has it. Until it ends, no more than that is known."""
    assert isinstance(calls.pipeline, LengthPipeline)
    calls.pipeline.gate.clear()
    table = FailingTable()
    table.failing = "fc-"
    ledger = CallLedger(table)
    async with spawner(calls, ledger) as jobs:
        job_id = await jobs.submit(asked("four", meta={"n": 1}), Priority.BULK)
    told = CallJobs(calls, ledger)
    job = await told.job(job_id)
    assert job is not None
    assert (job.job_id, job.status, job.meta) == (job_id, JobStatus.QUEUED, {})
    calls.pipeline.gate.set()
    job = await told.job(job_id, 30)
    assert job is not None
    assert (job.status, job.meta, job.model_name) == (JobStatus.SUCCEEDED, {"n": 1}, "lengths")
    assert "could not be noted" in caplog.text


async def test_a_job_whose_key_could_not_be_noted_is_accepted_all_the_same(
    calls: ModalInProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """An error would have it submitted a second time."""
    table = FailingTable()
    table.failing = "key/"
    async with spawner(calls, CallLedger(table)) as jobs:
        job_id = await jobs.submit(asked("four", idempotency_key="order-7"), Priority.BULK)
    assert await CallJobs(calls, calls.ledger).job(job_id, 30) is not None
    assert f"That job {job_id} has an idempotency key could not be noted" in caplog.text


async def test_a_job_of_which_modal_cannot_be_asked_is_neither_found_nor_missing() -> None:
    told = CallJobs(Unreachable(), CallLedger(MemoryTable()))
    for ask in (told.job, told.cancel):
        with pytest.raises(JobStoreError, match="Modal could not be asked"):
            await ask("fc-01J.0")
    assert await told.job("another store's id") is None


async def test_a_cancelled_job_stays_so_where_its_call_cannot_be_ended(
    calls: ModalInProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Its container finds the mark."""
    assert isinstance(calls.pipeline, LengthPipeline)
    calls.pipeline.gate.clear()
    async with Uncancellable(calls.service) as uncancellable:
        async with spawner(uncancellable, calls.ledger) as jobs:
            job_id = await jobs.submit(asked("four"), Priority.BULK)
        told = CallJobs(uncancellable, calls.ledger)
        cancelled = await told.cancel(job_id)
        assert cancelled is not None
        assert cancelled.status is JobStatus.CANCELLED
        calls.pipeline.gate.set()
        (call,) = uncancellable.calls.values()
        await call.ended.wait()
        job = await told.job(job_id)
    assert job is not None
    assert (job.status, job.result) == (JobStatus.CANCELLED, None)
    assert "its container will find its jobs cancelled" in caplog.text


async def test_a_submission_whose_caller_goes_away_before_it_is_sent_becomes_no_job(calls: ModalInProcess) -> None:
    calls.may_call = anyio.Event()
    async with spawner(calls, calls.ledger) as jobs, anyio.create_task_group() as task_group:
        for n in range(EAGER_LISTS):
            task_group.start_soon(jobs.submit, asked(f"first {n}"), Priority.BULK)
            for _ in range(5):
                await checkpoint()
        async with anyio.create_task_group() as gone:
            gone.start_soon(jobs.submit, asked("gone"), Priority.BULK)
            for _ in range(5):
                await checkpoint()
            gone.cancel_scope.cancel()
        calls.may_call.set()
    sent = [entry["message"]["text"] for call in calls.calls.values() for entry in call.entries]
    assert sorted(sent) == [f"first {n}" for n in range(EAGER_LISTS)]
