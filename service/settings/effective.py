"""The configuration that is in effect, as YAML: with the origin of what is no default, and without secrets."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modalkit.service.settings.schema import KeyPath, is_secret
from modalkit.service.settings.settings import Settings
from modalkit.service.settings.yaml_text import dump_yaml, parse_yaml

HIDDEN = "(hidden)"
MAX_COMMENTED_CHARACTERS = 60
"""Above longer texts their origin has a line of its own, because YAML may break them over lines."""

_SECRET_NAME = re.compile(
    r"(?:(?:^|_|-|api|access|private)key|token|secret|password|passwd|pwd|credential)s?$", re.IGNORECASE
)
_USER_IN_URL = re.compile(r"://[^/\s@]+@")
"""A password, or a token in the place of the user."""


def effective_settings(
    config_files: Sequence[Path | str] | None = None, environ: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The settings of `Settings.load` as plain data, and the origin of each value that is no default.

    An origin is a file with the line, or a variable. Secrets are hidden, and addresses with a user or password; of
    arguments of pipelines and variables of the image, so are those whose names end in ``key``, ``token`` and such.
    Raises SettingsError.
    """
    settings = Settings.load(config_files, environ)
    values = settings.model_dump(mode="json")
    defaults = dict(_leaves(Settings.load([], {}).model_dump(mode="json")))
    leaves = dict(_leaves(values))
    origins = {path: settings.origin(*path) for path, value in leaves.items() if defaults.get(path) != value}
    for path, value in leaves.items():
        if _is_hidden(path, value):
            _set(values, path, HIDDEN)
    return values, origins


def effective_yaml(config_files: Sequence[Path | str] | None = None, environ: Mapping[str, str] | None = None) -> str:
    """What `effective_settings` returns, as the text of a configuration file in which each origin is a comment."""
    values, origins = effective_settings(config_files, environ)
    leaves = dict(_leaves(values))
    text = dump_yaml(values)
    lines = text.splitlines()
    _, numbers = parse_yaml(text)
    for path, comment in sorted(origins.items(), key=lambda found: numbers[found[0]], reverse=True):
        index, value = numbers[path] - 1, leaves[path]
        if isinstance(value, str) and (len(value) > MAX_COMMENTED_CHARACTERS or not value.isprintable()):
            indent = len(lines[index]) - len(lines[index].lstrip())
            lines.insert(index, f"{' ' * indent}# {comment}:")
        else:
            lines[index] += f"  # {comment}"
    return "\n".join([*lines, ""])


def _leaves(values: Mapping[str, Any], at: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in values.items():
        path = (*at, str(key))
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _is_hidden(path: KeyPath, value: Any) -> bool:
    if value is None or value == []:
        return False
    if is_secret(Settings, path):
        # This one is a secret only for the password that it may hold.
        return path[-1] != "broker_url" or any(sign in str(value) for sign in "@?")
    is_free = path[:2] in (("model_settings", "common"), ("model_settings", "model_entries")) or path[2:3] == ("env",)
    return bool(_USER_IN_URL.search(str(value))) or (is_free and _is_named_secret(path[-1], value))


def _is_named_secret(name: str, value: Any) -> bool:
    """Whether a value is a secret by its name, or a list in which one is. A number of tokens is none."""
    if isinstance(value, int) and name.lower().endswith("tokens"):
        return False
    parts = value if isinstance(value, list) else []
    inner = [item for part in parts if isinstance(part, dict) for item in part.items()]
    return bool(_SECRET_NAME.search(name)) or any(_is_named_secret(key, each) for key, each in inner)


def _set(values: Any, path: KeyPath, value: object) -> None:
    for key in path[:-1]:
        values = values[key]
    values[path[-1]] = value
