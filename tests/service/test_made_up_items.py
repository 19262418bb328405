"""Items made from the schema of an input model."""

from datetime import datetime
from enum import Enum
from typing import Annotated, Literal, Union
from uuid import UUID

import pytest
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, HttpUrl, RootModel, field_validator

from modalkit.pipelines import AnyInput
from modalkit.pipelines.sentiment import SentimentRequest
from modalkit.service.made_up_items import TEXT, NoItemsError, make_up_items


class Color(Enum):
    RED = "red"


class Point(BaseModel):
    x: Annotated[float, Field(gt=0, lt=1)]
    y: Annotated[float, Field(ge=7)]


class Node(BaseModel):
    """Refers to itself."""

    name: Annotated[str, Field(min_length=30, max_length=40)]
    children: list["Node"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Everything(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, Field(max_length=5)]
    count: Annotated[int, Field(gt=9, multiple_of=4)]
    few: Annotated[int, Field(lt=-3)]
    flag: bool
    color: Color
    points: Annotated[list[Point], Field(min_length=2)]
    pair: tuple[int, str]
    either: Point | None
    animal: Annotated[Union[Dog, "Node"], Field()]
    tree: Node
    when: datetime
    uid: UUID
    url: HttpUrl
    content: bytes
    image: Base64Bytes
    scores: dict[str, float]
    anything: object
    nothing: None
    optional: int = 3


def test_every_type_gets_a_small_valid_value() -> None:
    made = make_up_items(Everything, 4)
    assert len(made.items) == 4
    assert made.are_guessed
    item = made.items[0]
    assert isinstance(item, Everything)
    assert (len(item.text), item.count, item.optional, len(item.points)) == (5, 12, 3, 2)


class Documented(BaseModel):
    text: Annotated[str, Field(examples=["one", "two"])]
    extra: Annotated[int | None, Field(examples=[5])] = None
    rest: int = 2


def test_examples_go_before_defaults_and_guesses() -> None:
    made = make_up_items(Documented, 2)
    assert not made.are_guessed
    assert made.items == [Documented(text="one", extra=5)] * 2
    assert not make_up_items(SentimentRequest, 1).are_guessed


class Whole(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"a": 1}, {"a": 2}]})

    a: int


def test_examples_of_the_whole_item_are_repeated() -> None:
    assert make_up_items(Whole, 3).items == [Whole(a=1), Whole(a=2), Whole(a=1)]


class Picky(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def _check(cls, text: str) -> str:
        raise ValueError("no text is good enough")


class Coded(BaseModel):
    code: Annotated[str, Field(pattern=r"^\d{4}-X$")]


class Endless(BaseModel):
    other: "Endless"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Picky,
            'Picky refuses the item made from its schema, {"text":"What a lovely day!"}: text: no text is good enough',
        ),
        (Coded, "Coded refuses the item made from its schema"),
        (Endless, "nested without end"),
    ],
)
def test_where_no_item_can_be_made_the_reason_is_said(model: type[BaseModel], message: str) -> None:
    with pytest.raises(NoItemsError) as caught:
        make_up_items(model, 1)
    assert message in str(caught.value)


class Empty(BaseModel):
    pass


class Pixels(RootModel[list[int]]):
    pass


def test_where_no_fields_are_declared_any_item_is_tried_with_a_text() -> None:
    made = make_up_items(AnyInput, 1)
    assert (made.items, made.are_guessed, made.has_fields) == ([AnyInput.model_validate({"text": TEXT})], True, False)


def test_a_model_that_takes_no_fields_or_no_object_gets_what_it_takes() -> None:
    assert (make_up_items(Empty, 1).items, make_up_items(Empty, 1).are_guessed) == ([Empty()], False)
    assert make_up_items(Pixels, 1).items == [Pixels([1])]


class ExamplesByName(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": {"one": {"value": {"text": "a"}}}})

    text: str = Field(json_schema_extra={"examples": {"one": "b"}})


def test_examples_by_name_are_none() -> None:
    assert make_up_items(ExamplesByName, 1).are_guessed
