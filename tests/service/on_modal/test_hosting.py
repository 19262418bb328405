"""Service classes in any program and, with Modal's own runtime objects, in a container."""

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import modal
import modal.exception
import pytest
from modal._partial_function import _PartialFunctionFlags
from pydantic import BaseModel

from modalkit.batching import BatchRecord
from modalkit.modal_config import ModalConfig
from modalkit.modal_service import ModalService
from modalkit.pipelines import SyncInputModel
from modalkit.service.calls.engine import CallOptions, MemoryKeyValueStore
from modalkit.service.calls.published_metrics import PublishedMetrics
from modalkit.service.calls.records import CallRecords
from modalkit.service.errors import ContainerFaultError, DeviceFaultError, RemoteCallError, UnknownModelError
from modalkit.service.loading import LoadError, ModelSource
from modalkit.service.logs import LogFormat
from modalkit.service.on_modal import container as container_module
from modalkit.service.on_modal.container import Container, set_up_logs_and_traces
from modalkit.service.on_modal.hosting import Constructible, HostedService, responses_of
from modalkit.service.queue_backends import InMemoryBackend
from tests.service.on_modal.conftest import CLOSABLE, Closable, MakeConfig
from tests.support.length_model import POISON, LengthPipeline, Text
from tests.support.modal_container import an_input, as_modal_runs_it, in_a_container, run_hooks
from tests.support.modal_objects import class_spec

pytestmark = pytest.mark.anyio

FAULT = "fault"
ENTRIES: dict[str, Any] = {
    "first": {"pipeline": "tests.support.length_model:LengthPipeline", "colour": "red"},
    "second": {"pipeline": "tests.support.odd_model:OddPipeline"},
}


@pytest.fixture
def anyio_backend() -> str:
    """Modal runs asyncio alone."""
    return "asyncio"


class Recording(LengthPipeline):
    """Notes where it was loaded and moved; breaks its device on demand."""

    made: list["Recording"] = []  # noqa: RUF012  # of the class, on purpose

    def __init__(self, *args: Any, **model_entry: Any) -> None:
        super().__init__(*args, **model_entry)
        self.history = [f"load on {self.common_settings['device']}"]
        self.made.append(self)

    def warm_up(self) -> None:
        self.history.append("warm up")

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if FAULT in preprocessed_data["texts"]:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().predict(input_list, preprocessed_data)


class Movable(Recording):
    def move_to(self, device: str) -> None:
        self.history.append(f"move to {device}")


@pytest.fixture(autouse=True)
def _nothing_made() -> Iterator[None]:
    yield
    for pipeline in Recording.made:
        pipeline.gate.set()
    Recording.made.clear()


class Service(ModalService):
    inference_implementation = Recording


def make(config: ModalConfig, base: type[ModalService] = Service, **attributes: Any) -> ModalService:
    """An instance of a subclass with this configuration, as users define them."""
    defined: type[ModalService] = type("Defined", (base,), {"modal_utils": config, **attributes})
    return defined()


async def process(service: ModalService, entries: list[Any], **options: Any) -> list[dict[str, Any]]:
    bound: Any = service.process_request  # to its types a Function, which it is only once registered
    outcomes: list[dict[str, Any]] = await bound(entries, **options)
    return outcomes


def item(text: str) -> dict[str, Any]:
    return {"message": {"text": text}}


def job(text: str) -> dict[str, Any]:
    return {"message": {"text": text}, "success_queue": "ok", "failure_queue": "bad"}


def pipeline_of(service: ModalService) -> Any:
    return service.running().worker.pipeline


async def test_a_service_runs_lists_inside_async_with(make_config: MakeConfig) -> None:
    async with make(make_config()) as service:
        outcomes = await process(service, [item("a"), SyncInputModel(message={"text": "bb"}), item(POISON)])
        assert [outcome.get("length") for outcome in outcomes] == [1, 2, None]
        assert outcomes[2]["error"] == "ValueError: this batch is poisoned"


async def test_outside_it_says_what_to_do(make_config: MakeConfig) -> None:
    service = make(make_config())
    with pytest.raises(RuntimeError, match="use it inside 'async with', or in a Modal container"):
        await process(service, [item("a")])
    async with service:
        pass
    with pytest.raises(RuntimeError, match="not running"):
        await process(service, [item("a")])


