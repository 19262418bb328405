"""Databases of older versions are migrated with what they hold, and deliver it."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from modalkit.batching import Priority
from modalkit.service.errors import MAX_ERROR_BYTES
from modalkit.service.jobs import (
    DeliveryRecord,
    DeliveryStatus,
    Job,
    JobEnd,
    JobFilter,
    JobStatus,
    SqliteJobStore,
)
from modalkit.service.jobs.sqlite_schema import APPLICATION_ID, MIGRATIONS
from tests.service.jobs.test_sqlite_store import new_job

pytestmark = pytest.mark.anyio


def make_database(path: Path, version: int, rows: str) -> None:
    """Write a database as an older version left it, with these rows."""
    path.parent.mkdir(parents=True)
    database = sqlite3.connect(path)
    for script in (*MIGRATIONS[:version], rows):
        database.executescript(script)
    database.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {version}")
    database.close()


async def test_a_database_of_the_first_version_is_migrated_with_its_jobs(path: Path) -> None:
    make_database(
        path,
        1,
        """
        INSERT INTO jobs (job_id, model_name, status, message, meta, created_at, delivery)
            VALUES ('a', 'm', 'queued', '{}', '{}', 1000000, 'none');
        INSERT INTO jobs (job_id, model_name, status, message, meta, created_at, delivery, success_queue, finished_at)
            VALUES ('b', 'm', 'succeeded', '{}', '{}', 1000000, 'pending', 'ok', 2000000),
                ('c', 'm', 'succeeded', '{}', '{}', 1000000, 'undelivered', 'ok', 2000000);
        INSERT INTO counts VALUES ('queued', 1), ('succeeded', 2);
    """,
    )
    async with SqliteJobStore(path) as store:
        (job,) = await store.claim("m", 9, 2.0)
        assert (job.job_id, job.priority) == ("a", Priority.BULK)
        (due,) = await store.claim_deliveries(9, 2.0, queue_limits={}, queue_limit=9)
        assert (due.job_id, due.delivery_queue) == ("b", "ok")
        assert (await store.counts()).deliveries[DeliveryStatus.UNDELIVERED] == 1
        assert await store.replay(None, 3.0) == 1
        (due,) = await store.claim_deliveries(9, 3.0, queue_limits={}, queue_limit=9)
        assert due.job_id == "c"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # it is about SQLite, and takes seconds
async def test_large_errors_of_an_older_version_stop_no_delivery(path: Path) -> None:
    """Failed jobs with errors of more than 1 GB of JSON, replayed beside good ones, also after a restart."""
    large = 20_000_000
    async with SqliteJobStore(path) as store:
        jobs = [replace(new_job(f"large{n}"), failure_queue="bad") for n in range(10)]
        await store.add([*jobs, *(new_job(f"good{n}") for n in range(3))])
        await store.claim("m", 99, 2.0)
        ends = [JobEnd(job_id=f"large{n}", status=JobStatus.FAILED, error="e", finished_at=3.0) for n in range(10)]
        await store.finish(ends)
        await claim_all(store)
        given_up = [
            DeliveryRecord(job_id=f"large{n}", status=DeliveryStatus.UNDELIVERED, attempts=8, error="x")
            for n in range(10)
        ]
        await store.record_deliveries(given_up)
        await store._perform(  # noqa: SLF001  # as an older version stored them
            lambda table: table._database.execute(  # noqa: SLF001
                "UPDATE jobs SET error = replace(hex(zeroblob(?)), '00', char(1)) WHERE status = 'failed'",
                (large,),
            )
        )
        good = [
            JobEnd(job_id=f"good{n}", status=JobStatus.SUCCEEDED, result_json="{}", finished_at=3.0) for n in range(3)
        ]
        await store.finish(good)
        assert await store.replay(None, 4.0) == 10
        assert sorted(job.job_id for job in await claim_all(store)) == sorted(
            [f"large{n}" for n in range(10)] + [f"good{n}" for n in range(3)]
        )
    async with SqliteJobStore(path) as store:
        await store.recover(5.0)
        claimed = await store.claim_quarantined_deliveries(99)
        assert len(claimed) == 13
        errors = {job.error for job in claimed if job.error is not None}
        assert errors == {"\x01" * MAX_ERROR_BYTES + f" … ({large - MAX_ERROR_BYTES} more characters)"}
        page = await store.page(200, JobFilter(statuses=[JobStatus.FAILED]))
        assert len(page.jobs) == 10


async def claim_all(store: SqliteJobStore) -> list[Job]:
    claimed = list[Job]()
    while some := await store.claim_deliveries(99, 9.0, queue_limits={}, queue_limit=99):
        claimed += some
    return claimed


async def test_a_database_of_the_third_version_is_migrated_with_its_jobs(path: Path) -> None:
    make_database(
        path,
        3,
        """
        INSERT INTO jobs (job_id, model_name, status, message, meta, created_at, delivery, crashes)
            VALUES ('a', 'm', 'queued', '{}', '{}', 1000000, 'none', 0), ('b', 'm', 'queued', '{}', '{}', 1, 'none', 3);
        INSERT INTO jobs (job_id, model_name, status, message, meta, created_at, delivery, success_queue, finished_at,
                          due_at, delivery_queue)
            VALUES ('c', 'm', 'succeeded', '{}', '{}', 1000000, 'pending', 'ok', 2000000, -1, 'ok'),
                ('d', 'm', 'succeeded', '{}', '{}', 1000000, 'pending', 'ok', 2000000, 1, 'ok');
        INSERT INTO counts VALUES ('queued', 2), ('succeeded', 2), ('delivery pending', 2), ('delivery none', 2);
    """,
    )
    async with SqliteJobStore(path) as store:
        await store.recover(3.0)
        assert [(job.job_id, job.attempts) for job in await store.claim("m", 9, 4.0)] == [("a", 0)]
        assert [job.job_id for job in await store.claim_quarantined("m", 9, 4.0)] == ["b"]
        assert [job.job_id for job in await claim_all(store)] == ["d"]
        assert [job.job_id for job in await store.claim_quarantined_deliveries(9)] == ["c"]


async def test_a_database_of_the_fourth_version_is_migrated_with_its_jobs(path: Path) -> None:
    make_database(
        path,
        4,
        """
        INSERT INTO jobs (job_id, model_name, status, message, meta, created_at, delivery, idempotency_key)
            VALUES ('a', 'm', 'queued', '{}', '{}', 1000000, 'none', 'once');
        INSERT INTO counts VALUES ('queued', 1), ('delivery none', 1);
    """,
    )
    async with SqliteJobStore(path) as store:
        again = replace(new_job("b"), message_json="{}", success_queue=None, meta_json="{}", idempotency_key="once")
        assert await store.add([again, replace(again, owner="shop")]) == ["a", "b"]
        assert {job.job_id: job.owner for job in await store.claim("m", 9, 2.0)} == {"a": "", "b": "shop"}


async def test_a_database_of_the_fifth_version_keeps_its_owners_and_gets_traces(path: Path) -> None:
    make_database(
        path,
        5,
        """
        INSERT INTO jobs (job_id, model_name, status, message, meta, created_at, delivery, owner)
            VALUES ('a', 'm', 'queued', '{}', '{}', 1000000, 'none', 'shop');
        INSERT INTO counts VALUES ('queued', 1), ('delivery none', 1);
    """,
    )
    async with SqliteJobStore(path) as store:
        await store.add([replace(new_job("b"), message_json="{}", owner="lab", traceparent="00-trace")])
        found = {job.job_id: (job.owner, job.traceparent) for job in await store.claim("m", 9, 2.0)}
    assert found == {"a": ("shop", None), "b": ("lab", "00-trace")}


async def test_a_database_of_the_sixth_version_takes_batches(path: Path) -> None:
    make_database(
        path,
        6,
        """
        INSERT INTO jobs (job_id, model_name, status, message, meta, created_at, delivery)
            VALUES ('a', 'm', 'queued', '{}', '{}', 1, 'none');
        INSERT INTO counts VALUES ('queued', 1), ('delivery none', 1);
    """,
    )
    async with SqliteJobStore(path) as store:
        await store.add([replace(new_job("b"), batch_id="x", line=1)])
        jobs = [await store.get(job_id) for job_id in "ab"]
        assert [(job.batch_id, job.line) for job in jobs if job] == [(None, None), ("x", 1)]
