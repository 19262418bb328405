"""YAML 1.1, in which `yes` is true and `017` is 15: text to plain data with the line of each key, and data to text."""

import re
from collections.abc import Iterator
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import VersionedResolver

from modalkit.service.settings.schema import KeyPath

_NOT_BOOL = re.compile(r"[yYnN]")
_NOT_FLOAT = re.compile(r"[^.:]*[eE].*|.*[eE][0-9]+")


class _Resolver(VersionedResolver):
    """YAML 1.1 as PyYAML reads it, which is what configuration files are written for: y, n and 1e3 are texts."""

    processing_version = (1, 1)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        if kind is ScalarNode and implicit[0]:
            text = {"tag:yaml.org,2002:bool": _NOT_BOOL, "tag:yaml.org,2002:float": _NOT_FLOAT}.get(str(tag))
            if text is not None and text.fullmatch(value):
                return self.DEFAULT_SCALAR_TAG
        return tag


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _Resolver
    return yaml


def parse_yaml(text: str | bytes) -> tuple[Any, dict[KeyPath, int]]:
    """The document as plain data, and the line of each of its keys.

    Raises `YAMLError`, also for a key that is given twice.
    """
    yaml = _yaml()
    node = yaml.compose(text)
    if node is None:
        return None, {}
    lines = dict(_lines(node, (), set()))
    try:
        return yaml.constructor.construct_document(node), lines
    except ValueError as error:  # a text such as 2020-13-45 looks like a date and is none
        raise YAMLError(str(error)) from error


def dump_yaml(data: Any) -> str:
    """The text of plain data, in the order of its keys; a value that is in two places is written twice."""
    yaml: Any = _yaml()  # mypy takes the types of its options from their first values, None
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    yaml.representer.ignore_aliases = lambda _: True
    stream = StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def describe_yaml_error(error: YAMLError) -> str:
    """What is wrong, in one line, with the line and column where they are known."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    problem = str(error.problem)
    if isinstance(error, DuplicateKeyError):
        problem = problem.partition(" with value ")[0] + ": keep one"  # values may be secrets
    return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {problem}"


def _lines(node: Node, at: KeyPath, seen: set[int]) -> Iterator[tuple[KeyPath, int]]:
    # Each aliased node is visited once, so that aliases can neither multiply the work nor form an endless loop.
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            yield from _lines(item, (*at, str(index)), seen)
    elif isinstance(node, MappingNode):
        given: set[str] = set()
        for key, value in node.value:
            path = (*at, str(key.value))
            if path[-1] in given:
                keep = "write <<: [*one, *other]" if path[-1] == "<<" else "keep one"
                problem = f"{'.'.join(path)} is given twice: {keep}"
                raise MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            given.add(path[-1])
            yield path, key.start_mark.line + 1
            yield from _lines(value, path, seen)
