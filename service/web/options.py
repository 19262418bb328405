"""Reads and documents the options of a request for predictions, which are in its headers and its query.

They are not parameters of FastAPI's: reading four of those takes longer than all other work for a job.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Request

from modalkit.batching import Priority
from modalkit.service.web.problems import ProblemError

MAX_KEY_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one request."""

    model_name: str | None
    priority: Priority
    timeout_s: float | None = None
    idempotency_key: str | None = None

    @classmethod
    def of_prediction(cls, request: Request) -> "Options":
        """The options of a request that waits for its result. Raises `ProblemError`."""
        return cls(
            _model_name(request),
            _priority(request, Priority.INTERACTIVE),
            timeout_s=_timeout_s(request.headers.get("x-request-timeout")),
        )

    @classmethod
    def of_submission(cls, request: Request) -> "Options":
        """The options of a request that submits jobs. Raises `ProblemError`."""
        if "x-request-timeout" in request.headers:
            raise _problem(
                "X-Request-Timeout: a job is not bound to its request; leave the header out, expires_in in the body "
                "and the setting async_config.timeout bound how long a job may take"
            )
        return cls(
            _model_name(request),
            _priority(request, Priority.BULK),
            idempotency_key=_key(request.headers.get("idempotency-key")),
        )


def check_query(request: Request, known: Collection[str]) -> None:
    """Refuse a query parameter that the route does not have: a misspelt filter would change what is asked for.

    Raises `ProblemError`.
    """
    for name in request.query_params:
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise _problem(f"{name!r:.100}: there is no such query parameter; this route has: {listed}")


def _model_name(request: Request) -> str | None:
    if not request.scope["query_string"]:
        return None
    check_query(request, ("model_name",))
    return request.query_params.get("model_name")


def _priority(request: Request, default: Priority) -> Priority:
    value = request.headers.get("x-priority")
    if value is None:
        return default
    try:
        return Priority(value)
    except ValueError:
        raise _problem(f"X-Priority: must be interactive or bulk, got {value!r:.100}") from None


def _timeout_s(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise _problem(f"X-Request-Timeout: must be a number of seconds above 0, got {value!r:.100}")
    return timeout_s


def _key(value: str | None) -> str | None:
    if value is not None and not (1 <= len(value) <= MAX_KEY_CHARACTERS and value.isprintable()):
        raise _problem(f"Idempotency-Key: must be 1 to {MAX_KEY_CHARACTERS} printable characters, got {value!r:.100}")
    return value


def _problem(detail: str) -> ProblemError:
    return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, detail)


def _parameter(name: str, place: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": place, "description": description, "schema": schema}


_MODEL_NAME = _parameter(
    "model_name", "query", "Which model, where there are several; the first if left out.", type="string"
)
_PRIORITY = _parameter(
    "X-Priority",
    "header",
    "`interactive` goes before `bulk`, which keeps a share.",
    type="string",
    enum=[priority.value for priority in Priority],
)
_TIMEOUT = _parameter(
    "X-Request-Timeout",
    "header",
    "Seconds after which the answer is 504.",
    type="number",
    exclusiveMinimum=0,
)
_IDEMPOTENCY_KEY = _parameter(
    "Idempotency-Key",
    "header",
    "The same for each repetition of a request: they all get one job.",
    type="string",
    minLength=1,
    maxLength=MAX_KEY_CHARACTERS,
)

PREDICTION_PARAMETERS = {"parameters": [_MODEL_NAME, _PRIORITY, _TIMEOUT]}
"""For OpenAPI: what `Options.of_prediction` reads."""
SUBMISSION_PARAMETERS = {"parameters": [_MODEL_NAME, _PRIORITY, _IDEMPOTENCY_KEY]}
"""For OpenAPI: what `Options.of_submission` reads."""
