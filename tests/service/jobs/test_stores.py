"""What every job store promises, asked of each of them."""

import itertools
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from modalkit.batching import Priority
from modalkit.service.jobs import (
    DeliveryRecord,
    DeliveryStatus,
    DuplicateJobError,
    IdempotencyKeyReusedError,
    Job,
    JobEnd,
    JobFilter,
    JobRetry,
    JobStatus,
    JobStore,
    JobStoreClosedError,
    JobStoreFullError,
    MemoryJobStore,
    Recovery,
    SqliteJobStore,
    sqlite_many,
    sqlite_table,
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


def new_job(job_id: str, **fields: Any) -> Job:
    given: dict[str, Any] = {"model_name": "m", "message_json": f'{{"text":"{job_id}"}}', "created_at": 1.5, **fields}
    return Job(job_id=job_id, **given)


def success(job_id: str, at: float = 3.0) -> JobEnd:
    return JobEnd(job_id=job_id, status=JobStatus.SUCCEEDED, result_json='{"length":1}', finished_at=at)


def failure(job_id: str, at: float = 3.0, status: JobStatus = JobStatus.FAILED) -> JobEnd:
    return JobEnd(job_id=job_id, status=status, error="no", finished_at=at)


async def existing(store: JobStore, job_id: str) -> Job:
    job = await store.get(job_id)
    assert job is not None
    return job


async def test_a_job_is_found_as_it_was_added(store: JobStore) -> None:
    given = new_job(
        "a",
        message_json='{"text":"naïve 🙂","deep":[1,{"x":null},2.5]}',
        success_queue="ok",
        failure_queue="bad",
        meta_json='{"user_id":"7"}',
        expires_at=1705314700.5,
        idempotency_key="once",
        created_at=1705314600.123456,
    )
    await store.add([given])
    job = await existing(store, "a")
    assert (job.message_json, job.meta_json, job.created_at) == (given.message_json, given.meta_json, given.created_at)
    assert (job.message["deep"], job.meta) == ([1, {"x": None}, 2.5], {"user_id": "7"})
    assert (job.expires_at, job.idempotency_key, job.crashes) == (1705314700.5, "once", 0)
    assert (job.success_queue, job.failure_queue, job.model_name) == ("ok", "bad", "m")
    assert (job.status, job.delivery) == (JobStatus.QUEUED, DeliveryStatus.NONE)
    assert (job.started_at, job.finished_at, job.result, job.error) == (None, None, None, None)
    assert await store.get("b") is None


async def test_an_id_is_used_once_and_a_list_is_added_whole_or_not_at_all(store: JobStore) -> None:
    await store.add([new_job("a")])
    with pytest.raises(DuplicateJobError, match="'a'"):
        await store.add([new_job("b"), new_job("a", message_json='{"text":"other"}')])
    with pytest.raises(DuplicateJobError, match="'c'"):
        await store.add([new_job("c"), new_job("c")])
    assert await store.get("b") is None
    assert await store.get("c") is None
    assert (await existing(store, "a")).message == {"text": "a"}
    assert (await store.counts()).statuses[JobStatus.QUEUED] == 1


async def test_an_id_that_comes_twice_is_refused_with_idempotency_keys_too(store: JobStore) -> None:
    with pytest.raises(DuplicateJobError, match="'a'"):
        await store.add([new_job("a", idempotency_key="k"), new_job("a")])
    assert await store.add([new_job("a", idempotency_key="k")]) == ["a"]
    assert await store.add([new_job("a", idempotency_key="k"), new_job("b")]) == ["a", "b"]


async def test_repetitions_in_one_list_need_room_for_one_job(kind: str, tmp_path: Path) -> None:
    async with make_store(kind, tmp_path, max_jobs=1) as store:
        same: dict[str, Any] = {"idempotency_key": "k", "message_json": "{}"}
        assert await store.add([new_job("a", **same), new_job("b", **same)]) == ["a", "a"]


async def test_a_job_whose_time_came_while_it_ran_expires_after_the_crash(store: JobStore) -> None:
    await store.add([new_job("a", expires_at=10.0)])
    await store.claim("m", 1, 2.0)
    assert await store.expire(9, 20.0) == []
    await store.recover(21.0)
    assert [job.job_id for job in await store.expire(9, 22.0)] == ["a"]


async def test_each_of_several_lists_is_added_or_fails_alone(kind: str, tmp_path: Path) -> None:
    async with make_store(kind, tmp_path, max_jobs=4) as store:
        same: dict[str, Any] = {"idempotency_key": "k", "message_json": "{}"}
        await store.add([new_job("a", **same)])
        lists = [[new_job("b"), new_job("c", **same)], [new_job("a")], [], [new_job("d"), new_job("d")]]
        added = await store.add_each([*lists, [new_job("e")], [new_job("f"), new_job("g")], [new_job("h")]])
        ids = [["b", "a"], DuplicateJobError, [], DuplicateJobError, ["e"], JobStoreFullError, ["h"]]
        assert [type(each) if isinstance(each, Exception) else each for each in added] == ids
        assert (await store.counts()).statuses[JobStatus.QUEUED] == 4


async def test_a_full_store_refuses_until_ended_jobs_are_removed(kind: str, tmp_path: Path) -> None:
    async with make_store(kind, tmp_path, max_jobs=3) as store:
        await store.add([new_job("a"), new_job("b")])
        with pytest.raises(JobStoreFullError, match="2 of at most 3 jobs and has no room for 2 more"):
            await store.add([new_job("c"), new_job("d")])
        await store.add([new_job("c")])
        await store.claim("m", 1, 2.0)
        await store.finish([success("a")])
        with pytest.raises(JobStoreFullError):
            await store.add([new_job("d")])
        assert await store.remove_finished(4.0) == 1
        await store.add([new_job("d")])


async def test_jobs_are_claimed_in_order_once_and_by_model(store: JobStore) -> None:
    await store.add([new_job("z"), new_job("other", model_name="n"), new_job("a")])
    await store.add([new_job("k")])
    first = await store.claim("m", 2, 2.5)
    assert [job.job_id for job in first] == ["z", "a"]
    assert all((job.status, job.started_at) == (JobStatus.RUNNING, 2.5) for job in first)
    assert [job.job_id for job in await store.claim("m", 10, 2.5)] == ["k"]
    assert await store.claim("m", 10, 2.5) == []
    assert [job.job_id for job in await store.claim("n", 10, 2.5)] == ["other"]
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
    await store.claim("m", 10, 2.0)
    outcomes = [success("a"), failure("b"), success("c"), failure("d"), failure("e", status=JobStatus.EXPIRED)]
    assert await store.finish(outcomes) == ["a", "b", "c", "d", "e"]
    jobs = {job_id: await existing(store, job_id) for job_id in "abcde"}
    assert [(job.job_id, job.status, job.delivery, job.delivery_queue) for job in jobs.values()] == [
        ("a", JobStatus.SUCCEEDED, DeliveryStatus.PENDING, "ok"),
        ("b", JobStatus.FAILED, DeliveryStatus.PENDING, "bad"),
        ("c", JobStatus.SUCCEEDED, DeliveryStatus.NONE, None),
        ("d", JobStatus.FAILED, DeliveryStatus.NONE, None),
        ("e", JobStatus.EXPIRED, DeliveryStatus.PENDING, "bad"),
    ]
    assert (jobs["a"].result, jobs["a"].error, jobs["a"].finished_at) == ({"length": 1}, None, 3.0)
    assert (jobs["b"].result, jobs["b"].error) == (None, "no")
    due = await store.claim_deliveries(9, 3.0, queue_limits={}, queue_limit=9)
    assert {job.job_id: job for job in due} == {job_id: jobs[job_id] for job_id in "abe"}


async def test_only_a_job_in_the_right_state_ends(store: JobStore) -> None:
    await store.add([new_job("queued"), new_job("late"), new_job("cancelled")])
    await store.cancel("cancelled", 2.0)
    outcomes = [success("queued"), failure("late", status=JobStatus.EXPIRED), success("cancelled"), success("unknown")]
    assert await store.finish(outcomes) == ["late"]
    assert await store.finish([success("late")]) == []
    assert (await existing(store, "queued")).status is JobStatus.QUEUED
    assert (await existing(store, "cancelled")).status is JobStatus.CANCELLED


async def test_cancelling_ends_what_has_not_ended(store: JobStore) -> None:
    await store.add([new_job("queued"), new_job("running"), new_job("done", success_queue="ok")])
    await store.cancel("queued", 2.0)
    assert [job.job_id for job in await store.claim("m", 10, 2.0)] == ["running", "done"]
    await store.finish([success("done")])
    running = await store.cancel("running", 5.0)
    assert running is not None
    assert (running.status, running.finished_at, running.delivery) == (JobStatus.CANCELLED, 5.0, DeliveryStatus.NONE)
    assert await existing(store, "running") == running
    done = await store.cancel("done", 5.0)
    assert done is not None
    assert (done.status, done.finished_at) == (JobStatus.SUCCEEDED, 3.0)
    assert await store.cancel("unknown", 5.0) is None


async def claim_due(store: JobStore, now: float = 9.0, limit: int = 99, queue_limit: int = 99) -> list[str]:
    return [job.job_id for job in await store.claim_deliveries(limit, now, queue_limits={}, queue_limit=queue_limit)]


async def finish_with_deliveries(store: JobStore, ends: dict[str, float], queue: str = "ok") -> None:
    await store.add([new_job(job_id, success_queue=queue, model_name="finished") for job_id in ends])
    await store.claim("finished", len(ends), 2.0)
    await store.finish([success(job_id, at) for job_id, at in ends.items()])


async def test_due_deliveries_are_claimed_once_in_the_order_in_which_they_became_due(store: JobStore) -> None:
    await finish_with_deliveries(store, {"a": 4.0, "b": 3.0, "c": 5.0, "d": 7.0})
    assert await claim_due(store, now=2.9) == []
    with anyio.fail_after(5):
        assert await claim_due(store, limit=0) == []
    assert sorted(await claim_due(store, now=5.0, limit=2)) == ["a", "b"]
    assert await claim_due(store, now=5.0) == ["c"]
    assert await claim_due(store, now=6.0) == []
    assert await claim_due(store, now=7.0) == ["d"]


async def test_a_claimed_delivery_is_not_due_until_it_is_recorded_or_the_process_dies(store: JobStore) -> None:
    await store.add([new_job(job_id, success_queue="ok") for job_id in "ab"])
    await store.claim("m", 2, 2.0)
    await store.finish([success("a")])
    assert await claim_due(store) == ["a"]
    await store.finish([success("b")])
    assert (await existing(store, "a")).delivery is DeliveryStatus.PENDING
    assert await claim_due(store) == ["b"]
    failed = DeliveryRecord(job_id="a", status=DeliveryStatus.PENDING, attempts=1, error="down", due_at=5.0)
    await store.record_deliveries([failed])
    assert await claim_due(store) == ["a"]
    await store.recover(6.0)
    assert [job.job_id for job in await store.claim_quarantined_deliveries(9)] == ["a", "b"]


async def test_queues_come_in_turns_and_keep_to_their_limits(store: JobStore) -> None:
    for queue in ("x", "y", "z"):
        await finish_with_deliveries(store, {f"{queue}{n}": 3.0 + n / 10 for n in range(4)}, queue)
    assert sorted(await claim_due(store, queue_limit=1)) == ["x0", "y0", "z0"]
    due = await store.claim_deliveries(99, 9.0, queue_limits={"x": 0, "y": -1}, queue_limit=2)
    assert [job.job_id for job in due] == ["z1", "z2"]
    claimed = [await claim_due(store, limit=1, queue_limit=1) for _ in range(7)]
    assert sorted(job_id for job_ids in claimed for job_id in job_ids) == ["x1", "x2", "x3", "y1", "y2", "y3", "z3"]
    turns = [job_ids[0][0] for job_ids in claimed]
    assert all(first != second for first, second in itertools.pairwise(turns[:5]))


async def test_many_queues_that_wait_for_a_retry_hide_no_delivery_that_is_due(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_table, "QUEUES_PER_STEP", 5)
    for number in range(23):
        await finish_with_deliveries(store, {f"later-{number}": 100.0}, f"https://host/{number:02}")
    for queue in ("a", "https://host/13b", "z"):  # before, between and after them
        await finish_with_deliveries(store, {queue: 3.0}, queue)
    claimed = [await claim_due(store, limit=1) for _ in range(4)]
    assert claimed == [["a"], ["https://host/13b"], ["z"], []]
    assert len(await claim_due(store, now=100.0)) > 0


async def test_deliveries_are_noted_and_failed_ones_are_due_when_they_say(store: JobStore) -> None:
    await finish_with_deliveries(store, {"a": 3.0})
    await store.add([new_job("b")])
    assert await claim_due(store) == ["a"]
    failed = DeliveryRecord(job_id="a", status=DeliveryStatus.PENDING, attempts=1, error="down", due_at=20.0)
    await store.record_deliveries([failed, replace(failed, job_id="b"), replace(failed, job_id="unknown")])
    assert await claim_due(store, now=19.9) == []
    (job,) = await store.claim_deliveries(9, 20.0, queue_limits={}, queue_limit=9)
    assert (job.delivery_attempts, job.delivery_error) == (1, "down")
    await store.record_deliveries([DeliveryRecord(job_id="a", status=DeliveryStatus.DELIVERED, attempts=2)])
    job = await existing(store, "a")
    assert (job.delivery, job.delivery_attempts, job.delivery_error) == (DeliveryStatus.DELIVERED, 2, None)
    assert await claim_due(store, now=1e9) == []
    assert (await existing(store, "b")).delivery is DeliveryStatus.NONE


async def test_undelivered_results_can_be_replayed_with_all_their_attempts(store: JobStore) -> None:
    await finish_with_deliveries(store, dict.fromkeys("abcd", 3.0))
    await claim_due(store)
    given_up = DeliveryRecord(job_id="a", status=DeliveryStatus.UNDELIVERED, attempts=8, error="down")
    await store.record_deliveries([replace(given_up, job_id=job_id) for job_id in "abc"])
    assert await claim_due(store) == []
    assert await store.replay(["a", "d", "unknown"], 10.0) == 1
    assert await claim_due(store, now=9.9) == []
    (job,) = await store.claim_deliveries(9, 10.0, queue_limits={}, queue_limit=9)
    assert (job.job_id, job.delivery, job.delivery_attempts) == ("a", DeliveryStatus.PENDING, 0)
    assert await store.replay(None, 11.0) == 2
    assert sorted(await claim_due(store, now=11.0)) == ["b", "c"]
    assert (await store.counts()).deliveries[DeliveryStatus.UNDELIVERED] == 0


async def test_the_same_idempotency_key_gives_the_same_job(store: JobStore) -> None:
    assert await store.add([new_job("a", idempotency_key="k"), new_job("b")]) == ["a", "b"]
    again = replace(new_job("c", idempotency_key="k"), message_json='{"text":"a"}', created_at=9.0)
    other = new_job("d", idempotency_key="k")
    assert (await store.add([again]), await store.get("c")) == (["a"], None)
    added, refused, twice = await store.add([new_job("e"), other, again])
    assert (added, twice) == ("e", "a")
    assert isinstance(refused, IdempotencyKeyReusedError)
    assert "'k' belongs to job a, which asked for something else" in str(refused)
    assert await store.get("d") is None
    assert (await store.counts()).statuses[JobStatus.QUEUED] == 3
    same_list = [replace(new_job(job_id, idempotency_key="l"), message_json="{}") for job_id in ("f", "g")]
    assert await store.add(same_list) == ["f", "f"]


async def test_an_idempotency_key_is_free_again_when_its_job_was_removed(store: JobStore) -> None:
    await store.add([new_job("a", idempotency_key="k")])
    await store.claim("m", 1, 2.0)
    await store.finish([success("a", 3.0)])
    assert await store.add([replace(new_job("a2", idempotency_key="k"), message_json='{"text":"a"}')]) == ["a"]
    await store.remove_finished(4.0)
    assert await store.add([new_job("b", idempotency_key="k")]) == ["b"]


async def test_queued_jobs_expire_when_their_time_has_come(store: JobStore) -> None:
    await store.add([new_job(f"{n}", expires_at=10.0 + n, failure_queue="bad" if n else None) for n in range(4)])
    await store.add([new_job("never")])
    await store.cancel("0", 2.0)
    await store.claim("m", 1, 2.0)
    assert await store.expire(9, 9.9) == []
    assert [job.job_id for job in await store.expire(1, 12.5)] == ["2"]
    assert await store.expire(9, 12.5) == []
    job = await existing(store, "2")
    assert (job.status, job.delivery, job.finished_at) == (JobStatus.EXPIRED, DeliveryStatus.PENDING, 12.5)
    assert job.error == "the job did not end within its expires_in of 10.5 s"
    assert (await existing(store, "1")).status is JobStatus.RUNNING
    assert await claim_due(store, now=12.5) == ["2"]
    assert [job.job_id for job in await store.claim("m", 9, 13.0)] == ["3", "never"]


async def test_jobs_are_listed_in_pages_the_newest_first(store: JobStore) -> None:
    await store.add([new_job(f"{n}", model_name="m" if n % 2 else "n") for n in range(7)])
    await store.claim("m", 2, 2.0)
    await store.finish([success("1"), failure("3")])
    page = await store.page(3, JobFilter())
    assert [job.job_id for job in page.jobs] == ["6", "5", "4"]
    await store.add([new_job("new")])
    await store.purge(JobFilter(statuses=[JobStatus.SUCCEEDED]))
    page = await store.page(9, JobFilter(), page.next_cursor)
    assert ([job.job_id for job in page.jobs], page.next_cursor) == (["3", "2", "0"], None)
    ended = JobFilter(statuses=[JobStatus.SUCCEEDED, JobStatus.FAILED])
    assert [job.job_id for job in (await store.page(9, ended)).jobs] == ["3"]
    assert [job.job_id for job in (await store.page(9, JobFilter(model_name="n"))).jobs] == ["6", "4", "2", "0"]
    assert (await store.page(9, JobFilter(deliveries=[DeliveryStatus.UNDELIVERED]))).jobs == []
    exactly = await store.page(7, JobFilter())
    assert (len(exactly.jobs), exactly.next_cursor) == (7, None)


async def test_purging_removes_ended_jobs_that_are_meant_and_no_others(store: JobStore) -> None:
    await finish_with_deliveries(store, {"pending": 3.0, "undelivered": 3.0, "delivered": 4.0})
    await claim_due(store)
    await store.record_deliveries(
        [
            DeliveryRecord(job_id="undelivered", status=DeliveryStatus.UNDELIVERED, attempts=8, error="x"),
            DeliveryRecord(job_id="delivered", status=DeliveryStatus.DELIVERED, attempts=1),
        ]
    )
    await store.add([new_job("queued")])
    assert await store.purge(JobFilter(ended_before=3.5)) == 1
    assert await store.get("undelivered") is None
    assert await store.purge(JobFilter(model_name="other")) == 0
    assert await store.purge(JobFilter()) == 1
    assert [job.job_id for job in (await store.page(9, JobFilter())).jobs] == ["queued", "pending"]


async def test_interactive_jobs_are_claimed_first_and_bulk_ones_have_a_share(store: JobStore) -> None:
    await store.add([new_job(f"b{n}") for n in range(6)])
    await store.add([new_job(f"i{n}", priority=Priority.INTERACTIVE) for n in range(6)])

    async def claim(limit: int, bulk_limit: int = 0) -> set[str]:
        claimed = await store.claim("m", limit, 2.0, bulk_limit=bulk_limit)
        assert len(claimed) <= limit
        return {job.job_id for job in claimed}

    assert await claim(2) == {"i0", "i1"}
    assert await claim(3, 1) == {"b0", "i2", "i3"}
    assert await claim(1, 9) == {"b1"}
    assert await claim(9, 1) == {"b2", "b3", "b4", "b5", "i4", "i5"}
    job = await existing(store, "i0")
    assert job.priority is Priority.INTERACTIVE
    assert (await existing(store, "b0")).priority is Priority.BULK


async def quarantined(store: JobStore, limit: int = 99) -> list[str]:
    return [job.job_id for job in await store.claim_quarantined("m", limit, 9.0)]


async def test_what_ran_at_a_crash_runs_again_apart_from_the_others(store: JobStore) -> None:
    await store.add([new_job("a"), new_job("b"), new_job("c"), new_job("d")])
    await store.claim("m", 3, 2.0)
    await store.finish([success("a")])
    assert await store.recover(3.0) == Recovery(2, [])
    assert [job.job_id for job in await store.claim("m", 10, 9.0)] == ["d"]
    assert await store.claim_quarantined("other", 9, 9.0) == []
    found = [*await store.claim_quarantined("m", 1, 9.0), *await store.claim_quarantined("m", 9, 9.0)]
    assert [(job.job_id, job.status, job.started_at, job.crashes) for job in found] == [
        ("b", JobStatus.RUNNING, 2.0, 1),
        ("c", JobStatus.RUNNING, 2.0, 1),
    ]
    assert await quarantined(store) == []
    await store.finish([success("b")])
    assert (await existing(store, "b")).status is JobStatus.SUCCEEDED


async def test_the_job_that_kills_is_found_by_ever_smaller_groups_and_fails(store: JobStore) -> None:
    """Each death is that of the group with the poison; of the others, the ones that crashed less often go first."""
    names = [f"{n:02}" for n in range(32)]
    await store.add([new_job(name, failure_queue="bad") for name in names])
    await store.claim("m", 32, 2.0)
    groups, deaths = list[list[str]](), 1
    recovery = await store.recover(3.0)
    while group := await quarantined(store, 16):
        groups.append(group)
        if "20" in group:
            deaths += 1
            recovery = await store.recover(3.0)
        else:
            await store.finish([success(name) for name in group])
    assert recovery == Recovery(0, ["20"])
    assert groups == [
        *(names[:16], names[16:]),
        *([f"{n}", f"{n + 1}"] for n in (16, 18, 20)),
        *([f"{n}", f"{n + 1}"] for n in (22, 24, 26, 28, 30)),
        *(["20"], ["21"]),
        *(["20"], ["20"]),
    ]
    assert deaths == 6
    job = await existing(store, "20")
    assert (job.status, job.delivery, job.crashes) == (JobStatus.FAILED, DeliveryStatus.PENDING, 6)
    assert "the process died 3 times while this job ran alone" in str(job.error)
    assert (await store.counts()).statuses[JobStatus.SUCCEEDED] == 31


async def test_what_was_being_delivered_at_a_crash_is_sent_again_apart_from_the_others(store: JobStore) -> None:
    await finish_with_deliveries(store, {"a": 3.0, "b": 4.0, "later": 20.0})
    await finish_with_deliveries(store, {"c": 5.0}, "other")
    assert await claim_due(store, now=4.5) == ["a", "b"]
    assert await store.recover(6.0) == Recovery(0, [])
    assert await claim_due(store, now=6.0) == ["c"]
    assert [job.job_id for job in await store.claim_quarantined_deliveries(1)] == ["a"]
    await store.record_deliveries([DeliveryRecord(job_id="a", status=DeliveryStatus.DELIVERED, attempts=1)])
    assert [job.job_id for job in await store.claim_quarantined_deliveries(9)] == ["b"]
    assert await store.claim_quarantined_deliveries(9) == []
    failed = DeliveryRecord(job_id="b", status=DeliveryStatus.PENDING, attempts=1, error="down", due_at=7.0)
    await store.record_deliveries([failed])
    assert await claim_due(store, now=7.0) == ["b"]


async def test_the_delivery_that_kills_is_found_by_ever_smaller_groups_and_given_up(store: JobStore) -> None:
    await finish_with_deliveries(store, {f"{n:02}": 3.0 for n in range(32)})
    await claim_due(store)
    recovery, deaths, sizes = await store.recover(4.0), 1, list[int]()
    while group := [job.job_id for job in await store.claim_quarantined_deliveries(16)]:
        sizes.append(len(group))
        if "20" in group:
            deaths += 1
            recovery = await store.recover(4.0)
        else:
            records = [DeliveryRecord(job_id=name, status=DeliveryStatus.DELIVERED, attempts=1) for name in group]
            await store.record_deliveries(records)
    assert recovery == Recovery(0, [], ["20"])
    assert (deaths, sizes) == (6, [16, 16, *[2] * 8, 1, 1, 1, 1])
    job = await existing(store, "20")
    assert job.delivery is DeliveryStatus.UNDELIVERED
    assert "the process died 3 times while this message alone was being sent" in str(job.delivery_error)
    counts = (await store.counts()).deliveries
    assert (counts[DeliveryStatus.DELIVERED], counts[DeliveryStatus.UNDELIVERED]) == (31, 1)
    assert await store.replay(["20"], 5.0) == 1
    assert await claim_due(store) == ["20"]
    await store.recover(6.0)
    assert [job.job_id for job in await store.claim_quarantined_deliveries(16)] == ["20"]


async def test_jobs_that_wait_to_run_again_are_claimed_in_their_old_order_once_released(store: JobStore) -> None:
    await store.add([new_job("a"), new_job("b"), new_job("c"), new_job("n", model_name="n")])
    await store.claim("m", 2, 2.0)
    await store.claim("n", 1, 2.0)
    retries = [JobRetry(job_id=job_id, retry_at=at, error="down") for job_id, at in (("b", 8.0), ("a", 6.0))]
    queued, unknown = JobRetry(job_id="c", retry_at=1.0, error="x"), JobRetry(job_id="?", retry_at=1.0, error="x")
    await store.requeue([*retries, queued, unknown, JobRetry(job_id="n", retry_at=5.0, error="down")])
    job = await existing(store, "a")
    assert (job.status, job.attempts, job.retry_at, job.error) == (JobStatus.QUEUED, 1, 6.0, "down")
    assert (await existing(store, "c")).attempts == 0
    assert (await store.counts()).statuses[JobStatus.QUEUED] == 4
    assert await store.release_retries("m", 5.9) == 6.0
    assert await store.release_retries("m", 7.0) == 8.0
    assert [job.job_id for job in await store.claim("m", 9, 7.0)] == ["a", "c"]
    assert await store.release_retries("m", math.inf) is None
    (again,) = await store.claim("m", 9, 7.0)
    assert (again.job_id, again.started_at, again.retry_at, again.attempts) == ("b", 2.0, None, 1)
    await store.finish([success("b")])
    ended = await existing(store, "b")
    assert (ended.status, ended.attempts, ended.error) == (JobStatus.SUCCEEDED, 2, None)
    assert await store.release_retries("n", 5.0) is None


async def test_claimed_jobs_that_did_not_begin_are_queued_as_they_were(store: JobStore) -> None:
    await store.add([new_job("a"), new_job("b"), new_job("c")])
    await store.claim("m", 1, 2.0)
    await store.requeue([JobRetry(job_id="a", retry_at=3.0, error="down")])
    await store.release_retries("m", 3.0)
    await store.claim("m", 2, 4.0)
    await store.return_claimed(["a", "b", "c", "unknown"])
    jobs = [await existing(store, job_id) for job_id in "abc"]
    assert [(job.status, job.started_at) for job in jobs] == [
        (JobStatus.QUEUED, 2.0),
        (JobStatus.QUEUED, None),
        (JobStatus.QUEUED, None),
    ]
    assert (await store.counts()).statuses[JobStatus.QUEUED] == 3
    assert [job.job_id for job in await store.claim("m", 9, 5.0)] == ["a", "b", "c"]


async def test_jobs_that_wait_to_run_again_can_be_cancelled_expire_and_leave_the_quarantine(store: JobStore) -> None:
    await store.add([new_job("a"), new_job("b", expires_at=10.0), new_job("c")])
    await store.claim("m", 3, 2.0)
    await store.recover(3.0)
    await store.claim_quarantined("m", 9, 3.0)
    await store.requeue([JobRetry(job_id=job_id, retry_at=20.0, error="down") for job_id in "abc"])
    assert (await existing(store, "a")).crashes == 0
    cancelled = await store.cancel("a", 4.0)
    assert cancelled is not None
    assert (cancelled.status, cancelled.retry_at) == (JobStatus.CANCELLED, None)
    assert await existing(store, "a") == cancelled
    assert [job.job_id for job in await store.expire(9, 11.0)] == ["b"]
    assert (await existing(store, "b")).retry_at is None
    assert await store.recover(12.0) == Recovery(0, [])
    assert await store.release_retries("m", 21.0) is None
    assert [job.job_id for job in await store.claim("m", 9, 21.0)] == ["c"]


async def test_a_page_ends_where_it_has_too_many_bytes(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modalkit.service.jobs.store.PAGE_BYTES", 2500)
    await store.add([new_job(f"{n}", meta_json=f'{{"text":"{"é" * (3000 if n == 2 else 400)}"}}') for n in range(6)])
    pages, cursor = list[list[str]](), None
    while not pages or cursor is not None:
        page = await store.page(4, JobFilter(), cursor)
        pages.append([job.job_id for job in page.jobs])
        cursor = page.next_cursor
    assert pages == [["5", "4", "3"], ["2"], ["1", "0"]]


async def test_jobs_that_a_page_or_a_purge_passes_over_are_passed_in_steps_between_which_others_have_their_turn(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sqlite_rows", "sqlite_many"):
        monkeypatch.setattr(f"modalkit.service.jobs.{module}.ROWS_PER_READ", 3)
    await store.add([new_job(f"{n}", model_name="rare" if n in (0, 2, 9) else "m") for n in range(200)])
    turns, is_over = 0, anyio.Event()

    async def count_turns() -> None:
        nonlocal turns
        while not is_over.is_set():
            await store.get("0")
            turns += 1
            await anyio.lowlevel.checkpoint()

    async def pages(limit: int, **which: Any) -> list[list[str]]:
        found, cursor = list[list[str]](), 2**62
        while True:
            page = await store.page(limit, JobFilter(**which), cursor)
            found.append([job.job_id for job in page.jobs])
            if page.next_cursor is None:
                return found
            cursor = page.next_cursor

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(count_turns)
        assert await pages(2, model_name="rare") == [["9", "2"], ["0"]]
        assert await pages(3, model_name="rare") == [["9", "2", "0"]]
        turns = 0
        assert await pages(3, model_name="none") == [[]]
        assert turns >= 10, turns  # of some 66 steps, 0 to 2 if it were one
        turns = 0
        assert await store.purge(JobFilter(model_name="m")) == 0
        assert turns >= 10, turns  # of some 66 steps, 0 to 2 if it were one
        is_over.set()


async def test_a_page_of_jobs_with_large_messages_does_not_read_them(store: JobStore) -> None:
    """Else 60 large jobs took 1.75 GB for an answer of 25 KB, or a page each."""
    await store.add([new_job(f"{n}", message_json=f'{{"text":"{"x" * 2**20}"}}') for n in range(10)])
    page = await store.page(100, JobFilter())
    assert [job.job_id for job in page.jobs] == [f"{n}" for n in reversed(range(10))]
    assert {job.message_json for job in page.jobs} == {"{}"}
    assert page.next_cursor is None


async def test_old_ends_are_removed_unless_something_is_left_to_deliver(store: JobStore) -> None:
    await store.add([new_job(job_id, success_queue="ok" if job_id in "be" else None) for job_id in "abced"])
    await store.claim("m", 4, 2.0)
    await store.finish([success("a", 3.0), success("b", 3.0), success("c", 9.0), success("e", 3.0)])
    assert await store.remove_finished(5.0) == 1
    assert [job_id for job_id in "abcde" if await store.get(job_id) is not None] == ["b", "c", "d", "e"]
    await claim_due(store)
    await store.record_deliveries(
        [
            DeliveryRecord(job_id="b", status=DeliveryStatus.UNDELIVERED, attempts=8, error="x"),
            DeliveryRecord(job_id="e", status=DeliveryStatus.DELIVERED, attempts=1),
        ]
    )
    assert await store.remove_finished(5.0) == 1
    assert await store.get("e") is None
    await store.replay(["b"], 6.0)
    await claim_due(store)
    await store.record_deliveries([DeliveryRecord(job_id="b", status=DeliveryStatus.DELIVERED, attempts=1)])
    assert await store.remove_finished(5.0) == 1


async def test_many_are_removed_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_many, "ROWS_PER_READ", 2000)
    async with make_store(kind, tmp_path, 10_000) as store:
        await store.add([new_job(f"{n}") for n in range(5001)])
        await store.claim("m", 5000, 2.0)
        await store.finish([success(f"{n}", 3.0 if n % 2 else 5.0) for n in range(5000)])
        assert await store.remove_finished(4.0) == 2500
        assert await store.purge(JobFilter(statuses=[JobStatus.SUCCEEDED])) == 2500
        assert sum((await store.counts()).statuses.values()) == 1


async def test_changes_of_many_jobs_in_memory_let_other_tasks_run_between_their_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sqlite_many, "ROWS_PER_STEP", 2)
    seen = set[int]()

    async def count_failed() -> None:
        while True:
            seen.add((await in_memory.counts()).statuses[JobStatus.FAILED])
            await anyio.lowlevel.checkpoint()

    async with MemoryJobStore() as in_memory, anyio.create_task_group() as task_group:
        task_group.start_soon(count_failed)
        await in_memory.add([new_job(f"{n}") for n in range(20)])
        for change in (in_memory.retry(None, JobFilter(), 4.0), in_memory.remove_finished(9.0)):
            await in_memory.claim("m", 20, 2.0)
            await in_memory.finish([failure(f"{n}") for n in range(20)])
            seen.clear()
            await change
            assert seen & set(range(1, 20))
            assert (await in_memory.counts()).statuses[JobStatus.FAILED] == 0
        task_group.cancel_scope.cancel()


async def test_large_jobs_are_changed_in_steps_of_few(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Because all that a job has is written once more with each change of it."""
    monkeypatch.setattr(sqlite_many, "BYTES_PER_STEP", 2500)
    store._database.execute("PRAGMA reverse_unordered_selects = ON")  # noqa: SLF001  # else a missing order may not show
    large: dict[str, Any] = {"message_json": json.dumps({"a": "x" * 1000}), "expires_at": 9.0, "failure_queue": "bad"}
    await store.add([replace(new_job(f"{n}"), **large) for n in range(7)])
    assert len(await store.cancel_some(JobFilter(), 2.0)) == 3
    assert len(await store.expire(100, 9.0)) == 3
    assert len(await store.expire(100, 9.0)) == 1
    given_up: dict[str, Any] = {"status": DeliveryStatus.UNDELIVERED, "attempts": 1, "error": "gone"}
    await store.record_deliveries([DeliveryRecord(job_id=f"{n}", **given_up) for n in range(7)])
    commits = store.commits
    assert await store.replay(None, 9.0) == 4
    assert store.commits == commits + 3  # three, one, and none
    await store.record_deliveries([DeliveryRecord(job_id=f"{n}", **given_up) for n in range(7)])
    commits = store.commits
    assert len(await store.retry(None, JobFilter(), 9.0)) == 7
    assert store.commits == commits + 4  # three, three, one, and none
    await store.claim("m", 7, 9.0)
    await store.requeue([JobRetry(job_id=f"{n}", retry_at=10.0, error="no") for n in range(7)])
    assert [await store.release_retries("m", 10.0) for _ in range(3)] == [10.0, 10.0, None]


async def test_counts_follow_every_change(store: JobStore) -> None:
    await store.add([new_job(f"{n}") for n in range(6)])
    await store.claim("m", 4, 2.0)
    await store.finish([success("0"), failure("1"), failure("2", status=JobStatus.EXPIRED)])
    await store.cancel("5", 2.0)
    await finish_with_deliveries(store, {"6": 3.0, "7": 3.0})
    await claim_due(store)
    await store.record_deliveries([DeliveryRecord(job_id="6", status=DeliveryStatus.DELIVERED, attempts=1)])
    counts = await store.counts()
    assert counts.statuses == {
        JobStatus.QUEUED: 1,
        JobStatus.RUNNING: 1,
        JobStatus.SUCCEEDED: 3,
        JobStatus.FAILED: 1,
        JobStatus.EXPIRED: 1,
        JobStatus.CANCELLED: 1,
    }
    assert counts.deliveries == {
        DeliveryStatus.NONE: 6,
        DeliveryStatus.PENDING: 1,
        DeliveryStatus.DELIVERED: 1,
        DeliveryStatus.MEMORY: 0,
        DeliveryStatus.UNDELIVERED: 0,
    }


async def test_many_callers_at_once_lose_nothing(store: JobStore) -> None:
    async def live(job_id: str) -> None:
        await store.add([new_job(job_id)])
        assert (await existing(store, job_id)).status is JobStatus.QUEUED

    async with anyio.create_task_group() as task_group:
        for n in range(200):
            task_group.start_soon(live, f"{n}")
    assert len(await store.claim("m", 1000, 2.0)) == 200


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


def test_an_end_or_a_record_of_another_status_is_refused() -> None:
    with pytest.raises(ValueError, match="status must be succeeded, failed or expired"):
        JobEnd(job_id="a", status=JobStatus.CANCELLED, finished_at=1.0)
    with pytest.raises(ValueError, match="status must be pending, delivered or undelivered"):
        DeliveryRecord(job_id="a", status=DeliveryStatus.NONE, attempts=1)


async def test_owners_get_equal_parts_of_what_is_claimed(store: JobStore) -> None:
    await store.add([new_job(f"a{n}", owner="a") for n in range(100)])
    await store.add([new_job(f"{name}{n}", owner=name) for name in ("", "b") for n in range(2)])
    claimed = [job.job_id for job in await store.claim("m", 9, 2.0)]
    assert sorted(claimed) == ["0", "1", "a0", "a1", "a2", "a3", "a4", "b0", "b1"]
    assert [job_id for job_id in claimed if job_id[0] == "a"] == ["a0", "a1", "a2", "a3", "a4"]


async def test_owners_take_turns_where_each_claim_is_for_one_job(store: JobStore) -> None:
    await store.add([new_job(f"{name}{n}", owner=name) for name in ("", "a", "b") for n in range(3)])
    claimed = [(await store.claim("m", 1, 2.0))[0].owner for _ in range(9)]
    assert [sorted(claimed[n : n + 3]) for n in (0, 3, 6)] == [["", "a", "b"]] * 3
    assert await store.claim("m", 1, 2.0) == []


async def test_owners_take_turns_in_each_model_and_priority_whatever_is_claimed_of_others(store: JobStore) -> None:
    kinds = [(model, priority) for model in ("m", "n") for priority in Priority]
    for (model, priority), owner, n in itertools.product(kinds, ("a", "b"), range(4)):
        await store.add([new_job(f"{model}{priority}{owner}{n}", model_name=model, priority=priority, owner=owner)])
    claims = [await store.claim(model, 2, 2.0, bulk_limit=1) for _ in range(4) for model in ("m", "n")]
    for model, priority in kinds:
        of_kind = [job.owner for jobs in claims for job in jobs if (job.model_name, job.priority) == (model, priority)]
        assert sorted(of_kind[:2]) == sorted(of_kind[2:4]) == ["a", "b"]


async def test_an_owner_behind_many_others_gets_its_turn(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_table, "OWNERS_PER_CLAIM", 2)
    await store.add([new_job(f"{owner}{n}", owner=owner) for n in range(9) for owner in "abcde"])
    claimed = [job.job_id for _ in range(10) for job in await store.claim("m", 1, 2.0)]
    assert claimed == ["a0", "b0", "c0", "d0", "e0", "a1", "b1", "c1", "d1", "e1"]


async def test_a_key_stands_for_a_job_of_each_owner(store: JobStore) -> None:
    same = new_job("a", idempotency_key="k", message_json="{}")
    others = [replace(same, job_id="b", owner="x"), replace(same, job_id="c", owner="x"), replace(same, job_id="d")]
    assert await store.add([same, *others]) == ["a", "b", "b", "a"]
    assert (await existing(store, "b")).owner == "x"


async def test_an_owner_lists_removes_and_replays_its_own_jobs_alone(store: JobStore) -> None:
    jobs = [new_job(f"{owner}{n}", owner=owner, success_queue="ok") for owner in ("x", "y") for n in range(2)]
    await store.add(jobs)
    await store.claim("m", 9, 2.0)
    await store.finish([success(job.job_id) for job in jobs])
    await store.record_deliveries(
        [DeliveryRecord(job_id=job.job_id, status=DeliveryStatus.UNDELIVERED, attempts=1) for job in jobs]
    )
    assert [job.job_id for job in (await store.page(9, JobFilter(owner="x"))).jobs] == ["x1", "x0"]
    assert await store.replay(["x0", "y0"], 4.0, "x") == 1
    assert await store.replay(None, 4.0, "x") == 1
    await store.add([new_job("unowned")])
    assert [job.job_id for job in (await store.page(9, JobFilter(owner=""))).jobs] == ["unowned"]
    assert await store.purge(JobFilter(owner="y")) == 2
    assert [job.job_id for job in (await store.page(9, JobFilter())).jobs] == ["unowned", "x1", "x0"]


async def test_a_document_keeps_its_owner_and_its_age_when_another_changes_it(store: JobStore) -> None:
    await store.put_document("d", 0, "shop", b"old", 1.0)
    await store.put_document("d", 0, "boss", b"new", 9.0)
    assert await store.document_part("d", 0, "shop") == b"new"
    assert await store.document_ids("d", "boss") == []
    await store.remove_old_documents(2.0)
    assert await store.document_part("d", 0, None) is None


@pytest.mark.parametrize("is_old", [False, True])
async def test_a_document_of_many_parts_is_removed_in_steps(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    """Else jobs would wait for seconds while a file of 200 MiB is removed."""
    monkeypatch.setattr(sqlite_many, "PARTS_PER_STEP", 2)
    for part in range(5):
        await store.put_document("d", part, "", b"x", 1.0)
    await store.put_document("other", 0, "", b"x", 3.0)
    commits = store.commits
    await (store.remove_old_documents(2.0) if is_old else store.remove_document("d"))
    assert store.commits == commits + 4, "two parts, two, one, none"
    assert (await store.documents_bytes(), await store.document_ids("", None)) == (1, ["other"])


async def test_a_job_has_as_long_to_its_end_at_each_retry(store: JobStore) -> None:
    await store.add([new_job("a", created_at=1.0, expires_at=11.0)])
    for now in (100.0, 200.0):
        await store.cancel("a", now - 1)
        assert await store.retry(["a"], JobFilter(), now) == ["a"]
        job = await existing(store, "a")
        assert (job.created_at, job.expires_at) == (now, now + 10)
        assert (await store.counts()).oldest_queued_at == {"m": now}
