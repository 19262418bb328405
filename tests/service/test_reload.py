"""A model is loaded anew beside the one that runs, or gets other limits, and no request fails for it."""

import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from modalkit.batching import SchedulerClosedError
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel
from modalkit.service import supervision
from modalkit.service.errors import InvalidItemError, NotReadyError, Readiness, ReloadError, UnknownModelError
from modalkit.service.jobs import JobStatus
from modalkit.service.loading import LoadError
from modalkit.service.local_gateway import LocalGateway, LocalModel
from modalkit.service.settings import Settings, SettingsError
from tests.support.length_model import Length, LengthPipeline, Text
from tests.support.panic import Panic

pytestmark = pytest.mark.anyio


class Versioned(LengthPipeline):
    """Answers with the version of its weights."""

    instances: list["Versioned"] = []  # noqa: RUF012  # shared on purpose
    loading = threading.Semaphore(0)
    may_load = threading.Event()

    def __init__(self, version: int = 0, hang_until: int = 0, **entry: Any) -> None:
        super().__init__(**entry)
        self.loading.release()
        self.may_load.wait(timeout=60)
        if version < 0:
            raise RuntimeError("the weights are damaged")
        if version == 14:
            raise Panic("fourteen")
        self.version = version
        self.instances.append(self)
        self.hangs = len(self.instances) <= hang_until

    def warm_up(self) -> None:
        if self.version == 13:
            raise RuntimeError("thirteen")

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if "fault" in preprocessed_data["texts"]:
            raise RuntimeError("CUDA error: device-side assert triggered")
        if self.hangs and "hang" in preprocessed_data["texts"]:
            self.gate.clear()
        return super().predict(input_list, preprocessed_data)

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        return [Length(length=self.version) for _ in input_list]


class Other(Versioned):
    input_model = BaseModel


class WarmingElsewhere(Versioned):
    async def warm_up(self) -> None:  # type: ignore[override]  # it may be of either kind
        raise Panic("fifteen")


class Unpadded(Versioned):
    cost_feature = "total"


def configure(folder: Path, *, pipeline: str = "Versioned", more: str = "", **entry: Any) -> Path:
    path = folder / "modalkit.yaml"
    path.write_text(
        f"""
app_settings:
  async_config: {{store_path: "{folder}/jobs.db"}}
  batch_config: {{max_batch_size: 4, batch_timeout_seconds: 0.5, calibration: {{enabled: false}}}}
  {more}
model_settings:
  model_entries:
    m: {{pipeline: "{__name__}:{pipeline}", {", ".join(f"{key}: {value}" for key, value in entry.items())}}}
"""
    )
    return path


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[LocalGateway]:
    Versioned.instances.clear()
    Versioned.loading = threading.Semaphore(0)
    Versioned.may_load.set()
    async with LocalGateway(Settings.load([configure(tmp_path, version=1)])) as opened:
        await opened.wait_until_ready()
        yield opened
        for instance in Versioned.instances:
            instance.gate.set()


async def version(model: LocalModel, text: str = "a") -> int:
    output: Any = await model.predict(Text(text=text))
    found: int = output.length
    return found


async def test_under_a_steady_load_no_request_and_no_job_fails(gateway: LocalGateway, tmp_path: Path) -> None:
    model, versions, done = gateway.models["m"], set[int](), anyio.Event()

    async def call() -> None:
        while not done.is_set():
            versions.add(await version(model))

    async with anyio.create_task_group() as task_group:
        for _ in range(20):
            task_group.start_soon(call)
        requests = [AsyncInputModel(message={"text": "job"}) for _ in range(500)]
        accepted = await gateway.jobs.submit(requests, model_name="m")
        for number in range(2, 7):
            configure(tmp_path, version=number)
            await gateway.reload("m")
            assert await version(model) == number
        done.set()
    assert versions == {1, 2, 3, 4, 5, 6}
    for outcome in accepted:
        job = await gateway.jobs.get(getattr(outcome, "value"), 60)  # noqa: B009  # one that was refused has none
        assert job is not None
        assert job.status is JobStatus.SUCCEEDED
    done_by_all = model.statistics()
    assert done_by_all is not None
    assert (done_by_all.failed, done_by_all.refused, done_by_all.cancelled) == (0, 0, 0)
    assert done_by_all.succeeded >= 500, "statistics go on"


