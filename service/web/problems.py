"""Errors as HTTP answers: problem details (RFC 9457) that name the field, the value and the remedy."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.routing import Match

from modalkit.batching import (
    BatchTimeoutError,
    DeadlineExceededError,
    Failure,
    Outcome,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
    Success,
)
from modalkit.pipelines import InferenceOutputModel, RejectItem
from modalkit.service.errors import (
    ContainerFaultError,
    InvalidItemError,
    NotAvailableError,
    NotAwaitedError,
    NotReadyError,
    OutputNotJsonError,
    PipelineOutputError,
    ReloadError,
    RemoteCallError,
    RemoteItemError,
    RemoteTimeoutError,
    RetryableError,
    ServiceError,
    UnknownBatchError,
    UnknownJobError,
    UnknownModelError,
    describe_error,
)
from modalkit.service.jobs import IdempotencyKeyReusedError, JobStoreBusyError, JobStoreError, JobStoreFullError
from modalkit.service.jobs.queue_rules import QueueNotAllowedError
from modalkit.service.loading import LoadError
from modalkit.service.outputs import outputs_json
from modalkit.service.queue_backends import QueueNameError
from modalkit.service.settings import SettingsError
from modalkit.service.validation import field_errors, summary
from modalkit.service.web.answers import PROBLEM_JSON

RETRY_AFTER_S = 1

_ERRORS: dict[HTTPStatus, tuple[type[Exception], ...]] = {
    HTTPStatus.NOT_FOUND: (UnknownBatchError, UnknownJobError, UnknownModelError),
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
    HTTPStatus.INTERNAL_SERVER_ERROR: (NotAwaitedError, OutputNotJsonError, PipelineOutputError),
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
_KIND_BY_NAME = {kind.__name__: kind for kind in _STATUS_OF}

TYPE_PREFIX = "urn:problem-type:modalkit:"
"""The beginning of the type of each problem; the rest is explained in docs/problems.md."""
PIPELINE_ERROR = "pipeline-error"
"""The type of the problem of an item that failed by an error of the pipeline's own."""
_TYPE_OF_STATUS = {
    HTTPStatus.BAD_REQUEST: "bad-request",
    HTTPStatus.UNAUTHORIZED: "unauthorized",
    HTTPStatus.FORBIDDEN: "forbidden",
    HTTPStatus.NOT_FOUND: "not-found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method-not-allowed",
    HTTPStatus.REQUEST_TIMEOUT: "request-timeout",
    HTTPStatus.CONFLICT: "conflict",
    HTTPStatus.LENGTH_REQUIRED: "length-required",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "content-too-large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported-media-type",
    HTTPStatus.UNPROCESSABLE_ENTITY: "invalid-request",
    HTTPStatus.TOO_MANY_REQUESTS: "too-many-requests",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "headers-too-large",
    HTTPStatus.INTERNAL_SERVER_ERROR: "internal-error",
    HTTPStatus.NOT_IMPLEMENTED: "not-available",
    HTTPStatus.SERVICE_UNAVAILABLE: "service-unavailable",
    HTTPStatus.INSUFFICIENT_STORAGE: "insufficient-storage",
}
"""The type of a problem that is no error of a kind with its own type."""


