"""Problems of a configuration as text: the key, what it must be, what it is, and its origin."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from modalkit.service.errors import ServiceError
from modalkit.service.settings.schema import KeyPath, is_secret, known_around, suggestion
from modalkit.service.settings.section import Section

_MAPPING = "must be a mapping, lines of `key: value`"
_DEMANDS = {
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    **dict.fromkeys(("dict_type", "model_type"), _MAPPING),
    **dict.fromkeys(("finite_number", "float_parsing", "float_type"), "must be a number"),
    **dict.fromkeys(("int_from_float", "int_parsing", "int_type"), "must be a whole number"),
    **dict.fromkeys(("string_too_short", "too_short"), "must not be empty"),
    "enum": "must be {expected}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list, as in [one, two]",
    "literal_error": "must be {expected}",
    "path_type": "must be a path",
    "string_type": "must be a text",
}


@dataclass(frozen=True)
class Problem:
    """One problem: the path of the key (empty for a whole file), what is wrong, and the origin of the value."""

    path: KeyPath
    message: str
    origin: str

    def __str__(self) -> str:
        key = ".".join(self.path)
        return f"{key}: {self.message} ({self.origin})" if key else f"{self.origin}: {self.message}"


class SettingsError(ServiceError):
    """Raised when a configuration cannot be used. Its text is for the author of the configuration."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        lines = ["the configuration cannot be used:", *(f"  {problem}" for problem in self.problems)]
        super().__init__("\n".join(lines))


def explain(root: type[Section], error: ValidationError, origin: Callable[[KeyPath], str]) -> list[Problem]:
    """The problems in pydantic's error; `origin` gives the origin of a key's value."""
    problems = []
    for finding in error.errors(include_url=False):
        path = tuple(str(key) for key in finding["loc"] if key != "[key]")
        path += tuple(finding.get("ctx", {}).get("key", ()))
        problems.append(Problem(path, _message(root, path, finding), origin(path)))
    return problems


def unknown_key(path: KeyPath, meant: KeyPath | None) -> str:
    """The message for an unknown key, without the value, which may be a secret under a wrong name."""
    if meant is None:
        return "unknown key; remove it or correct its name"
    return f"unknown key; did you mean {meant[-1] if meant[:-1] == path[:-1] else '.'.join(meant)}?"


def _message(root: type[Section], path: KeyPath, finding: Mapping[str, Any]) -> str:
    kind, value = finding["type"], finding["input"]
    if kind == "refused":
        return str(finding["msg"])
    if kind == "extra_forbidden":
        return unknown_key(path, suggestion(path, known_around(root, path)))
    if kind == "missing":
        return "is missing: add it"
    demand = _DEMANDS.get(kind, finding["msg"]).format_map(finding.get("ctx", {}))
    if kind == "value_error":
        demand = str(finding["ctx"]["error"])  # without "Value error, "
    shown = "" if is_secret(root, path) else f", not {_shown(value, whole=demand != _MAPPING)}"
    quote = "; write it in quotes" if kind == "string_type" and isinstance(value, bool | int | float) else ""
    return f"{demand}{shown}{quote}"


def _shown(value: object, *, whole: bool) -> str:
    # Only the type of mappings and lists, and of values in place of them, is shown: they may hold secrets.
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "null"
    if not whole:
        return f"a value of type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
