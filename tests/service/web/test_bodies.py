"""A key that comes twice is found however the body is written, and no other body is refused for it."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalkit.service.web.bodies import check_keys
from modalkit.service.web.problems import ProblemError

KEYS = st.text(alphabet='ab:"\\é', max_size=3)
TEXTS = st.text(alphabet='a:"\\,{}[]é\n', max_size=5)


class Pairs(list[tuple[str, Any]]):
    """An object as it is written: its keys may come twice."""


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(KEYS, values), max_size=4).map(Pairs)
    return pairs | st.lists(values, max_size=3)


VALUES = st.recursive(TEXTS | st.integers() | st.booleans() | st.none(), objects, max_leaves=8)


def written(value: Any, colon: str, *, ascii_only: bool) -> str:
    if isinstance(value, Pairs):
        pairs = [
            f"{json.dumps(key, ensure_ascii=ascii_only)}{colon}{written(each, colon, ascii_only=ascii_only)}"
            for key, each in value
        ]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(written(each, colon, ascii_only=ascii_only) for each in value)}]"
    text = json.dumps(value, ensure_ascii=ascii_only)
    return text.replace(":", "\\u003a") if ascii_only else text


def repeats_a_key(value: Any) -> bool:
    if isinstance(value, Pairs):
        keys = [key for key, _ in value]
        return len(set(keys)) < len(keys) or any(repeats_a_key(each) for _, each in value)
    return isinstance(value, list) and any(map(repeats_a_key, value))


@given(VALUES, st.sampled_from([":", " : ", ":\n"]), st.booleans())
def test_a_key_that_comes_twice_in_an_object_is_refused_and_nothing_else(
    value: Any, colon: str, ascii_only: bool
) -> None:
    body = written(value, colon, ascii_only=ascii_only).encode()
    if repeats_a_key(value):
        with pytest.raises(ProblemError, match="twice in one object"):
            check_keys(body)
    else:
        check_keys(body)
