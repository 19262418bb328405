"""The outputs of pipelines as JSON, which not everything that a pipeline returns can be."""

from typing import Any, cast

from pydantic_core import from_json, to_json

from pipelines import InferenceOutputModel
from service.errors import OutputNotJsonError


def output_json(output: InferenceOutputModel) -> bytes:
    """An output as JSON; numbers that JSON does not have (NaN, Infinity) are null. Raises `OutputNotJsonError`."""
    try:
        content = output.model_dump_json().encode()
    except Exception as error:
        # A model's own serializers may raise anything.
        raise OutputNotJsonError(error) from error
    if b"NaN" in content or b"Infinity" in content:  # a model may be configured to write them
        content = to_json(from_json(content), inf_nan_mode="null")
    return content


def output_object(output: InferenceOutputModel) -> dict[str, Any]:
    """An output as the JSON object that `output_json` writes, in Python's types. Raises `OutputNotJsonError`."""
    return cast("dict[str, Any]", from_json(output_json(output)))
