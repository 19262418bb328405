"""Messages for the sender of an invalid item: the field, what is wrong with it, and the remedy."""

import difflib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, RootModel, ValidationError, create_model
from pydantic_core import from_json, to_json

from modalkit.batching import Failure, Outcome
from modalkit.batching.errors import users_error
from modalkit.service.errors import InvalidItemError, describe_value

Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
Result = TypeVar("Result")

_SHOWN_CHARACTERS = 100
_COMPARED_CHARACTERS = 100


def validated(model: type[Model], value: object) -> Model:
    """The value as an instance of `model`. Raises `InvalidItemError`, and what the model's own validators raise."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        errors = field_errors(error.errors(include_url=False), model)
        raise InvalidItemError(summary(errors), errors) from error


async def run_valid(
    items: Sequence[Item | Failure], run: Callable[[list[Item]], Awaitable[Sequence[Outcome[Result]]]]
) -> list[Outcome[Result]]:
    """The outcomes of items, in their order: of the valid ones those that `run` returns, of the others their own."""
    valid = [item for item in items if not isinstance(item, Failure)]
    outcomes = await run(valid)
    if len(valid) == len(items):
        return list(outcomes)
    others = iter(outcomes)
    return [item if isinstance(item, Failure) else next(others) for item in items]


def field_errors(findings: Iterable[Mapping[str, Any]], model: type[BaseModel] | None = None) -> list[dict[str, Any]]:
    """The findings of pydantic (`ValidationError.errors`), each with a `field`, a `message` and mostly a `value`.

    `model` is the model that was validated; its field names are suggested for a misspelt one.
    """
    return [_field_error(finding, model) for finding in findings]


def summary(errors: Iterable[Mapping[str, Any]]) -> str:
    """The errors of one item in one line."""
    return "; ".join(
        f"{error['field']}: {error['message']}" if error["field"] else error["message"] for error in errors
    )


def _field_error(finding: Mapping[str, Any], model: type[BaseModel] | None) -> dict[str, Any]:
    path, kind = finding["loc"], finding["type"]
    field = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
    if kind == "extra_forbidden":
        return {"field": field, "message": f"unknown field; {_known_fields(path, model)}"}
    if kind == "missing":
        return {"field": field, "message": "is missing: add it"}
    message = str(finding["msg"])
    raised = finding.get("ctx", {}).get("error")
    if kind == "string_type":
        message = "must be a text, a JSON string"
    elif kind in ("value_error", "assertion_error") and isinstance(raised, Exception):  # others chose that kind
        message = str(raised)  # without "Value error, "
    elif kind == "list_type":
        message = "must be a JSON list, as in [1, 2]"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = 'must be a JSON object, as in {"name": "value"}'
    return {"field": field, "message": message, "value": _shown(finding["input"])}


def _known_fields(path: Sequence[int | str], model: type[BaseModel] | None) -> str:
    for key in path[:-1]:
        field = None if model is None else model.model_fields.get(str(key))
        annotation = None if field is None else field.annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    if model is None:
        return "remove it or correct its name"
    return _names_like(str(path[-1])[:_COMPARED_CHARACTERS], *field_keys(model))


def field_keys(model: type[BaseModel]) -> list[str]:
    """The key of each field in an item: its alias, the first of several, or its name."""
    aliases = [(name, field.validation_alias) for name, field in model.model_fields.items()]
    firsts = [(name, alias.choices[0] if isinstance(alias, AliasChoices) else alias) for name, alias in aliases]
    return [alias if isinstance(alias, str) else name for name, alias in firsts]


@lru_cache(maxsize=1024)  # many items may have the same wrong field, and to compare names takes long
def _names_like(wrong: str, *names: str) -> str:
    close = difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"remove it; known are: {', '.join(names)}"


def _shown(value: object) -> object:
    """The value where it is short, else the beginning of its JSON."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        text = value
    else:
        try:
            text = to_json(value, inf_nan_mode="null", fallback=describe_value).decode()
        except ValueError:  # half of a surrogate pair, or nested too deep
            text = describe_value(value)
        else:
            if len(text) <= _SHOWN_CHARACTERS:
                return from_json(text)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


@cache
def documented_model(model: type[BaseModel]) -> type[BaseModel]:
    """The model as it is documented: where it has no JSON schema, one with the same keys that may hold anything."""
    try:
        model.model_json_schema()
        model.model_json_schema(mode="serialization")
    except BaseException as error:  # noqa: BLE001  # a model's own types may raise anything
        users_error(error)
    else:
        return model
    if issubclass(model, RootModel):
        return create_model(model.__name__, __base__=RootModel[Any])
    fields: dict[str, Any] = {
        name: (Any, Field(... if field.is_required() else None, alias=key, description=field.description))
        for key, (name, field) in zip(field_keys(model), model.model_fields.items(), strict=True)
    }
    return create_model(model.__name__, __config__=ConfigDict(protected_namespaces=()), **fields)
