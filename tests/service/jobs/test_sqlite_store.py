"""What the SQLite store promises beyond the others: it outlives the process, and one process owns it."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from modalkit.batching import Priority
from modalkit.service.jobs import (
    DeliveryRecord,
    DeliveryStatus,
    DuplicateJobError,
    Job,
    JobEnd,
    JobFilter,
    JobRetry,
    JobStatus,
    JobStoreBusyError,
    JobStoreClosedError,
    JobStoreFullError,
    JobStoreLockedError,
    JobStoreSchemaError,
    JobStoreUnavailableError,
    Recovery,
    SqliteJobStore,
    sqlite_schema,
)
from modalkit.service.jobs import sqlite_statements as sql
from modalkit.service.jobs.sqlite_rows import NEXT_OLDEST, SELECT, condition_of, part_of_page
from modalkit.service.jobs.sqlite_schema import APPLICATION_ID, TABLES, VERSION
from modalkit.service.jobs.sqlite_table import JobTable

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]

ADD_UNTIL_KILLED = """
import sys, anyio
from modalkit.service.jobs import Job, SqliteJobStore

async def main():
    async with SqliteJobStore(sys.argv[1]) as store:
        async def add(prefix):
            for n in range(1_000_000):
                job_id = f"{prefix}-{n}"
                await store.add([Job(job_id=job_id, model_name="m", message_json="{}", created_at=1.0)])
                print(job_id, flush=True)
        async with anyio.create_task_group() as task_group:
            for prefix in "abcdefgh":
                task_group.start_soon(add, prefix)
            while True:
                await store.claim("m", 3, 2.0)

