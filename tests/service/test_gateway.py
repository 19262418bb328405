"""The models of a configuration in this process: loading them, and leaving while they load."""

import threading
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from modalkit.batching import QueueFullError
from modalkit.pipelines import AsyncInputModel
from modalkit.service.errors import NotReadyError, Readiness, UnknownModelError
from modalkit.service.jobs import Job, JobStatus, SqliteJobStore
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import Settings
from tests.support.length_model import LengthPipeline, Text
from tests.support.panic import Panic

pytestmark = pytest.mark.anyio


class Loading(LengthPipeline):
    """Takes as long to load as the test wants."""

    begun = threading.Semaphore(0)
    may_end = threading.Event()

    def __init__(self, *args: Any, **model_entry: Any) -> None:
        self.begun.release()
        self.may_end.wait(timeout=60)
        super().__init__(*args, **model_entry)


def settings_of(folder: Path, **pipelines: str) -> Settings:
    return Settings(
        app_settings={"async_config": {"store_path": folder / "jobs.db"}},
        model_settings={"model_entries": {name: {"pipeline": pipeline} for name, pipeline in pipelines.items()}},
    )


def readiness(gateway: LocalGateway) -> dict[str, Readiness]:
    return {name: model.readiness for name, model in gateway.models.items()}


async def test_leaving_waits_for_no_model_that_loads_and_runs_no_job(tmp_path: Path) -> None:
    good = "tests.support.length_model:LengthPipeline"
    async with LocalGateway(settings_of(tmp_path, slow=good)) as gateway:
        await gateway.wait_until_ready()
        gateway_left = gateway
    with pytest.raises(NotReadyError, match="draining"):
        await gateway_left.jobs.submit([AsyncInputModel(message={"text": "a"})], model_name="slow")

    Loading.may_end.clear()
    waited: list[NotReadyError] = []

    async def wait(gateway: LocalGateway) -> None:
        with pytest.raises(NotReadyError) as caught:
            await gateway.wait_until_ready()
        waited.append(caught.value)

    async with anyio.create_task_group() as task_group:
        async with LocalGateway(settings_of(tmp_path, slow=f"{__name__}:Loading")) as gateway:
            task_group.start_soon(wait, gateway)
            await to_thread.run_sync(Loading.begun.acquire)
            assert readiness(gateway) == {"slow": Readiness.LOADING}
        assert readiness(gateway) == {"slow": Readiness.DRAINING}
    Loading.may_end.set()
    assert [error.readiness for error in waited] == [Readiness.DRAINING]


async def stored_before(gateway: LocalGateway) -> str:
    """A job for a model that still loads, as one that an earlier process accepted."""
    job = Job(job_id="before", model_name="slow", message_json='{"text":"four"}', created_at=time.time())
    await gateway.jobs.store.add([job])  # the gateway accepts none for such a model
    return job.job_id


async def test_jobs_of_a_model_that_did_not_load_in_time_stay_for_the_next_start(tmp_path: Path) -> None:
    Loading.may_end.clear()
    settings = settings_of(tmp_path, slow=f"{__name__}:Loading")
    async with LocalGateway(settings) as gateway:
        await to_thread.run_sync(Loading.begun.acquire)
        job_id = await stored_before(gateway)
    async with SqliteJobStore(tmp_path / "jobs.db") as store:
        job = await store.get(job_id)
        assert job is not None
        assert job.status is JobStatus.QUEUED
    Loading.may_end.set()
    async with LocalGateway(settings) as gateway:
        finished = await gateway.jobs.get(job_id, 60)
        assert finished is not None
        assert finished.result is not None
        assert finished.result["length"] == 4


async def test_the_models_that_load_settle_beside_those_that_do_not(tmp_path: Path) -> None:
    support = "tests.support.length_model"
    settings = settings_of(tmp_path, bad=f"{support}:UnloadablePipeline", good=f"{support}:LengthPipeline")
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_settled()
        assert readiness(gateway) == {"bad": Readiness.FAILED, "good": Readiness.READY}


class Panicking(LengthPipeline):
    """Panics in the event loop."""

    async def warm_up(self) -> None:
        raise Panic("index out of bounds")


async def test_a_model_that_fails_by_no_ordinary_error_stops_no_other(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, good="tests.support.length_model:LengthPipeline", bad=f"{__name__}:Panicking")
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_settled()
        assert readiness(gateway) == {"good": Readiness.READY, "bad": Readiness.FAILED}
        assert "Panic: index out of bounds" in str(gateway.models["bad"].problem)
        await gateway.models["good"].predict(Text(text="a"))


class Interrupted(LengthPipeline):
    """Is interrupted, as by Ctrl-C, while it warms up in the event loop."""

    async def warm_up(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_while_a_model_loads_ends_the_service(tmp_path: Path, anyio_backend_name: str) -> None:
    async def serve() -> None:
        async with LocalGateway(settings_of(tmp_path, model=f"{__name__}:Interrupted")) as gateway:
            await gateway.wait_until_settled()

    with pytest.raises(BaseException) as raised:  # noqa: PT011  # in groups, on trio
        anyio.run(serve, backend=anyio_backend_name)
    group = BaseExceptionGroup("", [raised.value])
    assert group.subgroup(KeyboardInterrupt) is not None


async def test_a_shutdown_answers_callers_that_wait_for_a_job(tmp_path: Path) -> None:
    Loading.may_end.clear()
    async with LocalGateway(settings_of(tmp_path, slow=f"{__name__}:Loading")) as gateway:
        await to_thread.run_sync(Loading.begun.acquire)
        job_id = await stored_before(gateway)
        gateway.jobs.stop_waiting()
        job = await gateway.jobs.get(job_id, 1e9)
        assert job is not None
        assert job.status is JobStatus.QUEUED
    Loading.may_end.set()


async def test_jobs_of_a_model_that_is_not_configured_are_refused_by_its_name(tmp_path: Path) -> None:
    async with LocalGateway(settings_of(tmp_path, a="tests.support.length_model:LengthPipeline")) as gateway:
        with pytest.raises(UnknownModelError, match="'other'"):
            await gateway.jobs.submit([AsyncInputModel(message={"text": "a"})], model_name="other")


async def test_jobs_that_wait_for_a_model_that_is_not_configured_are_told_at_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Loading.may_end.clear()
    async with LocalGateway(settings_of(tmp_path, slow=f"{__name__}:Loading")) as gateway:
        await to_thread.run_sync(Loading.begun.acquire)
        await stored_before(gateway)
    Loading.may_end.set()
    async with LocalGateway(settings_of(tmp_path, a="tests.support.length_model:LengthPipeline")) as gateway:
        await gateway.wait_until_ready()
    assert "1 jobs wait for the model 'slow', which is not configured" in caplog.text


async def test_each_model_has_the_limits_of_its_entry(tmp_path: Path) -> None:
    pipeline = "tests.support.length_model:LengthPipeline"
    settings = Settings(
        app_settings={
            "async_config": {"store_path": tmp_path / "jobs.db"},
            "batch_config": {"max_batch_size": 3, "max_queue_size": 4, "calibration": {"enabled": False}},
        },
        model_settings={
            "model_entries": {
                "common": {"pipeline": pipeline},
                "own": {"pipeline": pipeline, "batch_config": {"max_batch_size": 1, "max_queue_size": 1}},
            }
        },
    )
    async with LocalGateway(settings) as gateway:
        await gateway.wait_until_ready()
        items = [Text(text="a"), Text(text="b")]
        await gateway.models["common"].predict_many(items)
        with pytest.raises(QueueFullError):
            await gateway.models["own"].predict_many(items)
