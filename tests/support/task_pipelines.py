"""A pipeline that answers as those of the library's tasks do, without a model."""

from typing import ClassVar, cast

from pydantic import BaseModel, ConfigDict

from modalkit.pipelines import InferenceOutputModel, InferencePipeline

LIMIT = 1000
"""Characters of a text that are read."""


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str
    query: str = ""
    scores: bool = False


class Answer(InferenceOutputModel):
    label: str
    scores: dict[str, float] | None = None
    embedding: list[float]
    score: float
    truncated: bool = False


class AllTasksPipeline(InferencePipeline):
    """Classifies texts as loud, by their share of capital letters, or quiet.

    A text's embedding has its number of characters and of words, and its score is the number of words that it shares
    with the query.
    """

    input_model: ClassVar[type[BaseModel]] = Request
    output_model: ClassVar[type[InferenceOutputModel]] = Answer

    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        return [self._answer(cast("Request", item)) for item in input_list]

    def _answer(self, item: Request) -> Answer:
        read = item.text[:LIMIT]
        loud = sum(character.isupper() for character in read) / max(1, len(read))
        words = read.split()
        return Answer(
            label="loud" if loud > 0.5 else "quiet",
            scores={"loud": loud, "quiet": 1 - loud} if item.scores else None,
            embedding=[len(read), len(words)],
            score=len({*words} & {*item.query.split()}),
            truncated=len(item.text) > LIMIT,
        )
