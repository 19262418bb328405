"""What a pipeline returns, or raises, as JSON and as text."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ConfigDict, field_serializer, model_serializer

from modalkit.pipelines import InferenceOutputModel
from modalkit.service.errors import (
    MAX_ERROR_BYTES,
    OutputNotJsonError,
    PipelineOutputError,
    ServiceError,
    describe_error,
)
from modalkit.service.outputs import output_json, output_object, outputs_json
from tests.support.odd_model import MuteError


class Constants(InferenceOutputModel):
    model_config = ConfigDict(ser_json_inf_nan="constants")

    score: float


class Unserializable(InferenceOutputModel):
    score: float = 1.0

    @field_serializer("score")
    def fail(self, value: float) -> float:
        raise LookupError(value)


def test_numbers_that_json_does_not_have_are_null() -> None:
    odd = {"a": float("nan"), "deep": [float("inf"), {"b": float("-inf")}], "text": "NaN"}
    nulls = {"a": None, "deep": [None, {"b": None}], "text": "NaN"}
    success: dict[str, Any] = {"status": "success", "error": None, "meta": {}}
    assert output_object(InferenceOutputModel.model_validate(odd)) == success | nulls
    assert output_object(Constants(score=float("nan"), **odd)) == success | nulls | {"score": None}
    assert b"NaN," not in output_json(Constants(score=float("nan"), **odd))


@pytest.mark.parametrize("value", ["\ud800", b"\xff", object(), {"deep": [object()]}])
def test_what_is_no_json_is_an_error_with_a_remedy(value: Any) -> None:
    output = InferenceOutputModel.model_validate({"score": value})
    with pytest.raises(OutputNotJsonError, match=r"is no JSON \(score: .*texts, numbers, lists"):
        output_json(output)


def test_a_serializer_that_raises_for_the_whole_output_blames_no_field() -> None:
    class Raising(InferenceOutputModel):
        @model_serializer
        def write(self) -> None:
            raise ValueError("never")

    with pytest.raises(OutputNotJsonError, match=r"is no JSON \(PydanticSerializationError.*never"):
        output_json(Raising())


def test_each_of_many_outputs_is_written_as_it_is_alone() -> None:
    """Beside others that JSON cannot hold."""

    class Spaced(InferenceOutputModel):
        def model_dump_json(self, **_: Any) -> str:
            return '{"x": 1e+20}'

    odd: list[InferenceOutputModel] = [Constants(score=float("inf")), Constants(score=1.0), Spaced()]
    alone = [output_json(output) for output in odd]
    first, error, *last = outputs_json([odd[0], Unserializable(), *odd[1:]])
    assert [first, *last] == alone
    assert isinstance(error, OutputNotJsonError)
    assert "LookupError" in str(error)
    assert outputs_json([]) == []


class Own(InferenceOutputModel):
    """Writes itself as the text that it is made of."""

    text: str

    def model_dump_json(self, **_: Any) -> str:
        return self.text


def test_what_a_models_own_method_writes_is_one_object_on_one_line() -> None:
    """Else it would break the lines of streams, which hold it beside other fields."""
    assert output_json(Own(text=' {\n "x": "a\\nb",\r\n "y": NaN }\n')) == b'{"x":"a\\nb","y":null}'
    assert output_json(Own(text="{ }")) == b"{}"
    for text in ("[1, 2]", "1", '"{}"', "", "{} {}", '{"x": 1'):
        with pytest.raises(OutputNotJsonError):
            output_json(Own(text=text))


class Scores(InferenceOutputModel):
    best: float
    count: int
    all: list[float]
    kept: Any = None


def test_numbers_and_arrays_of_numpy_and_torch_are_json() -> None:
    """In fields with a type and without one, at any depth."""
    odd = {"best": np.float32(0.5), "count": np.int64(3), "all": np.array([0.5, np.nan], np.float32)}
    deep = {"kept": {"grid": np.eye(2, dtype=np.int8)}, "vector": torch.ones(2, dtype=torch.bfloat16), "one": np.True_}
    plain = {"best": 0.5, "count": 3, "all": [0.5, None], "kept": {"grid": [[1, 0], [0, 1]]}, "vector": [1.0, 1.0]}
    success: dict[str, Any] = {"status": "success", "error": None, "meta": {}, "one": True}
    assert output_object(Scores.model_validate(odd | deep)) == success | plain


def test_a_serializer_that_raises_is_told_with_its_error() -> None:
    with pytest.raises(OutputNotJsonError, match=r"LookupError"):
        output_object(Unserializable())


def test_every_error_has_a_text_that_can_be_stored() -> None:
    assert describe_error(MuteError()) == "MuteError: (its message cannot be shown: __str__ raises)"
    assert describe_error(ValueError("naïve \ud83d")) == "ValueError: naïve \\ud83d"
    assert describe_error(ServiceError("ours")) == "ours"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [nested(201), nested(250), 10**4300, [10**6000] * 3], ids=list("abcd"))
def test_what_readers_of_json_refuse_is_an_error(value: Any) -> None:
    with pytest.raises(OutputNotJsonError, match="is no JSON"):
        output_json(InferenceOutputModel.model_validate({"score": value}))


@pytest.mark.parametrize(
    "value", [nested(190), 10**4299, [nested(3)] * 500, [i / 7 for i in range(9999)], "9" * 9999], ids=list("abcde")
)
def test_what_readers_of_json_take_is_an_output(value: Any) -> None:
    assert output_object(InferenceOutputModel.model_validate({"score": value}))["score"] == value


def test_a_long_error_is_cut_and_says_so() -> None:
    for text in ("x" * 60_000_000, "é\ud83d" * 5000):
        described = describe_error(ServiceError(text))
        assert MAX_ERROR_BYTES - 100 < len(described.encode()) <= MAX_ERROR_BYTES
        assert described.endswith("more characters)")
    assert describe_error(ServiceError("x" * MAX_ERROR_BYTES)) == "x" * MAX_ERROR_BYTES


def hostile_error() -> Exception:
    class Meta(type):
        @property
        def __name__(cls) -> str:  # type: ignore[override]  # a class may
            raise SystemExit

    class HostileError(Exception, metaclass=Meta):
        @property  # type: ignore[misc]  # a class may
        def __class__(self) -> type:
            raise KeyboardInterrupt

        def __str__(self) -> str:
            raise SystemExit

        def __repr__(self) -> str:
            raise GeneratorExit

    return HostileError()


def test_whatever_an_error_does_it_is_described() -> None:
    assert describe_error(hostile_error()) == "HostileError: (its message cannot be shown: __str__ raises)"
    assert describe_error(SystemExit(3)) == "SystemExit: 3"
    assert "a HostileError whose __repr__ raises" in str(PipelineOutputError(hostile_error(), InferenceOutputModel))
