"""The jobs in the SQLite file of the configuration, while no service has it open."""

import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio

from modalkit.service.cli.jobs.client import JobRefusedError, JobsError
from modalkit.service.jobs import Job, JobFilter, JobStoreLockedError, SqliteJobStore
from modalkit.service.web.answers import JobDetails, JobPageView, JobView


class StoredJobs:
    """The jobs in the file at `path`, which entering locks and does not create; see `JobsClient`.

    Entering raises `JobsError` for a file that is missing or in use, and other `JobStoreError`s as the store does.
    """

    sent_when = "when the service starts next"

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._store = SqliteJobStore(path)

    async def __aenter__(self) -> Self:
        if not await anyio.Path(self._store.path).is_file():
            raise JobsError(
                f"there is no job store {self.name} (from {Path.cwd()}); start where the service does, give its "
                "--config, or ask the service itself, as in --url http://127.0.0.1:8000"
            )
        try:
            await self._store.__aenter__()
        except JobStoreLockedError as error:
            owner = "another process" if error.owner_pid is None else f"process {error.owner_pid}"
            raise JobsError(
                f"the job store {self.name} is in use by {owner}; ask the service that runs there, as in "
                "--url http://127.0.0.1:8000, or stop it"
            ) from error
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._store.__aexit__(exc_type, exc, traceback)

    async def page(self, limit: int, which: JobFilter, cursor: int | None) -> JobPageView:
        """See `JobsClient.page`."""
        page = await self._store.page(limit, which, cursor)
        return JobPageView(jobs=[JobView.model_validate(job) for job in page.jobs], next_cursor=page.next_cursor)

    async def get(self, job_id: str) -> JobDetails:
        """See `JobsClient.get`."""
        return JobDetails.model_validate(await self._job(job_id))

    async def replay(self, job_id: str) -> None:
        """See `JobsClient.replay`."""
        if not await self._store.replay([job_id], time.time()):
            job = await self._job(job_id)
            raise JobRefusedError(
                f"the delivery of job {job_id} is {job.delivery}; only an undelivered result can be sent once more"
            )

    async def replay_all(self) -> int:
        """See `JobsClient.replay_all`."""
        return await self._store.replay(None, time.time())

    async def purge(self, which: JobFilter, older_than_s: int | None) -> int:
        """See `JobsClient.purge`."""
        ended_before = None if older_than_s is None else time.time() - older_than_s
        return await self._store.purge(replace(which, ended_before=ended_before))

    async def _job(self, job_id: str) -> Job:
        job = await self._store.get(job_id)
        if job is None:
            raise JobRefusedError(
                f"there is no job {job_id!r} in {self.name}: the id is wrong, or the job was removed after its "
                "result_ttl"
            )
        return job
