"""A model that needs no weights: how much a text shouts."""

from typing import Any

from pydantic import BaseModel

from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel


class Text(BaseModel):
    text: str


class Emphasis(InferenceOutputModel):
    shouting: float


class EmphasisPipeline(InferencePipeline):
    input_model = Text
    output_model = Emphasis

    def preprocess(self, input_list: list[Any]) -> dict[str, Any]:
        return {"texts": [item.text for item in input_list]}

    def predict(self, input_list: list[Any], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        loud = [sum(map(str.isupper, text)) / len(text) for text in preprocessed_data["texts"]]  # an empty text fails
        return {"loud": loud}

    def postprocess(self, input_list: list[Any], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        return [Emphasis(shouting=share) for share in raw_output["loud"]]
