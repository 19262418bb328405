"""A key that comes twice is found however the body is written, and no other body is refused for it."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AliasChoices, AliasPath, BaseModel, Field, RootModel, field_validator
from pydantic_core import PydanticCustomError

from modalkit.batching import Failure
from modalkit.service.web.bodies import BodyParser, check_keys
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


class Optional(BaseModel):
    text: str = "none given"

    @field_validator("text")
    @classmethod
    def fails(cls, text: str) -> str:
        if text == "poison":
            raise KeyError(text)
        return text


class Address(BaseModel):
    mail: str

    @field_validator("mail")
    @classmethod
    def is_an_address(cls, mail: str) -> str:
        if "@" not in mail:
            raise PydanticCustomError("value_error", "is no address: {reason}", {"reason": "there is no @"})
        return mail


class Aliased(BaseModel):
    content: str = Field(validation_alias=AliasChoices("text", AliasPath("message", "text")))


class Dictionary(RootModel[dict[str, Any]]):
    pass


class Anything(RootModel[Any]):
    pass


class DictionaryOrNumber(RootModel[dict[str, Any] | int]):
    pass


class TextsOrNone(RootModel[list[str] | None]):
    pass


class Text(RootModel[str]):
    pass


async def three_ways(model: type[BaseModel], item: Any) -> list[Any]:
    """What an item is in a body of its own, in a list, in a long list and in a line."""
    parser, content = BodyParser(model), json.dumps(item).encode()
    (in_list,) = await parser.items(b"[%b]" % content)
    in_long_list = (await parser.items(b"[%b]" % b",".join([content] * 5000)))[-1]
    (in_line,) = await parser.item_lines([content])
    return [parser.item(content), in_list, in_long_list, in_line]


@pytest.mark.parametrize(
    ("model", "item", "expected"),
    [
        (Optional, {"message": {"text": "a"}}, Optional(text="a")),
        (Optional, {"text": '"message"'}, Optional(text='"message"')),
        (Aliased, {"message": {"text": "a"}}, Aliased.model_construct(content="a")),
        (Dictionary, {"message": {"a": 1}}, Dictionary({"message": {"a": 1}})),
        (Anything, {"message": {"a": 1}}, Anything({"message": {"a": 1}})),
        (DictionaryOrNumber, {"message": {"a": 1}}, DictionaryOrNumber({"message": {"a": 1}})),
        (TextsOrNone, {"message": ["a"]}, TextsOrNone(["a"])),
        (Text, {"message": "a"}, Text("a")),
        (Text, "a", Text("a")),
    ],
)
@pytest.mark.anyio
async def test_an_item_is_the_same_alone_in_a_list_and_in_a_line(
    model: type[BaseModel], item: Any, expected: BaseModel
) -> None:
    assert await three_ways(model, item) == [expected] * 4


@pytest.mark.anyio
@pytest.mark.parametrize("count", [2, 5000])
async def test_an_item_whose_validator_raises_anything_fails_alone(count: int) -> None:
    items = [{"text": "a"}] * (count - 1) + [{"text": "poison"}]
    *others, failed = await BodyParser(Optional).items(json.dumps(items).encode())
    assert others == [Optional(text="a")] * (count - 1)
    assert isinstance(failed, Failure)
    assert isinstance(failed.error, KeyError)


def test_a_value_that_pydantics_own_types_refuse_is_told_with_their_reason() -> None:
    """Some of them, as `EmailStr`, raise errors of the kind that a ValueError of a validator has."""
    with pytest.raises(ProblemError, match="mail: is no address: there is no @") as refused:
        BodyParser(Address).item(b'{"mail": "a"}')
    assert refused.value.errors == [{"field": "mail", "message": "is no address: there is no @", "value": "a"}]


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b"", b" "])
async def test_an_empty_body_is_no_list(body: bytes) -> None:
    with pytest.raises(ProblemError, match="JSON"):
        await BodyParser(Optional).items(body)


@pytest.mark.parametrize(("model", "may_name"), [(Text, True), (DictionaryOrNumber, False), (Anything, False)])
def test_a_line_names_its_model_unless_its_item_may_have_that_key(model: type[BaseModel], may_name: bool) -> None:
    assert BodyParser(model).may_name_model == may_name
