"""A model whose outputs and errors are those that are hard to pass on."""

from typing import Any

from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel
from tests.support.length_model import Length, LengthPipeline

OBJECT = "object"
NAN = "nan"
SURROGATE = "surrogate"
MUTE = "mute"
BARE = "bare"


class MuteError(Exception):
    """An error that does not even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("not even this")


class Bare(Length):
    """An output without what was not given."""

    length: int = 0

    def model_dump_json(self, **options: Any) -> str:
        return super().model_dump_json(**options | {"exclude_unset": True})


class OddPipeline(LengthPipeline):
    """Answers these texts with what JSON cannot hold, an error without a text or an empty object, others as usual."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if MUTE in preprocessed_data["texts"]:
            raise MuteError
        return super().predict(input_list, preprocessed_data)

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        odd = {OBJECT: object(), NAN: float("nan"), SURROGATE: "half of a pair: \ud83d"}
        return [
            Length.model_construct(score=odd[text])  # type: ignore[call-arg]  # without its length, on purpose
            if text in odd
            else Bare()
            if text == BARE
            else Length(length=len(text))
            for text in raw_output["texts"]
        ]
