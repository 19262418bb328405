"""What a pipeline returns, or raises, as JSON and as text."""

from typing import Any

import numpy as np
import pytest
from pydantic import ConfigDict, field_serializer

from pipelines import InferenceOutputModel
from service.errors import OutputNotJsonError, ServiceError, describe_error
from service.outputs import output_json, output_object
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


@pytest.mark.parametrize("value", [np.float32(1), "\ud800", b"\xff", object()])
def test_what_is_no_json_is_an_error_with_a_remedy(value: Any) -> None:
    output = InferenceOutputModel.model_validate({"score": value})
    with pytest.raises(OutputNotJsonError, match=r"is no JSON \(.*float\(score\)"):
        output_json(output)


def test_a_serializer_that_raises_is_told_with_its_error() -> None:
    with pytest.raises(OutputNotJsonError, match=r"LookupError"):
        output_object(Unserializable())


def test_every_error_has_a_text_that_can_be_stored() -> None:
    assert describe_error(MuteError()) == "MuteError: (its message cannot be shown: __str__ raises)"
    assert describe_error(ValueError("naïve \ud83d")) == "ValueError: naïve \\ud83d"
    assert describe_error(ServiceError("ours")) == "ours"
