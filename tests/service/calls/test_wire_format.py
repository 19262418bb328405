"""What travels between containers and their callers."""

import json
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
from pydantic import ValidationError

from modalkit.batching import Failure, Priority, Success
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, RejectItem, SyncInputModel
from modalkit.service.calls.wire_format import (
    job_object,
    make_job_id,
    outcome_object,
    parse_job_id,
    read_entry,
    read_job,
    read_outcome,
)
from modalkit.service.errors import RemoteItemError
from modalkit.service.jobs import DeliveryStatus, Job, JobStatus
from modalkit.service.web.problems import as_problem
from tests.support.length_model import Length

JOB = Job(
    job_id="fc-01JABC.3",
    model_name="lengths",
    message_json='{"text":"four"}',
    success_queue="ok",
    failure_queue=None,
    meta_json='{"n":1}',
    priority=Priority.INTERACTIVE,
    created_at=1000.5,
    expires_at=2000.0,
    idempotency_key="k",
    status=JobStatus.SUCCEEDED,
    delivery=DeliveryStatus.UNDELIVERED,
    result_json='{"status":"success","length":4}',
    started_at=1001.0,
    finished_at=1002.0,
    delivery_attempts=3,
    delivery_error="QueueBackendError: no",
)


class Score(InferenceOutputModel):
    """Has fields of the base class, with other types."""

    meta: Any = None
    error: Any = 7


def test_a_job_id_is_read_as_it_was_made() -> None:
    for call_id, index in (("fc-01JABC", 0), ("call-000001", 31), ("019a5f5e-7c3d_Z", 999_999)):
        assert parse_job_id(make_job_id(call_id, index)) == (call_id, index)


@pytest.mark.parametrize(
    "foreign",
    [
        *("", "fc-01J", "fc-01J.", ".1", "fc-01J.x", "fc-01J.-1", "fc-01J.1.2", "fc-01J.1 ", "fc-01J.1\n"),
        *("fc-01J.01", "fc-01J.1000000", "fc-01J.\u0663", "fc-01/J.1", "fc-0\u00c4.1"),
        "019a5f5e-7c3d-7000-8000-000000000000",
    ],
)
def test_an_id_that_is_none_of_ours_names_nothing(foreign: str) -> None:
    assert parse_job_id(foreign) is None


def test_a_job_is_read_as_it_was_written() -> None:
    queued = replace(JOB, status=JobStatus.QUEUED, result_json=None, finished_at=None, delivery=DeliveryStatus.NONE)
    for job in (JOB, queued):
        read = read_job(job_object(job))
        assert read == job
        for name in ("status", "delivery", "priority"):
            assert type(getattr(read, name)) is type(getattr(job, name))


def test_a_job_is_written_with_what_its_caller_gave_and_gets_in_plain_values() -> None:
    written = job_object(JOB)
    assert written["message"] == {"text": "four"}
    assert written["meta"] == {"n": 1}
    assert written["result"] == {"status": "success", "length": 4}
    assert (written["status"], written["delivery"], written["priority"]) == ("succeeded", "undelivered", "interactive")
    assert len(written) == len(fields(Job))


def test_results_and_errors_are_read_as_they_were_written() -> None:
    output = read_outcome(outcome_object(Success(Length(length=4, meta={"n": 1}))))
    assert isinstance(output, InferenceOutputModel)
    assert output.model_dump() == {"status": "success", "error": None, "meta": {"n": 1}, "length": 4}
    for error, text in ((RejectItem("no"), "no"), (ValueError("no"), "ValueError: no")):
        read = read_outcome(outcome_object(Failure(error)))
        assert isinstance(read, RemoteItemError)
        assert (str(read), read.error_type) == (text, type(error).__name__)


def test_a_refusal_of_a_users_own_class_stays_one() -> None:
    class TooDarkError(RejectItem):
        """Raised by a user's pipeline."""

    read = read_outcome(outcome_object(Failure(TooDarkError("no light"))))
    assert isinstance(read, RemoteItemError)
    assert (str(read), as_problem(read).status) == ("no light", 422)


def test_an_output_that_is_no_json_is_its_items_error() -> None:
    read = read_outcome(outcome_object(Success(InferenceOutputModel.model_validate({"score": object()}))))
    assert isinstance(read, RemoteItemError)
    assert read.error_type == "OutputNotJsonError"


def test_an_output_may_have_fields_that_its_caller_knows_otherwise() -> None:
    read = read_outcome(outcome_object(Success(Score(meta=["a"], error={"why": 1}))))
    assert isinstance(read, InferenceOutputModel)
    assert json.loads(read.model_dump_json()) == {"status": "success", "error": {"why": 1}, "meta": ["a"]}


def test_an_output_that_has_an_error_type_is_no_error() -> None:
    output = InferenceOutputModel.model_validate({"error_type": "I"})
    assert isinstance(read_outcome(outcome_object(Success(output))), InferenceOutputModel)


def test_what_travels_is_read_without_our_code() -> None:
    """By a caller that has looked the class up, and has Python alone."""
    values = [job_object(JOB), outcome_object(Success(Length(length=4))), outcome_object(Failure(ValueError("no")))]
    assert json.loads(json.dumps(values)) == values
    program = "import pickle, sys; sys.stdout.write(repr(pickle.loads(sys.stdin.buffer.read())))"
    command = [sys.executable, "-I", "-S", "-c", program]
    read = subprocess.run(
        command, input=pickle.dumps(values), capture_output=True, check=True
    )  # what this test is about
    assert read.stdout.decode() == repr(values)


def test_an_entry_with_a_message_alone_is_waited_for_and_any_other_is_a_job() -> None:
    assert read_entry({"message": {"text": "a"}}) == SyncInputModel(message={"text": "a"})
    assert read_entry({"message": 1, "meta": {}}) == AsyncInputModel(message=1)
    job = AsyncInputModel(message={"text": "a"}, success_queue="ok")
    assert read_entry(job) is job
    assert read_entry(job.model_dump()) == job


@pytest.mark.parametrize("entry", [None, "text", 7, ["message"], Length(length=1)])
def test_what_is_no_entry_is_told_what_one_is(entry: object) -> None:
    with pytest.raises(TypeError, match=r"an entry must be .*, a SyncInputModel or an AsyncInputModel"):
        read_entry(entry)


def test_an_entry_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="queue"):
        read_entry({"message": {}, "queue": "ok"})
