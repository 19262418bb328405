"""What a pipeline raises is logged once for each distinct error, with the user's frames alone."""

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from modalkit.batching import BatchRecord, BatchScheduler, BatchTimeoutError, Failure
from modalkit.pipelines import AsyncInputModel, RejectItem
from modalkit.service.failure_log import MAX_ERRORS_PER_PERIOD, PERIOD_S, FailureLog
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import POISON, REJECTED, LengthPipeline, Text

pytestmark = pytest.mark.anyio

Logged = list[str]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Logged]:
    """The messages of the log of failures, so far."""
    messages: Logged = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("modalkit.service.failure_log"), Collect()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


class TensorError(Exception):
    """An error that tests can refer to weakly."""


class Broken(LengthPipeline):
    """Fails every batch, each time with another error."""

    def warm_up(self) -> None:
        pass

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"texts": preprocessed_data["the cause"]}
        except LookupError as error:
            raise ValueError("nothing works") from error


async def records_of(*errors: Exception) -> list[BatchRecord]:
    """The record of a batch with these errors."""
    records: list[BatchRecord] = []

    async def run(items: list[Exception]) -> list[Exception]:
        return items

    scheduler: BatchScheduler[Exception, Exception] = BatchScheduler(run, on_batch=records.append)
    async with scheduler:
        await scheduler.submit_many(errors)
    return records


def assert_one_traceback_of_the_user(messages: Logged) -> None:
    (message,) = messages
    assert message.startswith("lengths: 1 item failed: Traceback (most recent call last):\n")
    assert message.endswith("\nValueError: this batch is poisoned")
    assert message.count("  File ") == 1
    assert 'tests/support/length_model.py", line ' in message


@pytest.mark.parametrize("as_jobs", [False, True])
async def test_a_poisoned_slot_or_job_is_logged_once_with_the_users_frames_alone(
    logged: Logged, *, as_jobs: bool
) -> None:
    texts = ["one", POISON, "three", POISON]
    async with InferenceWorker(LengthPipeline(), calibrate=False) as worker:
        if as_jobs:
            submitted = await worker.submit_many([AsyncInputModel(message={"text": text}) for text in texts])
            for outcome in submitted:
                assert not isinstance(outcome, Failure)
                await worker.job(outcome.value, wait_s=60)
        else:
            await worker.predict_many([{"text": text} for text in texts])
    assert_one_traceback_of_the_user(logged)


async def test_a_single_request_that_fails_is_logged_too(logged: Logged) -> None:
    async with InferenceWorker(LengthPipeline(), calibrate=False) as worker:
        with pytest.raises(ValueError, match="poisoned"):
            await worker.predict({"text": POISON})
    assert_one_traceback_of_the_user(logged)


async def test_a_systemic_failure_of_thousands_of_items_logs_a_bounded_number_of_lines(logged: Logged) -> None:
    async with InferenceWorker(Broken(), calibrate=False) as worker:
        outcomes = await worker.predict_many([Text(text="x" * (n % 9 + 1)) for n in range(3000)])
    assert all(isinstance(outcome, Failure) for outcome in outcomes)
    (message,) = logged
    assert message.count("\n") < 20
    assert "KeyError: 'the cause'" in message
    assert "batching" not in message


async def test_what_the_model_answers_as_an_error_is_not_logged(logged: Logged) -> None:
    async with InferenceWorker(LengthPipeline(), calibrate=False) as worker:
        await worker.predict_many([Text(text=REJECTED), Text(text="four")])
    assert logged == []


async def test_each_distinct_error_is_logged_up_to_a_limit_and_the_rest_counted_in_the_next_period(
    logged: Logged,
) -> None:
    now = 0.0
    log = FailureLog("m", lambda: now)
    errors = [ValueError(str(n)) for n in range(MAX_ERRORS_PER_PERIOD + 1)]
    for record in await records_of(*errors):
        log(record)
    assert logged == [f"m: 1 item failed: ValueError: {n}" for n in range(MAX_ERRORS_PER_PERIOD)]
    logged.clear()
    now = PERIOD_S - 1
    for record in await records_of(errors[0], errors[0], errors[0]):
        log(record)
    assert logged == []
    now = PERIOD_S
    for record in await records_of(errors[0]):
        log(record)
    assert logged == ["m: 4 items more failed since the errors logged before", "m: 1 item failed: ValueError: 0"]


async def test_an_error_of_modalkit_is_logged_with_its_message_alone(logged: Logged) -> None:
    for record in await records_of(BatchTimeoutError(1.0, 1), RejectItem("no")):
        FailureLog("m")(record)
    assert logged == ["m: 1 item failed: a batch of 1 did not finish within the batch timeout of 1 s"]


async def test_errors_are_not_kept_alive(logged: Logged) -> None:
    log, error = FailureLog("m"), TensorError("holds tensors")
    for record in await records_of(error):
        log(record)
    alive = weakref.ref(error)
    del error, record
    gc.collect()
    assert alive() is None
    assert len(logged) == 1


async def test_an_error_with_thousands_of_causes_is_logged_with_its_message_first(logged: Logged) -> None:
    error = ValueError("the first")
    for n in range(2000):
        retried = ValueError(f"retry {n}")
        retried.__cause__ = error
        error = retried
    for record in await records_of(error):
        FailureLog("m")(record)
    (message,) = logged
    assert message.startswith("m: 1 item failed: ValueError: retry 1999\nValueError: the first\n")
