"""Pipelines that wait for another server: they run in the event loop, several batches at once."""

import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from pydantic import BaseModel

from modalkit.batching import BatchTimeoutError, Failure, Success
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, InferencePipeline, RejectItem
from modalkit.service.errors import NotAwaitedError, RetryableError, describe_error
from modalkit.service.jobs import JobStatus, MemoryJobStore
from modalkit.service.settings import Settings
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.measuring import measure
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import POISON, Length, LengthPipeline, Text

pytestmark = pytest.mark.anyio


def texts_of(items: Sequence[BaseModel]) -> list[str]:
    return [item.text for item in items if isinstance(item, Text)]


class Server:
    """A remote server: it answers once `opened` is set. `running` calls wait, and `most` waited at once."""

    def __init__(self) -> None:
        self.opened = anyio.Event()
        self.running = self.most = self.cancelled = 0

    async def length(self, text: str) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.opened.wait()
            if text == POISON:
                raise ConnectionError("the server does not answer")
            return len(text)
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class Remote(InferencePipeline):
    """Has only `run_inference`, which asks a server for each item in turn."""

    max_in_flight = 3

    def __init__(self) -> None:
        super().__init__("remote", ".", {})
        self.server = Server()
        self.threads: set[str] = set()
        self.batches: list[list[str]] = []

    async def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        self.threads.add(threading.current_thread().name)
        self.batches.append(texts_of(input_list))
        return [Length(length=await self.server.length(text)) for text in texts_of(input_list)]


class RemoteStage(LengthPipeline):
    """Asks a server in `predict`; the other stages are functions."""

    max_in_flight = 3

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.threads: list[tuple[str, str]] = []

    def note(self, stage: str) -> None:
        self.threads.append((stage, threading.current_thread().name))

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        self.note("preprocess")
        return super().preprocess(input_list)

    async def predict(  # type: ignore[override]  # its base is a function for the tests of those
        self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]
    ) -> dict[str, Any]:
        self.note("predict")
        return {"lengths": [await self.server.length(text) for text in preprocessed_data["texts"]]}

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        self.note("postprocess")
        return [Length(length=length) for length in raw_output["lengths"]]


def settings_with(**batch_config: Any) -> Settings:
    return Settings(app_settings={"batch_config": batch_config})


@pytest.mark.parametrize("kind", [Remote, RemoteStage])
@pytest.mark.parametrize("configured", [None, 5])
async def test_as_many_batches_wait_for_the_server_at_once_as_the_pipeline_says_or_the_settings(
    kind: type[Remote | RemoteStage], configured: int | None
) -> None:
    pipeline = kind()
    if isinstance(pipeline, RemoteStage):
        pipeline.server.opened.set()  # for the warm-up
    settings = settings_with(max_batch_size=1, max_in_flight=configured)
    async with InferenceWorker(pipeline, settings=settings, job_store=MemoryJobStore()) as worker:
        pipeline.server = Server()
        expected = configured or 3
        async with anyio.create_task_group() as task_group:
            for _ in range(7):
                task_group.start_soon(worker.predict, {"text": "four"} if kind is RemoteStage else Text(text="four"))
            while pipeline.server.running < expected:
                await checkpoint()
            pipeline.server.opened.set()
        assert pipeline.server.most == expected


async def test_asynchronous_stages_run_in_the_event_loop_and_functions_in_threads() -> None:
    pipeline = RemoteStage()
    pipeline.server.opened.set()
    async with InferenceWorker(pipeline) as worker:
        pipeline.threads.clear()
        assert await worker.predict(Text(text="four")) == Length(length=4)
    here = threading.current_thread().name
    (first, before), (second, between), (third, after) = pipeline.threads
    assert (first, second, third) == ("preprocess", "predict", "postprocess")
    assert between == here
    assert before == after != here
    assert before.startswith("lengths ")


async def test_an_asynchronous_run_inference_starts_no_thread() -> None:
    pipeline = Remote()
    pipeline.server.opened.set()
    async with InferenceWorker(pipeline) as worker:
        before = threading.active_count()
        assert await worker.predict(Text(text="four")) == Length(length=4)
        assert threading.active_count() == before
    assert pipeline.threads == {threading.current_thread().name}


async def test_a_poisoned_item_of_an_asynchronous_pipeline_fails_alone() -> None:
    pipeline = Remote()
    pipeline.server.opened.set()
    async with InferenceWorker(pipeline) as worker:
        texts = ["one", POISON, "three"]
        one, poisoned, three = await worker.predict_many([Text(text=text) for text in texts])
    assert (one, three) == (Success(Length(length=3)), Success(Length(length=5)))
    assert isinstance(poisoned, Failure)
    assert isinstance(poisoned.error, ConnectionError)


async def test_a_call_that_hangs_is_cancelled_after_the_batch_timeout() -> None:
    pipeline = Remote()
    async with InferenceWorker(pipeline, settings=settings_with(batch_timeout_seconds=0.05)) as worker:
        for _ in range(4):
            with pytest.raises(BatchTimeoutError):
                await worker.predict(Text(text="four"))
        assert (pipeline.server.running, pipeline.server.cancelled) == (0, 4)
        assert not worker.is_broken, "nothing is stuck in a thread"
        pipeline.server.opened.set()
        assert await worker.predict(Text(text="four")) == Length(length=4)