async def test_a_model_that_was_replaced_leaves_the_memory(gateway: LocalGateway) -> None:
    await version(gateway.models["m"])
    first = weakref.ref(Versioned.instances.pop())
    await gateway.reload("m")
    while first() is not None:  # until the thread of its last batch has ended
        assert await version(gateway.models["m"]) == 1


@pytest.mark.parametrize(
    ("entry", "error", "why"),
    [
        ({"version": -1}, LoadError, "m: Versioned cannot be loaded: RuntimeError: the weights are damaged"),
        ({"version": 13}, LoadError, "warming up Versioned failed: RuntimeError: thirteen"),
        ({"version": 14}, LoadError, "m: Versioned cannot be loaded: Panic: fourteen"),
        ({"version": 2, "pipeline": "WarmingElsewhere"}, LoadError, "warming up WarmingElsewhere failed: .*fifteen"),
        ({"version": 2, "pipeline": "Other"}, ReloadError, "its input_model or output_model has changed; restart"),
        ({"version": 2, "max_in_flight": 0}, SettingsError, "max_in_flight"),
        ({"version": 2, "unknown": 1, "pipeline": "Missing"}, LoadError, "has no 'Missing'"),
    ],
)
async def test_a_version_that_cannot_take_over_leaves_the_old_one_and_says_why(
    gateway: LocalGateway, tmp_path: Path, entry: dict[str, Any], error: type[Exception], why: str
) -> None:
    configure(tmp_path, **entry)
    with pytest.raises(error, match=why):
        await gateway.reload("m")
    assert await version(gateway.models["m"]) == 1
    assert gateway.models["m"].readiness is Readiness.READY


async def test_a_version_whose_batches_cost_something_else_takes_over(gateway: LocalGateway, tmp_path: Path) -> None:
    """The engine decides it, and a race of engines may have another winner. The costs are learnt from batches."""
    configure(tmp_path, version=2, pipeline="Unpadded")
    await gateway.reload("m")
    assert await version(gateway.models["m"]) == 2


async def test_a_version_for_which_there_is_no_memory_is_not_loaded(
    gateway: LocalGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.models["m"]._supervisor, "_loaded_bytes", 3 * 2**20)  # noqa: SLF001  # as if it took so much
    monkeypatch.setattr(supervision, "free_bytes", lambda: 2 * 2**20)
    with pytest.raises(ReloadError, match="it needs 3 MiB beside the old one and 2 MiB of memory are free; restart"):
        await gateway.reload("m")
    assert len(Versioned.instances) == 1


async def test_a_model_that_could_not_be_loaded_is_tried_again(tmp_path: Path) -> None:
    Versioned.may_load.set()
    async with LocalGateway(Settings.load([configure(tmp_path, version=-1)])) as gateway:
        await gateway.wait_until_settled()
        with pytest.raises(ReloadError, match="the weights are damaged"):
            await gateway.reload("m")
        assert gateway.models["m"].readiness is Readiness.FAILED
        configure(tmp_path, version=3)
        await gateway.reload("m")
        assert await version(gateway.models["m"]) == 3


async def test_one_reload_at_a_time_and_none_once_the_service_stops(gateway: LocalGateway) -> None:
    await anyio.to_thread.run_sync(Versioned.loading.acquire)
    Versioned.may_load.clear()
    refused: list[Exception] = []

    async def reload() -> None:
        try:
            await gateway.reload("m")
        except NotReadyError as error:
            refused.append(error)

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(reload)
        await anyio.to_thread.run_sync(Versioned.loading.acquire)
        with pytest.raises(ReloadError, match="it is being reloaded already"):
            await gateway.reload("m")
        gateway.drain()
    Versioned.may_load.set()
    assert "draining" in str(refused[0])
    with pytest.raises(UnknownModelError):
        await gateway.reload("other")


