"""Errors as HTTP answers: problem details (RFC 9457) that name the field, the value and the remedy."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from modalkit.batching import (
    BatchTimeoutError,
    DeadlineExceededError,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
)
from modalkit.service.errors import (
    ContainerFaultError,
    ItemRejectedError,
    NotAvailableError,
    NotReadyError,
    RemoteCallError,
    RemoteItemError,
    RemoteTimeoutError,
    UnknownModelError,
    describe_error,
)
from modalkit.service.jobs import IdempotencyKeyReusedError, JobStoreError, JobStoreFullError
from modalkit.service.jobs.errors import JobStoreBusyError
from modalkit.service.jobs.queue_rules import QueueNotAllowedError
from modalkit.service.queue_backends import QueueNameError
from modalkit.service.validation import field_errors, summary
from modalkit.service.web.answers import PROBLEM_JSON

RETRY_AFTER_S = 1

_STATUS_OF = {
    BatchTimeoutError: HTTPStatus.GATEWAY_TIMEOUT,
    ContainerFaultError: HTTPStatus.SERVICE_UNAVAILABLE,
    DeadlineExceededError: HTTPStatus.GATEWAY_TIMEOUT,
    ItemRejectedError: HTTPStatus.UNPROCESSABLE_ENTITY,
    IdempotencyKeyReusedError: HTTPStatus.UNPROCESSABLE_ENTITY,
    JobStoreBusyError: HTTPStatus.TOO_MANY_REQUESTS,
    JobStoreError: HTTPStatus.SERVICE_UNAVAILABLE,
    JobStoreFullError: HTTPStatus.TOO_MANY_REQUESTS,
    NotAvailableError: HTTPStatus.NOT_IMPLEMENTED,
    NotReadyError: HTTPStatus.SERVICE_UNAVAILABLE,
    QueueFullError: HTTPStatus.TOO_MANY_REQUESTS,
    QueueNameError: HTTPStatus.UNPROCESSABLE_ENTITY,
    QueueNotAllowedError: HTTPStatus.UNPROCESSABLE_ENTITY,
    RemoteCallError: HTTPStatus.SERVICE_UNAVAILABLE,
    RemoteTimeoutError: HTTPStatus.GATEWAY_TIMEOUT,
    RequestTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    SchedulerClosedError: HTTPStatus.SERVICE_UNAVAILABLE,
    UnknownModelError: HTTPStatus.NOT_FOUND,
}
_STATUS_BY_NAME = {kind.__name__: status for kind, status in _STATUS_OF.items()}


class ProblemError(Exception):
    """Raised in a route to answer with problem details. `headers` are named with underscores for hyphens."""

    def __init__(
        self, status: HTTPStatus, detail: str, *, errors: Sequence[Mapping[str, Any]] = (), **headers: str
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def problem_response(
    status: HTTPStatus,
    detail: str,
    *,
    errors: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer of the media type ``application/problem+json``."""
    content: dict[str, Any] = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail}
    if errors:
        content["errors"] = errors
    return Response(to_json(content, inf_nan_mode="null"), status, headers, PROBLEM_JSON)


def status_of(error: Exception) -> HTTPStatus:
    """The HTTP status for an error of a gateway; 500 for an error of a pipeline."""
    if isinstance(error, QueueFullError) and error.is_permanent:
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    if isinstance(error, RemoteItemError):
        return _STATUS_BY_NAME.get(error.error_type, HTTPStatus.INTERNAL_SERVER_ERROR)
    for kind in type(error).__mro__:
        if kind in _STATUS_OF:
            return _STATUS_OF[kind]
    return HTTPStatus.INTERNAL_SERVER_ERROR


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every error of the application with problem details."""

    @app.exception_handler(ProblemError)
    async def on_problem(_: Request, error: ProblemError) -> Response:
        return problem_response(error.status, error.detail, errors=error.errors, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_parameter(_: Request, error: RequestValidationError) -> Response:
        errors = field_errors(error.errors())
        return problem_response(HTTPStatus.UNPROCESSABLE_ENTITY, summary(errors), errors=errors)

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        is_unknown = status is HTTPStatus.NOT_FOUND
        detail = "there is nothing at this address; /docs lists what there is" if is_unknown else error.detail
        return problem_response(status, detail, headers=error.headers)

    @app.exception_handler(Exception)
    async def on_unexpected_error(_: Request, error: Exception) -> Response:
        # Starlette raises the error again once this is sent, so that the server logs it with its traceback.
        return problem_response(
            HTTPStatus.INTERNAL_SERVER_ERROR, f"an unexpected {type(error).__name__}; the service's log tells more"
        )

    async def on_error(_: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in _STATUS_OF:
        app.add_exception_handler(kind, on_error)


def error_response(error: Exception) -> Response:
    """The answer to a request whose item failed."""
    status = status_of(error)
    retry = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    return problem_response(
        status, describe_error(error), headers={"Retry-After": str(RETRY_AFTER_S)} if retry else None
    )
