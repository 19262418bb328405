"""Puts limits into the text of a configuration file, and changes nothing else in it."""

import os
import re
from collections.abc import Mapping
from functools import reduce
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from modalkit.service.errors import UsageError
from modalkit.service.settings import Settings, deep_merge
from modalkit.service.settings.schema import KeyPath
from modalkit.service.settings.yaml_text import parse_yaml
from modalkit.service.tuning import TuningError

LIMITS_OF_ALL: KeyPath = ("app_settings", "batch_config")
"""The section of the limits for models without their own."""

_FIRST_INDENTED_KEY = re.compile(r"^( +)[^\s#-]", re.MULTILINE)
_FIRST_LIST = re.compile(r"^( *)[^\s#-][^\n]*:[^\S\n]*\n( *)-( +)", re.MULTILINE)


class _Representer(RoundTripRepresenter):
    """Writes null as the word, not as an empty value."""


_Representer.add_representer(type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null"))


def require_writable(path: Path, section: KeyPath = LIMITS_OF_ALL) -> None:
    """Check that limits can be written there, into a new file or a configuration; called before measuring.

    Raises `SettingsError` for a file that is no configuration of modalkit, `TuningError` if it cannot be changed, and
    `UsageError` if there is no folder for it.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"--write {path}: is no file; give the name of one")
    if not path.parent.is_dir():
        raise UsageError(f"--write {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UsageError(f"--write {path}: {path.resolve().parent} may not be written to; choose another folder")
    text_with_limits(path, {"max_batch_size": 1}, section)


def text_with_limits(path: Path, values: Mapping[str, int | float], section: KeyPath = LIMITS_OF_ALL) -> str:
    """The text of the YAML file at `path`, if there is one, with these keys of the section.

    Comments, order and other keys stay; all lines get the indentation of the first section. Raises `SettingsError` if
    it would not load, and `TuningError` if other keys would change.
    """
    if path.exists():
        Settings.load([path], environ={})
    lines = ", ".join(f"{key}: {value}" for key, value in values.items())
    by_hand = f"write such lines into its {'.'.join(section)} by hand: {lines}"
    try:
        before = path.read_text(encoding="utf-8-sig") if path.exists() else ""
        after = _with_limits(before, values, section)
    except (UnicodeDecodeError, YAMLError) as error:
        reason = f"({' '.join(str(error).split())})"
        raise TuningError(f"{path} cannot be changed {reason}; {by_hand}") from error
    given = reduce(lambda inner, key: {key: inner}, reversed(section), dict[str, Any](values))
    wanted = deep_merge(parse_yaml(before)[0] or {}, given)
    if parse_yaml(after)[0] != wanted:
        raise TuningError(f"{path} cannot be changed without changing more of it; {by_hand}")
    Settings(_config_files=[], _environ={}, **wanted)
    return after


def _with_limits(text: str, values: Mapping[str, int | float], path: KeyPath) -> str:
    round_trip = YAML()
    round_trip.Representer = _Representer
    round_trip.preserve_quotes = True
    round_trip.width = 2**16
    step = len(found[1]) if (found := _FIRST_INDENTED_KEY.search(text)) else 2
    round_trip.indent(mapping=step)
    if found := _FIRST_LIST.search(text):
        offset = len(found[2]) - len(found[1])
        round_trip.indent(sequence=offset + 1 + len(found[3]), offset=offset)
    document = round_trip.load(text)
    if document is None:
        # A file with only comments has no document to which they could belong.
        return text + _with_limits(f"{path[0]}:\n  {path[1]}: {{}}\n", values, path)
    section = document
    for key in path:
        _set(section, key, section.get(key) or CommentedMap())
        section = section[key]
    for key, value in reversed(list(values.items())):
        _set(section, key, value)
    stream = StringIO()
    round_trip.dump(document, stream)
    return stream.getvalue()


def _set(section: CommentedMap, key: str, value: object) -> None:
    if key in section:
        section[key] = value
    else:
        # In front, because a comment after a section's last key belongs to the next section.
        section.insert(0, key, value)
