"""What every job store promises, asked of each of them."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from batching import Priority
from service.jobs import (
    DeliveryRecord,
    DeliveryStatus,
    DuplicateJobError,
    FinishedJob,
    Job,
    JobStatus,
    JobStore,
    JobStoreClosedError,
    JobStoreFullError,
    MemoryJobStore,
    NewJob,
    SqliteJobStore,
)

pytestmark = pytest.mark.anyio


def make_store(kind: str, folder: Path, max_jobs: int = 1000) -> JobStore:
    return MemoryJobStore(max_jobs=max_jobs) if kind == "memory" else SqliteJobStore(folder / "j.db", max_jobs=max_jobs)


@pytest.fixture(params=["memory", "sqlite"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def store(kind: str, tmp_path: Path) -> AsyncIterator[JobStore]:
    async with make_store(kind, tmp_path) as opened:
        yield opened


def new_job(job_id: str, **fields: Any) -> NewJob:
    given: dict[str, Any] = {"model_name": "m", "message": {"text": job_id}, "created_at": 1.5, **fields}
    return NewJob(job_id=job_id, **given)


def success(job_id: str, at: float = 3.0) -> FinishedJob:
    return FinishedJob(job_id=job_id, status=JobStatus.SUCCEEDED, result={"length": 1}, finished_at=at)


def failure(job_id: str, at: float = 3.0, status: JobStatus = JobStatus.FAILED) -> FinishedJob:
    return FinishedJob(job_id=job_id, status=status, error="no", finished_at=at)


async def existing(store: JobStore, job_id: str) -> Job:
    job = await store.get(job_id)
    assert job is not None
    return job


async def test_a_job_is_found_as_it_was_added(store: JobStore) -> None:
    given = new_job(
        "a",
        message={"text": "naïve 🙂", "deep": [1, {"x": None}, 2.5]},
        success_queue="ok",
        failure_queue="bad",
        meta={"user_id": "7"},
        created_at=1705314600.123456,
    )
    await store.add([given])
    job = await existing(store, "a")
    assert (job.message, job.meta, job.created_at) == (given.message, given.meta, given.created_at)
    assert (job.success_queue, job.failure_queue, job.model_name) == ("ok", "bad", "m")
    assert (job.status, job.delivery) == (JobStatus.QUEUED, DeliveryStatus.NONE)
    assert (job.started_at, job.finished_at, job.result, job.error) == (None, None, None, None)
    assert await store.get("b") is None


async def test_an_id_is_taken_once_and_a_list_is_added_whole_or_not_at_all(store: JobStore) -> None:
    await store.add([new_job("a")])
    with pytest.raises(DuplicateJobError, match="'a'"):
        await store.add([new_job("b"), new_job("a", message={"text": "other"})])
    with pytest.raises(DuplicateJobError, match="'c'"):
        await store.add([new_job("c"), new_job("c")])
    assert await store.get("b") is None
    assert await store.get("c") is None
    assert (await existing(store, "a")).message == {"text": "a"}
    assert (await store.counts())[JobStatus.QUEUED] == 1


async def test_a_full_store_refuses_until_ended_jobs_are_removed(kind: str, tmp_path: Path) -> None:
    async with make_store(kind, tmp_path, max_jobs=3) as store:
        await store.add([new_job("a"), new_job("b")])
        with pytest.raises(JobStoreFullError, match="2 of at most 3 jobs and has no room for 2 more"):
            await store.add([new_job("c"), new_job("d")])
        await store.add([new_job("c")])
        await store.take("m", 1, 2.0)
        await store.finish([success("a")])
        with pytest.raises(JobStoreFullError):
            await store.add([new_job("d")])
        assert await store.remove_finished(4.0) == 1
        await store.add([new_job("d")])


async def test_jobs_are_taken_in_order_once_and_by_model(store: JobStore) -> None:
    await store.add([new_job("z"), new_job("other", model_name="n"), new_job("a")])
    await store.add([new_job("k")])
    first = await store.take("m", 2, 2.5)
    assert [job.job_id for job in first] == ["z", "a"]
    assert all((job.status, job.started_at) == (JobStatus.RUNNING, 2.5) for job in first)
    assert [job.job_id for job in await store.take("m", 10, 2.5)] == ["k"]
    assert await store.take("m", 10, 2.5) == []
    assert [job.job_id for job in await store.take("n", 10, 2.5)] == ["other"]
    assert await existing(store, "z") == first[0]


async def test_ends_are_stored_and_messages_fall_due_where_a_queue_was_named(store: JobStore) -> None:
    await store.add(
        [
            new_job("a", success_queue="ok", failure_queue="bad"),
            new_job("b", success_queue="ok", failure_queue="bad"),
            new_job("c", failure_queue="bad"),
            new_job("d", success_queue="ok"),
            new_job("e", failure_queue="bad"),
        ]
    )
    await store.take("m", 10, 2.0)
    outcomes = [success("a"), failure("b"), success("c"), failure("d"), failure("e", status=JobStatus.EXPIRED)]
    ended = await store.finish(outcomes)
    assert [(job.job_id, job.status, job.delivery) for job in ended] == [
        ("a", JobStatus.SUCCEEDED, DeliveryStatus.PENDING),
        ("b", JobStatus.FAILED, DeliveryStatus.PENDING),
        ("c", JobStatus.SUCCEEDED, DeliveryStatus.NONE),
        ("d", JobStatus.FAILED, DeliveryStatus.NONE),
        ("e", JobStatus.EXPIRED, DeliveryStatus.PENDING),
    ]
    assert (ended[0].result, ended[0].error, ended[0].finished_at) == ({"length": 1}, None, 3.0)
    assert (ended[1].result, ended[1].error, ended[1].delivery_queue) == (None, "no", "bad")
    for job in ended:
        assert await existing(store, job.job_id) == job


async def test_only_a_job_in_the_right_state_ends(store: JobStore) -> None:
    await store.add([new_job("queued"), new_job("late"), new_job("cancelled")])
    await store.cancel("cancelled", 2.0)
    outcomes = [success("queued"), failure("late", status=JobStatus.EXPIRED), success("cancelled"), success("unknown")]
    assert [job.job_id for job in await store.finish(outcomes)] == ["late"]
    assert await store.finish([success("late")]) == []
    assert (await existing(store, "queued")).status is JobStatus.QUEUED
    assert (await existing(store, "cancelled")).status is JobStatus.CANCELLED


async def test_cancelling_ends_what_has_not_ended(store: JobStore) -> None:
    await store.add([new_job("queued"), new_job("running"), new_job("done", success_queue="ok")])
    await store.cancel("queued", 2.0)
    assert [job.job_id for job in await store.take("m", 10, 2.0)] == ["running", "done"]
    await store.finish([success("done")])
    running = await store.cancel("running", 5.0)
    assert running is not None
    assert (running.status, running.finished_at, running.delivery) == (JobStatus.CANCELLED, 5.0, DeliveryStatus.NONE)
    assert await existing(store, "running") == running
    done = await store.cancel("done", 5.0)
    assert done is not None
    assert (done.status, done.finished_at) == (JobStatus.SUCCEEDED, 3.0)
    assert await store.cancel("unknown", 5.0) is None


async def test_pending_deliveries_come_in_pages_by_the_time_of_their_end(store: JobStore) -> None:
    ends = {"d": 3.0, "a": 4.0, "c": 3.0, "b": 5.0}
    await store.add([new_job(job_id, success_queue="ok") for job_id in ends])
    await store.take("m", 10, 2.0)
    await store.finish([success(job_id, at) for job_id, at in ends.items()])
    first = await store.pending_deliveries(2)
    second = await store.pending_deliveries(2, first[-1])
    assert [job.job_id for job in first + second] == ["c", "d", "a", "b"]
    assert await store.pending_deliveries(2, second[-1]) == []


async def test_deliveries_are_noted(store: JobStore) -> None:
    await store.add([new_job("a", success_queue="ok"), new_job("b")])
    await store.take("m", 10, 2.0)
    await store.finish([success("a"), success("b")])
    failed = DeliveryRecord(job_id="a", status=DeliveryStatus.PENDING, attempts=1, error="down")
    await store.record_delivery([failed, replace(failed, job_id="b"), replace(failed, job_id="unknown")])
    assert [(job.delivery_attempts, job.delivery_error) for job in await store.pending_deliveries(9)] == [(1, "down")]
    await store.record_delivery([DeliveryRecord(job_id="a", status=DeliveryStatus.DELIVERED, attempts=2)])
    job = await existing(store, "a")
    assert (job.delivery, job.delivery_attempts, job.delivery_error) == (DeliveryStatus.DELIVERED, 2, None)
    assert await store.pending_deliveries(9) == []
    assert (await existing(store, "b")).delivery is DeliveryStatus.NONE


async def test_interactive_jobs_are_taken_first_and_bulk_ones_have_their_places(store: JobStore) -> None:
    await store.add([new_job(f"b{n}") for n in range(6)])
    await store.add([new_job(f"i{n}", priority=Priority.INTERACTIVE) for n in range(6)])

    async def take(limit: int, bulk_places: int = 0) -> set[str]:
        taken = await store.take("m", limit, 2.0, bulk_places=bulk_places)
        assert len(taken) <= limit
        return {job.job_id for job in taken}

    assert await take(2) == {"i0", "i1"}
    assert await take(3, 1) == {"b0", "i2", "i3"}
    assert await take(1, 9) == {"b1"}
    assert await take(9, 1) == {"b2", "b3", "b4", "b5", "i4", "i5"}
    job = await existing(store, "i0")
    assert job.priority is Priority.INTERACTIVE
    assert (await existing(store, "b0")).priority is Priority.BULK


async def test_requeued_jobs_run_again_in_their_old_places_and_keep_their_first_start(store: JobStore) -> None:
    await store.add([new_job("a"), new_job("b"), new_job("c")])
    await store.take("m", 2, 2.0)
    await store.finish([success("a")])
    assert await store.requeue_running() == 1
    again = await store.take("m", 10, 9.0)
    assert [(job.job_id, job.started_at) for job in again] == [("b", 2.0), ("c", 9.0)]


async def test_old_ends_are_removed_unless_their_delivery_is_pending(store: JobStore) -> None:
    await store.add([new_job(job_id, success_queue="ok" if job_id == "b" else None) for job_id in "abcd"])
    await store.take("m", 3, 2.0)
    await store.finish([success("a", 3.0), success("b", 3.0), success("c", 9.0)])
    assert await store.remove_finished(5.0) == 1
    assert [job_id for job_id in "abcd" if await store.get(job_id) is not None] == ["b", "c", "d"]
    await store.record_delivery([DeliveryRecord(job_id="b", status=DeliveryStatus.UNDELIVERED, attempts=8, error="x")])
    assert await store.remove_finished(5.0) == 1
    assert await store.get("b") is None


async def test_many_are_removed_at_once(kind: str, tmp_path: Path) -> None:
    async with make_store(kind, tmp_path, 5000) as store:
        await store.add([new_job(f"{n}") for n in range(2500)])
        await store.take("m", 2500, 2.0)
        await store.finish([success(f"{n}") for n in range(2500)])
        assert await store.remove_finished(4.0) == 2500
        assert sum((await store.counts()).values()) == 0


async def test_counts_follow_every_change(store: JobStore) -> None:
    await store.add([new_job(f"{n}") for n in range(6)])
    await store.take("m", 4, 2.0)
    await store.finish([success("0"), failure("1"), failure("2", status=JobStatus.EXPIRED)])
    await store.cancel("5", 2.0)
    assert await store.counts() == {
        JobStatus.QUEUED: 1,
        JobStatus.RUNNING: 1,
        JobStatus.SUCCEEDED: 1,
        JobStatus.FAILED: 1,
        JobStatus.EXPIRED: 1,
        JobStatus.CANCELLED: 1,
    }


async def test_many_callers_at_once_lose_nothing(store: JobStore) -> None:
    async def live(job_id: str) -> None:
        await store.add([new_job(job_id)])
        assert (await existing(store, job_id)).status is JobStatus.QUEUED

    async with anyio.create_task_group() as task_group:
        for n in range(200):
            task_group.start_soon(live, f"{n}")
    assert len(await store.take("m", 1000, 2.0)) == 200


async def test_a_store_that_is_not_open_says_so(kind: str, tmp_path: Path) -> None:
    store = make_store(kind, tmp_path)
    with pytest.raises(JobStoreClosedError, match="async with"):
        await store.get("a")
    async with store:
        assert await store.get("a") is None
    with pytest.raises(JobStoreClosedError):
        await store.add([new_job("a")])


async def test_an_exception_in_the_block_comes_out_as_it_was_raised(kind: str, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="mine"):
        async with make_store(kind, tmp_path):
            raise LookupError("mine")


def test_names_with_unprintable_characters_are_refused() -> None:
    with pytest.raises(ValueError, match="success_queue must not hold unprintable characters"):
        new_job("a", success_queue="a\x00b")
    with pytest.raises(ValueError, match="status must be succeeded, failed or expired"):
        FinishedJob(job_id="a", status=JobStatus.CANCELLED, finished_at=1.0)
    with pytest.raises(ValueError, match="status must be pending, delivered or undelivered"):
        DeliveryRecord(job_id="a", status=DeliveryStatus.NONE, attempts=1)
