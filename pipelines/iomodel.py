"""The input and output models that users build on.

`SyncInputModel` and `AsyncInputModel` take any message. With a parameter, as in ``AsyncInputModel[SentimentRequest]``,
they also validate it; the body of an HTTP request is validated like this.
"""

from typing import Annotated, Any, Generic

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, PositiveFloat, SerializeAsAny
from pydantic_core import PydanticCustomError
from typing_extensions import TypeVar

from modalkit.pipelines.errors import MissingFieldError

MessageT = TypeVar("MessageT", default=Any)

_DEFAULT_IS_EMPTY: dict[str, JsonValue] = {"default": {}}
"""The `json_schema_extra` of a field with `default_factory=dict`, which shows its default in the schema.

A default of {} itself would be copied for each object, which takes longer than all the rest.
"""
MAX_EXPIRES_IN_S = 315_360_000
"""Ten years: the most that `AsyncInputModel.expires_in` accepts."""


def _check_printable(name: str) -> str:
    if not name.isprintable():
        raise PydanticCustomError(
            "unprintable", "must not hold unprintable characters, such as line breaks: remove them"
        )
    return name


QueueName = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_check_printable)]
"""The name of a queue, or its URL: printable characters, because not all queues and stores accept others."""

IdempotencyKey = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_check_printable)]
"""A key that all repetitions of one request share: one or more printable characters."""


class AnyInput(BaseModel):
    """An item of a pipeline without its own `input_model`: any JSON object, with its fields as attributes.

    Reading a field that it does not have raises a `RejectItem` that names it, unless the pipeline uses ``getattr`` with
    a default, or ``hasattr``.
    """

    # A field with the name of a method of pydantic that begins with `model_` is in `model_extra` alone.
    model_config = ConfigDict(extra="allow")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]  # pydantic hides it from type checkers
        except AttributeError:
            if name.startswith("_"):
                raise
            raise MissingFieldError(f"{name}: is missing: add it") from None


class _NoMethod:
    """In place of a method that pydantic keeps for its first version: an item may have a field of that name."""

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError  # so `__getattr__` is asked


for _name in dir(BaseModel):
    if not _name.startswith(("_", "model_")):
        setattr(AnyInput, _name, _NoMethod())


class SyncInputModel(BaseModel, Generic[MessageT]):
    """One item whose caller waits for the result."""

    model_config = ConfigDict(extra="forbid")

    message: SerializeAsAny[MessageT]


class AsyncInputModel(BaseModel, Generic[MessageT]):
    """One item whose result is stored, and sent to a queue if one is named."""

    model_config = ConfigDict(extra="forbid")

    message: SerializeAsAny[MessageT]
    success_queue: QueueName | None = Field(
        default=None, description="Where the result is sent; null sends it nowhere."
    )
    failure_queue: QueueName | None = Field(default=None, description="Where an error is sent; null sends it nowhere.")
    meta: dict[str, Any] = Field(
        default_factory=dict,
        description="Your own data: returned with the result, unchanged.",
        json_schema_extra=_DEFAULT_IS_EMPTY,
    )
    idempotency_key: IdempotencyKey | None = Field(
        default=None, description="Of requests with the same key, only the first becomes a job; all get its job id."
    )
    expires_in: Annotated[PositiveFloat, Field(strict=True, le=MAX_EXPIRES_IN_S)] | None = Field(
        default=None, description="Seconds from now: a job that has not ended by then expires."
    )


class AsyncOutputModel(BaseModel):
    """The answer to an accepted `AsyncInputModel`."""

    job_id: str


class InferenceOutputModel(BaseModel):
    """The result of one item. Pipelines return subclasses of it, or add any fields."""

    model_config = ConfigDict(extra="allow")

    status: str = "success"
    error: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict, json_schema_extra=_DEFAULT_IS_EMPTY)


class DelayedFailureOutputModel(InferenceOutputModel):
    """The result of an asynchronous item that failed, together with its request."""

    original_message: AsyncInputModel
