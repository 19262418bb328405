"""Reads request bodies and validates their items; each invalid item has its own error."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, RootModel, TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from modalkit.batching import Failure, Outcome
from modalkit.pipelines import AsyncInputModel, SyncInputModel
from modalkit.service.web.problems import ProblemError, invalid

MAX_BODY_BYTES = 32 * 2**20

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
Content = TypeVar("Content")

_ENVELOPE = re.compile(rb'\s*\{\s*"message"\s*:')


async def read_body(request: Request) -> bytes:
    """The whole body. Raises `ProblemError` if it is over `MAX_BODY_BYTES`, or if the client leaves before its end."""
    chunks, size_bytes = [], 0
    try:
        async for chunk in request.stream():
            size_bytes += len(chunk)
            if size_bytes > MAX_BODY_BYTES:
                raise ProblemError(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"the body is larger than {MAX_BODY_BYTES} bytes: send several smaller requests",
                    headers={"Connection": "close"},
                )
            chunks.append(chunk)
    except ClientDisconnect:
        raise ProblemError(HTTPStatus.BAD_REQUEST, "the client disconnected before the end of the body") from None
    return b"".join(chunks)


class BodyParser:
    """Parses the bodies for one model, whose items are validated as `input_model`.

    An item may come bare (``{"text": …}``) or in an envelope (``{"message": {"text": …}}``), the form of asynchronous
    requests, unless the item itself may have a field ``message``. The methods for lists put a `Failure` with a
    `ProblemError` in the place of an invalid item, and the other methods raise it.
    """

    def __init__(self, input_model: type[BaseModel]) -> None:
        self._takes_envelope = (
            "message" not in input_model.model_fields and input_model.model_config.get("extra") != "allow"
        )
        self._item = input_model
        self._envelope = SyncInputModel[input_model]  # type: ignore[valid-type]  # a class known at run time
        self._job = AsyncInputModel[input_model]  # type: ignore[valid-type]  # as above
        self._items: TypeAdapter[list[BaseModel]] = TypeAdapter(list[input_model])  # type: ignore[valid-type]  # as above
        self._jobs: TypeAdapter[list[AsyncInputModel]] = TypeAdapter(list[self._job])  # type: ignore[name-defined]  # as above

    def item(self, body: bytes) -> BaseModel:
        """The one item of a body."""
        _check_keys(body)
        if self._takes_envelope and _ENVELOPE.match(body):
            return _parse(self._envelope, body).message
        return _parse(self._item, body)

    def items(self, body: bytes) -> Sequence[BaseModel | Failure]:
        """The items of a list. Raises `ProblemError` if it is no list."""
        _check_keys(body)
        return _parse_list(self._items, self.item, body)

    def job(self, body: bytes, what: str = "body") -> AsyncInputModel:
        """The job that a body, or another part of the request, asks for."""
        _check_keys(body, what)
        return _checked_meta(_parse(self._job, body, what))

    def jobs(self, body: bytes) -> Sequence[AsyncInputModel | Failure]:
        """The jobs of a list. Raises `ProblemError` if it is no list."""
        _check_keys(body)
        jobs = _parse_list(self._jobs, self.job, body)
        return [job if isinstance(job, Failure) else _or_failure(_checked_meta, job) for job in jobs]

    def line(self, line: bytes) -> AsyncInputModel | Failure:
        """The job that one line of a stream asks for, or what is wrong with the line."""
        return _or_failure(lambda body: self.job(body, "line"), line)


async def run_valid(
    items: Sequence[Model | Failure], run: Callable[[list[Model]], Awaitable[Sequence[Outcome[Result]]]]
) -> list[Outcome[Result]]:
    """The outcomes of items, in their order: of the valid ones those that `run` returns, of the others their own."""
    outcomes = iter(await run([item for item in items if not isinstance(item, Failure)]))
    return [item if isinstance(item, Failure) else next(outcomes) for item in items]


def _parse_list(
    adapter: TypeAdapter[list[Model]], parse: Callable[[bytes], Model], body: bytes
) -> Sequence[Model | Failure]:
    try:
        return adapter.validate_json(body)
    except ValidationError:
        return [
            _or_failure(parse, to_json(value, inf_nan_mode="constants"))
            for value in _parse(RootModel[list[Any]], body).root
        ]


def _or_failure(check: Callable[[Content], Model], content: Content) -> Model | Failure:
    try:
        return check(content)
    except ProblemError as problem:
        return Failure(problem)


class _RefusedJSONError(Exception):
    """Raised for what pydantic's reader takes, though its sender cannot mean it."""


def _check_object(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedJSONError(f"has the key {twice[:100]!r} twice in one object; remove one of the two")


# Numbers are left as they are written, because Python refuses the longest ones.
_STRICT_JSON = json.JSONEncoder(allow_nan=False)
_JSON = json.JSONDecoder(object_pairs_hook=_check_object, parse_int=str, parse_float=str)


def _check_keys(body: bytes, what: str = "body") -> None:
    """Raise `ProblemError` for a key that one object has twice."""
    try:
        _JSON.decode(body.decode())
    except _RefusedJSONError as error:
        raise ProblemError(HTTPStatus.BAD_REQUEST, f"the {what} {error}") from None
    except (ValueError, RecursionError):
        return  # pydantic says what is wrong


def _checked_meta(job: AsyncInputModel) -> AsyncInputModel:
    """The job. Raises `ProblemError` for NaN or 1e999 in its `meta`, which could not be returned unchanged."""
    if job.meta:
        try:
            _STRICT_JSON.encode(job.meta)
        except ValueError:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "meta: must not hold NaN, Infinity or a number above 1.8e308; send null",
            ) from None
    return job


def _parse(model: type[Model], body: bytes, what: str = "body") -> Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        findings = error.errors(include_url=False)
        if findings[0]["type"] == "json_invalid":
            reason = f"{findings[0]['ctx']['error']}; correct it there"
            if body.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                reason = "it begins with a byte order mark; send UTF-8 without one"
            raise ProblemError(HTTPStatus.BAD_REQUEST, f"the {what} is not JSON: {reason}") from error
        raise invalid(findings, model) from error
