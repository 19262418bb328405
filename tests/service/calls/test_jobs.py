"""Jobs as calls, where what they rely on fails."""

from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from modalkit.batching import Failure, Priority, Success
from modalkit.pipelines import AsyncInputModel
from modalkit.service.calls import records as records_module
from modalkit.service.calls.engine import CallState, KeyValueStore
from modalkit.service.calls.jobs import CallJobs
from modalkit.service.calls.predictor import MAX_PARTIAL_CALLS_IN_FLIGHT
from modalkit.service.calls.records import RESERVATION_S, CallRecords
from modalkit.service.errors import UnknownModelError
from modalkit.service.jobs import IdempotencyKeyReusedError, JobStatus, JobStoreError
from modalkit.testing import FakeClock
from tests.service.calls.conftest import MODEL, Stand
from tests.support.length_model import Text

pytestmark = pytest.mark.anyio


class Failing:
    """A key-value store that does not write what is under keys that have `failing` in them, reservations aside."""

    def __init__(self, store: KeyValueStore, failing: str) -> None:
        self.get, self.items, self.remove, self._put = store.get, store.items, store.remove, store.put
        self._failing = failing

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        if self._failing in key and not (isinstance(value, dict) and "reserved_at" in value):
            raise JobStoreError("the store is gone")
        return await self._put(key, value, skip_if_exists=skip_if_exists)


def asked(text: str, **fields: Any) -> AsyncInputModel:
    return AsyncInputModel(message={"text": text}, **fields)


async def accepted(jobs: CallJobs, request: AsyncInputModel, priority: Priority = Priority.BULK) -> str:
    (outcome,) = await jobs.submit([request], model_name=MODEL, priority=priority)
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome.value


async def test_submissions_of_many_callers_share_calls(stand: Stand) -> None:
    """A call costs a round trip: while as many are under way as hide it, what comes waits for company."""
    job_ids: dict[str, str] = {}

    async def submit(jobs: CallJobs, text: str) -> None:
        job_ids[text] = await accepted(jobs, asked(text))

    stand.carrier.hold()
    async with stand.jobs() as jobs, anyio.create_task_group() as task_group:
        for n in range(1, MAX_PARTIAL_CALLS_IN_FLIGHT + 65):
            task_group.start_soon(submit, jobs, "x" * n)
            for _ in range(5):  # one caller after the other
                await checkpoint()
        stand.carrier.release()
    assert len(stand.kept_calls) == MAX_PARTIAL_CALLS_IN_FLIGHT + 2
    assert sorted(len(call.entries) for call in stand.kept_calls) == [1] * MAX_PARTIAL_CALLS_IN_FLIGHT + [32] * 2
    told = stand.jobs()
    for text, job_id in job_ids.items():
        job = await told.get(job_id, 30)
        assert job is not None
        assert (job.message, (job.result or {})["length"]) == ({"text": text}, len(text))


async def test_more_jobs_are_accepted_than_items_may_wait_for_a_worker(stand: Stand) -> None:
    """That bound is one of a container's queue, and Modal has another."""
    job_ids: set[str] = set()

    async def submit(jobs: CallJobs) -> None:
        job_ids.add(await accepted(jobs, asked("four")))

    async with stand.jobs(max_queue_size=32) as jobs, anyio.create_task_group() as task_group:
        for _ in range(256):
            task_group.start_soon(submit, jobs)
    assert len(job_ids) == 256


