"""One worker: predictions, jobs and their delivery, without HTTP."""

import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel, field_validator

from modalkit.batching import (
    BatchRecord,
    BatchTimeoutError,
    Failure,
    OutputCountError,
    Priority,
    QueueFullError,
    SchedulerClosedError,
    Success,
)
from modalkit.pipelines import AnyInput, AsyncInputModel, InferenceOutputModel, RejectItem
from modalkit.service.errors import InvalidItemError, PipelineOutputError
from modalkit.service.jobs import (
    DeliveryStatus,
    IdempotencyKeyReusedError,
    Job,
    JobStatus,
    JobStore,
    MemoryJobStore,
    SqliteJobStore,
)
from modalkit.service.jobs.queue_rules import QueueNotAllowedError
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import POISON, REJECTED, Length, LengthPipeline, Text
from tests.support.odd_model import MUTE, NAN, OBJECT, SURROGATE, OddPipeline
from tests.support.panic import Panic

pytestmark = pytest.mark.anyio


@pytest.fixture
def pipeline() -> LengthPipeline:
    return LengthPipeline()


@pytest.fixture
def queue() -> InMemoryBackend:
    return InMemoryBackend()


@pytest.fixture
async def worker(pipeline: LengthPipeline, queue: InMemoryBackend) -> AsyncIterator[InferenceWorker]:
    async with InferenceWorker(pipeline, queue_backend=queue) as opened:
        yield opened


def settings_with(section: str, **values: Any) -> Settings:
    return Settings(app_settings={section: values})


async def test_each_caller_gets_the_result_of_its_own_item(worker: InferenceWorker) -> None:
    results: dict[str, InferenceOutputModel] = {}

    async def call(text: str) -> None:
        results[text] = await worker.predict(Text(text=text))

    texts = ["x" * n for n in range(1, 101)]
    async with anyio.create_task_group() as task_group:
        for text in texts:
            task_group.start_soon(call, text)
    assert results == {text: Length(length=len(text)) for text in texts}
    assert worker.statistics().mean_batch_size > 4


async def test_a_mapping_is_validated_before_it_is_queued(worker: InferenceWorker, pipeline: LengthPipeline) -> None:
    assert await worker.predict({"text": "four"}) == Length(length=4)
    seen = len(pipeline.batches)
    with pytest.raises(InvalidItemError) as refused:
        await worker.predict({"txt": "four"})
    assert str(refused.value) == "text: is missing: add it; txt: unknown field; did you mean 'text'?"
    assert [error["field"] for error in refused.value.errors] == ["text", "txt"]
    assert len(pipeline.batches) == seen


async def test_outcomes_of_a_list_keep_its_order_and_only_bad_items_fail(worker: InferenceWorker) -> None:
    outcomes = await worker.predict_many([Text(text=text) for text in ("one", POISON, REJECTED, "three")])
    assert [type(outcome) for outcome in outcomes] == [Success, Failure, Failure, Success]
    poisoned, rejected = outcomes[1], outcomes[2]
    assert isinstance(poisoned, Failure)
    assert isinstance(poisoned.error, ValueError)
    assert isinstance(rejected, Failure)
    assert isinstance(rejected.error, RejectItem)
    assert str(rejected.error) == "rejected by the model"
    assert outcomes[3] == Success(Length(length=5))


async def test_a_list_has_an_error_in_the_place_of_each_invalid_item(worker: InferenceWorker) -> None:
    bad, good, worse = await worker.predict_many([{"txt": "a"}, {"text": "bb"}, {"text": 3}])
    assert good == Success(Length(length=2))
    for outcome in (bad, worse):
        assert isinstance(outcome, Failure)
        assert isinstance(outcome.error, InvalidItemError)
    (alone,) = await worker.predict_many([{}])
    assert isinstance(alone, Failure)


