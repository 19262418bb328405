"""What the SQLite store promises beyond the others: it outlives the process, and one process owns it."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from batching import Priority
from service.jobs import (
    DeliveryStatus,
    DuplicateJobError,
    FinishedJob,
    JobStatus,
    JobStoreClosedError,
    JobStoreError,
    JobStoreLockedError,
    JobStoreSchemaError,
    JobStoreUnavailableError,
    NewJob,
    SqliteJobStore,
)
from service.jobs.sqlite_schema import APPLICATION_ID, MIGRATIONS

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]

ADD_UNTIL_KILLED = """
import sys, anyio
from service.jobs import NewJob, SqliteJobStore

async def main():
    async with SqliteJobStore(sys.argv[1]) as store:
        async def add(prefix):
            for n in range(1_000_000):
                job_id = f"{prefix}-{n}"
                await store.add([NewJob(job_id=job_id, model_name="m", message={}, created_at=1.0)])
                print(job_id, flush=True)
        async with anyio.create_task_group() as task_group:
            for prefix in "abcdefgh":
                task_group.start_soon(add, prefix)
            while True:
                await store.take("m", 3, 2.0)

anyio.run(main)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "down" / "jobs.db"


def new_job(job_id: str, message: str = "") -> NewJob:
    return NewJob(job_id=job_id, model_name="m", message={"text": message}, success_queue="ok", created_at=1.0)


