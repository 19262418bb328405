"""Layers of settings: YAML files, then `MODALKIT_…` variables over them, merged before anything is validated."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, get_origin

from ruamel.yaml.error import YAMLError

from modalkit.service.settings.problems import Problem, SettingsError, unknown_key
from modalkit.service.settings.schema import KeyPath, below, is_structured, kinds, known_paths, section_in, suggestion
from modalkit.service.settings.section import Section
from modalkit.service.settings.yaml_text import describe_yaml_error, parse_yaml

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "MODALKIT_API_KEY"
CONFIG_VARIABLE = "MODALKIT_CONFIG"
DEFAULT_FILE = Path("modalkit.yaml")
LOG_FORMAT_VARIABLE = "MODALKIT_LOG_FORMAT"
POSTFIX_VARIABLE = "MODALKIT_APP_POSTFIX"
PREFIX = "MODALKIT_"
RESERVED_VARIABLES = frozenset({CONFIG_VARIABLE, API_KEY_VARIABLE, LOG_FORMAT_VARIABLE, POSTFIX_VARIABLE})
"""Variables with our prefix that are no settings: the files to read, the key that ``modalkit jobs`` sends, the format
of the log of ``modalkit serve``, and the second part of the Modal app's name."""

_SERVICE_HOST = re.compile(r"(MODALKIT(?:_[A-Z0-9]+)*)_SERVICE_HOST")
_NULLS = frozenset({"null", "Null", "NULL"})


def deep_merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `override` over it: mappings are merged key by key, everything else (lists too) is replaced.

    Neither argument is changed; values that only one of them has are shared with the result.
    """
    merged = dict(base)
    for key, value in override.items():
        beneath = merged.get(key)
        if isinstance(beneath, Mapping) and isinstance(value, Mapping):
            merged[key] = deep_merge(beneath, value)
        else:
            merged[key] = value
    return merged


class Layer:
    """What one source gives: values, the origin of each key in words, and what is wrong with its keys.

    Old names of keys are replaced, each with a `FutureWarning`.
    """

    def __init__(self, root: type[Section], values: Mapping[Any, Any], origins: dict[KeyPath, str]) -> None:
        self.origins = origins
        self.problems: list[Problem] = []
        self.values = self._normalize(values, root, ())

    def gives(self, path: KeyPath) -> bool:
        """Whether this layer has a value for the key."""
        value: Any = self.values
        for key in path:
            if isinstance(value, Mapping) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            else:
                return False
        return True

    def origin(self, path: KeyPath) -> str:
        """The key's own origin, else its parent's, else its children's."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ", ".join(origin for other, origin in self.origins.items() if other[: len(path)] == path)

    def _normalize(self, values: Mapping[Any, Any], section: type[Section], at: KeyPath) -> dict[str, Any]:
        normalized: dict[str, Any] = {}
        for key, value in values.items():
            name = str(key)
            if name in section.old_names:
                name = self._present_name(name, values, section, at)
            annotation = below(section, name)
            options = kinds(annotation)
            if value is None and NoneType not in options and any(map(is_structured, options)):
                continue  # a heading in YAML with nothing, or only comments, below it: the default stays
            inner = section_in(annotation) if isinstance(value, Mapping) else None
            normalized[name] = value if inner is None else self._normalize(value, inner, (*at, name))
        return normalized

    def _present_name(self, old: str, values: Mapping[Any, Any], section: type[Section], at: KeyPath) -> str:
        new = section.old_names[old]
        path, place = (*at, old), self.origin((*at, old))
        if new in values:
            self.problems.append(Problem(path, f"is the old name of {new}, which is given too: remove it", place))
            return new
        warnings.warn(f"{'.'.join(path)}: is now called {new}: rename it ({place})", FutureWarning, stacklevel=2)
        self.origins[*at, new] = f"{place}, as {old}"
        return new