async def test_a_job_that_could_not_be_recorded_is_accepted_all_the_same(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine has it. Until it ends, no more than that is known."""
    stand.pipeline.gate.clear()
    records = CallRecords(Failing(stand.store, "0"))  # of the keys in use, only a call's id has digits
    async with stand.jobs(records=records) as jobs:
        job_id = await accepted(jobs, asked("four", meta={"n": 1}))
        job = await jobs.get(job_id)
        assert job is not None
        assert (job.job_id, job.status, job.meta) == (job_id, JobStatus.QUEUED, {})
        stand.pipeline.gate.set()
        job = await jobs.get(job_id, 30)
    assert job is not None
    assert (job.status, job.meta, job.model_name) == (JobStatus.SUCCEEDED, {"n": 1}, MODEL)
    assert "could not be recorded" in caplog.text


async def test_a_job_whose_key_could_not_be_recorded_is_accepted_all_the_same(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    """An error would have it submitted a second time."""
    async with stand.jobs(records=CallRecords(Failing(stand.store, "key/"))) as jobs:
        job_id = await accepted(jobs, asked("four", idempotency_key="order-7"))
    assert await stand.jobs().get(job_id, 30) is not None
    assert f"The idempotency key of job {job_id} could not be recorded" in caplog.text


async def test_a_job_whose_key_was_written_though_no_answer_came_is_accepted(stand: Stand) -> None:
    class LosesAnswers(Failing):
        async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
            await self._put(key, value, skip_if_exists=skip_if_exists)
            return await self._put(key, value, skip_if_exists=skip_if_exists)

    async with stand.jobs(records=CallRecords(LosesAnswers(stand.store, ""))) as jobs:
        job_ids = [await accepted(jobs, asked("four", idempotency_key="k")) for _ in range(2)]
    assert job_ids[0] == job_ids[1]
    assert len(stand.kept_calls) == 1


class TextWithLanguage(Text):
    language: str | None = None


async def test_a_repetition_is_known_after_the_input_model_has_got_an_optional_field(stand: Stand) -> None:
    async with stand.jobs() as jobs:
        first = await accepted(jobs, asked("four", idempotency_key="k"))
    async with stand.jobs(stand.model(TextWithLanguage)) as jobs:
        assert await accepted(jobs, asked("four", idempotency_key="k")) == first
        for message in ({"text": "five"}, {"text": "four", "language": "en"}):
            with pytest.raises(IdempotencyKeyReusedError):
                await accepted(jobs, AsyncInputModel(message=message, idempotency_key="k"))
    assert len(stand.kept_calls) == 1


async def test_a_request_holds_its_key_for_as_long_as_it_waits(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its repetition at another frontend would become a second job."""
    clock, job_ids, request = FakeClock(), list[str](), asked("four", idempotency_key="k")

    async def submit(jobs: CallJobs) -> None:
        job_ids.append(await accepted(jobs, request))

    async def renewed() -> None:
        with anyio.fail_after(10):
            while (await stand.store.get("key/k") or {}).get("reserved_at") != clock():
                await anyio.sleep(0.001)

    monkeypatch.setattr(records_module, "RENEWAL_INTERVAL_S", 0.001)
    first, second = (stand.jobs(records=CallRecords(stand.store, clock=clock)) for _ in range(2))
    stand.carrier.hold()
    async with first, second, anyio.create_task_group() as task_group:
        task_group.start_soon(submit, first)
        try:
            await renewed()
            for _ in range(2):
                clock.advance(RESERVATION_S - 1)
                await renewed()
            with pytest.raises(JobStoreError, match="'k' is under way; retry in a moment"):
                await accepted(second, request)
        finally:
            stand.carrier.release()
    async with stand.jobs() as third:
        await submit(third)
    assert job_ids[0] == job_ids[1]


async def test_a_request_that_fails_late_releases_no_key_that_another_one_has_taken_over(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, sending, may_fail, enqueue = FakeClock(), anyio.Event(), anyio.Event(), stand.engine.enqueue
    request, failed = asked("four", idempotency_key="k"), anyio.Event()

    async def fail_late(*_: object) -> str:
        monkeypatch.setattr(stand.engine, "enqueue", enqueue)
        sending.set()
        await may_fail.wait()
        raise JobStoreError("the engine is gone")

    async def submit(jobs: CallJobs) -> None:
        with pytest.raises(JobStoreError, match="the engine is gone"):
            await accepted(jobs, request)
        failed.set()

    monkeypatch.setattr(stand.engine, "enqueue", fail_late)
    first, second = (stand.jobs(records=CallRecords(stand.store, clock=clock)) for _ in range(2))
    async with first, second, anyio.create_task_group() as task_group:
        task_group.start_soon(submit, first)
        await sending.wait()
        clock.advance(RESERVATION_S)  # as where its renewals failed
        job_id = await accepted(second, request)
        may_fail.set()
        await failed.wait()
        assert await accepted(second, request) == job_id


async def test_an_id_of_another_store_names_no_job(stand: Stand) -> None:
    stand.carrier.faults.is_unreachable = True
    assert await stand.jobs().get("another store's id") is None
    assert await stand.jobs().cancel("another store's id") is None


async def test_a_cancelled_job_stays_so_where_its_call_cannot_be_ended(
    stand: Stand, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker finds the mark."""
    stand.pipeline.gate.clear()
    async with stand.jobs() as jobs:
        job_id = await accepted(jobs, asked("four"))

        async def cancel(call_id: str) -> None:
            stand.carrier.faults.is_unreachable = True
            await type(stand.engine).cancel(stand.engine, call_id)  # type: ignore[arg-type]  # of either engine

        monkeypatch.setattr(stand.engine, "cancel", cancel)
        cancelled = await jobs.cancel(job_id)
        stand.carrier.faults.is_unreachable = False
        assert cancelled is not None
        assert cancelled.status is JobStatus.CANCELLED
        stand.pipeline.gate.set()
        (call,) = stand.kept_calls
        await call.ended.wait()
        assert call.result.state is CallState.RETURNED
        job = await jobs.get(job_id)
    assert job is not None
    assert (job.status, job.result) == (JobStatus.CANCELLED, None)
    assert "its worker will find its jobs cancelled" in caplog.text


async def test_a_submission_whose_caller_goes_away_before_it_is_sent_becomes_no_job(stand: Stand) -> None:
    stand.carrier.hold()
    async with stand.jobs() as jobs, anyio.create_task_group() as task_group:
        for n in range(MAX_PARTIAL_CALLS_IN_FLIGHT):
            task_group.start_soon(accepted, jobs, asked(f"first {n}"))
            for _ in range(5):
                await checkpoint()
        async with anyio.create_task_group() as gone:
            gone.start_soon(accepted, jobs, asked("gone"))
            for _ in range(5):
                await checkpoint()
            gone.cancel_scope.cancel()
        stand.carrier.release()
    sent = [entry["message"]["text"] for call in stand.kept_calls for entry in call.entries]
    assert sorted(sent) == [f"first {n}" for n in range(MAX_PARTIAL_CALLS_IN_FLIGHT)]


async def test_a_request_that_is_invalid_disturbs_no_other(stand: Stand) -> None:
    requests = [
        asked("four"),
        asked(""),
        asked("five!", success_queue="elsewhere"),
        asked("x", meta={"half of a pair": "\ud83d"}),
        asked("last"),
    ]
    async with stand.jobs() as jobs:
        outcomes = await jobs.submit(requests, model_name=MODEL)
    assert [isinstance(outcome, Success) for outcome in outcomes] == [True, False, False, False, True]
    errors = [str(outcome.error) for outcome in outcomes if isinstance(outcome, Failure)]
    assert "at least 1 character" in errors[0]
    assert "'elsewhere' is not allowed" in errors[1]
    assert "surrogates" in errors[2]
    (call,) = stand.kept_calls
    assert [entry["message"]["text"] for entry in call.entries] == ["four", "last"]


async def test_a_message_may_be_validated_already_and_travels_as_json(stand: Stand) -> None:
    async with stand.jobs() as jobs:
        job_id = await accepted(jobs, AsyncInputModel(message=Text(text="four")))
        job = await jobs.get(job_id, 30)
    assert job is not None
    assert (job.status, job.message) == (JobStatus.SUCCEEDED, {"text": "four"})


async def test_jobs_of_a_model_that_is_none_are_refused(stand: Stand) -> None:
    async with stand.jobs() as jobs:
        with pytest.raises(UnknownModelError, match="'other'"):
            await jobs.submit([asked("four")], model_name="other")


async def test_its_calls_cannot_be_listed(stand: Stand) -> None:
    assert stand.jobs().administration is None


async def test_a_job_that_no_reader_of_json_takes_is_refused_and_its_neighbour_accepted_once(stand: Stand) -> None:
    meta: dict[str, Any] = {}
    for _ in range(220):
        meta = {"of": meta}
    async with stand.jobs() as jobs:
        good, deep = await jobs.submit([asked("good"), asked("deep", meta=meta)], model_name=MODEL)
    assert isinstance(good, Success)
    assert isinstance(deep, Failure)
    assert "recursion limit exceeded" in str(deep.error)
    assert len(stand.kept_calls) == 1


async def test_a_key_that_cannot_be_released_does_not_hide_why_the_job_was_refused(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(CallRecords):
        async def release(self, *_: object) -> None:
            raise JobStoreError("the store is gone")

    async def refuse(*_: object) -> str:
        raise JobStoreError("there is no room")

    monkeypatch.setattr(stand.engine, "enqueue", refuse)
    async with stand.jobs(records=Stuck(stand.store)) as jobs:
        (outcome,) = await jobs.submit([asked("a", idempotency_key="k")], model_name=MODEL)
    assert isinstance(outcome, Failure)
    assert str(outcome.error) == "there is no room"


async def test_a_job_keeps_its_owner_while_it_waits_and_once_its_call_has_returned(stand: Stand) -> None:
    """The jobs of several owners share a call; an idempotency key belongs to its owner."""
    stand.pipeline.gate.clear()
    async with stand.jobs() as jobs:
        request, ids = asked("four", idempotency_key="once"), dict[str, str]()
        for owner in ("", "shop", "blog", "shop"):
            (outcome,) = await jobs.submit([request], model_name=MODEL, owner=owner)
            assert isinstance(outcome, Success)
            assert ids.setdefault(owner, outcome.value) == outcome.value
        assert len(set(ids.values())) == 3
        (refused,) = await jobs.submit([asked("other", idempotency_key="once")], model_name=MODEL, owner="blog")
        assert isinstance(refused, Failure)
        assert ids["blog"] in str(refused.error)
        waiting = {owner: await jobs.get(job_id) for owner, job_id in ids.items()}
        stand.pipeline.gate.set()
        ended = {owner: await jobs.get(job_id, 30.0) for owner, job_id in ids.items()}
    for found in (waiting, ended):
        assert {owner: None if job is None else job.owner for owner, job in found.items()} == {o: o for o in ids}
    assert {job.status for job in ended.values() if job is not None} == {JobStatus.SUCCEEDED}