async def test_a_registered_class_runs_locally_and_is_started_once(make_config: MakeConfig) -> None:
    config = make_config()

    @modal.App("app").cls(**config.get_app_cls_settings(), serialized=True)
    class Registered(Service):
        modal_utils: ModalConfig = config

    registered: Any = Registered()
    outcomes: list[Any] = []

    async def call(text: str) -> None:
        outcomes.extend(await registered.process_request.local([item(text)]))

    async with anyio.create_task_group() as task_group:
        for text in ("a", "bb", "ccc"):
            task_group.start_soon(call, text)
    assert sorted(outcome["length"] for outcome in outcomes) == [1, 2, 3]
    await call("dddd")
    assert len(Recording.made) == 1
    await registered.__aexit__(None, None, None)


async def test_a_service_can_be_started_again(make_config: MakeConfig, configured_backends: list[Closable]) -> None:
    service = make(make_config(queue_config=CLOSABLE))
    for _ in range(2):
        async with service:
            (outcome,) = await process(service, [job("a")])
            assert outcome["delivery"] == "delivered"
    assert [backend.closed for backend in configured_backends] == [1, 1]
    assert [backend.depth("ok") for backend in configured_backends] == [1, 1]


async def test_an_injected_backend_goes_before_the_others_and_stays_open(
    make_config: MakeConfig, configured_backends: list[Closable]
) -> None:
    injected, of_the_class = Closable(), InMemoryBackend()
    service = make(make_config(queue_config=CLOSABLE), queue_backend=of_the_class)
    type(service).__init__(service)  # leaves the class's as it is
    assert service.queue_backend is of_the_class
    async with type(service)(queue_backend=injected) as running:
        await process(running, [job("a")])
    assert (injected.depth("ok"), injected.closed) == (1, 0)
    async with service:
        await process(service, [job("a")])
    assert of_the_class.depth("ok") == 1
    assert configured_backends == [injected]


async def test_a_configured_backend_is_made_in_the_container_and_closed_at_the_end(
    make_config: MakeConfig, configured_backends: list[Closable]
) -> None:
    service = make(make_config(queue_config=CLOSABLE))
    assert configured_backends == []
    async with service:
        await process(service, [job("a")])
        (backend,) = configured_backends
        assert (backend.depth("ok"), backend.closed) == (1, 0)
    assert backend.closed == 1


async def test_without_a_backend_jobs_are_run_and_sent_nowhere(make_config: MakeConfig) -> None:
    async with make(make_config(queue_config={"backend": "none"})) as service:
        (outcome,) = await process(service, [job("a")])
        assert (outcome["status"], outcome["delivery"]) == ("succeeded", "none")
        assert responses_of(service) is None


async def test_an_overridden_send_to_queue_is_used(make_config: MakeConfig) -> None:
    tried: list[str] = []

    class Documented(Service):
        async def _send_to_queue(self, queue_name: str, message: str) -> bool:
            tried.append(queue_name)
            if self.queue_backend:
                return await self.queue_backend.send_message(queue_name, message)
            return False

    backend = InMemoryBackend()
    async with make(make_config(), Documented, queue_backend=backend) as service:
        (outcome,) = await process(service, [job("a")])
    assert (outcome["delivery"], tried, backend.depth("ok")) == ("delivered", ["ok"], 1)


async def test_an_overridden_send_async_response_that_returns_nothing_has_sent(make_config: MakeConfig) -> None:
    class Documented(Service):
        async def send_async_response(self, queue_name: str, message: str) -> None:
            try:
                if not await self._send_to_queue(queue_name, message):
                    errors.append("not taken")
            except ConnectionError as error:
                errors.append(str(error))

    class Down(InMemoryBackend):
        async def send_message(self, queue_name: str, message: str) -> bool:
            raise ConnectionError("down")

    errors: list[str] = []
    async with make(make_config(), Documented, queue_backend=InMemoryBackend()) as service:
        (outcome,) = await process(service, [job("a")])
        assert (outcome["delivery"], errors) == ("delivered", [])
    async with make(make_config(), Documented, queue_backend=Down()) as service:
        (outcome,) = await process(service, [job("a")])
        assert (outcome["status"], errors) == ("succeeded", ["down"])


async def test_a_method_that_returns_false_is_called_again(make_config: MakeConfig) -> None:
    answers: list[bool | Exception] = [False, ConnectionError("down"), True]

    class Documented(Service):
        async def _send_to_queue(self, queue_name: str, message: str) -> bool:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    config = make_config(queue_config={"backend": "none"}, async_config={"max_delivery_attempts": 3})
    sender = responses_of(make(config, Documented))
    assert sender is not None
    assert await sender.send_message("ok", "{}") is False
    with pytest.raises(ConnectionError):
        await sender.send_message("ok", "{}")
    assert await sender.send_message("ok", "{}") is True