@dataclass(frozen=True)
class Origins:
    """Where the values of a configuration come from; two of equal values are equal, wherever these come from."""

    layers: Sequence[Layer] = field(default=(), compare=False)
    arguments: tuple[Any, ...] = field(default=(), compare=False)
    """The arguments of `Settings` that gave these layers: its files and its variables."""
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Its arguments by name."""

    def of(self, path: KeyPath) -> str:
        """The origin of a key: in the last layer that gives it, else in the last one that gives its parent."""
        for length in range(len(path), 0, -1):
            for layer in reversed(self.layers):
                if layer.gives(path[:length]):
                    return layer.origin(path[:length])
        return "default"


def read_files(
    root: type[Section], config_files: Sequence[Path | str] | None, environ: Mapping[str, str]
) -> Iterator[Layer]:
    """A layer for each file, in order: those given, else those in `MODALKIT_CONFIG`, else `modalkit.yaml` if it exists.

    Raises SettingsError for a file that is missing, cannot be read or is not a YAML mapping, and for one such as
    `modalkit.yml` in place of `modalkit.yaml`.
    """
    if config_files is not None:
        yield from (_read_file(root, Path(file), "") for file in config_files)
    elif names := named_files(environ):
        yield from (_read_file(root, Path(name), f", named in {CONFIG_VARIABLE}") for name in names)
    else:
        others = [f"{file}" for file in sorted(Path().glob("*.*")) if _is_mistaken(file)]
        if DEFAULT_FILE.exists():
            yield _read_file(root, DEFAULT_FILE, "")
            if others:
                logger.warning("%s: not read, because there is %s; remove it", ", ".join(others), DEFAULT_FILE)
        elif others:
            raise _file_error(Path(others[0]), f"is not read: rename it to {DEFAULT_FILE}, or name it by --config")


def named_files(environ: Mapping[str, str]) -> list[str]:
    """The files that `MODALKIT_CONFIG` names, separated by commas."""
    return [name.strip() for name in environ.get(CONFIG_VARIABLE, "").split(",") if name.strip()]


def _is_mistaken(file: Path) -> bool:
    """Whether a file has the name of the default one in other letters or with another ending."""
    is_alike = file.stem.lower() == DEFAULT_FILE.stem and file.suffix.lower() in (".yaml", ".yml", ".json")
    return is_alike and file.is_file() and not (DEFAULT_FILE.exists() and file.samefile(DEFAULT_FILE))


def read_variables(root: type[Section], environ: Mapping[str, str]) -> Layer:
    """The layer of all `MODALKIT_…` variables. A variable for one key wins over one for the whole section.

    Those by which Kubernetes tells all containers of a Service named modalkit, or modalkit-…, are left out.
    Names of settings match in any case. Below a mapping with free keys (names of models, `build_config.env`) a name
    keeps its case; in `common` and in the arguments of a model entry, a name in capitals is converted to lower case.
    """
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    problems: list[Problem] = []
    services = [found[1] for found in map(_SERVICE_HOST.fullmatch, environ) if found is not None]
    of_services = tuple(f"{service}_{what}" for service in services for what in ("SERVICE_", "PORT"))
    for name in sorted(environ, key=lambda name: (name.count("__"), name)):
        if not name.upper().startswith(PREFIX) or name in RESERVED_VARIABLES or name.startswith(of_services):
            continue
        parts = name[len(PREFIX) :].split("__")
        path, annotation = _resolve(root, parts)
        if annotation is None:
            problems.append(Problem(path, _unknown_variable(root, path, parts[len(path) :]), name))
        elif path in origins:
            problems.append(Problem(path, f"is set by {origins[path]} too: unset one of them", name))
        else:
            origins[path] = name
            try:
                value = _parse_text(environ[name], annotation)
            except YAMLError as error:
                message = f"is not valid YAML or JSON ({describe_yaml_error(error)})"
                problems.append(Problem(path, f"{message}; a text with special characters needs quotes", name))
            else:
                values = deep_merge(values, reduce(lambda inner, key: {key: inner}, reversed(path), value))
    layer = Layer(root, values, origins)
    layer.problems.extend(problems)
    return layer


def _read_file(root: type[Section], file: Path, named: str) -> Layer:
    try:
        values, lines = parse_yaml(file.expanduser().read_bytes())
    except RuntimeError:
        raise _file_error(file, f"begins with a user that does not exist{named}: correct its name") from None
    except FileNotFoundError:
        raise _file_error(file, f"no such file{named}: create it or correct its name (from {Path.cwd()})") from None
    except OSError as error:
        raise _file_error(file, f"cannot be read{named}: {error.strerror}") from None
    except YAMLError as error:
        raise _file_error(file, f"is not valid YAML: {describe_yaml_error(error)}") from None
    if not isinstance(values, Mapping | None):
        message = f"must hold a mapping, such as `app_settings:` and lines below it, not a {type(values).__name__}"
        raise _file_error(file, message)
    return Layer(root, values or {}, {path: f"{file}, line {line}" for path, line in lines.items()} | {(): str(file)})


def _file_error(file: Path, message: str) -> SettingsError:
    return SettingsError([Problem((), message, str(file))])


def _resolve(root: type[Section], parts: Sequence[str]) -> tuple[KeyPath, Any]:
    """The path of the key that a variable sets, and its annotation.

    For an unknown key the path ends with the first unknown part, and the annotation is None.
    """
    path: KeyPath = ()
    annotation: Any = root
    for part in parts:
        section = section_in(annotation)
        free = below(annotation, part.lower()) is Any
        key = part.lower() if (part.isupper() if free else section is not None) else part
        renamed = {} if section is None else section.old_names
        path = (*path, key)
        annotation = None if not key or _has_lists(annotation) else below(annotation, renamed.get(key, key))
        if annotation is None:
            break
    return path, annotation


def _has_lists(annotation: Any) -> bool:
    return any(get_origin(kind) is list for kind in kinds(annotation))


def _unknown_variable(root: type[Section], path: KeyPath, rest: Sequence[str]) -> str:
    if path[:-1] and _has_lists(_resolve(root, path[:-1])[1]):
        return f"a list is set as a whole: give {_variable(path[:-1])} a value such as [one, two]"
    settable = (known for known in known_paths(root) if _resolve(root, known)[1] is not None)
    meant = suggestion(path, settable)
    if meant is None:
        return unknown_key(path, None)
    return f"unknown key; did you mean {'__'.join([_variable(meant), *rest])}?"


def _variable(path: KeyPath) -> str:
    return PREFIX + "__".join(path).upper()


def _parse_text(text: str, annotation: Any) -> Any:
    """The value of a variable: null, YAML (and so JSON) for lists, mappings and free values, else the text itself."""
    if text in _NULLS:
        return None
    options = kinds(annotation)
    may_be_structured = any(kind is Any or is_structured(kind) for kind in options)
    if may_be_structured and (str not in options or text.lstrip().startswith("[")):
        return parse_yaml(text)[0]
    return text
