"""The outputs of pipelines as JSON."""

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from modalkit.batching.errors import users_error
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.errors import OutputNotJsonError

MAX_DEPTH = 200
"""Limit of nested objects and lists; pydantic's JSON reader refuses more."""
MAX_WRAPPERS = 4
"""Limit of the objects and lists that answers and messages put around an output."""
MAX_DIGITS = 4300
"""Limit of the digits of an integer that Python reads."""

T = TypeVar("T")

_DUMP_JSON = BaseModel.model_dump_json
_SAMPLE_STEP = 64
_LONG_DIGITS = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS // _SAMPLE_STEP))


def output_json(output: InferenceOutputModel) -> bytes:
    """An output as JSON; numbers that JSON does not have (NaN, Infinity) are null.

    NumPy's scalars and arrays and torch's tensors become numbers and lists.

    Raises `OutputNotJsonError` for an output that cannot be written, or is no object, or that readers of JSON refuse:
    one nested deeper than 196 levels, or with an integer of more than 4,300 digits.
    """
    try:
        return with_nulls(_written(output))
    except BaseException as error:
        # A model's own serializers may raise anything.
        raise _not_json(users_error(error), output) from error


def part_json(part: object) -> bytes:
    """A value that an output holds as JSON, as `output_json` writes it. Raises `OutputNotJsonError`."""
    try:
        content = to_json(part, inf_nan_mode="null", fallback=plain_value)
        _check_readable(content)
    except BaseException as error:
        raise OutputNotJsonError(users_error(error)) from error
    return content


def outputs_json(outputs: Iterable[InferenceOutputModel]) -> list[bytes | OutputNotJsonError]:
    """What `output_json` returns or raises for each output; all are searched for constants at once, which is faster."""
    contents = [_or_error(_written, output) for output in outputs]
    if _may_hold_constants(b"".join([content for content in contents if isinstance(content, bytes)])):
        contents = [_or_error(with_nulls, content) if isinstance(content, bytes) else content for content in contents]
    return contents


def _or_error(function: Callable[[T], bytes], value: T) -> bytes | OutputNotJsonError:
    try:
        return function(value)
    except BaseException as error:  # noqa: BLE001  # a model's own serializers may raise anything
        return _not_json(users_error(error), value)


def _not_json(reason: Exception, output: object) -> OutputNotJsonError:
    """The error of an output, or of its JSON, with the fields that cannot be written, unless none can."""
    if not isinstance(output, BaseModel):
        return OutputNotJsonError(reason)
    names = [*vars(output), *(getattr(output, "__pydantic_extra__", None) or ())]
    wrong = [name for name in names if not _can_be_json(output, name)]
    return OutputNotJsonError(reason, wrong if len(wrong) < len(names) else ())


def _can_be_json(output: BaseModel, name: str) -> bool:
    try:
        output.__pydantic_serializer__.to_json(output, include={name}, fallback=plain_value)
    except BaseException as error:  # noqa: BLE001  # a model's own serializers may raise anything
        users_error(error)
        return False
    return True


def _written(output: InferenceOutputModel) -> bytes:
    if type(output).model_dump_json is _DUMP_JSON:
        content = output.__pydantic_serializer__.to_json(output, fallback=plain_value)  # what it does, in half the time
    else:
        # Anew, because lines of streams hold it beside other fields: it must be one object, without line breaks.
        content = to_json(from_json(output.model_dump_json(fallback=plain_value)))
    if content[:1] != b"{":
        raise TypeError("an output must be an object")
    _check_readable(content)
    return content


def _check_readable(content: bytes) -> None:
    """Raise `ValueError` for JSON that readers refuse."""
    if may_be_refused(content):
        from_json(b"[" * MAX_WRAPPERS + content + b"]" * MAX_WRAPPERS)


def _may_hold_constants(content: bytes) -> bool:
    return content.find(b"NaN") >= 0 or content.find(b"Infinity") >= 0  # twice as fast as `in`


def with_nulls(content: bytes) -> bytes:
    """JSON with null in place of the constants that it may not have, though models can be configured to write them."""
    return to_json(from_json(content), inf_nan_mode="null") if _may_hold_constants(content) else content


def plain_value(value: object) -> object:
    """What an array or a scalar of NumPy or torch holds, in Python's types. Raises `TypeError` for anything else."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no type of JSON")


def may_be_refused(content: bytes) -> bool:
    """Whether a text may be nested too deep, or hold too long an integer; cheaper than reading it."""
    if len(content) <= MAX_DEPTH - MAX_WRAPPERS:
        return False
    if content.count(b"{") + content.count(b"[") > MAX_DEPTH - MAX_WRAPPERS:
        return True
    return len(content) > MAX_DIGITS and _LONG_DIGITS.search(content[::_SAMPLE_STEP]) is not None


def output_object(output: InferenceOutputModel) -> dict[str, Any]:
    """An output as the JSON object that `output_json` writes, in Python's types. Raises `OutputNotJsonError`."""
    return cast("dict[str, Any]", from_json(output_json(output)))