async def test_everything_is_still_there_after_it_was_closed(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        await store.add([new_job("a"), new_job("b"), new_job("c")])
        await store.take("m", 2, 2.0)
        done = FinishedJob(job_id="a", status=JobStatus.SUCCEEDED, result={"n": 1}, finished_at=3.0)
        (ended,) = await store.finish([done])
        counts = await store.counts()
    async with SqliteJobStore(path) as store:
        assert await store.counts() == counts
        assert await store.get("a") == ended
        assert await store.pending_deliveries(9) == [ended]
        assert await store.requeue_running() == 1
        assert [job.job_id for job in await store.take("m", 9, 4.0)] == ["b", "c"]


async def test_a_job_whose_add_returned_survives_a_kill(path: Path) -> None:
    command = [sys.executable, "-c", ADD_UNTIL_KILLED, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().strip() for _ in range(500)]
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += process.stdout.read().split("\n")[:-1]
    assert process.returncode == -signal.SIGKILL
    async with SqliteJobStore(path) as store:
        for job_id in acknowledged:
            assert await store.get(job_id) is not None, job_id
        counts = await store.counts()
        assert counts[JobStatus.RUNNING] > 0
        assert await store.requeue_running() == counts[JobStatus.RUNNING]
        stored = sum(counts.values())
        assert len(await store.take("m", 10 * stored, 2.0)) == stored >= len(acknowledged)


async def test_operations_at_the_same_time_share_commits(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        before = store.commits
        async with anyio.create_task_group() as task_group:
            for n in range(500):
                task_group.start_soon(store.add, [new_job(f"{n}")])
        assert (await store.counts())[JobStatus.QUEUED] == 500
        assert store.commits - before < 20


async def test_an_operation_that_fails_does_so_alone(path: Path) -> None:
    refused = 0
    async with SqliteJobStore(path) as store:
        await store.add([new_job("7", "the first")])

        async def add(n: int) -> None:
            nonlocal refused
            try:
                await store.add([new_job(f"{n}a"), new_job(f"{n}"), new_job(f"{n}b")])
            except DuplicateJobError:
                refused += 1

        async with anyio.create_task_group() as task_group:
            for n in range(50):
                task_group.start_soon(add, n)
        assert refused == 1
        assert (await store.counts())[JobStatus.QUEUED] == 49 * 3 + 1
        assert await store.get("7a") is None


async def test_a_second_owner_is_refused_with_the_firsts_process_id(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        with pytest.raises(JobStoreLockedError, match=f"in use by process {os.getpid()}; stop that process"):
            async with SqliteJobStore(path):
                pass
        with pytest.raises(JobStoreLockedError):
            await store.__aenter__()
        await store.add([new_job("a")])
    async with SqliteJobStore(path) as store:
        assert await store.get("a") is not None


async def test_a_full_disk_is_an_error_with_a_remedy_and_the_store_goes_on(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        await store.add([new_job("a")])
        store._database.execute("PRAGMA max_page_count = 20")  # noqa: SLF001  # stands in for the full disk
        with pytest.raises(JobStoreUnavailableError, match=r"jobs\.db cannot be used: .*full; free some space"):
            await store.add([new_job(f"{n}", "x" * 2000) for n in range(100)])
        stored = (await store.counts())[JobStatus.QUEUED]
        store._database.execute("PRAGMA max_page_count = 2000000")  # noqa: SLF001  # space again
        await store.add([new_job("z", "x" * 100_000)])
        assert (await store.counts())[JobStatus.QUEUED] == stored + 1
        assert len(await store.take("m", 1000, 2.0)) == stored + 1


async def test_a_cancelled_owner_leaves_a_sound_store(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        await store.add([new_job("a")])
    with anyio.CancelScope() as scope:
        async with SqliteJobStore(path) as store, anyio.create_task_group() as task_group:
            for n in range(200):
                task_group.start_soon(store.add, [new_job(f"{n}")])
            await anyio.lowlevel.checkpoint()
            scope.cancel()
    with pytest.raises(JobStoreClosedError):
        await store.get("a")
    async with SqliteJobStore(path) as store:
        counted = sum((await store.counts()).values())
        assert len(await store.take("m", 1000, 2.0)) == counted >= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"these are not the bytes of a database, but enough of them to be read as one" * 20, "is no SQLite database"),
        ("CREATE TABLE notes (text)", "belongs to another program; give another store_path"),
        ("PRAGMA application_id = 1836016747; PRAGMA user_version = 99", "version 99, newer than"),
    ],
)
async def test_a_file_that_is_not_ours_is_refused_and_left_alone(
    path: Path, content: str | bytes, message: str
) -> None:
    path.parent.mkdir(parents=True)
    if isinstance(content, str):
        with sqlite3.connect(path) as database:
            database.executescript(content)
        database.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(JobStoreSchemaError, match=message):
            async with SqliteJobStore(path):
                pass
    assert path.read_bytes() == before


async def test_a_path_that_cannot_be_written_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobStoreUnavailableError, match="give another store_path"):
        async with SqliteJobStore(tmp_path / "file" / "jobs.db"):
            pass
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(JobStoreError, match=r"folder\.db"):
        async with SqliteJobStore(tmp_path / "folder.db"):
            pass


async def test_the_file_is_safe_to_read_meanwhile_and_shrinks_when_jobs_are_removed(path: Path) -> None:
    async with SqliteJobStore(path, max_jobs=5000) as store:
        reader = sqlite3.connect(path)
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        await store.add([new_job(f"{n}", "x" * 1000) for n in range(3000)])
        (pages,) = reader.execute("PRAGMA page_count").fetchone()
        await store.take("m", 3000, 2.0)
        ends = [FinishedJob(job_id=f"{n}", status=JobStatus.FAILED, error="e", finished_at=3.0) for n in range(3000)]
        assert all(job.delivery is DeliveryStatus.NONE for job in await store.finish(ends))
        assert await store.remove_finished(4.0) == 3000
        assert reader.execute("PRAGMA page_count").fetchone()[0] < pages / 4
        reader.close()


async def test_a_database_of_the_first_version_is_migrated_with_its_jobs(path: Path) -> None:
    path.parent.mkdir(parents=True)
    database = sqlite3.connect(path)
    database.executescript(MIGRATIONS[0])
    database.executescript("""
        INSERT INTO jobs (job_id, model_name, status, message, meta, created_at, delivery)
            VALUES ('a', 'm', 'queued', '{}', '{}', 1000000, 'none');
        INSERT INTO counts VALUES ('queued', 1);
    """)
    database.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1")
    database.close()
    async with SqliteJobStore(path) as store:
        (job,) = await store.take("m", 9, 2.0)
        assert (job.job_id, job.priority) == ("a", Priority.BULK)


def test_the_connection_is_not_closed_under_a_transaction_that_asyncio_cancelled(path: Path) -> None:
    """Its cancellation passes by anyio's shields, and a connection closed while it is used crashes the process."""
    began, closing, may_go_on = threading.Event(), threading.Event(), threading.Event()
    store = SqliteJobStore(path)
    found: list[object] = []

    def operation() -> None:
        began.set()
        may_go_on.wait(timeout=60)
        found.extend(store._database.execute("SELECT count(*) FROM jobs").fetchone())  # noqa: SLF001

    close = store._close  # noqa: SLF001  # to know when it is tried

    def close_loudly() -> None:
        closing.set()
        close()

    store._close = close_loudly  # type: ignore[method-assign]  # noqa: SLF001  # as above

    async def own() -> None:
        async with store:
            await store._perform(operation)  # noqa: SLF001  # an operation that takes its time

    async def cancel_all() -> None:
        owner = asyncio.create_task(own())
        await asyncio.to_thread(began.wait, 60)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.to_thread(closing.wait, 60)
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await owner

    asyncio.run(cancel_all())
    assert found == [0]
