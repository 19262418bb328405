"""Items made from the JSON schema of an input model, to try a pipeline that has no sample items."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from modalkit.batching.errors import users_error
from modalkit.service.errors import ServiceError, describe_error
from modalkit.service.validation import field_errors, summary

TEXT = "What a lovely day!"
MAX_OPTIONAL_DEPTH = 4
"""Levels of nesting below which lists that may be empty are."""
MAX_DEPTH = 50

_BY_FORMAT = {
    "base64": "aGVsbG8=",
    "binary": "aGVsbG8=",
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "duration": "PT1S",
    "email": "someone@example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "time": "12:00:00Z",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


class NoItemsError(ServiceError):
    """Raised when no valid item can be made from a schema. Its text says why."""


@dataclass(frozen=True)
class MadeUpItems:
    """Valid items; `are_guessed` where a value is neither an example nor a default of the model's author.

    `has_fields` is False for a model that declares none and takes any: then its items have a text, by a blind guess.
    """

    items: Sequence[BaseModel]
    are_guessed: bool
    has_fields: bool


def make_up_items(model: type[BaseModel], n: int) -> MadeUpItems:
    """`n` items: the examples of the model, else one from the examples, defaults and types of its fields, repeated.

    Raises `NoItemsError`.
    """
    try:
        schema: Mapping[str, Any] = model.model_json_schema()
    except BaseException as error:
        raise NoItemsError(f"{model.__name__} has no JSON schema: {describe_error(users_error(error))}") from error
    maker = _Maker(schema.get("$defs", {}))
    schema = maker.resolved(schema)
    has_fields = bool(_examples(schema) or schema.get("properties")) or schema.get("additionalProperties") is not True
    if not has_fields:
        schema = {**schema, "properties": {"text": {"type": "string"}}, "required": ["text"]}
    items = [_validated(model, value) for value in (_examples(schema) or [maker.value(schema)])[:n]]
    return MadeUpItems([items[index % len(items)] for index in range(n)], maker.has_guessed, has_fields)


def _validated(model: type[BaseModel], value: object) -> BaseModel:
    content = to_json(value, serialize_unknown=True)
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        reason = summary(field_errors(error.errors(include_url=False), model))
    except BaseException as error:  # noqa: BLE001  # a model's own validators may raise anything
        reason = describe_error(users_error(error))
    raise NoItemsError(f"{model.__name__} refuses the item made from its schema, {content.decode()}: {reason}")


class _Maker:
    """Makes values from schemas. `has_guessed` is set once a value is neither an example nor a default."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions
        self.has_guessed = False

    def resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """The schema with what it refers to."""
        if "$ref" not in schema:
            return schema
        return {**self._definitions[schema["$ref"].rpartition("/")[2]], **schema}

    def value(self, schema: Mapping[str, Any], depth: int = 0) -> Any:
        """A small value that the schema allows, as far as it can be told from the schema. Raises `NoItemsError`."""
        if depth > MAX_DEPTH:
            raise NoItemsError("its fields are nested without end")
        schema = self.resolved(schema)
        if examples := _examples(schema):
            return examples[0]
        for key in ("default", "const"):
            if key in schema:
                return schema[key]
        if "enum" in schema:
            return schema["enum"][0]
        for key in ("anyOf", "oneOf"):
            if key in schema:
                options = sorted(schema[key], key=lambda option: option.get("type") == "null")
                return self.value(options[0], depth + 1)
        if "allOf" in schema:
            return self.value({name: part for inner in schema["allOf"] for name, part in inner.items()}, depth + 1)
        return self._of_type(schema, depth)

    def _of_type(self, schema: Mapping[str, Any], depth: int) -> Any:
        match schema.get("type"):
            case "object":
                required = schema.get("required", ())
                return {
                    name: self.value(inner, depth + 1)
                    for name, inner in schema.get("properties", {}).items()
                    if name in required or _examples(inner)
                }
            case "array":
                return self._list(schema, depth)
            case "null":
                return None
            case "boolean":
                self.has_guessed = True
                return False
            case "integer" | "number" as kind:
                self.has_guessed = True
                return _number(schema, is_whole=kind == "integer")
            case _:
                self.has_guessed = True
                return _text(schema)

    def _list(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        if "prefixItems" in schema:
            return [self.value(inner, depth + 1) for inner in schema["prefixItems"]]
        count = min(max(schema.get("minItems", 0), depth <= MAX_OPTIONAL_DEPTH), schema.get("maxItems", math.inf))
        return [self.value(schema.get("items", {}), depth + 1) for _ in range(int(count))]


def _examples(schema: Mapping[str, Any]) -> Sequence[Any]:
    """The examples of a schema; those by name, which OpenAPI has outside of schemas, are none."""
    examples = schema.get("examples")
    return examples if isinstance(examples, list) else ()


def _number(schema: Mapping[str, Any], *, is_whole: bool) -> float:
    """1 where the limits allow it, else the number in them that is the nearest or, between open ones, the middle."""
    step = schema.get("multipleOf", 1 if is_whole else 0)
    open_by = 1 if is_whole else 1e-3
    lowest: float = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf) + open_by)
    highest: float = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf) - open_by)
    if lowest > highest:
        return (lowest + highest) / 2
    number = min(max(1.0, lowest), highest)
    if step:
        number = math.ceil(number / step) * step
    return int(number) if is_whole else number


def _text(schema: Mapping[str, Any]) -> str:
    if schema.get("format") in _BY_FORMAT:
        return _BY_FORMAT[schema["format"]]
    repeated = TEXT * -(-schema.get("minLength", 1) // len(TEXT))
    return (repeated or TEXT)[: schema.get("maxLength")]
