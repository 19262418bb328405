"""What the commands need of whatever has the jobs; `ServiceJobs` and `StoredJobs` give it."""

from types import TracebackType
from typing import Protocol, Self

from modalkit.service.errors import ServiceError
from modalkit.service.jobs import JobFilter
from modalkit.service.web.answers import JobDetails, JobPageView


class JobsError(ServiceError):
    """Raised when the jobs cannot be reached: no service at the address, a wrong key, no file, or one in use."""


class JobRefusedError(JobsError):
    """Raised when one job is unknown, or in no state for what is asked; others may be better off."""


class JobsClient(Protocol):
    """Looks at jobs and changes them; an asynchronous context manager, whose calls raise `ServiceError`."""

    name: str
    """The address or the file, as it may be shown."""
    sent_when: str
    """When results that are due are sent."""

    async def __aenter__(self) -> Self: ...  # protocol methods have no body

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None: ...

    async def page(self, limit: int, which: JobFilter, cursor: int | None) -> JobPageView:
        """Up to `limit` jobs that `which` covers, the newest first."""
        ...

    async def get(self, job_id: str) -> JobDetails:
        """All that can be known of a job. Raises `JobRefusedError` if there is none."""
        ...

    async def replay(self, job_id: str) -> None:
        """Make an undelivered result due again. Raises `JobRefusedError` for any other job."""
        ...

    async def replay_all(self) -> int:
        """Make all undelivered results due again; returns how many."""
        ...

    async def purge(self, which: JobFilter, older_than_s: int | None) -> int:
        """Remove the ended jobs that `which` covers and that ended so many seconds ago; returns how many."""
        ...
