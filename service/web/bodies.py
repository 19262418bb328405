"""Reads request bodies and validates their items; each invalid item has its own error."""

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from modalkit.pipelines import AsyncInputModel, SyncInputModel
from modalkit.service.validation import field_errors, summary
from modalkit.service.web.problems import ProblemError

MAX_BODY_BYTES = 32 * 2**20

T = TypeVar("T")

_ANY_LIST: TypeAdapter[list[Any]] = TypeAdapter(list[Any])
_ENVELOPE = re.compile(rb'\s*\{\s*"message"\s*:')


@dataclass(frozen=True)
class InvalidItem:
    """An item of a list that is no valid request, with the reason."""

    error: str


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
                    Connection="close",
                )
            chunks.append(chunk)
    except ClientDisconnect:
        raise ProblemError(HTTPStatus.BAD_REQUEST, "the client disconnected before the end of the body") from None
    return b"".join(chunks)


class BodyParser:
    """Parses the bodies for one model, whose items are validated as `input_model`.

    An item may come bare (``{"text": …}``) or in an envelope (``{"message": {"text": …}}``), the form of asynchronous
    requests, unless the item itself may have a field ``message``.
    """

    def __init__(self, input_model: type[BaseModel]) -> None:
        self.input_model = input_model
        self._takes_envelope = (
            "message" not in input_model.model_fields and input_model.model_config.get("extra") != "allow"
        )
        self._sync_model = SyncInputModel[input_model]  # type: ignore[valid-type]  # a class known at run time
        self._async_model = AsyncInputModel[input_model]  # type: ignore[valid-type]  # as above
        self._item = TypeAdapter(input_model)
        self._items: TypeAdapter[list[BaseModel]] = TypeAdapter(list[input_model])  # type: ignore[valid-type]  # as above
        self._sync_envelope = TypeAdapter(self._sync_model)
        self._async_envelope = TypeAdapter(self._async_model)
        self._async_envelopes: TypeAdapter[list[AsyncInputModel]] = TypeAdapter(list[self._async_model])  # type: ignore[name-defined]  # as above

    def item(self, body: bytes) -> BaseModel:
        """The one item of a body. Raises `ProblemError`."""
        if self._takes_envelope and _ENVELOPE.match(body):
            return _parse(self._sync_envelope, body, self._sync_model).message
        return _parse(self._item, body, self.input_model)

    def items(self, body: bytes) -> list[BaseModel | InvalidItem]:
        """The items of a list; an invalid one does not affect the others. Raises `ProblemError` if it is no list."""
        try:
            return list(self._items.validate_json(body))
        except ValidationError:
            return [self._item_or_error(value) for value in _parse(_ANY_LIST, body)]

    def async_request(self, body: bytes, what: str = "body") -> AsyncInputModel:
        """The job that a body, or another part of the request, asks for. Raises `ProblemError`."""
        return _parse(self._async_envelope, body, self._async_model, what)

    def async_requests(self, body: bytes) -> list[AsyncInputModel | InvalidItem]:
        """The jobs of a list; an invalid one does not affect the others. Raises `ProblemError` if it is no list."""
        try:
            return list(self._async_envelopes.validate_json(body))
        except ValidationError:
            return [self.line(to_json(value)) for value in _parse(_ANY_LIST, body)]

    def line(self, line: bytes) -> AsyncInputModel | InvalidItem:
        """The job that one line of a stream asks for."""
        try:
            return self.async_request(line, "line")
        except ProblemError as problem:
            return InvalidItem(problem.detail)

    def _item_or_error(self, value: Any) -> BaseModel | InvalidItem:
        try:
            return self.item(to_json(value))
        except ProblemError as problem:
            return InvalidItem(problem.detail)


def _parse(adapter: TypeAdapter[T], body: bytes, model: type[BaseModel] | None = None, what: str = "body") -> T:
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        findings = error.errors(include_url=False)
        if findings[0]["type"] == "json_invalid":
            raise ProblemError(
                HTTPStatus.BAD_REQUEST, f"the {what} is not JSON: {findings[0]['ctx']['error']}; correct it there"
            ) from error
        errors = field_errors(findings, model)
        raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, summary(errors), errors=errors) from error
