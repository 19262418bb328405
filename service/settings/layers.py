"""Layers of settings: plain data that knows the origin of each key, merged before anything is validated."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from pydantic import BaseModel

from modalkit.service.settings.problems import Problem
from modalkit.service.settings.schema import KeyPath, below, is_structured, kinds, old_names, section_in


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


@dataclass(frozen=True)
class Layer:
    """What one source gives: values, the origin of each key in words, and what is wrong with its keys."""

    values: dict[str, Any]
    origins: dict[KeyPath, str]
    problems: list[Problem] = field(default_factory=list)

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


def origin(path: KeyPath, layers: Sequence[Layer]) -> str:
    """The origin of a key's value: in the last layer that gives the key, else in the last one that gives its parent."""
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            if layer.gives(path[:length]):
                return layer.origin(path[:length])
    return "default"


def make_layer(root: type[BaseModel], values: Mapping[Any, Any], origins: dict[KeyPath, str]) -> Layer:
    """A layer of `values`, with old names of keys replaced (each with a `FutureWarning`)."""
    layer = Layer({}, origins)
    layer.values.update(_normalize(values, root, (), layer))
    return layer


def _normalize(values: Mapping[Any, Any], section: type[BaseModel], at: KeyPath, layer: Layer) -> dict[str, Any]:
    normalized: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key)
        if name in old_names(section):
            name = _present_name(name, values, section, at, layer)
        annotation = below(section, name)
        inner = section_in(annotation)
        if value is None and _null_means_default(annotation):
            continue
        if inner is None or not isinstance(value, Mapping):
            normalized[name] = value
        else:
            normalized[name] = _normalize(value, inner, (*at, name), layer)
    return normalized


def _present_name(old: str, values: Mapping[Any, Any], section: type[BaseModel], at: KeyPath, layer: Layer) -> str:
    new = old_names(section)[old]
    place = layer.origin((*at, old))
    if new in values:
        layer.problems.append(Problem((*at, old), f"is the old name of {new}, which is given too: remove it", place))
        return new
    warnings.warn(f"{'.'.join((*at, old))}: is now called {new}: rename it ({place})", FutureWarning, stacklevel=2)
    layer.origins[*at, new] = f"{place}, as {old}"
    return new


def _null_means_default(annotation: Any) -> bool:
    """Whether null leaves a key at its default: a heading in YAML with nothing, or only comments, below it."""
    options = kinds(annotation)
    return NoneType not in options and any(is_structured(option) for option in options)