async def test_a_worker_whose_scheduler_breaks_says_so(
    worker: InferenceWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(type(worker.costs), "predict_s", fail)
    assert not worker.is_broken
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await worker.predict(Text(text="a"))
    await worker.wait_until_broken()
    assert worker.is_broken
    with pytest.raises(SchedulerClosedError, match="broken"):
        await worker.predict(Text(text="a"))


async def test_outputs_that_are_no_models_fail_their_items_alone(
    worker: InferenceWorker, pipeline: LengthPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "postprocess", lambda *_: [{"length": 1}, Length(length=2)])
    first, second = await worker.predict_many([Text(text="a"), Text(text="bb")])
    assert isinstance(first, Failure)
    assert isinstance(first.error, PipelineOutputError)
    assert "its output_model is Length; return an instance of it for each item" in str(first.error)
    assert second == Success(Length(length=2))


async def test_an_output_that_does_not_fit_the_output_model_fails_its_item_alone(
    worker: InferenceWorker, pipeline: LengthPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [InferenceOutputModel(lenght=1), InferenceOutputModel(length=2, extra=3), Length(length=3)]
    monkeypatch.setattr(pipeline, "postprocess", lambda items, _: outputs[: len(items)])
    first, *others = await worker.predict_many([Text(text="a")] * 3)
    assert isinstance(first, Failure)
    assert "where its output_model is Length (length: is missing: add it)" in str(first.error)
    assert others == [Success(Length.model_validate({"length": 2, "extra": 3})), Success(Length(length=3))]


async def test_a_class_in_place_of_a_pipeline_is_refused() -> None:
    kind: Any = LengthPipeline
    with pytest.raises(TypeError, match=r"takes a pipeline, not its class: LengthPipeline\(\.\.\.\)"):
        InferenceWorker(kind)


@pytest.mark.parametrize(("outputs", "count"), [([], "0"), (None, "NoneType"), ([Length(length=1)] * 3, "3")])
async def test_a_wrong_number_of_outputs_is_an_error_that_says_so(
    worker: InferenceWorker, pipeline: LengthPipeline, monkeypatch: pytest.MonkeyPatch, outputs: Any, count: str
) -> None:
    monkeypatch.setattr(pipeline, "postprocess", lambda *_: outputs)
    with pytest.raises(OutputCountError, match=f"1 inputs must be returned, not .*{count}"):
        await worker.predict(Text(text="a"))
    monkeypatch.undo()
    assert await worker.predict(Text(text="still here")) == Length(length=10)


@pytest.mark.parametrize("stage", ["preprocess", "predict", "postprocess"])
async def test_an_error_in_any_stage_reaches_the_caller_and_the_worker_goes_on(
    worker: InferenceWorker, pipeline: LengthPipeline, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError(stage)

    monkeypatch.setattr(pipeline, stage, fail)
    with pytest.raises(ZeroDivisionError, match=stage):
        await worker.predict(Text(text="a"))
    monkeypatch.undo()
    assert await worker.predict(Text(text="ab")) == Length(length=2)


async def test_a_hanging_batch_fails_and_the_next_one_runs(pipeline: LengthPipeline) -> None:
    settings = settings_with("batch_config", batch_timeout_seconds=0.05)
    async with InferenceWorker(pipeline, settings=settings, job_store=MemoryJobStore()) as worker:
        pipeline.gate.clear()
        with pytest.raises(BatchTimeoutError):
            await worker.predict(Text(text="hangs"))
        assert not worker.is_broken
        for _ in range(2):
            await worker.set_limits(worker.limits)  # what hangs, hangs on
            with pytest.raises(BatchTimeoutError):
                await worker.predict(Text(text="hangs"))
        assert worker.is_broken
        pipeline.gate.set()
        assert await worker.predict(Text(text="works")) == Length(length=5)


async def test_the_queue_is_bounded_as_configured(pipeline: LengthPipeline) -> None:
    settings = settings_with("batch_config", max_batch_size=1, max_queue_size=2)
    async with InferenceWorker(pipeline, settings=settings, job_store=MemoryJobStore()) as worker:
        with pytest.raises(QueueFullError) as caught:
            await worker.predict_many([Text(text="a")] * 3)
        assert (caught.value.depth, caught.value.limit) == (0, 2)


async def test_a_job_is_run_kept_and_delivered(worker: InferenceWorker, queue: InMemoryBackend) -> None:
    job_id = await worker.submit(
        AsyncInputModel(message={"text": "seven!!"}, success_queue="ok", failure_queue="bad", meta={"user_id": "7"})
    )
    message = json.loads(await queue.receive("ok"))
    timestamp = message["meta"].pop("timestamp")
    assert timestamp.endswith("Z")
    assert message == {
        "version": 1,
        "job_id": job_id,
        "status": "success",
        "result": {"status": "success", "error": None, "meta": {}, "length": 7},
        "meta": {"user_id": "7"},
    }
    job = await worker.job(job_id, wait_s=30)
    assert job is not None
    assert job.status is JobStatus.SUCCEEDED
    assert job.result == message["result"]
    assert queue.queue_names() == []


@pytest.mark.parametrize(("text", "error"), [(POISON, "ValueError: this batch is poisoned"), (REJECTED, "rejected by")])
async def test_a_failed_job_goes_to_its_failure_queue_with_what_was_asked_for(
    worker: InferenceWorker, queue: InMemoryBackend, text: str, error: str
) -> None:
    request = AsyncInputModel(message={"text": text}, success_queue="ok", failure_queue="bad", meta={"n": 1})
    job_id = await worker.submit(request)
    message = json.loads(await queue.receive("bad"))
    assert message["job_id"] == job_id
    assert message["status"] == "error"
    assert error in message["error"]
    assert message["original_message"] == request.model_dump()
    assert message["meta"]["n"] == 1
    job = await worker.job(job_id)
    assert job is not None
    assert job.status is JobStatus.FAILED


async def test_without_a_queue_results_are_kept_and_sent_nowhere(pipeline: LengthPipeline) -> None:
    async with InferenceWorker(pipeline) as worker:
        job_id = await worker.submit(AsyncInputModel(message=Text(text="abc"), success_queue="ok"))
        job = await worker.job(job_id, wait_s=30)
        assert job is not None
        assert job.status is JobStatus.SUCCEEDED
        assert job.delivery is DeliveryStatus.NONE


async def test_a_job_with_an_invalid_message_or_queue_is_refused_at_once(pipeline: LengthPipeline) -> None:
    settings = settings_with("queue_config", backend="memory", allowed_queues=["team-a.*"])
    async with InferenceWorker(pipeline, settings=settings, job_store=MemoryJobStore()) as worker:
        with pytest.raises(InvalidItemError, match="text: "):
            await worker.submit(AsyncInputModel(message={"text": ""}))
        with pytest.raises(QueueNotAllowedError, match=r"failure_queue: queue 'other' is not allowed.*team-a"):
            await worker.submit(
                AsyncInputModel(message={"text": "a"}, success_queue="team-a.ok", failure_queue="other")
            )
        await worker.submit(AsyncInputModel(message={"text": "a"}, success_queue="team-a.ok"))


async def test_a_queued_job_can_be_cancelled_and_never_runs(worker: InferenceWorker, pipeline: LengthPipeline) -> None:
    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(worker.predict, Text(text="in front"))
        await anyio.to_thread.run_sync(pipeline.entered.acquire)
        await anyio.to_thread.run_sync(pipeline.entered.acquire)
        job_id = await worker.submit(AsyncInputModel(message={"text": "cancelled"}))
        cancelled = await worker.cancel(job_id)
        pipeline.gate.set()
    assert cancelled is not None
    assert cancelled.status is JobStatus.CANCELLED
    await worker.predict(Text(text="behind"))
    assert ["cancelled"] not in pipeline.batches
    job = await worker.job(job_id)
    assert job is not None
    assert job.status is JobStatus.CANCELLED


async def test_leaving_the_worker_finishes_what_was_accepted(pipeline: LengthPipeline, queue: InMemoryBackend) -> None:
    async with InferenceWorker(pipeline, queue_backend=queue) as worker:
        for n in range(1, 1001):
            await worker.submit(AsyncInputModel(message={"text": "x" * n}, success_queue="ok"))
    lengths = [json.loads(message)["result"]["length"] for message in queue.messages("ok")]
    assert sorted(lengths) == list(range(1, 1001))
    with pytest.raises(SchedulerClosedError):
        await worker.predict(Text(text="too late"))


async def test_an_exception_in_the_block_comes_out_as_it_was_raised(pipeline: LengthPipeline) -> None:
    with pytest.raises(LookupError, match="mine"):
        async with InferenceWorker(pipeline):
            raise LookupError("mine")


class Anything(LengthPipeline):
    """Takes any JSON object, as a pipeline that declares no models does."""

    input_model = AnyInput
    output_model = InferenceOutputModel

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        return {"texts": [getattr(item, "text", str(item)) for item in input_list]}


async def test_a_pipeline_without_models_takes_any_object(queue: InMemoryBackend) -> None:
    async with InferenceWorker(Anything(), queue_backend=queue) as worker:
        assert await worker.predict({"text": "five!", "more": [1]}) == Length(length=5)
        await worker.submit(AsyncInputModel(message={"text": "abc", "more": {"a": 1}}, success_queue="ok"))
        assert json.loads(await queue.receive("ok"))["result"]["length"] == 3


@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_a_result_or_an_error_that_cannot_be_kept_fails_its_job_alone(
    queue: InMemoryBackend, tmp_path: Path, store: str
) -> None:
    jobs: JobStore = MemoryJobStore() if store == "memory" else SqliteJobStore(tmp_path / "jobs.db")
    async with InferenceWorker(OddPipeline(), queue_backend=queue, job_store=jobs) as worker:
        errors = {}
        for text in (OBJECT, SURROGATE, MUTE):
            job_id = await worker.submit(AsyncInputModel(message={"text": text}, failure_queue="bad"))
            job = await worker.job(job_id, wait_s=30)
            assert job is not None
            assert job.status is JobStatus.FAILED
            errors[text] = job.error
            assert json.loads(await queue.receive("bad"))["error"] == job.error
        assert "object is no type of JSON" in str(errors[OBJECT])
        assert "surrogates not allowed" in str(errors[SURROGATE])
        assert str(errors[MUTE]).startswith("MuteError: ")
        await worker.submit(AsyncInputModel(message={"text": "goes on"}, success_queue="ok"))
        assert json.loads(await queue.receive("ok"))["result"]["length"] == 7


async def test_a_number_that_json_does_not_have_is_null_in_job_and_message(queue: InMemoryBackend) -> None:
    async with InferenceWorker(OddPipeline(), queue_backend=queue) as worker:
        request = AsyncInputModel(message={"text": NAN}, success_queue="ok", meta={"ratio": float("inf")})
        job_id = await worker.submit(request)

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        message = json.loads(await queue.receive("ok"), parse_constant=refuse)
        assert (message["result"]["score"], message["meta"]["ratio"]) == (None, None)
        job = await worker.job(job_id, wait_s=30)
        assert job is not None
        assert job.result == message["result"]


async def test_a_job_runs_in_its_class(pipeline: LengthPipeline) -> None:
    records: list[BatchRecord] = []
    async with InferenceWorker(pipeline, on_batch=records.append) as worker:
        for priority in ({}, {"priority": Priority.INTERACTIVE}):
            job_id = await worker.submit(AsyncInputModel(message={"text": "a"}), **priority)
            await worker.job(job_id, wait_s=30)
    assert [record.priority for record in records] == [Priority.BULK, Priority.INTERACTIVE]


async def test_many_jobs_are_submitted_in_one_step_and_a_bad_one_disturbs_no_other(
    worker: InferenceWorker, queue: InMemoryBackend
) -> None:
    requests = [
        AsyncInputModel(message={"text": "abc"}, success_queue="ok", idempotency_key="k"),
        AsyncInputModel(message={"text": ""}),
        AsyncInputModel(message=Text(text="abc"), success_queue="ok", idempotency_key="k"),
        AsyncInputModel(message={"text": "other"}, idempotency_key="k"),
        AsyncInputModel(message={"text": "ab"}, success_queue="ok"),
    ]
    first, invalid, same, reused, last = await worker.submit_many(requests)
    assert isinstance(first, Success)
    assert same == first
    assert isinstance(invalid, Failure)
    assert isinstance(invalid.error, InvalidItemError)
    assert isinstance(reused, Failure)
    assert isinstance(reused.error, IdempotencyKeyReusedError)
    assert isinstance(last, Success)
    lengths = {json.loads(await queue.receive("ok"))["result"]["length"] for _ in range(2)}
    assert lengths == {2, 3}
    with pytest.raises(IdempotencyKeyReusedError, match="give every request a key of its own"):
        await worker.submit(requests[3])


class Hanging(LengthPipeline):
    """Hangs on one text until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if "hangs" in preprocessed_data["texts"]:
            self.let_go.wait(timeout=60)
        return super().predict(input_list, preprocessed_data)


async def test_jobs_run_apart_after_a_crash_and_the_one_that_hangs_fails_alone() -> None:
    store, now, pipeline = MemoryJobStore(), time.time(), Hanging()
    texts = ["good", POISON, REJECTED, "hangs", "better"]
    async with store:
        for text in texts:
            message = f'{{"text":"{text}"}}'
            await store.add([Job(job_id=text, model_name=pipeline.model_name, message_json=message, created_at=now)])
        await store.claim(pipeline.model_name, 9, now)
    settings = settings_with("batch_config", batch_timeout_seconds=0.2)
    async with InferenceWorker(pipeline, settings=settings, job_store=store, calibrate=False) as worker:
        jobs = [await worker.job(text, wait_s=30) for text in texts]
        pipeline.let_go.set()
    assert [job and (job.status, job.crashes) for job in jobs] == [
        (JobStatus.SUCCEEDED, 1),
        (JobStatus.FAILED, 1),
        (JobStatus.FAILED, 1),
        (JobStatus.FAILED, 1),
        (JobStatus.SUCCEEDED, 1),
    ]
    assert jobs[3] is not None
    assert "within the batch timeout of 0.2 s" in str(jobs[3].error)
    assert "a batch of 1 did not finish" in str(jobs[3].error)


class Closing(InMemoryBackend):
    """Remembers how often it was closed."""

    instances: list["Closing"] = []  # noqa: RUF012  # shared on purpose

    def __init__(self) -> None:
        super().__init__()
        self.closed = 0
        self.instances.append(self)

    async def aclose(self) -> None:
        self.closed += 1


async def test_a_backend_that_the_configuration_made_is_closed_once_and_an_injected_one_is_its_owners(
    pipeline: LengthPipeline,
) -> None:
    Closing.instances.clear()
    settings = settings_with("queue_config", backend=f"{__name__}:Closing")
    async with InferenceWorker(pipeline, settings=settings, job_store=MemoryJobStore()) as worker:
        await worker.submit(AsyncInputModel(message={"text": "abc"}, success_queue="ok"))
    (made,) = Closing.instances
    assert (made.closed, made.depth("ok")) == (1, 1)
    injected = Closing()
    async with InferenceWorker(LengthPipeline(), queue_backend=injected):
        pass
    assert injected.closed == 0


class Synchronous:
    def send_message(self, queue_name: str, message: str) -> bool:
        return True


@pytest.mark.parametrize(
    ("backend", "given"),
    [(object(), "a object"), (Synchronous(), "a Synchronous"), (InMemoryBackend, "the class InMemoryBackend")],
)
def test_an_object_that_cannot_send_is_refused_at_once(pipeline: LengthPipeline, backend: Any, given: str) -> None:
    with pytest.raises(TypeError, match=f"^queue_backend must be a backend .*async send_message.*, not {given}$"):
        InferenceWorker(pipeline, queue_backend=backend)


async def test_a_job_may_be_a_mapping(worker: InferenceWorker, queue: InMemoryBackend) -> None:
    await worker.submit({"message": {"text": "four"}, "success_queue": "ok"})
    assert json.loads(await queue.receive("ok"))["result"]["length"] == 4
    with pytest.raises(
        InvalidItemError, match=r"message: is missing: add it; text: unknown field; .*known are: message"
    ):
        await worker.submit({"text": "four"})
    first, second = await worker.submit_many(
        [{"message": {"text": "a"}, "succes_queue": "ok"}, {"message": {"text": "b"}}]
    )
    assert isinstance(first, Failure)
    assert str(first.error) == "succes_queue: unknown field; did you mean 'success_queue'?"
    assert isinstance(second, Success)


class Fragile(Text):
    @field_validator("text")
    @classmethod
    def check(cls, text: str) -> str:
        if text == "odd":
            raise Panic("out of bounds")
        return text


async def test_a_panic_of_a_validator_refuses_that_item_or_job_alone() -> None:
    async with InferenceWorker(LengthPipeline(), input_model=Fragile) as worker:
        items = [{"text": "a"}, {"text": "odd"}]
        predicted = await worker.predict_many(items)
        submitted = await worker.submit_many([AsyncInputModel(message=item) for item in items])
    for good, bad in (predicted, submitted):
        assert isinstance(good, Success)
        assert isinstance(bad, Failure)
        assert "Panic: out of bounds" in str(bad.error)
