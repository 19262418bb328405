"""A pipeline refuses single items: their callers get the reason, and no other caller notices."""

import json
import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import httpx
import pytest
from pydantic import BaseModel

from modalkit.batching import Failure, Outcome, OutputCountError, Success
from modalkit.inference_pipeline import RejectItem
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, InferencePipeline
from modalkit.pipelines.errors import MissingFieldError
from modalkit.service.jobs import JobStatus
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import Settings
from modalkit.service.testing import client_of
from modalkit.service.web import create_app
from modalkit.service.worker import InferenceWorker
from tests.support.http_client import assert_problem
from tests.support.http_server import serving
from tests.support.length_model import POISON, Length, LengthPipeline, Text

pytestmark = pytest.mark.anyio

BAD = "bad"
TEXTS = ["one", "bad 1", "three", "bad 2", "fives"]


def texts_of(items: Sequence[BaseModel]) -> list[str]:
    return [item.text for item in items if isinstance(item, Text)]


class Rejecting(LengthPipeline):
    """Rejects texts that begin with `BAD` in `preprocess`, by their index."""

    def __init__(self, *args: Any, **model_entry: Any) -> None:
        super().__init__(*args, **model_entry)
        self.preprocessed: list[list[str]] = []

    def index_of(self, index: int) -> int | None:
        return index

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        texts = texts_of(input_list)
        self.preprocessed.append(texts)
        for index, text in enumerate(texts):
            if text.startswith(BAD):
                raise RejectItem(f"{text} is refused", index=self.index_of(index))
        return super().preprocess(input_list)


class WithoutIndex(Rejecting):
    def index_of(self, index: int) -> int | None:
        return None


class WrongIndex(Rejecting):
    def index_of(self, index: int) -> int | None:
        return 1000 if index else -1


class InOneStep(LengthPipeline):
    """Rejects as `Rejecting` does, in its own `run_inference`."""

    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        texts = texts_of(input_list)
        for index, text in enumerate(texts):
            if text.startswith(BAD):
                raise RejectItem(f"{text} is refused", index=index)
        self.batches.append(texts)
        return [Length(length=len(text)) for text in texts]


class InPlace(LengthPipeline):
    """Returns exceptions in the places of items."""

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> Any:
        return [
            RejectItem(f"{text} is refused")
            if text.startswith(BAD)
            else LookupError(f"no {text}")
            if text == "three"
            else Length(length=len(text))
            for text in raw_output["texts"]
        ]


class InPredict(LengthPipeline):
    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        for index, text in enumerate(preprocessed_data["texts"]):
            if text.startswith(BAD):
                raise RejectItem(f"{text} is refused", index=index)
        return super().predict(input_list, preprocessed_data)


async def outcomes_of(worker: InferenceWorker, texts: Sequence[str]) -> list[Outcome[InferenceOutputModel]]:
    return await worker.predict_many([Text(text=text) for text in texts])


def assert_only_bad_ones_are_refused(texts: Sequence[str], outcomes: Sequence[Outcome[InferenceOutputModel]]) -> None:
    for text, outcome in zip(texts, outcomes, strict=True):
        if text.startswith(BAD):
            assert isinstance(outcome, Failure)
            assert isinstance(outcome.error, RejectItem)
            assert str(outcome.error) == f"{text} is refused"
            assert not outcome.is_systemic
        else:
            assert outcome == Success(Length(length=len(text)))


@pytest.mark.parametrize("kind", [Rejecting, WithoutIndex, WrongIndex, InOneStep, InPredict])
async def test_a_rejected_item_gets_the_reason_and_the_others_their_results(kind: type[LengthPipeline]) -> None:
    async with InferenceWorker(kind(), calibrate=False) as worker:
        assert_only_bad_ones_are_refused(TEXTS, await outcomes_of(worker, TEXTS))
        for text in TEXTS:
            assert_only_bad_ones_are_refused([text], await outcomes_of(worker, [text]))


async def test_no_item_runs_twice_where_preprocess_names_the_index() -> None:
    pipeline = Rejecting()
    async with InferenceWorker(pipeline, calibrate=False) as worker:
        pipeline.batches.clear()
        pipeline.preprocessed.clear()
        await outcomes_of(worker, TEXTS)
    assert pipeline.batches == [["one", "three", "fives"]]
    assert pipeline.preprocessed == [TEXTS, ["one", "three", "bad 2", "fives"], ["one", "three", "fives"]]


@pytest.mark.parametrize("kind", [Rejecting, WithoutIndex, InOneStep])
async def test_where_all_are_rejected_each_gets_its_own_reason_and_the_model_does_not_run(
    kind: type[LengthPipeline],
) -> None:
    pipeline = kind()
    texts = [f"{BAD} {n}" for n in range(100)]
    async with InferenceWorker(pipeline, calibrate=False) as worker:
        pipeline.batches.clear()
        assert_only_bad_ones_are_refused(texts, await outcomes_of(worker, texts))
    assert pipeline.batches == []


async def test_an_exception_in_an_items_place_is_the_error_of_that_item() -> None:
    async with InferenceWorker(InPlace(), calibrate=False) as worker:
        one, bad, three, _, _ = await outcomes_of(worker, TEXTS)
    assert one == Success(Length(length=3))
    assert isinstance(bad, Failure)
    assert isinstance(bad.error, RejectItem)
    assert isinstance(three, Failure)
    assert repr(three.error) == "LookupError('no three')"


