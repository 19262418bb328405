"""The options of a request for predictions, which are in its headers and its query.

Routes read them by `of`. FastAPI only documents them: its own reading takes longer than all other work for a job.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Self

from fastapi import Header, Query, Request
from pydantic import Field

from modalkit.batching import Priority, RequestOptions
from modalkit.service.web.answers import EVENT_STREAM
from modalkit.service.web.problems import ProblemError

MAX_KEY_CHARACTERS = 255
RESPOND_ASYNC = "respond-async"
BATCH_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
MAX_LINE = 2**53
NDJSON_TYPES = ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines")

ModelName = Annotated[str | None, Query(description="Which model, where there are several; the first if left out.")]
PriorityHeader = Annotated[
    Priority, Header(alias="X-Priority", description="`interactive` goes before `bulk`, which keeps a share.")
]
Ordered = Annotated[
    bool, Query(description="Whether a stream is answered in the order of its lines, not as results are done.")
]
TimeoutHeader = Annotated[
    float | None, Header(alias="X-Request-Timeout", gt=0, description="Seconds after which the answer is 504.")
]
KeyHeader = Annotated[
    str | None,
    Field(min_length=1, max_length=MAX_KEY_CHARACTERS),
    Header(alias="Idempotency-Key", description="The same for each repetition of a request: they all get one job."),
]
PreferHeader = Annotated[
    str | None,
    Header(alias="Prefer", description="`respond-async`: accept the item as a job, and answer with its id (RFC 7240)."),
]


NewBatchId = Annotated[
    str | None,
    Field(pattern=BATCH_ID_PATTERN),
    Query(description="The batch that the jobs are lines of: an id of your own, such as a UUID."),
]
FirstLine = Annotated[
    int, Query(ge=1, le=MAX_LINE, description="The line, in its batch, of the first job of this request.")
]


@dataclass(slots=True)  # not frozen: one is made for each request
class PredictionOptions:
    """The options of a request that waits for its result."""

    model_name: ModelName = None
    priority: PriorityHeader = Priority.INTERACTIVE
    timeout_s: TimeoutHeader = None

    @classmethod
    def of(cls, request: Request) -> Self:
        """The options of this request. Raises `ProblemError`."""
        return cls(_model_name(request), _priority(request, Priority.INTERACTIVE), _timeout_s(request))

    def for_owner(self, owner: str) -> RequestOptions:
        """How the items of the request wait for their results."""
        return {"priority": self.priority, "timeout_s": self.timeout_s, "owner": owner}


@dataclass(slots=True)  # not frozen: one is made for each request
class SyncOptions(PredictionOptions):
    """The options of ``/sync/predict``, for its documentation; `prefers_async` reads the preference."""

    prefer: PreferHeader = None


@dataclass(slots=True)  # not frozen: one is made for each request
class StreamOptions(PredictionOptions):
    """The options of a request whose items may come as a stream."""

    ordered: Ordered = False

    @classmethod
    def of(cls, request: Request) -> Self:
        """The options of this request. Raises `ProblemError`."""
        model_name = _model_name(request, "ordered")
        default = Priority.BULK if takes_lines(request) else Priority.INTERACTIVE
        return cls(model_name, _priority(request, default), _timeout_s(request), _ordered(request))


@dataclass(slots=True)  # not frozen: one is made for each request
class SubmissionOptions:
    """The options of a request that submits jobs."""

    model_name: ModelName = None
    priority: PriorityHeader = Priority.BULK
    idempotency_key: KeyHeader = None
    batch_id: NewBatchId = None
    first_line: FirstLine = 1

    @classmethod
    def of(cls, request: Request) -> Self:
        """The options of this request. Raises `ProblemError`."""
        if "x-request-timeout" in request.headers:
            raise _problem(
                "X-Request-Timeout: a job is not bound to its request; leave the header out, expires_in in the body "
                "and the setting async_config.timeout bound how long a job may take"
            )
        return cls(
            _model_name(request, "batch_id", "first_line"),
            _priority(request, Priority.BULK),
            _idempotency_key(request),
            *_place(request),
        )


def prefers_async(request: Request) -> bool:
    """Whether the client prefers a job to waiting for the result; other preferences are ignored."""
    if "prefer" not in request.headers:
        return False
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(preference.partition(";")[0].strip().lower() == RESPOND_ASYNC for preference in preferences)


def check_query(request: Request, known: Collection[str], repeatable: Collection[str] = ()) -> None:
    """Refuse a query parameter that the route does not have: a misspelt filter would change what is asked for.

    So is one that is given twice, unless it is `repeatable`. Raises `ProblemError`.
    """
    seen = set[str]()
    for name, _ in request.query_params.multi_items():
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise _problem(f"{name!r:.100}: there is no such query parameter; this route has: {listed}")
        if name in seen and name not in repeatable:
            raise _problem(f"{name}: is given twice; remove one of the two")
        seen.add(name)


def takes_events(request: Request) -> bool:
    """Whether the client asks for server-sent events."""
    return EVENT_STREAM in request.headers.get("accept", "").lower()


def takes_lines(request: Request) -> bool:
    """Whether the body is a stream of lines."""
    return are_lines(request.headers.get("content-type", ""))


def are_lines(content_type: str) -> bool:
    """Whether a media type is that of a stream of lines."""
    return content_type.partition(";")[0].strip().lower() in NDJSON_TYPES


def _model_name(request: Request, *others: str) -> str | None:
    if not request.scope["query_string"]:
        return None
    check_query(request, ("model_name", *others))
    return request.query_params.get("model_name")


def _place(request: Request) -> tuple[str | None, int]:
    """The batch of a request, and the line of its first job there."""
    if not request.scope["query_string"]:
        return None, 1
    batch_id, first = request.query_params.get("batch_id"), request.query_params.get("first_line") or "1"
    if batch_id is not None and not re.fullmatch(BATCH_ID_PATTERN, batch_id):
        raise _problem(
            f"batch_id: must be 1 to 100 letters, digits, dots, hyphens or underscores, got {batch_id!r:.200}"
        )
    if not (first.isascii() and first.isdecimal() and len(first) <= 16 and 1 <= int(first) <= MAX_LINE):
        raise _problem(f"first_line: must be a number from 1, got {first!r:.100}")
    return batch_id, int(first)


def _ordered(request: Request) -> bool:
    value = request.query_params.get("ordered", "false")
    if value not in ("true", "false"):
        raise _problem(f"ordered: must be true or false, got {value!r:.100}")
    return value == "true"


def _priority(request: Request, default: Priority) -> Priority:
    value = request.headers.get("x-priority")
    if value is None:
        return default
    try:
        return Priority(value)
    except ValueError:
        raise _problem(f"X-Priority: must be interactive or bulk, got {value!r:.100}") from None


def _timeout_s(request: Request) -> float | None:
    value = request.headers.get("x-request-timeout")
    if value is None:
        return None
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise _problem(f"X-Request-Timeout: must be a number of seconds above 0, got {value!r:.100}")
    return timeout_s


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not (1 <= len(key) <= MAX_KEY_CHARACTERS and key.isprintable()):
        raise _problem(f"Idempotency-Key: must be 1 to {MAX_KEY_CHARACTERS} printable characters, got {key!r:.100}")
    return key


def _problem(detail: str) -> ProblemError:
    return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