anyio.run(main)
"""


def new_job(job_id: str, message: str = "") -> Job:
    text = f'{{"text":"{message}"}}'
    return Job(job_id=job_id, model_name="m", message_json=text, success_queue="ok", created_at=1.0)


async def test_everything_is_still_there_after_it_was_closed(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        await store.add([new_job("a"), new_job("b"), new_job("c")])
        await store.claim("m", 2, 2.0)
        done = JobEnd(job_id="a", status=JobStatus.SUCCEEDED, result_json='{"n":1}', finished_at=3.0)
        assert await store.finish([done]) == ["a"]
        ended = await store.get("a")
        counts = await store.counts()
    async with SqliteJobStore(path) as store:
        assert await store.counts() == counts
        assert await store.get("a") == ended
        assert await store.claim_deliveries(9, 4.0, queue_limits={}, queue_limit=9) == [ended]
        assert await store.recover(4.0) == Recovery(1, [])
        assert [job.job_id for job in await store.claim("m", 9, 4.0)] == ["c"]
        assert [job.job_id for job in await store.claim_quarantined("m", 9, 4.0)] == ["b"]


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
        statuses = (await store.counts()).statuses
        assert statuses[JobStatus.RUNNING] > 0
        assert (await store.recover(2.0)).requeued == statuses[JobStatus.RUNNING]
        stored = sum(statuses.values())
        assert len(await store.claim("m", 10 * stored, 2.0)) == statuses[JobStatus.QUEUED]
        assert stored >= len(acknowledged)


async def test_operations_at_the_same_time_share_commits(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        before = store.commits
        async with anyio.create_task_group() as task_group:
            for n in range(500):
                task_group.start_soon(store.add, [new_job(f"{n}")])
        assert (await store.counts()).statuses[JobStatus.QUEUED] == 500
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
        assert (await store.counts()).statuses[JobStatus.QUEUED] == 49 * 3 + 1
        assert await store.get("7a") is None


async def test_a_list_is_stored_whole_or_not_at_all_however_long_it_is(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        await store.add([new_job("150")])
        with pytest.raises(DuplicateJobError, match="'150'"):
            await store.add([new_job(f"{n}") for n in range(200)])
        assert (await store.counts()).statuses[JobStatus.QUEUED] == 1
        await store.add([new_job(f"x{n}") for n in range(201)])
        assert [job.job_id for job in await store.claim("m", 999, 2.0)] == ["150", *(f"x{n}" for n in range(201))]


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


async def test_a_path_that_leads_to_an_open_store_is_refused(path: Path, tmp_path: Path) -> None:
    """Its second owner would queue the running jobs of the first again."""
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    async with SqliteJobStore(path):
        with pytest.raises(JobStoreLockedError):
            async with SqliteJobStore(link):
                pass
    async with SqliteJobStore(link):
        with pytest.raises(JobStoreLockedError):
            async with SqliteJobStore(path):
                pass


async def test_a_full_disk_is_an_error_with_a_remedy_and_the_store_goes_on(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        await store.add([new_job("a")])
        store._database.execute("PRAGMA max_page_count = 20")  # noqa: SLF001  # stands in for the full disk
        with pytest.raises(JobStoreUnavailableError, match=r"jobs\.db cannot be used: .*full; free .* at least 32 MiB"):
            await store.add([new_job(f"{n}", "x" * 2000) for n in range(100)])
        stored = (await store.counts()).statuses[JobStatus.QUEUED]
        await store.expire(10, 2.0)
        assert store.failure is not None, "what writes nothing shows nothing"
        store._database.execute("PRAGMA max_page_count = 2000000")  # noqa: SLF001  # space again
        await store.add([new_job("z", "x" * 100_000)])
        await store.check()
        assert store.failure is None
        assert (await store.counts()).statuses[JobStatus.QUEUED] == stored + 1
        assert len(await store.claim("m", 1000, 2.0)) == stored + 1


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
        counted = sum((await store.counts()).statuses.values())
        assert len(await store.claim("m", 1000, 2.0)) == counted >= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"these are not the bytes of a database, but enough of them to be read as one" * 20, "is no SQLite database"),
        ("CREATE TABLE notes (text)", "belongs to another program; give another store_path"),
        ("PRAGMA application_id = 1836016747; PRAGMA user_version = 99", "version 99, and this modalkit knows"),
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


async def test_a_store_of_this_version_may_have_its_columns_in_another_order(path: Path) -> None:
    head, columns, rest = re.split(
        r"(?<=CREATE TABLE jobs \()(.*?)(?=\n    \) STRICT)", TABLES, maxsplit=1, flags=re.DOTALL
    )
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as database:
        database.executescript(f"{head}{','.join(reversed(columns.split(',')))}{rest}")
        database.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}")
    database.close()
    async with SqliteJobStore(path) as store:
        await store.add([new_job("a")])
        (claimed,) = await store.claim("m", 1, 2.0)
        assert await store.get("a") == claimed


async def test_a_path_that_cannot_be_written_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobStoreUnavailableError, match="give another store_path"):
        async with SqliteJobStore(tmp_path / "file" / "jobs.db"):
            pass
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(JobStoreUnavailableError, match=r"folder\.db cannot be used: it is a folder; give a file, as "):
        async with SqliteJobStore(tmp_path / "folder.db"):
            pass
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "folder.db"}


async def test_the_file_is_safe_to_read_meanwhile_and_shrinks_when_jobs_are_removed(path: Path) -> None:
    async with SqliteJobStore(path, max_jobs=5000) as store:
        reader = sqlite3.connect(path)
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        await store.add([new_job(f"{n}", "x" * 1000) for n in range(3000)])
        (pages,) = reader.execute("PRAGMA page_count").fetchone()
        await store.claim("m", 3000, 2.0)
        ends = [JobEnd(job_id=f"{n}", status=JobStatus.FAILED, error="e", finished_at=3.0) for n in range(3000)]
        assert len(await store.finish(ends)) == 3000
        assert await store.remove_finished(4.0) == 3000
        assert reader.execute("PRAGMA page_count").fetchone()[0] < pages / 4
        reader.close()


async def test_the_log_that_a_long_reading_has_made_large_gets_small_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_schema, "CHECKPOINT_PAGES", 100)
    monkeypatch.setattr(sqlite_schema, "LOG_BYTES", 2**20)
    log = Path(f"{path}-wal")
    async with SqliteJobStore(path) as store:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN")
            other.execute("SELECT count(*) FROM jobs").fetchone()
            for n in range(5):
                await store.add([new_job(f"{n}", "x" * 2**20)])
            assert log.stat().st_size > 5 * 2**20
        for n in range(5, 8):
            await store.add([new_job(f"{n}")])
        assert log.stat().st_size <= 2**20


async def test_what_is_removed_is_not_written_once_more(path: Path) -> None:
    """As SQLite does where it was compiled to overwrite it: other changes would wait for seconds."""
    async with SqliteJobStore(path) as store:
        await store.add([new_job("a", "x" * 2**23)])
        await store.cancel("a", 2.0)
        store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # noqa: SLF001
        assert await store.remove_finished(3.0) == 1
        assert Path(f"{path}-wal").stat().st_size < 2**20


async def test_jobs_are_removed_also_where_their_space_cannot_be_given_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("modalkit.service.jobs.store.ROWS_PER_STEP", "no number")
    async with SqliteJobStore(path) as store:
        await store.add([new_job("a")])
        await store.cancel("a", 2.0)
        assert await store.purge(JobFilter()) == 1
        assert await store.get("a") is None
    assert "could not be given back; trying again after the next removal" in caplog.text


async def test_a_database_that_another_program_locks_is_an_error_and_then_works_again(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        store._database.execute("PRAGMA busy_timeout = 0")  # noqa: SLF001  # so that the test need not wait
        intruder = sqlite3.connect(path, isolation_level=None)
        intruder.execute("BEGIN IMMEDIATE")
        with pytest.raises(JobStoreUnavailableError, match="locked; close the other program"):
            await store.add([new_job("a")])
        assert await store.get("a") is None
        intruder.execute("ROLLBACK")
        intruder.close()
        assert await store.add([new_job("a")]) == ["a"]


def listed(**fields: Any) -> str:
    return f"{SELECT} WHERE {condition_of(JobFilter(**fields))[0]} ORDER BY seq DESC LIMIT ?"


def changed(chosen: str) -> str:
    return sql.SIZES.format(columns="seq", chosen=chosen)


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (sql.CLAIMABLE, "queued_jobs"),
        (sql.IS_CLAIMABLE, "queued_jobs"),
        (sql.OWNERS.format(which="owner > ?4"), "queued_jobs"),
        (sql.OWNERS.format(which="owner <= ?4"), "queued_jobs"),
        (sql.FEWEST_CRASHES, "suspect_jobs"),
        (sql.QUARANTINED, "suspect_jobs"),
        (sql.REQUEUE.format(rows="(1, 1, 1)"), "sqlite_autoindex_jobs_1"),
        (changed(sql.DUE_RETRIES), "waiting_retries"),
        (sql.NEXT_RETRY, "waiting_retries"),
        (changed(sql.EXPIRED), "expiring_jobs"),
        (sql.REQUEUE_CRASHED, "running_jobs"),
        (sql.CRASHED, "suspect_jobs"),
        (sql.NEXT_QUEUE, "deliveries"),
        (sql.NEXT_DUE_QUEUE, "deliveries"),
        (sql.DUE, "deliveries"),
        (sql.FEWEST_DELIVERY_CRASHES, "suspect_deliveries"),
        (sql.QUARANTINED_DELIVERIES, "suspect_deliveries"),
        (sql.QUARANTINE_DELIVERIES.format(which="delivery_crashes > 0"), "suspect_deliveries"),
        (sql.QUARANTINE_DELIVERIES.format(which="delivery_crashes = 0 AND delivery_queue = ?"), "deliveries"),
        (sql.GIVE_UP_DELIVERIES, "suspect_deliveries"),
        (sql.END.format(rows="(1, 1, 1, 1, 1, 1, 1)"), "sqlite_autoindex_jobs_1"),
        (sql.COUNT_PENDING, "sqlite_autoindex_jobs_1"),
        (sql.RECORD_DELIVERIES.format(rows="(1, 1, 1, 1, 1)"), "sqlite_autoindex_jobs_1"),
        (changed(sql.UNDELIVERED.format(which="seq > ?")), "undelivered_jobs"),
        (sql.REMOVE, "removable_jobs"),
        (changed(sql.UNDELIVERED.format(which="seq > ? AND owner = ?")), "undelivered_jobs"),
        (f"{SELECT} WHERE idempotency_key = ? AND owner = ?", "idempotency_keys"),
        (listed(owner="a"), "owned_jobs"),
        (sql.KNOWN_KEYS, "idempotency_keys"),
        (NEXT_OLDEST, "queued_jobs"),
        ("SELECT status, count(*) FROM jobs WHERE batch_id = ? AND owner = ? GROUP BY status", "batch_states"),
        ("SELECT count(*) FROM jobs WHERE batch_id = ? AND finished_at > ?", "batch_ends"),
        ("SELECT * FROM jobs WHERE batch_id = ? AND line > ? ORDER BY line LIMIT 500", "batch_lines"),
        (listed(statuses=[JobStatus.FAILED]), "failed_jobs"),
        (listed(statuses=[JobStatus.RUNNING], model_name="m"), "running_jobs"),
        (listed(deliveries=[DeliveryStatus.UNDELIVERED]), "undelivered_jobs"),
    ],
)
async def test_what_is_done_again_and_again_costs_the_same_however_many_jobs_there_are(
    path: Path, statement: str, index: str
) -> None:
    async with SqliteJobStore(path) as store:
        unbound = re.sub(r"\?\d*", "1", statement)
        plan = store._database.execute(f"EXPLAIN QUERY PLAN {unbound}").fetchall()  # noqa: SLF001
        steps = [str(step[3]) for step in plan]
        assert any(f"INDEX {index}" in step for step in steps), steps
        assert not any(step.startswith("SCAN jobs") and "INDEX" not in step for step in steps), steps
        assert not any("TEMP B-TREE" in step for step in steps), steps


@pytest.mark.parametrize(
    "which",
    [
        JobFilter(ended_before=5.0),
        JobFilter(statuses=[JobStatus.SUCCEEDED]),
        JobFilter(deliveries=[DeliveryStatus.NONE], model_name="m"),
        JobFilter(batch_id="b", owner=""),
    ],
)
async def test_other_changes_wait_for_no_search_of_a_purge(path: Path, which: JobFilter) -> None:
    async with SqliteJobStore(path) as store:
        await store.add([replace(new_job(job_id), success_queue=None, batch_id="b", line=1) for job_id in ("a", "b")])
        await store.claim("m", 1, 2.0)
        await store.finish([JobEnd(job_id="a", status=JobStatus.SUCCEEDED, result_json="{}", finished_at=3.0)])
        statements: list[str] = []
        store._database.set_trace_callback(statements.append)  # noqa: SLF001
        assert await store.purge(which) == 1
        store._database.set_trace_callback(None)  # noqa: SLF001
        removals = [statement for statement in statements if "DELETE" in statement]
        plans = [store._database.execute(f"EXPLAIN QUERY PLAN {removal}").fetchall() for removal in removals]  # noqa: SLF001
        assert [str(plan[0][3]) for plan in plans] == ["SEARCH jobs USING INTEGER PRIMARY KEY (rowid=?)"]
        assert not any("jobs" in str(step[3]) for plan in plans for step in plan[1:]), plans


async def test_a_claim_of_large_jobs_reads_few_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "READ", sql.READ.replace(str(sql.BYTES_PER_READ), "100000"))
    monkeypatch.setattr(sql, "BYTES_PER_READ", 100_000)
    looked_at = 0

    def length(value: bytes | None) -> int | None:
        nonlocal looked_at
        looked_at += value is not None and value.startswith(b'{"a":')
        return None if value is None else len(value)

    async with SqliteJobStore(path) as store:
        large = json.dumps({"a": "x" * 1000})
        await store.add([replace(new_job(f"{n:03}"), message_json=large) for n in range(500)])
        store._database.create_function("length", 1, length, deterministic=True)  # noqa: SLF001
        claimed = await store.claim("m", 500, 2.0)
        assert 40 < len(claimed) <= looked_at < 100
        assert [job.job_id for job in claimed] == [f"{n:03}" for n in range(len(claimed))]


async def test_bulk_jobs_take_no_place_of_large_interactive_ones(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which only some are claimed at once, because of their size."""
    monkeypatch.setattr(sql, "READ", sql.READ.replace(str(sql.BYTES_PER_READ), "10000"))
    monkeypatch.setattr(sql, "BYTES_PER_READ", 10_000)
    large: dict[str, Any] = {"message_json": json.dumps({"a": "x" * 1000}), "priority": Priority.INTERACTIVE}
    async with SqliteJobStore(path) as store:
        await store.add([replace(new_job(f"bulk {n:02}"), priority=Priority.BULK) for n in range(20)])
        await store.add([replace(new_job(f"large {n}"), **large) for n in range(6)])
        names = [[job.job_id.split()[0] for job in await store.claim("m", 12, 2.0, bulk_limit=2)] for _ in range(2)]
    assert names[0] == ["large"] * 4 + ["bulk"] * 2
    assert names[1] == ["large"] * 2 + ["bulk"] * 10


