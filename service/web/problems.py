"""Errors as HTTP answers: problem details (RFC 9457) that name the field, the value and the remedy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from modalkit.batching import (
    BatchTimeoutError,
    DeadlineExceededError,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
)
from modalkit.pipelines import RejectItem
from modalkit.service.errors import (
    ContainerFaultError,
    InvalidItemError,
    NotAvailableError,
    NotReadyError,
    ReloadError,
    RemoteCallError,
    RemoteItemError,
    RemoteTimeoutError,
    RetryableError,
    ServiceError,
    UnknownModelError,
    describe_error,
)
from modalkit.service.jobs import IdempotencyKeyReusedError, JobStoreBusyError, JobStoreError, JobStoreFullError
from modalkit.service.jobs.queue_rules import QueueNotAllowedError
from modalkit.service.loading import LoadError
from modalkit.service.queue_backends import QueueNameError
from modalkit.service.settings import SettingsError
from modalkit.service.validation import field_errors, summary
from modalkit.service.web.answers import PROBLEM_JSON

RETRY_AFTER_S = 1

_ERRORS: dict[HTTPStatus, tuple[type[Exception], ...]] = {
    HTTPStatus.NOT_FOUND: (UnknownModelError,),
    HTTPStatus.CONFLICT: (LoadError, ReloadError, SettingsError),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (RequestTooLargeError,),
    HTTPStatus.UNPROCESSABLE_ENTITY: (
        IdempotencyKeyReusedError,
        InvalidItemError,
        QueueNameError,
        QueueNotAllowedError,
        RejectItem,
    ),
    HTTPStatus.TOO_MANY_REQUESTS: (JobStoreBusyError, JobStoreFullError, QueueFullError),
    HTTPStatus.NOT_IMPLEMENTED: (NotAvailableError,),
    HTTPStatus.SERVICE_UNAVAILABLE: (
        ContainerFaultError,
        JobStoreError,
        NotReadyError,
        RemoteCallError,
        RetryableError,
        SchedulerClosedError,
    ),
    HTTPStatus.GATEWAY_TIMEOUT: (BatchTimeoutError, DeadlineExceededError, RemoteTimeoutError),
}
_STATUS_OF = {kind: status for status, kinds in _ERRORS.items() for kind in kinds}
_STATUS_BY_NAME = {kind.__name__: status for kind, status in _STATUS_OF.items()}


@dataclass(eq=False)
class ProblemError(ServiceError):
    """Raised to answer a request, or one of its items, with problem details."""

    status: HTTPStatus
    detail: str
    errors: Sequence[Mapping[str, Any]] = ()
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return self.detail


KNOWN_ERRORS: tuple[type[Exception], ...] = (ProblemError, *_STATUS_OF)
"""Errors that callers are told; any other one is logged with its traceback, and the answer is 500."""


def invalid(findings: Iterable[Mapping[str, Any]], model: type[BaseModel] | None = None) -> ProblemError:
    """The problem of a request in which pydantic found errors (`ValidationError.errors`); for `model`, its model."""
    errors = field_errors(findings, model)
    return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, summary(errors), errors=errors)


def status_of(error: Exception) -> HTTPStatus:
    """The HTTP status for an error of a gateway; 500 for an error of a pipeline."""
    if isinstance(error, QueueFullError) and error.is_permanent:
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    if isinstance(error, RemoteItemError):
        return _STATUS_BY_NAME.get(error.error_type, HTTPStatus.INTERNAL_SERVER_ERROR)
    found = (_STATUS_OF[kind] for kind in type(error).__mro__ if kind in _STATUS_OF)
    return next(found, HTTPStatus.INTERNAL_SERVER_ERROR)


def error_response(error: Exception) -> Response:
    """The answer to a request that failed, of the media type ``application/problem+json``."""
    if not isinstance(error, ProblemError):
        status = status_of(error)
        retry = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
        headers = {"Retry-After": str(RETRY_AFTER_S)} if retry else None
        errors = error.errors if isinstance(error, InvalidItemError) else ()
        error = ProblemError(status, describe_error(error), errors, headers)
    status = error.status
    content = {"type": "about:blank", "title": status.phrase, "status": status, "detail": error.detail}
    if error.errors:
        content["errors"] = error.errors
    return Response(to_json(content, inf_nan_mode="null"), status, error.headers, PROBLEM_JSON)


def error_json(error: Exception) -> bytes:
    """The answer to one of several items, in JSON."""
    return to_json({"status": "error", "error": describe_error(error)})


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every error of the application with problem details."""

    async def on_error(_: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in KNOWN_ERRORS:
        app.add_exception_handler(kind, on_error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_parameter(_: Request, error: RequestValidationError) -> Response:
        return error_response(invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        status, detail = HTTPStatus(error.status_code), error.detail
        if status is HTTPStatus.NOT_FOUND:
            detail = "there is nothing at this address; /docs lists what there is"
        elif status is HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "another method")
            detail = f"{request.url.path} takes {allowed}, not {request.method}; /docs lists what there is"
        return error_response(ProblemError(status, detail, headers=error.headers))

    @app.exception_handler(Exception)
    async def on_unexpected_error(_: Request, error: Exception) -> Response:
        # Starlette raises the error again once this is sent, so that the server logs it with its traceback.
        detail = f"an unexpected {type(error).__name__}; the service's log tells more"
        return error_response(ProblemError(HTTPStatus.INTERNAL_SERVER_ERROR, detail))
