"""What `modalkit.testing` gives to tests of a user's own."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest
from pydantic import BaseModel

from modalkit.batching import Failure, Success
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, InferencePipeline
from modalkit.service.jobs import JobStatus
from modalkit.service.loading import LoadError
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import Settings, SettingsError
from modalkit.testing import FakeClock, client_of, poisoned, worker_of
from tests.support.command_line import CONFIGURATION
from tests.support.length_model import Length, LengthPipeline, Text, UnloadablePipeline

pytestmark = pytest.mark.anyio


class AsOne(LengthPipeline):
    """Has no stages."""

    entries: ClassVar[list[dict[str, Any]]] = []

    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        self.entries.append(self.model_entry)
        return [Length(length=len(item.text)) for item in input_list if isinstance(item, Text)]


class Streaming(LengthPipeline):
    """Yields its results."""

    def predict_stream(self, input_list: list[BaseModel]) -> Iterator[list[InferenceOutputModel | None]]:
        yield [Length(length=len(item.text)) for item in input_list if isinstance(item, Text)]


class Asynchronous(InferencePipeline):
    """Runs in the event loop."""

    input_model = Text

    async def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        return [Length(length=len(item.text)) for item in input_list if isinstance(item, Text)]


class AsynchronousStages(InferencePipeline):
    """Has stages of which one runs in the event loop."""

    input_model = Text

    async def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        return {"outputs": [Length(length=len(item.text)) for item in input_list if isinstance(item, Text)]}

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        return preprocessed_data

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        found: list[InferenceOutputModel] = raw_output["outputs"]
        return found


class StreamingLater(Asynchronous):
    """Yields its results in the event loop."""

    async def predict_stream(self, input_list: list[BaseModel]) -> AsyncIterator[list[InferenceOutputModel]]:
        yield await self.run_inference(input_list)


async def test_a_worker_has_the_keys_of_its_entry_and_reads_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modalkit.yaml").write_text("nonsense: {}")
    monkeypatch.setenv("MODALKIT_NONSENSE", "1")
    async with worker_of(
        LengthPipeline, model_name="mine", common={"device": "cpu"}, scale=2, unit="characters"
    ) as worker:
        assert await worker.predict({"text": "four"}) == Length(length=4)
        assert worker.pipeline.model_name == worker.model_name == "mine"
        assert worker.pipeline.model_entry == {"scale": 2, "unit": "characters"}
        assert worker.pipeline.common_settings["device"] == "cpu"


async def test_what_a_configuration_may_not_have_and_a_pipeline_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(SettingsError, match="did you mean max_batch_size"):
        async with worker_of(LengthPipeline, app_settings={"batch_config": {"max_batch_sise": 1}}):
            pass
    with pytest.raises(LoadError, match="the weights are not there"):
        async with worker_of(UnloadablePipeline):
            pass


async def test_settings_of_the_service_have_their_effect() -> None:
    async with worker_of(LengthPipeline, app_settings={"batch_config": {"max_batch_size": 2}}) as worker:
        pipeline = worker.pipeline
        assert isinstance(pipeline, LengthPipeline)
        await worker.predict_many([Text(text="a")] * 10)
        assert max(map(len, pipeline.batches)) == 2


@pytest.mark.parametrize(
    "pipeline_class", [LengthPipeline, AsOne, Streaming, Asynchronous, AsynchronousStages, StreamingLater]
)
async def test_of_a_poisoned_pipeline_the_items_that_match_fail_alone(pipeline_class: type[InferencePipeline]) -> None:
    error = KeyError("no such user")
    poison = poisoned(pipeline_class, lambda item: item.text.startswith("bad"), error)
    async with worker_of(poison) as worker:
        outcomes = await worker.predict_many([Text(text=text) for text in ("a", "bad one", "bb", "bad two")])
    assert outcomes == [Success(Length(length=1)), Failure(error), Success(Length(length=2)), Failure(error)]


async def test_what_is_used_wrongly_says_how_it_is_used() -> None:
    pipeline: Any = LengthPipeline()
    unopened: Any = worker_of(LengthPipeline)
    with pytest.raises(
        AttributeError, match=r"no predict before the worker is open: async with worker_of\(\.\.\.\) as"
    ):
        await unopened.predict({"text": "a"})
    with pytest.raises(TypeError, match="worker_of takes a subclass of InferencePipeline, not <tests"):
        async with worker_of(pipeline):
            pass
    with pytest.raises(TypeError, match="poisoned takes a subclass of InferencePipeline, not <tests"):
        poisoned(pipeline, bool)
    with pytest.raises(TypeError, match="client_of takes the path of a configuration, a LocalGateway or an applicat"):
        async with client_of(pipeline):
            pass


async def test_jobs_take_the_time_from_the_clock() -> None:
    clock, queue = FakeClock(), InMemoryBackend()
    async with worker_of(LengthPipeline, queue_backend=queue, clock=clock) as worker:
        pipeline = worker.pipeline
        assert isinstance(pipeline, LengthPipeline)
        done = await worker.submit(AsyncInputModel(message={"text": "four"}, success_queue="ok"))
        assert done in await queue.receive("ok")
        job = await worker.job(done)
        assert job is not None
        assert job.created_at == clock.now
        pipeline.gate.clear()
        late = await worker.submit(AsyncInputModel(message={"text": "four"}, failure_queue="bad", expires_in=60))
        await anyio.wait_all_tasks_blocked()
        clock.advance(61)
        assert late in await queue.receive("bad")
        expired = await worker.job(late)
        pipeline.gate.set()
    assert expired is not None
    assert expired.status is JobStatus.EXPIRED


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_client_of_a_configuration_file_finds_its_models_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODALKIT_NONSENSE", "1")
    file, queue = tmp_path / "service.yaml", InMemoryBackend()
    keys = "app_settings:\n  auth_config: {api_key: s3cret, keys: {of-a-variable: {}}}"
    file.write_text(CONFIGURATION.replace("app_settings:", keys))
    async with client_of(file, queue_backend=queue) as client:
        assert (await client.post("/sync/predict", json={"text": "four"})).json()["length"] == 4
        job = {"message": {"text": "four"}, "success_queue": "ok"}
        job_id = (await client.post("/async/predict", json=job)).json()["job_id"]
        assert job_id in await queue.receive("ok")
    assert not (tmp_path / "jobs.db").exists()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_client_of_a_gateway_raises_why_a_model_cannot_be_loaded() -> None:
    unloadable = {"pipeline": "tests.support.length_model:UnloadablePipeline"}
    settings = Settings(
        app_settings={"async_config": {"store": "memory"}}, model_settings={"model_entries": {"a": unloadable}}
    )
    with pytest.raises(LoadError, match="the weights are not there"):
        async with client_of(LocalGateway(settings)):
            pass
