"""Facts about the sections: which keys there are, of which types, and which known key is similar to an unknown one."""

import difflib
import types
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

from pydantic import SecretStr

from modalkit.service.settings.section import Section

KeyPath: TypeAlias = tuple[str, ...]


def kinds(annotation: Any) -> list[Any]:
    """The alternatives of a field's annotation, unions and `Annotated` taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for alternative in get_args(annotation) for kind in kinds(alternative)]
    return [annotation]


def section_in(annotation: Any) -> type[Section] | None:
    """The section among the types of an annotation, or None."""
    return next((kind for kind in kinds(annotation) if isinstance(kind, type) and issubclass(kind, Section)), None)


def is_structured(kind: Any) -> bool:
    """Whether values of this type are mappings or lists, which are YAML or JSON in a variable."""
    return get_origin(kind) in (dict, list) or section_in(kind) is not None


def below(annotation: Any, key: str) -> Any:
    """The annotation of `key` below this one; `Any` where keys are free, None where the key cannot exist."""
    for kind in kinds(annotation):
        section = section_in(kind)
        if section is not None:
            free = Any if section.model_config.get("extra") == "allow" else None
            return section.model_fields[key].annotation if key in section.model_fields else free
        if get_origin(kind) in (dict, list):
            return get_args(kind)[-1]
        if kind is Any:
            return Any
    return None


def is_secret(root: type[Section], path: KeyPath) -> bool:
    """Whether the value of this key must not be shown."""
    annotation: Any = root
    for key in path:
        section = section_in(annotation)
        field = section.model_fields.get(key) if section is not None else None
        annotation = below(annotation, key)
        if SecretStr in kinds(annotation) or (field is not None and not field.repr):
            return True
    return False


def known_paths(root: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths of all keys below `root`, parents first; paths below a list have no index."""
    section = section_in(root)
    for name, field in section.model_fields.items() if section is not None else ():
        yield (*at, name)
        for kind in kinds(field.annotation):
            yield from known_paths(get_args(kind)[0] if get_origin(kind) is list else kind, (*at, name))


def known_around(root: type[Section], path: KeyPath) -> list[KeyPath]:
    """The paths of all keys below `root`, and those beside `path`, which may be below a mapping with free keys."""
    annotation = reduce(below, path[:-1], root)
    return [*known_paths(root), *known_paths(annotation, path[:-1])]


def close_name(name: str, names: Iterable[str]) -> str | None:
    """The most similar of the names, if one is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.75)), None)


def suggestion(path: KeyPath, known: Iterable[KeyPath]) -> KeyPath | None:
    """The most similar known key: one beside the given key, else one with its name elsewhere, else one below."""
    known = list(known)
    path = (*(key for key in path[:-1] if not key.isdecimal()), path[-1])
    beside = [other[-1] for other in known if other[:-1] == path[:-1]]
    similar = close_name(path[-1], beside)
    if similar is not None:
        return (*path[:-1], similar)
    elsewhere = [other for other in known if other[-1] == path[-1]]
    if elsewhere:
        return elsewhere[0]
    depth = len(path) - 1
    below = {".".join(other[depth:]): other for other in known if other[:depth] == path[:depth]}
    closest = difflib.get_close_matches(path[-1], below, n=1, cutoff=0.7)
    return below[closest[0]] if closest else None
