"""The texts that requests have, and what responses say about them."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_TEXT_CHARACTERS = 100_000


def _check_text(text: str) -> str:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise PydanticCustomError(
            "text_too_long",
            "The text has {length} characters, at most {limit} are accepted: send its decisive part, or split it into "
            "several requests",
            {"length": len(text), "limit": MAX_TEXT_CHARACTERS},
        )
    if not text or text.isspace():
        raise PydanticCustomError("text_blank", "The text is blank: send at least one visible character")
    return text


Text = Annotated[
    str,
    AfterValidator(_check_text),
    Field(
        description="Not blank. Tokens beyond the model's limit are not read (`truncated`).",
        json_schema_extra={"minLength": 1, "maxLength": MAX_TEXT_CHARACTERS, "examples": ["What a lovely day!"]},
    ),
]
"""A text that is not blank, of up to `MAX_TEXT_CHARACTERS`."""

Truncated = Annotated[
    bool,
    Field(
        exclude_if=lambda truncated: not truncated,
        description="True if the text was longer than the model's limit, so that only its beginning was read.",
    ),
]
"""A field whose default is false, and which is left out then."""


class TextRequest(BaseModel):
    """One text."""

    model_config = ConfigDict(extra="forbid")

    text: Text