async def test_what_a_reload_does_not_take_up_is_logged(
    gateway: LocalGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configure(tmp_path, version=2, more="require_all_models: true")
    await gateway.reload("m")
    assert "What changed of app_settings.require_all_models takes effect at the next start only" in caplog.text


async def test_limits_are_changed_live_and_by_a_reload(gateway: LocalGateway, tmp_path: Path) -> None:
    model = gateway.models["m"]
    await model.set_limits({"max_batch_size": 2, "max_in_flight": 3})
    assert model.worker is not None
    assert (model.worker.limits.max_batch_size, model.worker.limits.batch_timeout_seconds) == (2, 0.5)
    await model.predict_many([Text(text="a")] * 8)
    assert max(map(len, Versioned.instances[0].batches)) == 2
    limits: dict[str, Any]
    for limits in ({"max_batch_size": 0}, {"max_batch_sise": 3}, {"max_batch_size": 20_000}, {"calibration": {}}):
        with pytest.raises(InvalidItemError):
            await model.set_limits(limits)
    configure(tmp_path, version=2)
    await gateway.reload("m")
    assert model.worker.limits.max_batch_size == 4


async def test_under_other_limits_the_next_batch_waits_for_the_one_that_runs(gateway: LocalGateway) -> None:
    model, (pipeline,) = gateway.models["m"], Versioned.instances
    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(version, model)
        await anyio.to_thread.run_sync(pipeline.entered.acquire)
        await model.set_limits({"max_batch_size": 2})
        task_group.start_soon(version, model)
        await anyio.wait_all_tasks_blocked()
        statistics = model.statistics()
        assert statistics is not None
        assert (statistics.running, statistics.queue_depth) == (1, 1)
        pipeline.gate.set()


async def test_a_model_that_hangs_is_not_ready_is_loaded_anew_and_goes_on(tmp_path: Path) -> None:
    Versioned.instances.clear()
    Versioned.may_load.set()
    async with LocalGateway(Settings.load([configure(tmp_path, version=1, hang_until=1)])) as gateway:
        await gateway.wait_until_ready()
        model = gateway.models["m"]
        Versioned.may_load.clear()
        async with anyio.create_task_group() as task_group:
            for _ in range(2):
                task_group.start_soon(model.predict_many, [Text(text="hang")])
            while model.readiness is not Readiness.RESTARTING:
                await anyio.sleep(0.01)
            assert "of its calls hang past batch_timeout_seconds" in str(model.problem)
            Versioned.may_load.set()
        while model.readiness is not Readiness.READY:
            await anyio.sleep(0.01)
        assert await version(model, "hang") == 1
        assert len(Versioned.instances) == 2
        Versioned.instances[0].gate.set()


async def test_a_model_that_hangs_again_is_broken(tmp_path: Path) -> None:
    Versioned.instances.clear()
    Versioned.may_load.set()
    async with LocalGateway(Settings.load([configure(tmp_path, version=1, hang_until=2)])) as gateway:
        await gateway.wait_until_ready()
        model = gateway.models["m"]
        async with anyio.create_task_group() as task_group:

            async def hang() -> None:
                with suppress(NotReadyError, SchedulerClosedError):
                    while model.error is None:
                        await model.predict_many([Text(text="hang")])

            task_group.start_soon(hang)
            with anyio.fail_after(60):
                await gateway.wait_until_broken()
        assert model.readiness is Readiness.BROKEN
        assert "hang past batch_timeout_seconds, again after it was restarted" in str(model.problem)
        for instance in Versioned.instances:
            instance.gate.set()


async def test_a_model_whose_device_is_lost_is_broken_and_one_such_error_alone_is_not(gateway: LocalGateway) -> None:
    model = gateway.models["m"]

    async def fault() -> None:
        with pytest.raises(RuntimeError, match="CUDA error"):
            await model.predict(Text(text="fault"))

    await fault()
    assert await version(model) == 1
    await fault()
    assert model.problem is None, "a batch between them has succeeded"
    await fault()
    with anyio.fail_after(60):
        await gateway.wait_until_broken()
    assert model.readiness is Readiness.BROKEN
    assert "its device is broken: RuntimeError: CUDA error" in str(model.problem)
    with pytest.raises(NotReadyError, match="broken"):
        await model.predict(Text(text="a"))


async def test_learnt_costs_survive_a_reload_as_a_start(gateway: LocalGateway, tmp_path: Path) -> None:
    model = gateway.models["m"]
    await version(model)
    assert model.worker is not None
    costs, observed = model.worker.costs, model.worker.costs.observed
    assert observed
    configure(tmp_path, version=2)
    await gateway.reload("m")
    assert model.worker.costs is costs
    assert costs.observed >= observed
