"""A model that needs no weights: it counts words."""

from pydantic import BaseModel

from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel


class Text(BaseModel):
    text: str


class WordCount(InferencePipeline):
    input_model = Text

    def preprocess(self, input_list):
        return {"texts": [item.text for item in input_list]}

    def predict(self, input_list, preprocessed_data):
        return {"counts": [len(text.split()) for text in preprocessed_data["texts"]]}

    def postprocess(self, input_list, raw_output):
        return [
            InferenceOutputModel(words=count)
            if count
            else InferenceOutputModel(status="error", error="there are no words in this text")
            for count in raw_output["counts"]
        ]