@pytest.mark.parametrize("owner", [None, "a"])
async def test_the_next_ends_of_a_batch_are_read_from_an_index_alone(path: Path, owner: str | None) -> None:
    async with SqliteJobStore(path) as store:
        statements: list[str] = []
        store._reader.set_trace_callback(statements.append)  # noqa: SLF001
        await store.ends_after("b", owner, 5, 7)
        store._reader.set_trace_callback(None)  # noqa: SLF001
        plan = store._database.execute(f"EXPLAIN QUERY PLAN {statements[0]}").fetchall()  # noqa: SLF001
        assert any("COVERING INDEX batch_ends (batch_id=? AND finished_at>?)" in str(step[3]) for step in plan), plan


def test_a_transaction_that_asyncio_cancelled_is_finished_before_the_store_closes(path: Path) -> None:
    """Its cancellation passes by anyio's shields, and a connection closed while it is used crashes the process."""
    began, may_go_on = threading.Event(), threading.Event()
    store = SqliteJobStore(path)
    found: list[object] = []

    def operation(_: JobTable) -> None:
        began.set()
        may_go_on.wait(timeout=60)
        found.extend(store._database.execute("SELECT count(*) FROM jobs").fetchone())  # noqa: SLF001

    async def own() -> None:
        async with store:
            await store._perform(operation)  # noqa: SLF001  # an operation that takes its time

    async def cancel_all() -> None:
        owner = asyncio.create_task(own())
        await asyncio.to_thread(began.wait, 60)
        for _ in range(3):
            owner.cancel()
            await asyncio.sleep(0)
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await owner
        while True:
            try:
                async with SqliteJobStore(path) as again:
                    assert await again.get("a") is None
                    break
            except JobStoreLockedError:  # until the thread has closed it
                await asyncio.sleep(0)

    asyncio.run(cancel_all())
    assert found == [0]


