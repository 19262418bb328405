"""Calls over each engine: the one in this process, and Modal's, by its real client against a server of the test's."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import modal
import pytest
from pydantic import BaseModel

from modalkit.service.calls.engine import KeyValueStore
from modalkit.service.calls.in_process import InProcessCall, InProcessEngine
from modalkit.service.calls.jobs import CallGateway, CallJobs
from modalkit.service.calls.predictor import CallModel
from modalkit.service.calls.processor import CallProcessor
from modalkit.service.calls.records import CallRecords
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.engine import ModalEngine, ModalKeyValueStore, connection
from modalkit.service.on_modal.service import ModalService
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import BatchConfig, Settings
from modalkit.service.web import create_app
from modalkit.service.worker import InferenceWorker
from tests.support.http_server import serving
from tests.support.length_model import Length, LengthPipeline, Text
from tests.support.modal_container import in_a_container
from tests.support.modal_server import ModalServer, as_modal_runs_it, serve_modal

ALLOWED_QUEUES = ["ok", "bad"]
MODEL = "lengths"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # uvicorn, Modal's client and the hooks of its classes run on asyncio alone


@dataclass
class Stand:
    """A worker that measures texts, and an engine that carries calls to it.

    `carrier` is what stands for the other processes, with its faults: on Modal, behind the server of its client.
    """

    engine: InProcessEngine | ModalEngine
    carrier: InProcessEngine
    store: KeyValueStore
    pipeline: LengthPipeline
    queue: InMemoryBackend

    @property
    def records(self) -> CallRecords:
        """As a frontend opens them."""
        return CallRecords(self.store)

    @property
    def kept_calls(self) -> list[InProcessCall]:
        """The calls so far that carry jobs."""
        return [call for call in self.carrier.calls.values() if call.options.accepted_at is not None]

    def model(
        self,
        input_model: type[BaseModel] = Text,
        *,
        input_model_path: str | None = None,
        **config: Any,
    ) -> CallModel:
        """A frontend's model, not yet open."""
        return CallModel(
            MODEL,
            self.engine,
            BatchConfig(**config),
            input_model=input_model,
            output_model=Length,
            input_model_path=input_model_path,
        )

    def jobs(
        self,
        model: CallModel | None = None,
        *,
        records: CallRecords | None = None,
        input_model_path: str | None = None,
        **config: Any,
    ) -> CallJobs:
        """A frontend's jobs, not yet open."""
        return CallJobs(
            self.engine,
            records or self.records,
            {MODEL: model or self.model()},
            queue_rules=QueueRules(ALLOWED_QUEUES, None),
            config=BatchConfig(**config),
            input_model_path=input_model_path,
        )


OpenStand = Callable[..., AbstractAsyncContextManager[Stand]]


@pytest.fixture(params=["in process", "on modal"])
def open_stand(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenStand:
    """Opens a stand, by default with a `LengthPipeline`; its engine repeats a call that raised `retries` times."""

    @asynccontextmanager
    async def open_stand(
        pipeline_class: type[LengthPipeline] = LengthPipeline, *, retries: int = 0
    ) -> AsyncIterator[Stand]:
        settings = Settings(
            app_settings={
                "batch_config": {"calibration": {"enabled": False}},
                "queue_config": {"allowed_queues": ALLOWED_QUEUES},
                "deployment_config": {"retries": retries},
            }
        )
        queue = InMemoryBackend()
        engine = InProcessEngine(retries=retries)
        async with AsyncExitStack() as stack:
            if request.param == "in process":
                await stack.enter_async_context(engine)
                pipeline = pipeline_class(MODEL)
                worker = await stack.enter_async_context(InferenceWorker(pipeline, settings=settings))
                processor = CallProcessor(
                    worker,
                    settings.app_settings.async_config,
                    queue_rules=QueueRules(ALLOWED_QUEUES, queue),
                    responses=queue,
                    records=CallRecords(engine.store),
                    retries=retries,
                )
                engine.attach(MODEL, processor.process)
                yield Stand(engine, engine, engine.store, pipeline, queue)
                return
            server = await stack.enter_async_context(serve_modal(tmp_path, monkeypatch, engine))
            await stack.enter_async_context(engine)  # what it runs uses Modal's client, and ends before the server
            server.deploy_class("Lengths", max_concurrent_inputs=64)
            stack.enter_context(in_a_container(max_inputs=64))
            config = ModalConfig(settings, environ={})

            class Service(ModalService):
                inference_implementation = pipeline_class
                model_name = MODEL
                modal_utils = config

            service = await stack.enter_async_context(Service(queue_backend=queue))
            engine.attach(MODEL, as_modal_runs_it(service))
            connect = connection(modal.Cls.from_name(config.app_name, "Lengths"), config, {})
            on_modal = await stack.enter_async_context(ModalEngine({MODEL: connect}))
            store = ModalKeyValueStore(f"{config.app_name}-jobs")
            made = service.running().worker.pipeline
            assert isinstance(made, LengthPipeline)
            yield Stand(on_modal, engine, store, made, queue)

    return open_stand


@pytest.fixture
async def stand(open_stand: OpenStand) -> AsyncIterator[Stand]:
    """An engine with one worker."""
    async with open_stand() as opened:
        yield opened
        opened.pipeline.gate.set()  # a thread that waits would keep the worker from closing


@pytest.fixture
async def client(stand: Stand) -> AsyncIterator[httpx.AsyncClient]:
    """The HTTP service of a frontend."""
    model = stand.model()
    gateway = CallGateway({MODEL: model}, stand.jobs(model), opens=[model])
    async with serving(create_app(gateway)) as opened:
        yield opened


@pytest.fixture
async def modal_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModalServer]:
    """A server of this test's, which Modal's client takes for Modal's."""
    async with InProcessEngine() as engine, serve_modal(tmp_path, monkeypatch, engine) as server:
        yield server