def _type_of_kind(kind: type[Exception]) -> str:
    """The type of the problems of one class of errors: `QueueFullError` has ``queue-full``."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "-", kind.__name__.removesuffix("Error")).lower()


_TYPE_OF_KIND = {kind: _type_of_kind(kind) for kind in _STATUS_OF}
PROBLEM_TYPES = frozenset((*_TYPE_OF_STATUS.values(), *_TYPE_OF_KIND.values(), PIPELINE_ERROR))
"""The types of all problems, without `TYPE_PREFIX`."""


@dataclass(eq=False)
class ProblemError(ServiceError):
    """Raised to answer a request, or one of its items, with problem details."""

    status: HTTPStatus
    detail: str
    errors: Sequence[Mapping[str, Any]] = ()
    headers: Mapping[str, str] | None = None
    name: str | None = None
    """The last part of its type; None: that of the status."""

    def __str__(self) -> str:
        return self.detail


KNOWN_ERRORS: tuple[type[Exception], ...] = (ProblemError, *_STATUS_OF)
"""Errors whose text callers get; any other one is logged with its traceback, and the answer is 500."""


def invalid(findings: Iterable[Mapping[str, Any]], model: type[BaseModel] | None = None) -> ProblemError:
    """The problem of a request in which pydantic found errors (`ValidationError.errors`); for `model`, its model."""
    errors = field_errors(findings, model)
    for error in errors:
        if error["field"] == "model_name" and error["message"].startswith("unknown field"):
            error["message"] = "unknown field; name the model in the query, as in ?model_name=NAME"
    return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, summary(errors), errors=errors)


def _kind_of(error: Exception) -> type[Exception] | None:
    """The class in `_ERRORS` that an error counts as; None for an error of a pipeline."""
    if isinstance(error, QueueFullError) and error.is_permanent:
        return RequestTooLargeError
    if isinstance(error, RemoteItemError):
        return _KIND_BY_NAME.get(error.error_type)
    return next((kind for kind in type(error).__mro__ if kind in _STATUS_OF), None)


def error_response(error: Exception, **more: str) -> Response:
    """The answer to a request that failed, of the media type ``application/problem+json``, with `more` members."""
    problem = as_problem(error)
    content = to_json(_content(problem) | more, inf_nan_mode="null")
    return Response(content, problem.status, problem.headers, PROBLEM_JSON)


def problem_json(error: Exception) -> bytes:
    """The problem details of an error, in JSON."""
    return to_json(_content(as_problem(error)), inf_nan_mode="null")


def slot_json(error: Exception) -> bytes:
    """The answer to one of several items, in JSON, with the problem details that it would have as a request."""
    problem = as_problem(error)
    slot = {"status": "error", "error": problem.detail, "problem": _content(problem)}
    return to_json(slot, inf_nan_mode="null")


def as_problem(error: Exception) -> ProblemError:
    """The problem details for a request that failed with this error."""
    if isinstance(error, ProblemError):
        return error
    kind = _kind_of(error)
    status = HTTPStatus.INTERNAL_SERVER_ERROR if kind is None else _STATUS_OF[kind]
    retry = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    predicted_s = getattr(error, "retry_after_s", None)
    after_s = max(RETRY_AFTER_S, math.ceil(predicted_s or 0))
    headers = {"Retry-After": str(after_s)} if retry or predicted_s else None
    errors = error.errors if isinstance(error, InvalidItemError) else ()
    name = PIPELINE_ERROR if kind is None else _TYPE_OF_KIND[kind]
    return ProblemError(status, describe_error(error), errors, headers, name=name)


def _content(problem: ProblemError) -> dict[str, Any]:
    name, status = problem.name or _TYPE_OF_STATUS.get(problem.status), problem.status
    content = {
        "type": "about:blank" if name is None else f"{TYPE_PREFIX}{name}",
        "title": status.phrase if name is None else name.replace("-", " ").capitalize(),
        "status": status,
        "detail": problem.detail,
    }
    return {**content, "errors": problem.errors} if problem.errors else content


def error_slot(error: Exception) -> dict[str, str]:
    """The answer to one of several items."""
    return {"status": "error", "error": describe_error(error)}


def unexpected_error_response(error: Exception) -> Response:
    """The answer to a request that failed by an internal error; the log has the reason.

    The error is raised once this is sent, and the server then closes the connection.
    """
    detail = f"an unexpected {type(error).__name__}; the service's log tells more"
    headers = {"Connection": "close"}
    return error_response(ProblemError(HTTPStatus.INTERNAL_SERVER_ERROR, detail, headers=headers))


def error_json(error: Exception) -> bytes:
    """The answer to one of several items, in JSON."""
    return to_json(error_slot(error))


def outcomes_json(
    outcomes: Sequence[Outcome[InferenceOutputModel]], error_json: Callable[[Exception], bytes]
) -> list[bytes]:
    """The answers to several items, in JSON; `error_json` makes that to one that failed."""
    contents = iter(outputs_json([outcome.value for outcome in outcomes if isinstance(outcome, Success)]))
    found = [outcome.error if isinstance(outcome, Failure) else next(contents) for outcome in outcomes]
    return [content if isinstance(content, bytes) else error_json(content) for content in found]


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
        try:
            status = HTTPStatus(error.status_code)
        except ValueError:  # of a user's own route, as 499
            return await http_exception_handler(request, error)
        detail, headers = error.detail, error.headers
        if detail == status.phrase:  # Starlette's own, where there is no route
            if status is HTTPStatus.NOT_FOUND:
                detail = "there is nothing at this address; /docs lists what there is"
            elif status is HTTPStatus.METHOD_NOT_ALLOWED:
                allowed = _allowed_methods(app, request)
                detail = f"{request.url.path} takes {allowed}, not {request.method}; /docs lists what there is"
                headers = {"Allow": allowed}
        return error_response(ProblemError(status, detail, headers=headers))

    @app.exception_handler(Exception)
    async def on_unexpected_error(_: Request, error: Exception) -> Response:
        # Starlette raises the error again once this is sent, so that the server logs it with its traceback.
        return unexpected_error_response(error)


def _allowed_methods(app: FastAPI, request: Request) -> str:
    """The methods of all routes at the request's path; Starlette's own answer has those of the first one."""

    def is_allowed(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in app.routes)

    methods = list(filter(is_allowed, ("GET", "POST", "PUT", "PATCH", "DELETE")))
    if not methods:  # at files, which are an application of their own
        methods = ["GET"]
    return ", ".join(["GET", "HEAD", *methods[1:]] if methods[0] == "GET" else methods)
