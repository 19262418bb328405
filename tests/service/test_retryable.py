"""Errors that a pipeline declares transient: jobs run again later, and other callers are told to."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from modalkit.batching import Failure, Success
from modalkit.pipelines import BatchTooLargeError, InferenceOutputModel
from modalkit.service.errors import RetryableError
from modalkit.service.jobs import JobStatus
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import Length, LengthPipeline, Text

pytestmark = pytest.mark.anyio


class Weather(LengthPipeline):
    """Fails as often as `failures` says for a text that begins with its error."""

    retryable_errors = (ConnectionError, MemoryError)
    failures = 1_000_000

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        for text in preprocessed_data["texts"]:
            if text.startswith(("down", "broken", "large")) and self.failures:
                self.failures -= 1
                kinds = {"down": ConnectionResetError, "broken": ValueError, "large": BatchTooLargeError}
                raise kinds[text.split()[0]](text)
        return super().predict(input_list, preprocessed_data)

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        outputs: list[Any] = super().postprocess(input_list, raw_output)
        for place, text in enumerate(raw_output["texts"]):
            if text == "cut":
                outputs[place] = ConnectionError("cut")
        return outputs


@pytest.fixture
def pipeline() -> Weather:
    return Weather()


@pytest.fixture
async def worker(pipeline: Weather) -> AsyncIterator[InferenceWorker]:
    async with InferenceWorker(pipeline, calibrate=False) as opened:
        yield opened


async def test_a_transient_error_is_told_as_such_and_any_other_as_it_is(worker: InferenceWorker) -> None:
    with pytest.raises(RetryableError, match="ConnectionResetError: down") as caught:
        await worker.predict(Text(text="down"))
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    with pytest.raises(ValueError, match="broken"):
        await worker.predict(Text(text="broken"))
    with pytest.raises(BatchTooLargeError):
        await worker.predict(Text(text="large"))
    cut, good = await worker.predict_many([Text(text="cut"), Text(text="four")])
    assert isinstance(cut, Failure)
    assert isinstance(cut.error, RetryableError)
    assert good == Success(Length(length=4))


async def test_a_job_that_fails_by_a_transient_error_runs_again_though_others_of_its_batch_succeed() -> None:
    pipeline = Weather()
    pipeline.failures = 2  # of the batch, and of the job alone
    async with InferenceWorker(pipeline, calibrate=False) as worker:
        worker._runner._backoff_s = lambda _: 0.0  # noqa: SLF001  # no test waits for a clock
        accepted = await worker.submit_many([{"message": {"text": text}} for text in ("down", "four")])
        job_ids = [outcome.value for outcome in accepted if isinstance(outcome, Success)]
        down, four = [await worker.job(job_id, wait_s=60) for job_id in job_ids]
    assert down is not None
    assert four is not None
    assert (down.status, down.attempts) == (JobStatus.SUCCEEDED, 2)
    assert (four.status, four.attempts) == (JobStatus.SUCCEEDED, 1)


async def test_the_retries_of_a_job_are_bounded() -> None:
    settings = Settings(app_settings={"async_config": {"max_attempts": 3, "store": "memory"}})
    async with InferenceWorker(Weather(), settings=settings, calibrate=False) as worker:
        worker._runner._backoff_s = lambda _: 0.0  # noqa: SLF001  # as above
        job = await worker.job(await worker.submit({"message": {"text": "down"}}), wait_s=60)
    assert job is not None
    assert (job.status, job.attempts, job.error) == (JobStatus.FAILED, 3, "ConnectionResetError: down")


class Streaming(LengthPipeline):
    retryable_errors: ClassVar[type[Exception]] = ConnectionError

    def warm_up(self) -> None: ...

    def predict_stream(self, input_list: list[BaseModel]) -> Any:
        yield [Length(length=0) for _ in input_list]
        raise ConnectionError("lost")


async def test_a_stream_that_breaks_by_a_transient_error_says_so() -> None:
    async with (
        InferenceWorker(Streaming(), calibrate=False) as worker,
        aclosing(worker.predict_stream(Text(text="four"))) as pieces,
    ):
        assert await anext(pieces) == Length(length=0)
        with pytest.raises(RetryableError, match="lost"):
            await anext(pieces)
