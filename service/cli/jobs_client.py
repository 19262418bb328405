"""The jobs of a running service over HTTP, and those of a stored file through the same routes, in this process."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import anyio
import httpx
from anyio.from_thread import start_blocking_portal
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError

from modalkit.service.errors import ServiceError, UsageError
from modalkit.service.jobs import JobStoreLockedError, SqliteJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.web.admission import Admission
from modalkit.service.web.answers import Problem
from modalkit.service.web.auth import scheme_of
from modalkit.service.web.job_routes import make_job_router
from modalkit.service.web.problems import install_problem_handlers
from modalkit.service.web.ssm_key import header_bytes

Answer = TypeVar("Answer", bound=BaseModel)

AWAY = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})
TIMEOUT = httpx.Timeout(10, read=300)  # to replay or to purge very many jobs takes minutes


class JobsError(ServiceError):
    """Raised when the jobs cannot be reached: no service at the address, a wrong key, no file, or one in use."""


class AwayError(JobsError):
    """Raised when a service cannot be reached, or its proxy says so; the same may succeed later."""


class JobRefusedError(JobsError):
    """Raised when one job is unknown, or in no state for what is asked; the same may succeed for other jobs."""


@dataclass
class JobsClient:
    """Asks the routes of jobs, in a block of `opened`.

    `name` is the address of the service, or the path of the file, as it may be shown. `sent_when` says when results
    that are due are sent. `key_remedy` says what to do where the key is refused; None for a file.
    """

    http: AbstractAsyncContextManager[httpx.AsyncClient]
    name: str
    sent_when: str
    key_remedy: str | None = None

    @classmethod
    def of_service(cls, url: httpx.URL, key: str | None, auth_header: str) -> Self:
        """The jobs of the service at `url`. Raises `UsageError` for a key that no header can carry."""
        headers = {}
        remedy = "give its API key with --key or in MODALKIT_API_KEY"
        if key is not None:
            remedy = (
                f"correct the API key, which was sent in the header {auth_header!r} (auth_config.auth_header of the "
                "configuration)"
            )
            try:
                headers[auth_header.encode()] = scheme_of(auth_header).encode() + header_bytes(key)
            except ValueError as error:
                raise UsageError(f"the API key (--key or MODALKIT_API_KEY) must be corrected: {error}") from None
        http = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT)
        return cls(http, str(url.copy_with(userinfo=b"")), "at once", remedy)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """The jobs in the SQLite file at `path`."""
        return cls(_serving_file(path), str(path), "when the service starts next")

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """This client in the context in which to ask; locks a file, and does not create it.

        Raises `JobsError` for a file that is missing or in use, and other `JobStoreError`s as the store does.
        """
        with start_blocking_portal() as self._portal, self._portal.wrap_async_context_manager(self.http) as client:
            self._request = client.request
            yield self

    def ask(
        self,
        kind: type[Answer],
        method: str,
        path: str = "",
        *,
        job_id: str | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> Answer:
        """The answer of the route `path` below that of all jobs, or of one job.

        Parameters that are None are left out. Raises `JobsError`; `JobRefusedError` if it is for the job alone.
        """
        # A dot is quoted too: /jobs/./replay would mean /jobs/replay, and so all jobs.
        job = "" if job_id is None else f"/{quote(job_id, safe='').replace('.', '%2E')}"
        given = {name: value for name, value in (parameters or {}).items() if value is not None}
        return self.send(kind, method, f"/jobs{job}{path}", given, about=job_id)

    def send(
        self,
        kind: type[Answer],
        method: str,
        path: str,
        given: dict[str, Any] | None = None,
        *,
        about: str | None = None,
    ) -> Answer:
        """The answer of a route to the parameters `given`; `about` is the job that is asked for. Raises as `ask`."""
        try:
            response = self._portal.call(partial(self._request, method, path, params=given))
        except httpx.ReadTimeout as error:
            raise JobsError(
                f"{self.name} has not answered {method} {path} within {TIMEOUT.read:g} s; it may still do what was "
                "asked, so look before asking again"
            ) from error
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise AwayError(f"{self.name} cannot be reached: {reason}; start the service, or correct --url") from error
        if response.status_code != HTTPStatus.OK:
            raise self.error_of(response, about)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise JobsError(
                f"{self.name} answers {method} {path} as no modalkit of this version does; correct --url, or use the "
                "modalkit of the service"
            ) from error

    def error_of(self, response: httpx.Response, about: str | None = None) -> JobsError:
        """What an answer means that is no result; `about` is the job that was asked for."""
        status, detail, kind = response.status_code, "", ""
        with suppress(ValidationError):  # the answer may be none of ours
            problem = Problem.model_validate_json(response.content)
            detail, kind = problem.detail, problem.type.rpartition(":")[2]
        if about is not None and status in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND):
            if status == HTTPStatus.CONFLICT or about in detail:
                return JobRefusedError(detail)
            if self.key_remedy is None:
                return JobRefusedError(f"there is no job {about!r} in {self.name}")
        if status == HTTPStatus.UNAUTHORIZED:
            return JobsError(f"{self.name} refuses the request (401); {self.key_remedy}")
        is_missing = status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
        if (is_missing and not kind.startswith("unknown-")) or response.has_redirect_location:
            elsewhere = f", and leads to {response.headers['location']}" if response.has_redirect_location else ""
            return JobsError(
                f"{self.name} is not the address of a modalkit service: it answers {status}{elsewhere}; give --url as "
                "modalkit serve shows it"
            )
        kind_of_error = AwayError if status in AWAY else JobsError
        return kind_of_error(f"{self.name} answers {status}{detail and ': '}{detail}")


@asynccontextmanager
async def _serving_file(path: Path) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of the routes over the jobs of a file."""
    if not await anyio.Path(path).is_file():
        raise JobsError(
            f"there is no job store {path} (from {Path.cwd()}); start where the service does, give its --config, or "
            "ask the service itself, as in --url http://127.0.0.1:8000"
        )
    try:
        async with SqliteJobStore(path) as store:
            app = FastAPI()
            # The manager is not entered: that would recover the jobs of a crash, as only the start of a service should.
            app.include_router(make_job_router(JobManager(store), Admission()))
            install_problem_handlers(app)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://file") as client:
                yield client
    except JobStoreLockedError as error:
        owner = "another process" if error.owner_pid is None else f"process {error.owner_pid}"
        raise JobsError(
            f"the job store {path} is in use by {owner}; ask the service that runs there, as in "
            "--url http://127.0.0.1:8000, or stop it"
        ) from error