async def test_a_poisoned_item_beside_rejected_ones_fails_alone() -> None:
    texts = [*TEXTS, POISON]
    async with InferenceWorker(Rejecting(), calibrate=False) as worker:
        *outcomes, poisoned = await outcomes_of(worker, texts)
    assert_only_bad_ones_are_refused(TEXTS, outcomes)
    assert isinstance(poisoned, Failure)
    assert isinstance(poisoned.error, ValueError)


async def test_a_wrong_number_of_outputs_beside_rejected_items_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Rejecting()
    async with InferenceWorker(pipeline, calibrate=False) as worker:
        monkeypatch.setattr(pipeline, "postprocess", lambda *_: [Length(length=1)] * 2)
        *_, last = await outcomes_of(worker, ["bad", "one"])
    assert isinstance(last, Failure)
    assert isinstance(last.error, OutputCountError)


async def test_items_that_a_stage_moves_beside_rejected_ones_get_no_result_of_another() -> None:
    class Moving(Rejecting):
        def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
            input_list.reverse()
            return {"texts": texts_of(input_list)}

    async with InferenceWorker(Moving(), calibrate=False) as worker:
        assert_only_bad_ones_are_refused(TEXTS, await outcomes_of(worker, TEXTS))


@pytest.mark.parametrize("kind", [Rejecting, WithoutIndex, InPredict])
async def test_a_rejected_item_is_not_logged_as_a_failure(
    kind: type[LengthPipeline], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "modalkit"):
        async with InferenceWorker(kind(), calibrate=False) as worker:
            await outcomes_of(worker, TEXTS)
    assert caplog.messages == []


@pytest.mark.parametrize("kind", [Rejecting, WithoutIndex])
async def test_a_job_of_a_rejected_item_fails_at_once_with_the_reason(kind: type[LengthPipeline]) -> None:
    queue = InMemoryBackend()
    async with InferenceWorker(kind(), queue_backend=queue, calibrate=False) as worker:
        request = AsyncInputModel(message={"text": "bad one"}, success_queue="ok", failure_queue="refused")
        job_id, _ = [await worker.submit(request), await worker.submit(AsyncInputModel(message={"text": "good"}))]
        message = json.loads(await queue.receive("refused"))
        job = await worker.job(job_id, wait_s=60)
    assert (message["status"], message["error"]) == ("error", "bad one is refused")
    assert job is not None
    assert (job.status, job.error, job.attempts) == (JobStatus.FAILED, "bad one is refused", 1)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # uvicorn runs on asyncio alone
async def test_over_http_a_rejected_item_is_422_with_the_reason(anyio_backend: str) -> None:
    entry = {"pipeline": f"{__name__}:Rejecting"}
    settings = Settings(
        app_settings={"async_config": {"store": "memory"}}, model_settings={"model_entries": {"m": entry}}
    )
    gateway = LocalGateway(settings)
    async with gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, owns_gateway=False)) as client:
            answers: dict[str, httpx.Response] = {}

            async def call(text: str) -> None:
                answers[text] = await client.post("/sync/predict", json={"text": text})

            async with anyio.create_task_group() as task_group:
                for text in TEXTS:
                    task_group.start_soon(call, text)
            assert assert_problem(answers["bad 1"], 422)["detail"] == "bad 1 is refused"
            assert [answers[text].status_code for text in TEXTS] == [200, 422, 200, 422, 200]
            slots = (await client.post("/batch/predict", json=[{"text": text} for text in TEXTS])).json()
            assert slots[1] == {"status": "error", "error": "bad 1 is refused"}
            assert [slot["status"] for slot in slots] == ["success", "error", "success", "error", "success"]


class WithoutAnInputModel(InferencePipeline):
    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        return [self.length(item) for item in input_list]

    def length(self, item: Any) -> InferenceOutputModel:
        return Length(length=len(item.text) + getattr(item, "more", 0))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_field_that_an_item_without_an_input_model_lacks_is_422(anyio_backend: str) -> None:
    entry = {"pipeline": f"{__name__}:WithoutAnInputModel"}
    settings = Settings(
        app_settings={"async_config": {"store": "memory"}}, model_settings={"model_entries": {"m": entry}}
    )
    async with client_of(LocalGateway(settings)) as client:
        refused = await client.post("/sync/predict", json={"txet": "four"})
        assert assert_problem(refused, 422)["detail"] == "text: is missing: add it"
        slots = (await client.post("/batch/predict", json=[{"text": "four"}, {"txet": "four"}])).json()
        assert [slot["status"] for slot in slots] == ["success", "error"]


def test_a_rejection_can_travel_between_processes() -> None:
    missing = pickle.loads(pickle.dumps(MissingFieldError("text: is missing")))  # noqa: S301  # our own bytes
    assert (str(missing), missing.index) == ("text: is missing", None)
    error = pickle.loads(pickle.dumps(RejectItem("too long", index=3)))  # noqa: S301  # our own bytes
    assert (str(error), error.index) == ("too long", 3)


@pytest.mark.parametrize("make", [lambda: RejectItem(""), lambda: RejectItem("", index=0)])
def test_a_rejection_without_a_reason_says_so(make: Callable[[], RejectItem]) -> None:
    assert str(make()) == "the pipeline gave no reason"
