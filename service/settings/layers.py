"""Layers of settings: plain data that remembers where each key was given, merged before anything is validated."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from types import NoneType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from modalkit.service.settings.problems import Problem
from modalkit.service.settings.schema import KeyPath, below, is_structured, kinds, old_names, section_in


def deep_merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `override` over it: mappings are merged key by key, everything else (lists too) is replaced.

    Both are left as they are; values that only one of them has are shared with the result.
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
    """What one place says: its values, the words that name the place of a key, and what was wrong with its keys."""

    values: dict[str, Any]
    origins: dict[KeyPath, str]
    problems: list[Problem] = field(default_factory=list)

    def gives(self, path: KeyPath) -> bool:
        """Whether this layer says anything of the key."""
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
        """The place of a key: its own, else that of what holds it, else those of what it holds."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ", ".join(origin for other, origin in self.origins.items() if other[: len(path)] == path)


def origin(path: KeyPath, layers: Sequence[Layer]) -> str:
    """Where the value of a key comes from: the topmost layer that gives it, or else gives what holds it."""
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            if layer.gives(path[:length]):
                return layer.origin(path[:length])
    return "default"


def make_layer(root: type[BaseModel], values: Mapping[Any, Any], origins: dict[KeyPath, str]) -> Layer:
    """A layer of `values` as a place spells them, with old names replaced (each with a `FutureWarning`)."""
    layer = Layer({}, origins)
    layer.values.update(_settle(values, root, (), layer))
    return layer


class LayersSource(PydanticBaseSettingsSource):
    """Gives pydantic-settings the layers merged, later ones over earlier ones."""

    def __init__(self, settings_cls: type[BaseSettings], layers: Sequence[Layer]) -> None:
        super().__init__(settings_cls)
        self._layers = layers

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002 - the base's signature
        """The top-level value of a field."""
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """All values, merged."""
        return reduce(deep_merge, (layer.values for layer in self._layers), {})


def _settle(values: Mapping[Any, Any], section: type[BaseModel], at: KeyPath, layer: Layer) -> dict[str, Any]:
    settled: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key)
        if name in old_names(section):
            name = _present_name(name, values, section, at, layer)
        annotation = below(section, name)
        inner = section_in(annotation)
        if value is None and _means_nothing_said(annotation):
            continue
        if inner is None or not isinstance(value, Mapping):
            settled[name] = value
        else:
            settled[name] = _settle(value, inner, (*at, name), layer)
    return settled


def _present_name(old: str, values: Mapping[Any, Any], section: type[BaseModel], at: KeyPath, layer: Layer) -> str:
    new = old_names(section)[old]
    place = layer.origin((*at, old))
    if new in values:
        layer.problems.append(Problem((*at, old), f"is the old name of {new}, which is given too: remove it", place))
        return new
    warnings.warn(f"{'.'.join((*at, old))}: is now called {new}: rename it ({place})", FutureWarning, stacklevel=2)
    layer.origins[*at, new] = f"{place}, as {old}"
    return new


def _means_nothing_said(annotation: Any) -> bool:
    """Whether null leaves a key at its default: a heading in YAML with nothing, or only comments, below it."""
    options = kinds(annotation)
    return NoneType not in options and any(is_structured(option) for option in options)
