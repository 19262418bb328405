"""A model that needs no weights: it counts words."""

from typing import Any

from pydantic import BaseModel

from modalkit import InferenceOutputModel, InferencePipeline


class Text(BaseModel):
    text: str


class Count(InferenceOutputModel):
    words: int


class WordCount(InferencePipeline):
    input_model = Text
    output_model = Count

    def preprocess(self, input_list: list[Any]) -> dict[str, Any]:
        return {"texts": [item.text for item in input_list]}

    def predict(self, input_list: list[Any], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        return {"counts": [len(text.split()) for text in preprocessed_data["texts"]]}

    def postprocess(self, input_list: list[Any], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        return [Count(words=count) for count in raw_output["counts"]]