async def test_an_implementation_goes_before_the_entries_and_needs_none(make_config: MakeConfig) -> None:
    config = make_config({"model_entries": ENTRIES})
    async with make(config) as unnamed, make(config, model_name="first") as named:
        assert (pipeline_of(unnamed).model_name, pipeline_of(unnamed).model_entry) == ("Recording", {})
        assert type(pipeline_of(named)) is Recording
        assert pipeline_of(named).model_entry == {"colour": "red"}
    async with make(config, model_name="sentiment-analyzer") as service:
        assert pipeline_of(service).model_name == "sentiment-analyzer"
        assert pipeline_of(service).model_entry == {}


async def test_without_an_implementation_the_entries_say_what_runs(make_config: MakeConfig) -> None:
    config = make_config({"model_entries": ENTRIES})
    async with make(config, ModalService) as first, make(config, ModalService, model_name="second") as second:
        assert (pipeline_of(first).model_name, pipeline_of(first).model_entry) == ("first", {"colour": "red"})
        assert type(pipeline_of(second)).__name__ == "OddPipeline"
    with pytest.raises(UnknownModelError, match="there is no model 'third'; configured are: first, second"):
        await make(config, ModalService, model_name="third").__aenter__()


async def test_a_pipeline_that_cannot_be_loaded_leaves_nothing_behind(
    make_config: MakeConfig, configured_backends: list[Closable]
) -> None:
    class Cold(Recording):
        def warm_up(self) -> None:
            raise ZeroDivisionError("the warm-up")

    service = make(make_config(queue_config=CLOSABLE), inference_implementation=Cold)
    for _ in range(2):
        with pytest.raises(LoadError, match=r"warming up Cold failed: ZeroDivisionError: the warm-up \(.*, line "):
            await service.__aenter__()
    assert [backend.closed for backend in configured_backends] == [1, 1]
    unloadable = make(make_config({"model_entries": {"m": {"pipeline": "nowhere:Nothing"}}}), ModalService)
    with pytest.raises(LoadError, match=r"model_settings\.model_entries\.m\.pipeline: there is no module 'nowhere'"):
        await unloadable.__aenter__()


async def test_a_subclass_is_told_of_each_batch(make_config: MakeConfig) -> None:
    records: list[BatchRecord] = []

    class Measured(Service):
        def on_batch(self, record: BatchRecord) -> None:
            records.append(record)

    async with make(make_config(), Measured) as service:
        await process(service, [item("a"), item("bb")])
    assert [(record.count, record.failed) for record in records] == [(2, 0)]


@pytest.mark.parametrize("error", [TimeoutError("the warm-up"), modal.exception.NotFoundError("the warm-up")])
async def test_what_leaves_a_container_is_an_error_of_ours(make_config: MakeConfig, error: Exception) -> None:
    """Or its caller would take it for what Modal's client says of the call."""

    class Cold(Recording):
        def warm_up(self) -> None:
            raise error

    instance = make(make_config(), inference_implementation=Cold)
    with pytest.raises(LoadError, match=f"warming up Cold failed: {type(error).__name__}: the warm-up"):
        await run_hooks(instance, _PartialFunctionFlags.ENTER_POST_SNAPSHOT)
    async with make(make_config()) as service:
        with pytest.raises(RemoteCallError, match="process_request failed: ValueError: timeouts_s: 1 values"):
            await process(service, [item("a"), item("b")], timeouts_s=[1.0])


def snapshotting(make_config: MakeConfig, **deployment: Any) -> ModalConfig:
    settings = {"memory_snapshot": True, "gpu": "T4"} | deployment
    return make_config({"common": {"device": "the device"}}, deployment_config=settings)


async def test_a_pipeline_of_a_snapshot_is_moved_to_the_device_of_its_entry(make_config: MakeConfig) -> None:
    settings = {"model_entries": {"Movable": {"pipeline": "m:C", "devices": "its own"}}}
    config = make_config(settings, deployment_config={"memory_snapshot": True, "gpu": "T4"})
    async with as_modal_runs_it(make(config, inference_implementation=Movable)):
        (pipeline,) = Recording.made
        assert pipeline.history[1] == "move to its own"


async def test_a_memory_snapshot_has_the_weights_loaded_on_the_cpu_and_moved_afterwards(
    make_config: MakeConfig,
) -> None:
    async with as_modal_runs_it(make(snapshotting(make_config), inference_implementation=Movable)) as before:
        assert before == 1
        (pipeline,) = Recording.made
        assert pipeline.history == ["load on cpu", "move to the device", "warm up"]


