"""How users call modalkit: checked by mypy in `make check`, never run."""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from torch import Tensor, nn

from modalkit import (
    BatchPolicy,
    BatchRecord,
    BatchScheduler,
    Failure,
    InferenceWorker,
    Job,
    JobStatus,
    JobStoreFullError,
    LocalGateway,
    Priority,
    QueueFullError,
    Stages,
    Success,
    create_app,
    enable_tracing,
    lifespan_of,
)
from modalkit.inference_pipeline import InferencePipeline, RejectItem
from modalkit.iomodel import (
    AsyncInputModel,
    AsyncOutputModel,
    DelayedFailureOutputModel,
    InferenceOutputModel,
    SyncInputModel,
)
from modalkit.pipelines import Engine, EngineSettings, load_engine
from modalkit.settings import Settings
from modalkit.task_queue import InMemoryBackend, QueueBackend
from modalkit.testing import FakeClock, client_of, poisoned, worker_of


class Request(BaseModel):
    text: str


class Response(InferenceOutputModel):
    length: int


class Lengths(InferencePipeline):
    input_model = Request
    output_model = Response

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        for index, item in enumerate(input_list):
            if not getattr(item, "text", ""):
                raise RejectItem("there is no text", index=index)
        return {"texts": [getattr(item, "text", "") for item in input_list]}

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        return {"lengths": [len(text) for text in preprocessed_data["texts"]]}

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        return [Response(length=length) for length in raw_output["lengths"]]


class Remote(InferencePipeline):
    max_in_flight = 8

    async def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel | Exception]:
        return [RejectItem("there is no text") for _ in input_list]

    async def warm_up(self) -> None:
        await self.run_inference([])


class RemoteStage(Lengths):
    async def predict(  # type: ignore[override]  # only a class whose base defines it as a function needs this
        self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]
    ) -> dict[str, Any]:
        return preprocessed_data


class Writer(InferencePipeline):
    def predict_stream(self, input_list: list[BaseModel]) -> Iterator[list[Response | None]]:
        yield [Response(length=1) for _ in input_list]


class RemoteWriter(InferencePipeline):
    async def predict_stream(self, input_list: list[BaseModel]) -> AsyncIterator[list[Response | RejectItem | None]]:
        yield [None for _ in input_list]


async def read_pieces(worker: InferenceWorker) -> list[InferenceOutputModel]:
    async with aclosing(worker.predict_stream(Request(text="a"), timeout_s=60)) as pieces:
        return [piece async for piece in pieces]


class Printer:
    async def send_message(self, queue_name: str, message: str) -> bool:
        return bool(queue_name) and bool(message)


async def run_a_worker() -> InferenceOutputModel:
    backend: QueueBackend = Printer()
    async with InferenceWorker(Lengths("lengths", ".", {}), settings=Settings(), queue_backend=backend) as worker:
        job_id: str = await worker.submit(AsyncInputModel(message={"text": "a"}, success_queue="results"))
        with suppress(JobStoreFullError):
            await worker.submit({"message": {"text": "a"}})
        answer = AsyncOutputModel(job_id=job_id)
        job: Job | None = await worker.job(answer.job_id, wait_s=1.0)
        if job is not None and job.status is not JobStatus.FAILED and job.status.has_ended:
            await worker.cancel(job.job_id)
        await worker.predict_many([Request(text="a"), {"text": "b"}])
        return await worker.predict(SyncInputModel(message=Request(text="a")).message)


async def run_a_scheduler(texts: list[str]) -> list[int]:
    def lengths(batch: list[str]) -> list[int]:
        return [len(text) for text in batch]

    async with BatchScheduler(lengths, policy=BatchPolicy(max_batch_size=8)) as scheduler:
        return [await scheduler.submit(text, size=len(text)) for text in texts]


def load_an_engine(module: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    settings = EngineSettings(engine="openvino", dtype="float32")
    engine: Engine = load_engine(module, batches, settings, same=lambda reference, found: None)
    assert str(engine.choice)
    return engine(**batches[0])["logits"]


def read_a_failure(message: str) -> DelayedFailureOutputModel:
    return DelayedFailureOutputModel.model_validate_json(message)


def read_results(backend: InMemoryBackend) -> list[str]:
    return list(backend.messages("results"))


async def run_stages(texts: list[str]) -> list[int]:
    records: list[BatchRecord] = []
    stages: Stages[str, int] = Stages(
        preprocess=lambda batch: [text.strip() for text in batch],
        predict=lambda batch, stripped: [len(text) for text in stripped],
        postprocess=lambda batch, lengths: lengths,
    )
    async with BatchScheduler(stages, on_batch=records.append) as scheduler:
        outcomes = await scheduler.submit_many(texts)
    results = [outcome.value for outcome in outcomes if isinstance(outcome, Success)]
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            raise outcome.error
    return results


def mount(gateway: LocalGateway) -> FastAPI:
    enable_tracing()
    models = create_app(gateway)
    app = FastAPI(lifespan=lifespan_of(models))
    app.mount("/models", models)
    return app


async def test_a_pipeline(gateway: LocalGateway) -> bool:
    kind: type[Lengths] = poisoned(Lengths, lambda item: item.text == "bad")
    async with worker_of(kind, clock=FakeClock(), scale=2) as worker, client_of(mount(gateway)) as client:
        try:
            await worker.predict({"text": "a"}, priority=Priority.BULK)
        except QueueFullError as error:
            return error.is_permanent
        return (await client.get("/models/health/live")).is_success
