"""Validates the items of request bodies; each invalid item has its own error.

What costs much is done in slices, between which other requests have their turn, and is bounded: the items of a list,
the size of an item, and what is said of invalid ones.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http import HTTPStatus
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import jiter
from anyio.lowlevel import checkpoint
from fastapi import Request
from pydantic import AliasChoices, AliasPath, BaseModel, RootModel, TypeAdapter, ValidationError
from pydantic_core import to_json

from modalkit.batching import Failure
from modalkit.batching.errors import users_error
from modalkit.pipelines import AsyncInputModel, SyncInputModel
from modalkit.service.settings import RequestConfig
from modalkit.service.web.admission import Admission, read_body, reception_of
from modalkit.service.web.problems import ProblemError, invalid

SLICE_BYTES = 2**16
"""Bytes of a list that are parsed in one go, and a longer item as a whole."""
SLICE_MARKS = 10_000
"""Commas and brackets that are looked at in one go."""
MAX_EXPLAINED_BYTES = 2**20
"""Bytes of explanations of the invalid items of one list; of further invalid items, only that they are invalid."""
MAX_FINDINGS = 1000
"""Findings in one item of which an answer lists the first; of more, it tells only the number."""
MAX_SHOWN = 100
"""Most findings that an answer lists."""

Model = TypeVar("Model", bound=BaseModel)

_ENVELOPE = re.compile(rb'\s*\{\s*"message"\s*:')
_NO_OBJECTS = (str, bytes, int, float, NoneType, list, tuple, set, frozenset)
"""Types that no JSON object can be."""


def _may_have_key(kind: Any, key: str) -> bool:
    """Whether an object that is validated as this type may have the key; also where that is not known."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _may_have_key(get_args(kind)[0], key)
    if origin in (Union, UnionType):
        return any(_may_have_key(each, key) for each in get_args(kind))
    plain = origin or kind
    if not (isinstance(plain, type) and issubclass(plain, (BaseModel, *_NO_OBJECTS))):
        return True
    if issubclass(plain, RootModel):
        return _may_have_key(plain.model_fields["root"].annotation, key)
    if not issubclass(plain, BaseModel):
        return False
    config = plain.model_config
    by_name = config.get("validate_by_name") or config.get("populate_by_name")
    names = set[str | int]()
    for name, field in plain.model_fields.items():
        alias = field.validation_alias
        if alias is None or by_name:
            names.add(name)
        choices = alias.choices if isinstance(alias, AliasChoices) else [] if alias is None else [alias]
        names.update(choice.path[0] if isinstance(choice, AliasPath) else choice for choice in choices)
    return config.get("extra") == "allow" or key in names


def check_encoding(request: Request) -> None:
    """Raise `ProblemError` for a compressed body: a small one may become larger than all memory."""
    encoding = request.headers.get("content-encoding")
    if encoding is not None and encoding.strip().lower() != "identity":
        raise ProblemError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Encoding: {encoding!r:.100} is not supported; send the body as it is, without compression",
            headers={"Accept-Encoding": "identity"},
        )


