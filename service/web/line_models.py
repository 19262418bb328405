"""Streams whose lines may each name a model."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic_core import from_json, to_json

from modalkit.batching import Failure
from modalkit.service.errors import UnknownModelError
from modalkit.service.gateway import Model
from modalkit.service.web.bodies import BodyParser, check_keys
from modalkit.service.web.lines import Line, parsed
from modalkit.service.web.problems import ProblemError

T = TypeVar("T")

KEY = "model_name"


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A model, and what parses its items."""

    model: Model
    parser: BodyParser


FindTarget = Callable[[str | None], Target]
"""The target of a model's name, or that of the first model. Raises `UnknownModelError`."""


async def parse_lines(
    lines: Sequence[Line],
    parse: Callable[[BodyParser, Sequence[bytes]], Awaitable[Sequence[T | Failure]]],
    target: Target,
    find: FindTarget | None,
) -> tuple[Sequence[T | Failure], Sequence[Target]]:
    """What each line asks for, or what is wrong with it, with its target: the model that it names, else `target`.

    Without `find`, no line names one.
    """
    contents = [line.content for line in lines if isinstance(line.content, bytes)]
    if find is None or b'"model_name"' not in b"\n".join(contents):
        return await parsed(lines, partial(parse, target.parser)), [target] * len(lines)
    targets, asked = [target] * len(lines), list[T | Failure | None]([None] * len(lines))
    places = dict[str, list[int]]()
    plain = list(lines)
    for index, line in enumerate(lines):
        if isinstance(line.content, ProblemError):
            asked[index] = Failure(line.content)
            continue
        try:
            name, content = _model_of(line.content)
            targets[index] = target if name is None else find(name)
        except (ProblemError, UnknownModelError) as error:
            asked[index] = Failure(error)
            continue
        plain[index] = Line(line.number, content)
        places.setdefault(targets[index].model.name, []).append(index)
    for indices in places.values():
        parser = targets[indices[0]].parser
        found = await parsed([plain[index] for index in indices], partial(parse, parser))
        for index, entry in zip(indices, found, strict=True):
            asked[index] = entry
    return [entry for entry in asked if entry is not None], targets


def _model_of(content: bytes) -> tuple[str | None, bytes]:
    """The model that a line names, and the line without that."""
    try:
        value: Any = from_json(content)
    except ValueError:
        return None, content  # its parser says what is wrong
    if not isinstance(value, dict) or KEY not in value:
        return None, content
    check_keys(content, "line")
    name = value.pop(KEY)
    if name is not None and not isinstance(name, str):
        raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, f"{KEY}: must be the name of a model, a JSON string")
    return name, to_json(value, inf_nan_mode="constants")
