"""The errors that a job store raises; all derive from `JobStoreError`."""

from pathlib import Path

from modalkit.service.errors import ServiceError


class JobStoreError(ServiceError):
    """The root of all errors of a job store.

    An operation that raised one has stored nothing, except the earlier steps of one with several steps.
    """


class DuplicateJobError(JobStoreError):
    """Raised when a job is added whose id is already in the store, or twice in the same call."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job_id {job_id!r} is already used; give every job an id of its own, such as a new UUID")
        self.job_id = job_id


class IdempotencyKeyReusedError(JobStoreError):
    """Raised when a job is refused because its idempotency key belongs to a job that asked for something else."""

    def __init__(self, key: str, job_id: str) -> None:
        super().__init__(
            f"idempotency_key {key!r} belongs to job {job_id}, which asked for something else (model, message, queues, "
            "meta or batch); give every request a key of its own, and only its repetitions the same"
        )
        self.key = key
        self.job_id = job_id


class JobStoreFullError(JobStoreError):
    """Raised when jobs are refused because the store would hold more than its limit, ended jobs included."""

    def __init__(self, stored: int, added: int, limit: int) -> None:
        super().__init__(
            f"the job store holds {stored} of at most {limit} jobs and has no room for {added} more; retry when jobs "
            f"have ended and been removed, shorten result_ttl, or raise max_stored_jobs"
        )
        self.stored = stored
        self.added = added
        self.limit = limit


class JobStoreBusyError(JobStoreError):
    """Raised when so many operations wait for the store that one more is refused; the caller may try again later."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} operations wait for the job store already; retry later")
        self.waiting = waiting


class JobStoreClosedError(JobStoreError):
    """Raised when a store is used outside its `async with` block, or was aborted before the operation finished."""

    def __init__(self) -> None:
        super().__init__("the job store is not open: use it inside its 'async with' block")


class JobStoreLockedError(JobStoreError):
    """Raised when a store is opened that another process has open, or this one already has."""

    def __init__(self, path: Path, owner_pid: int | None) -> None:
        owner = "another process" if owner_pid is None else f"process {owner_pid}"
        super().__init__(
            f"the job store {path} is in use by {owner}; stop that process, or give this one another store_path"
        )
        self.path = path
        self.owner_pid = owner_pid


class JobStoreSchemaError(JobStoreError):
    """Raised when a database has tables of another version, or of another program."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"the database {path} {problem}; {remedy}")
        self.path = path


class JobStoreUnavailableError(JobStoreError):
    """Raised when the database cannot be opened, read or written: a full disk, a locked or damaged file.

    The store stays open: the next operation may succeed once the cause is gone.
    """

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"the job store {path} cannot be used: {problem}; {remedy}")
        self.path = path