class BodyParser:
    """Parses the bodies for one model, whose items are validated as `input_model`.

    An item may come bare (``{"text": …}``) or in an envelope (``{"message": {"text": …}}``), the form of asynchronous
    requests, unless the item itself may have a field ``message``. The methods for lists put a `Failure` with a
    `ProblemError` in the place of an invalid item, and the other methods raise it. All raise it where the body exceeds
    the limits of `admission`.
    """

    def __init__(self, input_model: type[BaseModel], admission: Admission | None = None) -> None:
        self._admission = admission or Admission()
        self._takes_envelope = not _may_have_key(input_model, "message")
        self.may_name_model = not _may_have_key(input_model, "model_name")
        """Whether the key `model_name` of a bare item can name its model, because it is no field of the item."""
        self._item = input_model
        self._envelope = SyncInputModel[input_model]  # type: ignore[valid-type]  # a class known at run time
        self._job = AsyncInputModel[input_model]  # type: ignore[valid-type]  # as above
        self._items: TypeAdapter[list[BaseModel]] = TypeAdapter(list[input_model])  # type: ignore[valid-type]  # as above
        self._jobs: TypeAdapter[list[AsyncInputModel]] = TypeAdapter(list[self._job])  # type: ignore[name-defined]  # as above

    def item(self, body: bytes, what: str = "body") -> BaseModel:
        """The one item of a body, or of another part of the request."""
        return self._item_of(body, what, explain=True)

    async def items(self, body: bytes) -> Sequence[BaseModel | Failure]:
        """The items of a list. Raises `ProblemError` if it is no list."""
        return await self._list(self._items, self._item_of, body, one_by_one=self._may_have_envelopes(body))

    def job(self, body: bytes, what: str = "body") -> AsyncInputModel:
        """The job that a body, or another part of the request, asks for."""
        return self._job_of(body, what, explain=True)

    async def jobs(self, body: bytes) -> Sequence[AsyncInputModel | Failure]:
        """The jobs of a list. Raises `ProblemError` if it is no list."""
        return await self._admission.map(_checked_jobs, await self._list(self._jobs, self._job_of, body))

    async def item_lines(self, lines: Sequence[bytes]) -> Sequence[BaseModel | Failure]:
        """The item of each line of a stream, or what is wrong with the line."""
        async with self._admission.turn:
            parse = partial(self.item, what="line")
            if self._may_have_envelopes(*lines):
                return [_or_failure(partial(parse, line)) for line in lines]
            return _parse_lines(self._item, parse, lines)

    async def job_lines(self, lines: Sequence[bytes]) -> Sequence[AsyncInputModel | Failure]:
        """The job that each line of a stream asks for, or what is wrong with the line."""
        async with self._admission.turn:
            jobs = _parse_lines(self._job, partial(self.job, what="line"), lines)
        return _checked_jobs(jobs)

    def _item_of(self, body: bytes, what: str = "body", *, explain: bool) -> BaseModel:
        _check_item(body, self._admission.limits)
        if self._takes_envelope and _ENVELOPE.match(body):
            return parsed_as(self._envelope, body, what, explain=explain).message
        return parsed_as(self._item, body, what, explain=explain)

    def _job_of(self, body: bytes, what: str = "body", *, explain: bool) -> AsyncInputModel:
        _check_item(body, self._admission.limits)
        (job,) = _checked_jobs((parsed_as(self._job, body, what, explain=explain),))
        if isinstance(job, Failure):
            raise job.error
        return job

    def _may_have_envelopes(self, *contents: bytes) -> bool:
        """Whether items may come in envelopes, which would pass as items whose fields all have defaults."""
        return self._takes_envelope and any(b'"message"' in content for content in contents)

    async def _list(
        self,
        adapter: TypeAdapter[list[Model]],
        parse: Callable[..., Model],
        body: bytes,
        *,
        one_by_one: bool = False,
    ) -> Sequence[Model | Failure]:
        """The valid items of a list, and what is wrong with the others; `parse` parses one of them.

        They are validated together where that is possible, unless `one_by_one`.
        """
        limits = self._admission.limits
        is_short = len(body) <= min(SLICE_BYTES, limits.max_item_bytes, limits.max_item_values)
        if is_short and not one_by_one:
            check_keys(body)
            try:
                valid = adapter.validate_json(body)
            except BaseException as error:  # noqa: BLE001  # one by one, each gets its own; validators may raise anything
                users_error(error)
            else:
                check_count(len(valid), limits)
                return valid
        found, room_bytes = list[Model | Failure](), MAX_EXPLAINED_BYTES

        def parse_one(value: object) -> Model | Failure:
            nonlocal room_bytes
            content = to_json(value, inf_nan_mode="constants")
            entry = _or_failure(partial(parse, content, explain=room_bytes > 0))
            if isinstance(entry, Failure):
                room_bytes -= len(str(entry.error))
            return entry

        parts = iter((body,)) if is_short else _parts_of(body, limits)
        while True:
            async with self._admission.turn:
                part = next(parts, None)
                if part is None:
                    return found
                if not part and not is_short:
                    continue
                if not one_by_one:
                    try:
                        valid = adapter.validate_json(part)
                    except BaseException as error:  # noqa: BLE001  # as above
                        users_error(error)
                        await _pause_after(part)
                    else:
                        check_keys(part)
                        found += valid
                        continue
                values = parsed_as(RootModel[list[Any]], part).root
                check_count(len(values), limits)
            await _pause_after(part)
            found += await self._admission.map(partial(map, parse_one), values)