async def test_an_abandoned_operation_that_has_not_begun_is_not_run(path: Path) -> None:
    began, may_go_on = threading.Event(), threading.Event()

    def operation(_: JobTable) -> None:
        began.set()
        may_go_on.wait(timeout=60)

    async with SqliteJobStore(path) as store:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(store._perform, operation)  # noqa: SLF001  # keeps the thread
            await anyio.to_thread.run_sync(began.wait, 60)
            with anyio.move_on_after(0):
                await store.add([new_job("a")])
            may_go_on.set()
        assert await store.get("a") is None
        await store.add([new_job("b")])
        assert await store.get("b") is not None


async def test_more_operations_than_may_wait_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modalkit.service.jobs.operation_thread.MAX_WAITING_OPERATIONS", 10)
    refusals: list[str] = []

    async def add(store: SqliteJobStore, n: int) -> None:
        try:
            await store.add([new_job(f"{n}")])
        except JobStoreBusyError as error:
            refusals.append(str(error))

    async with SqliteJobStore(path) as store:
        async with anyio.create_task_group() as task_group:
            for n in range(100):
                task_group.start_soon(add, store, n)
        assert (await store.counts()).statuses[JobStatus.QUEUED] == 100 - len(refusals)
    assert set(refusals) == {"10 operations wait for the job store already; retry later"}