async def test_a_gpu_snapshot_has_them_loaded_and_warm_on_the_device(make_config: MakeConfig) -> None:
    config = snapshotting(make_config, gpu_snapshot=True)
    async with as_modal_runs_it(make(config, inference_implementation=Movable)):
        (pipeline,) = Recording.made
        assert pipeline.history[:2] == ["load on the device", "warm up"]
        assert "move" not in "".join(pipeline.history)


async def test_a_pipeline_that_cannot_move_is_loaded_after_the_snapshot(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    async with as_modal_runs_it(make(snapshotting(make_config))):
        (pipeline,) = Recording.made
        assert pipeline.history == ["load on the device", "warm up"]
    assert "Recording has no move_to" in caplog.text


async def test_without_a_gpu_the_snapshot_holds_the_weights_of_any_pipeline(make_config: MakeConfig) -> None:
    async with as_modal_runs_it(make(snapshotting(make_config, gpu=None))) as before:
        assert before == 1
        (pipeline,) = Recording.made
        assert pipeline.history == ["load on cpu", "warm up"]


async def test_without_snapshots_there_is_no_hook_for_them(make_config: MakeConfig) -> None:
    async with as_modal_runs_it(make(make_config())) as before:
        assert before == 0
        (pipeline,) = Recording.made
        assert pipeline.history == ["load on auto", "warm up"]


@pytest.mark.parametrize("memory_snapshot", [True, False])
def test_modal_takes_the_class_with_and_without_snapshots(make_config: MakeConfig, memory_snapshot: bool) -> None:
    config = make_config(deployment_config={"memory_snapshot": memory_snapshot})
    defined = type(make(config))
    registered = modal.App("app").cls(**config.get_app_cls_settings(), serialized=True)(defined)
    assert class_spec(registered) is not None
    assert hasattr(defined, "_load_for_snapshot") is memory_snapshot


async def wait_for(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.001)


async def test_a_broken_device_takes_its_container_out_of_rotation(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with in_a_container(max_inputs=4) as stub:
        async with make(make_config()) as service:
            with an_input("fc-1"), pytest.raises(DeviceFaultError, match="device-side assert"):
                await process(service, [item("a"), item(FAULT)])
            await wait_for(lambda: stub.stops)
            for _ in range(2):
                with an_input("fc-2"), pytest.raises(ContainerFaultError, match="device of this container is broken"):
                    await process(service, [item("a")])
            assert stub.stops == [("ta-1", True)]
    assert caplog.text.count("it takes no more inputs, and Modal replaces it") == 1
    assert "one input at a time" not in caplog.text


async def test_the_last_run_of_a_call_takes_its_container_out_of_rotation_too(make_config: MakeConfig) -> None:
    with in_a_container(max_inputs=4) as stub:
        service = make(make_config(deployment_config={"retries": 0}), queue_backend=InMemoryBackend())
        left = anyio.Event()

        async def leave() -> None:
            await service._leave_rotation()  # noqa: SLF001  # what a service gives its container
            left.set()

        source = ModelSource(service.configuration().settings, "m", Recording)
        container = Container(
            service.configuration(),
            source,
            source.load(),
            responses=service.queue_backend,
            backend=service.queue_backend,
            leave_rotation=leave,
            on_batch=service.on_batch,
            records=CallRecords(MemoryKeyValueStore()),
        )
        await container.start()
        try:
            with an_input("fc-1"):
                (outcome,) = await container.process([job(FAULT)], CallOptions(accepted_at=1.0))
            assert (outcome["job_id"], outcome["status"], outcome["delivery"]) == ("fc-1.0", "failed", "delivered")
            with anyio.fail_after(30):
                await left.wait()
            assert stub.stops == [("ta-1", True)]
        finally:
            await container.stop()


async def test_items_that_come_by_another_frontend_are_watched_as_well(make_config: MakeConfig) -> None:
    with in_a_container() as stub:
        async with make(make_config()) as service:
            worker = service.running().worker
            with pytest.raises(ValueError, match="poisoned"):
                await worker.predict(Text(text=POISON))
            assert not worker.is_broken
            with pytest.raises(RuntimeError, match="device-side assert"):
                await worker.predict(Text(text=FAULT))
            assert worker.is_broken
            await wait_for(lambda: stub.stops)


async def test_batches_that_hang_take_their_container_out_of_rotation(make_config: MakeConfig) -> None:
    config = make_config(batch_config={"batch_timeout_seconds": 0.01, "calibration": {"enabled": False}})
    with in_a_container() as stub:
        async with make(config) as service:
            pipeline_of(service).gate.clear()

            async def hang() -> None:
                while True:  # three hang, but on a busy machine others run out of time before they do
                    (outcome,) = await process(service, [item("hangs")])
                    assert outcome["error_type"] == "BatchTimeoutError"

            with pytest.raises(ContainerFaultError, match="batches of this container hang"):
                await hang()
            await wait_for(lambda: stub.stops)
            pipeline_of(service).gate.set()


async def test_a_container_that_cannot_tell_modal_refuses_all_the_same(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with in_a_container() as stub:
        stub.failure = ConnectionError("Modal is away")
        async with make(make_config()) as service:
            with pytest.raises(DeviceFaultError):
                await process(service, [item(FAULT)])
            await wait_for(lambda: "Modal could not be told" in caplog.text)
            with pytest.raises(ContainerFaultError):
                await process(service, [item("a")])


async def test_in_any_other_program_nothing_is_told_to_modal(make_config: MakeConfig) -> None:
    async with make(make_config()) as service:
        with pytest.raises(DeviceFaultError):
            await process(service, [item(FAULT)])
        await service._leave_rotation()  # noqa: SLF001  # where it is called; outside, Modal's function would raise
        with pytest.raises(ContainerFaultError):
            await process(service, [item("a")])


async def test_a_container_that_takes_one_input_at_a_time_says_so_once(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with in_a_container(max_inputs=1):
        async with make(make_config()) as service:
            for _ in range(2):
                await process(service, [item("a")])
    assert caplog.text.count("takes one input at a time") == 1


async def test_a_spawned_jobs_id_names_its_call(make_config: MakeConfig) -> None:
    with in_a_container(max_inputs=4):
        async with make(make_config(), queue_backend=InMemoryBackend()) as service:
            with an_input("fc-1"):
                outcomes = await process(service, [job("a"), job("b")])
    # Not one that was spawned with ids given out before: its jobs cannot be asked for by a call.
    assert [outcome["job_id"] for outcome in outcomes] == ["in-fc-1.0", "in-fc-1.1"]


async def test_work_that_does_not_end_is_cut_short_after_the_grace(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(container_module, "GRACE_S", 0.01)
    async with make(make_config()) as service:
        pipeline = pipeline_of(service)
        pipeline.gate.clear()

        async def call() -> None:
            with pytest.raises(ContainerFaultError, match="aborted before this request finished"):
                await process(service, [item("hangs")])

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(call)
            await anyio.to_thread.run_sync(pipeline.entered.acquire)
            await service.__aexit__(None, None, None)
            pipeline.gate.set()
    assert "could not be finished within 0.01 s; Modal runs calls again elsewhere" in caplog.text


async def test_volumes_are_reloaded_while_it_serves(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, reloaded = make_config(deployment_config={"volume_reload_interval_seconds": 1}), anyio.Event()

    async def keep(given: ModalConfig, pipeline: Any, interval_s: float) -> None:
        assert (given, interval_s) == (config, 1)
        reloaded.set()
        await anyio.sleep_forever()

    monkeypatch.setattr(container_module, "keep_volumes_fresh", keep)
    async with make(config) as service:
        await reloaded.wait()
        (outcome,) = await process(service, [item("a")])
        assert outcome["length"] == 1


def test_the_base_class_needs_no_constructor_to_have_run() -> None:
    class Careless(HostedService):
        def __init__(self) -> None:
            self.model_name = "set"  # and does not call super().__init__

    service = Careless()
    assert isinstance(service, Constructible)
    assert (service.queue_backend, service.model_name) == (None, "set")
    with pytest.raises(RuntimeError, match="not running"):
        service.running()


async def test_a_container_publishes_the_metrics_of_its_batches(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryKeyValueStore()
    monkeypatch.setattr(
        "modalkit.service.on_modal.container.open_metrics", lambda _: PublishedMetrics(store, process_id="ta-1")
    )
    with in_a_container(max_inputs=4):
        service = make(make_config())
        async with service:
            name = service.running().worker.name
            await service.running().process([{"message": {"text": "four"}}], CallOptions())
    _, text = (await store.items())["ta-1"]
    assert re.search(rf'^modalkit_batch_size_count{{model="{name}"}} [1-9]', text, re.MULTILINE)
    assert f'modalkit_requests_total{{model="{name}",outcome="succeeded"}} 1.0' in text.splitlines()


async def test_a_container_logs_as_json_unless_the_program_has_handlers_of_its_own(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured: list[LogFormat] = []
    monkeypatch.setattr("modalkit.service.on_modal.container.configure_logging", configured.append)
    root = logging.getLogger()
    with in_a_container():
        set_up_logs_and_traces()
        assert configured == []
        monkeypatch.setattr(root, "handlers", [])
        set_up_logs_and_traces()
    set_up_logs_and_traces()
    assert configured == [LogFormat.AUTO], "only in the container"