async def read_as(model: type[Model], request: Request) -> Model:
    """The whole body as an instance of `model`; it may be as large as one item. Raises `ProblemError`."""
    check_encoding(request)
    body = await read_body(request)
    _check_item(body, reception_of(request.scope).limits)
    parsed = parsed_as(model, body)
    await _pause_after(body)
    return parsed


async def _pause_after(body: bytes) -> None:
    """Let others have their turn after work on a body, or on a part of one, that may have taken long."""
    if len(body) > SLICE_BYTES:
        await checkpoint()


_SPACE = b" \t\r\n"
_LIST = re.compile(rb"[ \t\r\n]*\[")
_TO_MARK = re.compile(rb'[^"\[\]{},]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{},]*+)*+[\[\]{},]', re.DOTALL)
"""All up to the next bracket or comma that is in no string."""
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_FLAT = rb'[\[{](?:[^"\[\]{}]++|%b)*+[\]}]' % _STRING
_NESTED = rb'[\[{](?:[^"\[\]{}]++|%b|%b)*+[\]}]' % (_STRING, _FLAT)
_TO_NEXT = re.compile(rb'(?:[^"\[\]{},]++|%b|%b)*+[,\]]' % (_STRING, _NESTED), re.DOTALL)
"""An item that has objects and lists in itself at most, up to its end, in one step instead of many."""


def _parts_of(body: bytes, limits: RequestConfig) -> Iterator[bytes]:
    """A JSON list in parts of whole items, each a list again; an empty part now and then, so that others have a turn.

    Brackets are only counted: what is between them is looked at when a part is parsed. Raises `ProblemError`.
    """
    opened = _LIST.match(body)
    if opened is None:
        raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, "must be a JSON list, as in [1, 2]")
    first = start = item = end = opened.end()
    depth, count, marks, mark = 1, 0, 0, b""
    short = min(SLICE_BYTES, limits.max_item_bytes, limits.max_item_values)
    while depth:
        found = (_TO_NEXT.match(body, end, end + short) if end == item else None) or _TO_MARK.match(body, end)
        if found is None:
            raise _not_json("the list, or a text in it, has no end")
        end = found.end()
        mark = body[end - 1 : end]
        depth += (mark in b"[{") - (mark in b"]}")
        marks += 1
        if end - item > limits.max_item_bytes or marks > limits.max_item_values:
            _check_size(end - item, marks, limits)
        if depth == 0 or (depth == 1 and mark == b","):
            count += 1
            if count > limits.max_items:
                check_count(count, limits)
            item, marks = end, 0
            if depth == 0 or end - start > SLICE_BYTES:
                part = body[start : end - 1]
                if start != first and not part.strip(_SPACE):
                    raise _not_json("the list ends with a comma")
                yield b"[%b]" % part
                start = end
        elif marks % SLICE_MARKS == 0:
            yield b""
    if mark != b"]" or body[end:].strip(_SPACE):
        raise _not_json("something follows the list")


def _check_item(body: bytes, limits: RequestConfig) -> None:
    if len(body) > min(limits.max_item_bytes, limits.max_item_values):
        _check_size(len(body), 0, limits)  # first, because counting takes long for a large body
        _check_size(len(body), sum(map(body.count, (b",", b"[", b"{"))), limits)


def _check_size(size_bytes: int, marks: int, limits: RequestConfig) -> None:
    for size, what, key in ((size_bytes, "bytes", "max_item_bytes"), (marks, "brackets and commas", "max_item_values")):
        limit = getattr(limits, key)
        if size > limit:
            raise ProblemError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"an item has more than {limit} {what}: send a smaller one, or raise request_config.{key}",
            )


def check_count(count: int, limits: RequestConfig) -> None:
    """Raise `ProblemError` for more items than one request may have."""
    if count > limits.max_items:
        raise ProblemError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the list has more than {limits.max_items} items: send several lists, or jobs as a stream of lines "
            "(application/x-ndjson), or raise request_config.max_items",
        )


