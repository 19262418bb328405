"""The jobs of a running service, over HTTP."""

from collections.abc import Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from modalkit.service.cli.jobs.client import JobRefusedError, JobsError
from modalkit.service.jobs import JobFilter
from modalkit.service.web.answers import JobDetails, JobPageView, Problem, Purged, Replayed

Answer = TypeVar("Answer", bound=BaseModel)
Parameters = list[tuple[str, str | int | float | bool | None]]

TIMEOUT = httpx.Timeout(10, read=300)  # to replay or to purge very many takes its time


class ServiceJobs:
    """The jobs of the service at `url`, asked for with `key` in the header `auth_header`; see `JobsClient`.

    Raises `JobsError` for a key that no header can carry.
    """

    sent_when = "at once"

    def __init__(self, url: httpx.URL, key: str | None, auth_header: str) -> None:
        self.name = str(url.copy_with(userinfo=b""))
        self._auth_header = auth_header
        self._has_key = key is not None
        self._client = httpx.AsyncClient(base_url=url, headers=_headers(auth_header, key), timeout=TIMEOUT)

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.__aexit__(exc_type, exc, traceback)

    async def page(self, limit: int, which: JobFilter, cursor: int | None) -> JobPageView:
        """See `JobsClient.page`."""
        parameters = [*_parameters(which), ("limit", limit), *_given("cursor", cursor)]
        return await self._ask(JobPageView, "GET", "/jobs", parameters)

    async def get(self, job_id: str) -> JobDetails:
        """See `JobsClient.get`."""
        return await self._ask(JobDetails, "GET", _path(job_id), about=job_id)

    async def replay(self, job_id: str) -> None:
        """See `JobsClient.replay`."""
        await self._ask(JobDetails, "POST", f"{_path(job_id)}/replay", about=job_id)

    async def replay_all(self) -> int:
        """See `JobsClient.replay_all`."""
        return (await self._ask(Replayed, "POST", "/jobs/replay")).replayed

    async def purge(self, which: JobFilter, older_than_s: int | None) -> int:
        """See `JobsClient.purge`."""
        parameters = [*_parameters(which), *_given("older_than", older_than_s)]
        return (await self._ask(Purged, "DELETE", "/jobs", parameters)).purged

    async def _ask(
        self,
        kind: type[Answer],
        method: str,
        path: str,
        parameters: Parameters | None = None,
        *,
        about: str | None = None,
    ) -> Answer:
        """The answer to a request, which may be `about` one job."""
        try:
            response = await self._client.request(method, path, params=parameters)
        except httpx.ReadTimeout as error:
            raise JobsError(
                f"{self.name} has not answered {method} {path} within {TIMEOUT.read:g} s; it may still do what was "
                "asked, so look before asking again"
            ) from error
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise JobsError(f"{self.name} cannot be reached: {reason}; start the service, or correct --url") from error
        if response.status_code != HTTPStatus.OK:
            raise self._error(response, about)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise JobsError(
                f"{self.name} answers {method} /jobs as no modalkit of this version does; correct --url, or use the "
                "modalkit of the service"
            ) from error

    def _error(self, response: httpx.Response, about: str | None) -> JobsError:
        status, detail = response.status_code, _detail(response)
        if about is not None and (
            status == HTTPStatus.CONFLICT or (status == HTTPStatus.NOT_FOUND and about in detail)
        ):
            return JobRefusedError(detail)
        if status == HTTPStatus.UNAUTHORIZED:
            remedy = "give its API key with --key or in MODALKIT_API_KEY"
            if self._has_key:
                remedy = (
                    f"correct the API key, which was sent in the header {self._auth_header!r} (auth_config.auth_header "
                    "of the configuration)"
                )
            return JobsError(f"{self.name} refuses the request (401); {remedy}")
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED) or response.has_redirect_location:
            elsewhere = f", and leads to {response.headers['location']}" if response.has_redirect_location else ""
            return JobsError(
                f"{self.name} is not the address of a modalkit service: it answers {status}{elsewhere}; give --url as "
                "modalkit serve shows it"
            )
        return JobsError(f"{self.name} answers {status}{detail and ': '}{detail}")


def _headers(auth_header: str, key: str | None) -> dict[bytes, bytes]:
    if key is None:
        return {}
    scheme = "Bearer " if auth_header.lower() == "authorization" else ""
    if not key.isprintable() or not key.isascii():
        # The key is not shown: it is a secret.
        raise JobsError("the API key (--key or MODALKIT_API_KEY) must be printable ASCII characters only; correct it")
    return {auth_header.encode(): f"{scheme}{key}".encode()}


def _path(job_id: str) -> str:
    # A dot is quoted too: /jobs/./replay would mean /jobs/replay, and so all jobs.
    return f"/jobs/{quote(job_id, safe='').replace('.', '%2E')}"


def _parameters(which: JobFilter) -> Parameters:
    names: Sequence[tuple[str, Sequence[str]]] = (("status", which.statuses), ("delivery", which.deliveries))
    return [*((name, value) for name, values in names for value in values), *_given("model_name", which.model_name)]


def _given(name: str, value: str | int | None) -> Parameters:
    return [] if value is None else [(name, value)]


def _detail(response: httpx.Response) -> str:
    """What the service says of an error; empty where it is none of ours."""
    try:
        return Problem.model_validate_json(response.content).detail
    except ValidationError:
        return ""