async def test_its_sample_items_warm_it_up_once_and_measure_nothing() -> None:
    class WithSamples(Remote):
        def sample_items(self, n: int, size: int) -> list[BaseModel]:
            return [Text(text="sample")] * n

    pipeline = WithSamples()
    pipeline.server.opened.set()
    async with InferenceWorker(pipeline) as worker:
        assert pipeline.batches == [["sample"]]
        assert worker.costs.observed == 0
    staged = RemoteStage()
    staged.server.opened.set()
    async with InferenceWorker(staged):
        assert [stage for stage, _ in staged.threads] == ["preprocess", "predict", "postprocess"]


async def test_a_warm_up_may_be_asynchronous() -> None:
    class Connecting(Remote):
        async def warm_up(self) -> None:
            await self.server.length("connect")

    pipeline = Connecting()
    pipeline.server.opened.set()
    async with InferenceWorker(pipeline):
        assert pipeline.server.most == 1


def test_tuning_an_asynchronous_pipeline_says_what_to_set_instead() -> None:
    with pytest.raises(TuningError, match=r"Remote is asynchronous: .*; set batch_config\.max_batch_size"):
        measure(Remote(), settings_with().app_settings.batch_config, 1.0)


async def test_jobs_run_in_an_asynchronous_pipeline() -> None:
    pipeline = Remote()
    pipeline.server.opened.set()
    async with InferenceWorker(pipeline, input_model=Text) as worker:
        good, bad = [await worker.submit(AsyncInputModel(message={"text": text})) for text in ("four", POISON)]
        job = await worker.job(good, wait_s=60)
        assert job is not None
        assert (job.status, (job.result or {})["length"]) == (JobStatus.SUCCEEDED, 4)
        assert (await worker.job(bad)) is not None


async def call() -> int:
    return 1


class Forgetful(LengthPipeline):
    """Forgets an ``await`` in the stage and in the way that `forgets` says."""

    def __init__(self, forgets: str) -> None:
        super().__init__()
        self.forgets = forgets

    def warm_up(self) -> None:
        pass

    def preprocess(self, input_list: list[BaseModel]) -> Any:
        return call() if self.forgets == "preprocess" else super().preprocess(input_list)

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> Any:
        if self.forgets == "predict":
            return call()
        if self.forgets == "predict: value":
            return {"answer": call()}
        if self.forgets == "predict: list":
            return {"answers": [call() for _ in input_list]}
        return super().predict(input_list, preprocessed_data)

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> Any:
        if self.forgets == "postprocess":
            return call()
        outputs: list[Any] = super().postprocess(input_list, raw_output)
        return [call() if self.forgets == "item" and output.length == 3 else output for output in outputs]


@pytest.mark.parametrize("forgets", ["preprocess", "predict", "predict: value", "predict: list", "postprocess", "item"])
async def test_a_forgotten_await_is_an_error_that_says_so(forgets: str) -> None:
    source = "the pipeline" if forgets == "item" else forgets.partition(":")[0]
    async with InferenceWorker(Forgetful(forgets), calibrate=False) as worker:
        with pytest.raises(NotAwaitedError) as caught:
            await worker.predict(Text(text="abc"))
    assert str(caught.value) == (
        f"{source} returned a coroutine of call that was not awaited; write 'await' before the call that makes it, in "
        "an 'async def'"
    )


async def test_an_await_that_is_forgotten_for_one_item_fails_that_item_alone() -> None:
    async with InferenceWorker(Forgetful("item"), calibrate=False) as worker:
        good, bad = await worker.predict_many([Text(text="four"), Text(text="abc")])
    assert good == Success(Length(length=4))
    assert isinstance(bad, Failure)
    assert isinstance(bad.error, NotAwaitedError)


async def test_a_forgotten_await_in_an_asynchronous_method_is_an_error_that_says_so() -> None:
    class Forgetting(Remote):
        async def run_inference(self, input_list: list[BaseModel]) -> Any:
            return [self.server.length(text) for text in texts_of(input_list)]

    async with InferenceWorker(Forgetting()) as worker:
        with pytest.raises(NotAwaitedError, match="not awaited"):
            await worker.predict(Text(text="abc"))


class InTasks(LengthPipeline):
    """Asks for each item in a task of its own; some texts are the name of what is raised."""

    retryable_errors = ConnectionError
    raised = {"reject": RejectItem("not this one"), "down": ConnectionError("down"), "bad": ValueError("bad")}  # noqa: RUF012

    async def ask(self, text: str, outputs: dict[str, InferenceOutputModel]) -> None:
        await checkpoint()
        if text in self.raised:
            raise self.raised[text]
        outputs[text] = Length(length=len(text))

    async def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        outputs: dict[str, InferenceOutputModel] = {}
        async with anyio.create_task_group() as task_group:
            for text in texts_of(input_list):
                task_group.start_soon(self.ask, text, outputs)
        return [outputs[text] for text in texts_of(input_list)]


class InTasksByPieces(InTasks):
    async def predict_stream(self, input_list: list[BaseModel]) -> AsyncIterator[list[InferenceOutputModel]]:
        yield await self.run_inference(input_list)


@pytest.mark.parametrize("kind", [InTasks, InTasksByPieces])
async def test_the_error_of_one_task_of_a_group_counts_as_if_it_was_raised_alone(kind: type[InTasks]) -> None:
    async with InferenceWorker(kind(), calibrate=False) as worker:
        texts = ["reject", "good", "down", "bad"]
        outcomes = await worker.predict_many([Text(text=text) for text in texts])
    assert outcomes[1] == Success(Length(length=4))
    rejected, down, bad = (outcome.error for outcome in outcomes if isinstance(outcome, Failure))
    assert isinstance(rejected, RejectItem)
    assert isinstance(down, RetryableError)
    assert [describe_error(error) for error in (rejected, down, bad)] == [
        "not this one",
        "ConnectionError: down",
        "ValueError: bad",
    ]
