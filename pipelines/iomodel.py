"""What goes into a pipeline and what comes out: the models that users build on.

`SyncInputModel` and `AsyncInputModel` take any message. Parametrised, as in ``AsyncInputModel[SentimentRequest]``, they
validate it too, which is how the body of an HTTP request is checked.
"""

from typing import Annotated, Any, Generic

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, SerializeAsAny
from pydantic_core import PydanticCustomError
from typing_extensions import TypeVar

MessageT = TypeVar("MessageT", default=Any)

LONGEST_LIFE_S = 315_360_000
"""Ten years: no job waits longer."""


def _check_printable(name: str) -> str:
    if not name.isprintable():
        raise PydanticCustomError(
            "unprintable", "must not hold unprintable characters, such as line breaks: remove them"
        )
    return name


QueueName = Annotated[str, Field(min_length=1), AfterValidator(_check_printable)]
"""The name of a queue: printable characters, at least one, because not every queue and store can keep others."""


IdempotencyKey = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_check_printable)]
"""What tells the repetitions of one request: printable characters, at least one."""


class AnyInput(BaseModel):
    """An item of a pipeline that declares no `input_model`: any JSON object, its fields readable as attributes."""

    model_config = ConfigDict(extra="allow")


class SyncInputModel(BaseModel, Generic[MessageT]):
    """One item whose caller waits for the result."""

    model_config = ConfigDict(extra="forbid")

    message: SerializeAsAny[MessageT]


class AsyncInputModel(BaseModel, Generic[MessageT]):
    """One item whose result is kept, and sent to a queue where one is named."""

    model_config = ConfigDict(extra="forbid")

    message: SerializeAsAny[MessageT]
    success_queue: QueueName | None = Field(
        default=None, description="Where the result is sent; null sends it nowhere."
    )
    failure_queue: QueueName | None = Field(default=None, description="Where an error is sent; null sends it nowhere.")
    meta: dict[str, Any] = Field(default={}, description="Yours: returned with the result as it is.")
    idempotency_key: IdempotencyKey | None = Field(
        default=None, description="Of requests with the same key, only the first becomes a job; all get its id."
    )
    expires_in: PositiveFloat | None = Field(
        default=None, le=LONGEST_LIFE_S, description="Seconds from now: a job that has not ended by then expires."
    )


class AsyncOutputModel(BaseModel):
    """The answer to an accepted `AsyncInputModel`."""

    job_id: str


class InferenceOutputModel(BaseModel):
    """One item's result. Pipelines return subclasses of it, or add fields as they please."""

    model_config = ConfigDict(extra="allow")

    status: str = "success"
    error: str | None = None
    meta: dict[str, Any] = {}


class DelayedFailureOutputModel(InferenceOutputModel):
    """The result of an asynchronous item that failed, together with what was asked for."""

    original_message: AsyncInputModel