def _not_json(reason: str) -> ProblemError:
    return ProblemError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {reason}; correct it there")


def _parse_lines(
    model: type[Model], parse: Callable[[bytes], Model], lines: Sequence[bytes]
) -> Sequence[Model | Failure]:
    validate = model.__pydantic_validator__.validate_json
    try:
        found = [validate(line) for line in lines]
        check_keys(b"[%b]" % b",".join([line for line in lines if line.count(b":") > 1]))
    except BaseException as error:  # noqa: BLE001  # one by one, each gets its own error; validators may raise anything
        users_error(error)
        return [_or_failure(partial(parse, line)) for line in lines]
    return found


def _or_failure(parse: Callable[[], Model]) -> Model | Failure:
    try:
        return parse()
    except BaseException as raised:  # noqa: BLE001  # as above
        error = users_error(raised)
        # What it was raised from refers to all that is wrong with the item.
        error.__cause__ = error.__context__ = None
        return Failure(error.with_traceback(None))


_STRICT_JSON = json.JSONEncoder(allow_nan=False)
_DUPLICATE_KEY = re.compile(r"Detected duplicate key (.*) at line \d+ column \d+", re.DOTALL)
"""What jiter says of it. The place is one in a part of the body."""


def check_keys(body: bytes, what: str = "body") -> None:
    """Raise `ProblemError` for a key that one object has twice; pydantic's reader would take the last one."""
    if body.count(b":") < 2:
        return
    try:
        jiter.from_json(body, catch_duplicate_keys=True, cache_mode="keys", float_mode="lossless-float")
    except ValueError as error:
        found = _DUPLICATE_KEY.match(str(error))
        if found is None:
            return  # pydantic says what is wrong
        detail = f"the {what} has the key {found[1]:.100} twice in one object; remove one of the two"
        raise ProblemError(HTTPStatus.BAD_REQUEST, detail) from None


def _checked_jobs(jobs: Sequence[AsyncInputModel | Failure]) -> Sequence[AsyncInputModel | Failure]:
    """The jobs, or what is wrong with their `meta`: NaN or 1e999, which could not be returned unchanged."""
    content = to_json([job.meta for job in jobs if not isinstance(job, Failure)])
    if b"NaN" in content or b"Infinity" in content:  # as a number, or in a text
        return list(map(_checked_job, jobs))
    return jobs


def _checked_job(job: AsyncInputModel | Failure) -> AsyncInputModel | Failure:
    if isinstance(job, Failure):
        return job
    try:
        _STRICT_JSON.encode(job.meta)
    except ValueError:
        detail = "meta: must not hold NaN, Infinity or a number above 1.8e308; send null"
        return Failure(ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, detail))
    return job


def parsed_as(model: type[Model], body: bytes, what: str = "body", *, explain: bool = True) -> Model:
    """JSON as an instance of `model`. Raises `ProblemError`, without the reasons unless they are to be explained."""
    try:
        # As `model_validate_json`, which checks its arguments first.
        parsed: Model = model.__pydantic_validator__.validate_json(body)
    except ValidationError as error:
        if not explain:
            detail = (
                "is invalid, as others before it are: correct those, and send it again to see what is wrong with it"
            )
            raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, detail) from None
        if (count := error.error_count()) > MAX_FINDINGS:
            detail = f"has {count} errors, too many to list them: compare it with the schema at /docs"
            raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, detail) from None
        findings = error.errors(include_url=False)
        if findings[0]["type"] == "json_invalid":
            reason = f"{findings[0]['ctx']['error']}; correct it there"
            if what == "line":
                reason = reason.replace(" at line 1 column", " at column")  # a line is one of many
            if body.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                reason = "it begins with a byte order mark; send UTF-8 without one"
            raise ProblemError(HTTPStatus.BAD_REQUEST, f"the {what} is not JSON: {reason}") from error
        raise invalid(findings[:MAX_SHOWN], model) from error
    check_keys(body, what)  # not before: to explain what is wrong with a large body takes as long
    return parsed
