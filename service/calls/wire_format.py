"""The wire format of calls: plain values, which a caller reads without our classes.

In: a list of ``{"message": …}``, or of `SyncInputModel` and `AsyncInputModel`. An entry that has more than a message is
a job. Out, for each entry, in the same order: the output as an object (``{"status": "success", …}``), or
``{"status": "error", "error": …, "error_type": …}``; for a job the job itself, as ``GET /jobs/{job_id}`` shows it.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter

from modalkit.batching import Failure, Outcome, Success
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, RejectItem, SyncInputModel
from modalkit.service.errors import RemoteItemError, describe_error
from modalkit.service.jobs.model import Job, json_text, read_object
from modalkit.service.outputs import output_object, plain_value

InputEntry = Mapping[str, Any] | SyncInputModel | AsyncInputModel

_JOB_ID = re.compile(r"([0-9A-Za-z_-]{1,100})\.(0|[1-9][0-9]{0,5})")
_TEXTS = {"message": "message_json", "meta": "meta_json", "result": "result_json"}
_JOB = TypeAdapter(Job)


def make_job_id(call_id: str, index: int) -> str:
    """The id of the job at an index of a call's list."""
    return f"{call_id}.{index}"


def parse_job_id(job_id: str) -> tuple[str, int] | None:
    """The call and the index that a job's id names, or None where it is no such id."""
    match = _JOB_ID.fullmatch(job_id)
    return None if match is None else (match[1], int(match[2]))


def json_form(model: BaseModel) -> Any:
    """A model in the form that travels: JSON values, under the names that its caller uses."""
    return model.model_dump(mode="json", by_alias=True, round_trip=True, fallback=plain_value)


def read_entry(entry: object) -> SyncInputModel | AsyncInputModel:
    """An entry of a list as a model. Raises ``ValidationError``, and `TypeError` for what is no entry."""
    if isinstance(entry, SyncInputModel | AsyncInputModel):
        return entry
    if not isinstance(entry, Mapping):
        raise TypeError(
            f'an entry must be {{"message": ...}}, a SyncInputModel or an AsyncInputModel, got {entry!r:.100}'
        )
    kind: type[SyncInputModel | AsyncInputModel] = SyncInputModel if set(entry) == {"message"} else AsyncInputModel
    return kind.model_validate(dict(entry))


def outcome_object(outcome: Outcome[InferenceOutputModel]) -> dict[str, Any]:
    """What a caller gets for an item that it waits for."""
    if isinstance(outcome, Success):
        try:
            return output_object(outcome.value)
        except Exception as error:  # noqa: BLE001  # an output that is no JSON is the item's error
            outcome = Failure(error)
    # An error of a user's own class tells only by its base that the item was refused, which is the caller's fault.
    kind = RejectItem if isinstance(outcome.error, RejectItem) else type(outcome.error)
    return {"status": "error", "error": describe_error(outcome.error), "error_type": kind.__name__}


def read_outcome(value: Mapping[str, Any]) -> InferenceOutputModel | RemoteItemError:
    """The output, or the error, that `outcome_object` wrote."""
    if value.get("status") == "error" and "error_type" in value:
        return RemoteItemError(value["error"], value["error_type"])
    return _AnyOutput.model_validate(value)


def job_object(job: Job) -> dict[str, Any]:
    """A job as plain values, times in wall-clock Unix seconds."""
    values: dict[str, Any] = _JOB.dump_python(job, mode="json")
    for name, text_name in _TEXTS.items():
        text = values.pop(text_name)
        values[name] = None if text is None else read_object(text)
    return values


def read_job(value: Mapping[str, Any]) -> Job:
    """The job that `job_object` wrote. Raises `LookupError`, `TypeError` or `ValueError` for what is no job."""
    values = dict(value)
    for name, text_name in _TEXTS.items():
        content = values.pop(name)
        values[text_name] = None if content is None else json_text(content)
    return _JOB.validate_python(values)


class _AnyOutput(InferenceOutputModel):
    """An output of any class. Its fields were checked where it was made, so they may hold any value."""

    status: Any
    error: Any = None
    meta: Any = Field(default={})
