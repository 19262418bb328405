"""The model that is served: a class with three stages, each of which takes a whole batch."""

from typing import Any

from pydantic import BaseModel, Field

from modalkit import InferenceOutputModel, InferencePipeline


class Text(BaseModel):
    """A request. One that does not fit is refused with the field and the reason, before it costs any inference."""

    text: str = Field(min_length=1, examples=["one two three"])


class Count(InferenceOutputModel):
    """A result."""

    words: int


class WordCount(InferencePipeline):
    """Counts words. Put your model in its place."""

    input_model = Text
    output_model = Count

    def __init__(self, *args: Any, separator: str | None = None, **entry: Any) -> None:
        """Load the model. Further keys of its entry in modalkit.yaml, such as `separator`, are arguments."""
        super().__init__(*args, **entry)
        self.separator = separator

    def preprocess(self, input_list: list[Any]) -> dict[str, Any]:
        """Prepare a batch for the model: `input_list` holds one `Text` for each request."""
        return {"texts": [item.text for item in input_list]}

    def predict(self, input_list: list[Any], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        """Run the model. What a batch needs travels in the dictionaries, never on `self`."""
        return {"words": [text.split(self.separator) for text in preprocessed_data["texts"]]}

    def postprocess(self, input_list: list[Any], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        """Make one result for each request, in the same order."""
        return [Count(words=len(words)) for words in raw_output["words"]]

    def item_size(self, item: BaseModel) -> int:
        """How large a request is. Requests of similar size run together."""
        return len(item.text) if isinstance(item, Text) else 1

    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        """Requests of a size, by which `check`, `tune` and each start measure what a batch costs."""
        return [Text(text="x" * size)] * n
