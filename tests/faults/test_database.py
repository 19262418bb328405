"""A database that is full or locked for a while delays jobs, and loses none."""

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from modalkit.pipelines import AsyncInputModel, InferenceOutputModel
from modalkit.service.jobs import JobStatus, JobStoreError, SqliteJobStore
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import Length, LengthPipeline

pytestmark = pytest.mark.anyio


class Wordy(LengthPipeline):
    """Gives large results, as long as it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = threading.Event()
        self.may_end.set()

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        self.may_end.wait(timeout=60)
        return [Length(length=len(text), padding="x" * 20_000) for text in raw_output["texts"]]


def requests(count: int) -> list[AsyncInputModel]:
    return [AsyncInputModel(message={"text": "x" * n}, success_queue="ok") for n in range(1, count + 1)]


async def all_delivered(queue: InMemoryBackend, count: int) -> list[int]:
    with anyio.fail_after(60):
        return sorted([json.loads(await queue.receive("ok"))["result"]["length"] for _ in range(count)])


async def test_jobs_whose_ends_find_the_database_full_are_delivered_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, queue, pipeline = SqliteJobStore(tmp_path / "jobs.db"), InMemoryBackend(), Wordy()
    async with InferenceWorker(pipeline, queue_backend=queue, job_store=store, calibrate=False) as worker:
        pipeline.may_end.clear()
        await worker.submit_many(requests(40))
        while not (await store.counts()).statuses[JobStatus.RUNNING]:
            await anyio.sleep(0.01)
        (pages,) = await store._perform(lambda table: _pragma(table, "page_count"))  # noqa: SLF001  # the disk is ours
        await store._perform(lambda table: _pragma(table, f"max_page_count = {pages + 1}"))  # noqa: SLF001  # as above
        pipeline.may_end.set()
        while "could not be stored" not in caplog.text:
            await anyio.sleep(0.01)
        with pytest.raises(JobStoreError, match="free some space on its disk"):
            await worker.submit(AsyncInputModel(message={"text": "x" * 1000}, meta={"padding": "x" * 100_000}))
        await store._perform(lambda table: _pragma(table, "max_page_count = 1000000"))  # noqa: SLF001  # as above
        assert await all_delivered(queue, 40) == list(range(1, 41))


async def test_jobs_that_meet_a_locked_database_are_delivered_once_it_is_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, queue, pipeline = SqliteJobStore(tmp_path / "jobs.db"), InMemoryBackend(), Wordy()
    async with InferenceWorker(pipeline, queue_backend=queue, job_store=store, calibrate=False) as worker:
        await store._perform(lambda table: _pragma(table, "busy_timeout = 0"))  # noqa: SLF001  # so that no call waits
        pipeline.may_end.clear()
        await worker.submit_many(requests(40))
        while not (await store.counts()).statuses[JobStatus.RUNNING]:
            await anyio.sleep(0.01)
        intruder = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
        intruder.execute("BEGIN IMMEDIATE")
        pipeline.may_end.set()
        while "could not be stored" not in caplog.text:
            await anyio.sleep(0.01)
        with pytest.raises(JobStoreError, match="close the other program"):
            await worker.submit(requests(1)[0])
        intruder.execute("ROLLBACK")
        intruder.close()
        assert await all_delivered(queue, 40) == list(range(1, 41))


def _pragma(table: Any, text: str) -> Any:
    return table._database.execute(f"PRAGMA {text}").fetchone()  # noqa: SLF001  # no operation of the store's
