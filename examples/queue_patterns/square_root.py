"""A model that needs no weights: it takes square roots, and fails at negative numbers."""

import math
from typing import Any

from pydantic import BaseModel

from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel


class Number(BaseModel):
    number: float


class SquareRoot(InferencePipeline):
    input_model = Number

    def preprocess(self, input_list: list[Any]) -> dict[str, Any]:
        return {"numbers": [item.number for item in input_list]}

    def predict(self, input_list: list[Any], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        return {"roots": [math.sqrt(number) for number in preprocessed_data["numbers"]]}

    def postprocess(self, input_list: list[Any], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        return [InferenceOutputModel(root=root) for root in raw_output["roots"]]