async def test_a_page_takes_no_longer_for_the_jobs_that_were_removed(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        await store.add([new_job(f"{n}") for n in range(3)])
    found, before = list[list[str]](), None
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE jobs SET seq = seq * seq * 1000000000000")
        for _ in range(3):
            part, before = part_of_page(database, 9, JobFilter(), before, 2**20)
            found.append([job.job_id for _, job in part])
    assert (found, before) == ([["2"], ["1"], ["0"]], None)


async def test_a_cancelled_purge_leaves_the_store_working(path: Path) -> None:
    is_busy, may_go_on = threading.Event(), threading.Event()

    def keep_busy(_: object) -> bool:
        is_busy.set()
        return may_go_on.wait(timeout=60)

    async with SqliteJobStore(path) as store:
        await store.add([new_job(f"{n}") for n in range(10)])
        for n in range(10):
            await store.cancel(f"{n}", 2.0)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(store._perform, keep_busy)  # noqa: SLF001  # its thread can do nothing else
            assert await anyio.to_thread.run_sync(is_busy.wait, 60)
            with anyio.move_on_after(0):
                await store.purge(JobFilter())
            may_go_on.set()
        assert await store.purge(JobFilter()) == 10
        assert sum((await store.counts()).statuses.values()) == 0


async def test_a_cancelled_opening_leaves_no_lock(path: Path) -> None:
    for _ in range(3):
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with SqliteJobStore(path):
                pass
    async with SqliteJobStore(path) as store:
        assert await store.get("a") is None


async def test_an_error_that_is_not_sqlites_own_reaches_the_caller_and_the_store_goes_on(path: Path) -> None:
    def fail(table: JobTable) -> None:
        table._database.execute("COMMIT")  # noqa: SLF001  # so that the commit of the transaction fails
        raise MemoryError

    async with SqliteJobStore(path) as store:
        with pytest.raises((JobStoreUnavailableError, MemoryError)):
            await store._perform(fail)  # noqa: SLF001  # an operation of the test's own
        await store.add([new_job("a")])
        assert await store.get("a") is not None


async def test_more_is_never_read_at_once_than_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth is read by itself: as JSON it might be longer than any value may be."""
    monkeypatch.setattr(sql, "READ", sql.READ.replace(str(sql.BYTES_PER_READ), "5000"))
    async with SqliteJobStore(path) as store:
        await store.add([new_job(f"{n}", "é" * (5000 if n == 4 else 500)) for n in range(7)])
        claimed = [[job.job_id for job in await store.claim("m", 9, 2.0)] for _ in range(5)]
        assert claimed == [["0", "1"], ["2", "3"], ["4"], ["5", "6"], []]
        fourth = await store.get("4")
        assert fourth is not None
        assert len(fourth.message["text"]) == 5000


async def test_jobs_that_wait_to_run_again_and_quarantined_ones_outlive_the_process(path: Path) -> None:
    async with SqliteJobStore(path) as store:
        await store.add([new_job("retry"), new_job("sent")])
        await store.claim("m", 9, 2.0)
        await store.requeue([JobRetry(job_id="retry", retry_at=8.5, error="down")])
        end = JobEnd(job_id="sent", status=JobStatus.SUCCEEDED, result_json="{}", finished_at=3.0)
        await store.finish([end])
        await store.claim_deliveries(9, 3.0, queue_limits={}, queue_limit=9)
    async with SqliteJobStore(path) as store:
        assert await store.recover(4.0) == Recovery(0, [])
        assert await store.claim("m", 9, 4.0) == []
        assert await store.release_retries("m", 4.0) == 8.5
        assert [job.job_id for job in await store.claim_quarantined_deliveries(9)] == ["sent"]
        assert await store.release_retries("m", 8.5) is None
        (job,) = await store.claim("m", 9, 8.5)
        assert (job.job_id, job.attempts, job.error) == ("retry", 1, "down")


@pytest.mark.parametrize("keyed", [True, False])
async def test_a_full_store_still_knows_its_keys(path: Path, keyed: bool) -> None:
    job = replace(new_job("a"), idempotency_key="k")
    async with SqliteJobStore(path, max_jobs=1) as store:
        assert await store.add([job]) == ["a"]
        again = replace(job, job_id="b", idempotency_key="k" if keyed else "l")
        if keyed:
            assert await store.add([again]) == ["a"]
        else:
            with pytest.raises(JobStoreFullError):
                await store.add([again])


async def test_a_delivery_that_fails_again_meanwhile_is_replayed_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modalkit.service.jobs.sqlite_many.ROWS_PER_STEP", 2)
    ids = [f"{n}" for n in range(5)]
    async with SqliteJobStore(path) as store:
        await store.add([replace(new_job(job_id), failure_queue="bad") for job_id in ids])
        await store.claim("m", 9, 2.0)
        failed: dict[str, Any] = {"status": JobStatus.FAILED, "error": "no", "finished_at": 3.0}
        await store.finish([JobEnd(job_id=job_id, **failed) for job_id in ids])
        given_up: dict[str, Any] = {"status": DeliveryStatus.UNDELIVERED, "attempts": 1, "error": "gone"}

        async def give_up() -> None:
            await store.record_deliveries([DeliveryRecord(job_id=job_id, **given_up) for job_id in ids])

        async def give_up_for_ever() -> None:
            while True:
                await give_up()

        await give_up()
        with anyio.fail_after(30):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(give_up_for_ever)
                replayed = await store.replay(None, 4.0)
                task_group.cancel_scope.cancel()
    assert replayed == 5
