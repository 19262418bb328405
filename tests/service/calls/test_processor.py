"""Calls of items and jobs, run by a real worker and sent to real queues in memory."""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from pydantic import BaseModel, ConfigDict

from modalkit.batching import Outcome, Priority, QueueFullError, SchedulerClosedError
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, SyncInputModel
from modalkit.service.calls import processor as processor_module
from modalkit.service.calls.engine import CallOptions, MemoryKeyValueStore
from modalkit.service.calls.processor import Call, CallProcessor
from modalkit.service.calls.records import CallRecords
from modalkit.service.errors import ContainerFaultError, DeviceFaultError
from modalkit.service.jobs.life import CRASHES_TOGETHER, MAX_CRASHES
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import AsyncConfig, Settings
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import POISON, REJECTED, LengthPipeline, Text
from tests.support.odd_model import OBJECT, OddPipeline

pytestmark = pytest.mark.anyio

FAULT = "fault"
NOW = 1_700_000_000.0


class Fragile(OddPipeline):
    """Its device breaks when it meets one text; this is told as torch tells it."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if FAULT in preprocessed_data["texts"]:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().predict(input_list, preprocessed_data)

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        outputs = super().postprocess(input_list, raw_output)
        rejected = InferenceOutputModel(status="error", error="rejected by the model")
        return [
            rejected if text == REJECTED else output for text, output in zip(raw_output["texts"], outputs, strict=True)
        ]


@pytest.fixture
def pipeline() -> Iterator[Fragile]:
    made = Fragile()
    yield made
    made.gate.set()  # a thread that waits would keep the worker from closing


@pytest.fixture
async def worker(pipeline: Fragile) -> AsyncIterator[InferenceWorker]:
    async with InferenceWorker(pipeline, queue_backend=InMemoryBackend(), calibrate=False) as opened:
        pipeline.batches.clear()
        while pipeline.entered.acquire(blocking=False):
            pass
        yield opened


@pytest.fixture
def queue() -> InMemoryBackend:
    return InMemoryBackend()


@pytest.fixture
def records() -> CallRecords:
    return CallRecords(MemoryKeyValueStore())


def make_processor(
    worker: InferenceWorker, records: CallRecords, queue: InMemoryBackend | None, **options: Any
) -> CallProcessor:
    config = AsyncConfig(timeout=options.pop("job_timeout_s", 3600.0), max_delivery_attempts=1)
    given: dict[str, Any] = {"clock": lambda: NOW} | options
    rules = QueueRules(["ok", "bad"], queue)
    return CallProcessor(worker, config, queue_rules=rules, responses=queue, records=records, **given)


@pytest.fixture
def processor(worker: InferenceWorker, records: CallRecords, queue: InMemoryBackend) -> CallProcessor:
    return make_processor(worker, records, queue)


def a_call(call_id: str = "fc-1", **options: Any) -> Call:
    until_s, is_kept = options.pop("until_s", anyio.current_time() + 60), options.pop("is_kept", False)
    return Call(call_id=call_id, until_s=until_s, is_kept=is_kept, options=CallOptions(**options))


def item(text: str) -> dict[str, Any]:
    return {"message": {"text": text}}


def job(text: str, **options: Any) -> dict[str, Any]:
    return {"message": {"text": text}, "success_queue": "ok", "failure_queue": "bad", "meta": {"of": text}} | options


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"of": value}
    return value


def sent(queue: InMemoryBackend, queue_name: str) -> list[dict[str, Any]]:
    return [json.loads(message) for message in queue.messages(queue_name)]


async def entered(pipeline: LengthPipeline, batches: int = 1) -> None:
    for _ in range(batches):
        assert await anyio.to_thread.run_sync(pipeline.entered.acquire, True, 30)


async def test_outcomes_come_in_the_order_of_the_list(processor: CallProcessor) -> None:
    entries = [item("a"), SyncInputModel(message={"text": "bb"}), SyncInputModel(message=Text(text="ccc"))]
    outcomes = await processor.process(entries, a_call())
    assert outcomes == [{"status": "success", "error": None, "meta": {}, "length": n} for n in (1, 2, 3)]


async def test_lists_of_several_calls_are_merged_into_one_batch(processor: CallProcessor, pipeline: Fragile) -> None:
    lengths: dict[str, list[int]] = {}

    async def call(name: str) -> None:
        outcomes = await processor.process([item(name * n) for n in (1, 2, 3)], a_call(name))
        lengths[name] = [outcome["length"] for outcome in outcomes]

    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(processor.process, [item("first")], a_call("first"))
        await entered(pipeline)
        for name in "abcd":
            task_group.start_soon(call, name)
        await anyio.wait_all_tasks_blocked()
        pipeline.gate.set()
    first, *merged = pipeline.batches
    assert (len(first), sum(map(len, merged))) == (1, 12)
    for batch in merged:  # one, or one for each length, as the costs say that were measured
        assert {text[0] for text in batch} == set("abcd")
    assert lengths == {name: [1, 2, 3] for name in "abcd"}


async def test_entries_that_cannot_be_run_or_written_fail_alone(processor: CallProcessor) -> None:
    entries = [
        item("good"),
        item(""),
        item(POISON),
        item(REJECTED),
        item(OBJECT),
        {"text": "no message"},
        "not even an object",
        item("good too"),
    ]
    outcomes = await processor.process(entries, a_call())
    assert [outcome["status"] for outcome in outcomes] == ["success", *["error"] * 6, "success"]
    assert [outcome["error_type"] for outcome in outcomes[1:-1]] == [
        *("RejectItem", "ValueError", "RejectItem", "OutputNotJsonError", "RejectItem"),
        "TypeError",
    ]
    assert outcomes[1]["error"] == "text: String should have at least 1 character"
    assert outcomes[2]["error"] == "ValueError: this batch is poisoned"
    assert "message: is missing" in outcomes[5]["error"]


async def test_jobs_run_again_after_a_transient_error_and_other_entries_are_told(
    processor: CallProcessor, pipeline: Fragile, queue: InMemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, postprocess = iter((True, True)), pipeline.postprocess

    def fail(input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        if next(failures, False):
            raise ConnectionError("the database is down")
        return postprocess(input_list, raw_output)

    monkeypatch.setattr(processor_module, "FIRST_JOB_RETRY_S", 0.0)
    monkeypatch.setattr(pipeline, "retryable_errors", ConnectionError)
    monkeypatch.setattr(pipeline, "postprocess", fail)
    (told,) = await processor.process([item("four")], a_call())
    assert (told["error_type"], told["error"]) == ("RetryableError", "ConnectionError: the database is down")
    (outcome,) = await processor.process([job("four")], a_call("fc-2", accepted_at=NOW))
    assert (outcome["status"], outcome["attempts"]) == ("succeeded", 2)
    assert [message["result"]["length"] for message in sent(queue, "ok")] == [4]


class Counted:
    """Counts the lists that a worker runs; before the second, `recover` is called."""

    def __init__(self, worker: InferenceWorker, recover: Callable[[], object] = lambda: None) -> None:
        self._predict_many = worker.predict_many
        self._recover = recover
        self.lists = 0

    async def predict_many(self, items: Sequence[BaseModel], **options: Any) -> list[Outcome[InferenceOutputModel]]:
        self.lists += 1
        if self.lists == 2:
            self._recover()
        return await self._predict_many(items, **options)


async def test_jobs_run_again_after_a_failure_of_all(
    processor: CallProcessor, worker: InferenceWorker, pipeline: Fragile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `max_attempts` says: the database was down, and no job is at fault."""
    is_down, predict = True, pipeline.predict

    def fail(input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if is_down:
            raise ConnectionError("the database is down")
        return predict(input_list, preprocessed_data)

    def recover() -> None:
        nonlocal is_down
        is_down = False

    monkeypatch.setattr(processor_module, "FIRST_JOB_RETRY_S", 0.0)
    monkeypatch.setattr(pipeline, "predict", fail)
    monkeypatch.setattr(worker, "predict_many", Counted(worker, recover).predict_many)
    outcomes = await processor.process([job(f"{n}") for n in range(64)], a_call(is_kept=True))
    assert {(outcome["status"], outcome["attempts"]) for outcome in outcomes} == {("succeeded", 2)}


async def test_a_time_for_each_entry_is_asked_for(processor: CallProcessor) -> None:
    with pytest.raises(ValueError, match="timeouts_s: 1 values for 2 entries; give each entry one"):
        await processor.process([item("four"), item("five")], a_call(timeouts_s=[1.0]))
    with pytest.raises(ValueError, match="owners: 1 values for 2 entries; give each entry one"):
        await processor.process([job("four"), job("five")], a_call(accepted_at=1.0, owners=["a"]))


async def test_an_empty_list_is_answered_with_one(processor: CallProcessor) -> None:
    assert await processor.process([], a_call()) == []


async def test_what_the_pipeline_raised_is_logged_where_it_ran(
    processor: CallProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    await processor.process([item(POISON), item(""), "no object", {}], a_call())
    (record,) = caplog.records
    assert "ValueError: this batch is poisoned" in record.getMessage()
    assert "in predict" in record.getMessage()


class Strict(Text):
    model_config = ConfigDict(strict=True)

    tags: tuple[str, ...] = ()
    at: datetime | None = None


async def test_a_strict_model_takes_the_json_form_that_a_web_container_sends(records: CallRecords) -> None:
    written = Strict(text="seven!!", tags=("a", "b"), at=datetime(2024, 1, 1, tzinfo=UTC))
    async with InferenceWorker(OddPipeline(), input_model=Strict, calibrate=False) as worker:
        processor = make_processor(worker, records, None)
        entries = [
            {"message": written.model_dump(mode="json")},
            {"message": written.model_dump()},
            {"message": {"text": 7}},
            {"message": {"text": object()}},
        ]
        json_form, python_form, *others = await processor.process(entries, a_call())
    assert json_form == python_form
    assert json_form["status"] == "success"
    assert [outcome["error"].partition(":")[0] for outcome in others] == ["text"] * 2


async def test_a_batch_that_came_back_incomplete_is_logged_where_it_ran(
    records: CallRecords, caplog: pytest.LogCaptureFixture
) -> None:
    class Forgetful(LengthPipeline):
        def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
            return super().postprocess(input_list, raw_output)[1:]

    async with InferenceWorker(Forgetful(), calibrate=False) as worker:
        await make_processor(worker, records, None).process([item("a")], a_call())
    (record,) = caplog.records
    assert "one output for each of 1 inputs" in record.getMessage()


async def test_a_jobs_result_is_sent_and_returned(processor: CallProcessor, queue: InMemoryBackend) -> None:
    (outcome,) = await processor.process([job("seven!!", idempotency_key="k")], a_call(accepted_at=NOW - 5))
    assert sent(queue, "ok") == [
        {
            "version": 1,
            "job_id": "fc-1.0",
            "status": "success",
            "result": {"status": "success", "error": None, "meta": {}, "length": 7},
            "meta": {"of": "seven!!", "timestamp": "2023-11-14T22:13:20Z"},
        }
    ]
    assert queue.queue_names() == ["ok"]
    expected = {
        "job_id": "fc-1.0",
        "model_name": "lengths",
        "status": "succeeded",
        "delivery": "delivered",
        "result": {"status": "success", "error": None, "meta": {}, "length": 7},
        "message": {"text": "seven!!"},
        "meta": {"of": "seven!!"},
        "created_at": NOW - 5,
        "started_at": NOW,
        "finished_at": NOW,
        "idempotency_key": "k",
        "error": None,
    }
    assert outcome | expected == outcome


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (POISON, "ValueError: this batch is poisoned"),
        (REJECTED, "rejected by the model"),
        ("", "text: String should have at least 1 character"),
        (OBJECT, "the pipeline's output is no JSON"),
    ],
)
async def test_a_failed_job_sends_what_was_asked_for(
    processor: CallProcessor, queue: InMemoryBackend, text: str, error: str
) -> None:
    entries = [job("before"), AsyncInputModel(**job(text)), job("after")]
    outcomes = await processor.process(entries, a_call())
    assert [outcome["status"] for outcome in outcomes] == ["succeeded", "failed", "succeeded"]
    (message,) = sent(queue, "bad")
    assert message.pop("error").startswith(error)
    assert message == {
        "version": 1,
        "job_id": "fc-1.1",
        "status": "error",
        "original_message": job(text) | {"idempotency_key": None, "expires_in": None},
        "meta": {"of": text, "timestamp": "2023-11-14T22:13:20Z"},
    }
    assert [message["job_id"] for message in sent(queue, "ok")] == ["fc-1.0", "fc-1.2"]


async def test_jobs_of_a_list_are_submitted_together_and_are_bulk(
    processor: CallProcessor, worker: InferenceWorker, pipeline: Fragile, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[tuple[int, Priority]] = []
    predict_many = worker.predict_many

    async def noted(items: Sequence[BaseModel], **options: Any) -> list[Outcome[InferenceOutputModel]]:
        submitted.append((len(items), options["priority"]))
        return await predict_many(items, **options)

    monkeypatch.setattr(worker, "predict_many", noted)
    await processor.process([job("x" * n) for n in range(1, 21)], a_call(accepted_at=NOW))
    assert submitted == [(20, Priority.BULK)]
    submitted.clear()
    await processor.process([job("a"), item("b"), job("c")], a_call())
    assert sorted(submitted) == [(1, Priority.INTERACTIVE), (2, Priority.BULK)]
    submitted.clear()
    await processor.process([job("a"), item("b")], a_call(priority="bulk"))
    assert submitted == [(1, Priority.BULK), (1, Priority.BULK)]


async def test_a_queue_that_is_not_allowed_fails_its_job_alone_and_is_told_to_a_failure_queue_that_is(
    processor: CallProcessor, queue: InMemoryBackend, pipeline: Fragile
) -> None:
    entries = [job("a"), job("b", success_queue="elsewhere"), job("c", failure_queue="elsewhere"), job("d")]
    outcomes = await processor.process(entries, a_call())
    assert [outcome["status"] for outcome in outcomes] == ["succeeded", "failed", "failed", "succeeded"]
    assert "'elsewhere' is not allowed" in outcomes[1]["error"]
    queues = [(outcome["success_queue"], outcome["failure_queue"], outcome["delivery"]) for outcome in outcomes[1:3]]
    assert queues == [(None, "bad", "delivered"), (None, None, "none")]
    assert [(told["job_id"], told["error"]) for told in sent(queue, "bad")] == [("fc-1.1", outcomes[1]["error"])]
    assert "elsewhere" not in queue.queue_names()
    assert sorted(text for batch in pipeline.batches for text in batch) == ["a", "d"]


async def test_without_a_delivery_results_are_returned_only(worker: InferenceWorker, records: CallRecords) -> None:
    processor = make_processor(worker, records, None)
    good, bad = await processor.process([job("a"), job(POISON)], a_call())
    assert (good["status"], good["delivery"], good["success_queue"]) == ("succeeded", "none", None)
    assert (bad["status"], bad["delivery"]) == ("failed", "none")


async def test_a_job_that_has_expired_is_not_run(
    processor: CallProcessor, queue: InMemoryBackend, pipeline: Fragile
) -> None:
    entries = [job("late", expires_in=10), job("in time", expires_in=30)]
    late, in_time = await processor.process(entries, a_call(accepted_at=NOW - 20))
    assert (late["status"], late["error"]) == ("expired", "the job did not end within its expires_in of 10 s")
    assert in_time["status"] == "succeeded"
    assert pipeline.batches == [["in time"]]
    (message,) = sent(queue, "bad")
    assert (message["error"], message["original_message"]["expires_in"]) == (late["error"], 10)


async def test_a_job_that_expires_while_it_waits_is_not_run(
    worker: InferenceWorker, records: CallRecords, queue: InMemoryBackend, pipeline: Fragile
) -> None:
    times = iter([NOW, NOW + 60])
    processor = make_processor(worker, records, queue, clock=lambda: next(times, NOW + 60))
    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(worker.predict, Text(text="runs"))
        await entered(pipeline)
        (outcome,) = await processor.process([job("waits", expires_in=0.01)], a_call())
        pipeline.gate.set()
    assert (outcome["status"], outcome["error"]) == ("expired", "the job did not end within its expires_in of 0.01 s")
    assert pipeline.batches == [["runs"]]


@pytest.mark.parametrize(("job_timeout_s", "left_s"), [(0.01, 60.0), (3600.0, 0.01), (3600.0, -1.0)])
async def test_a_job_has_the_time_that_is_configured_and_that_its_call_has(
    worker: InferenceWorker,
    records: CallRecords,
    queue: InMemoryBackend,
    pipeline: Fragile,
    job_timeout_s: float,
    left_s: float,
) -> None:
    processor = make_processor(worker, records, queue, job_timeout_s=job_timeout_s)
    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(worker.predict, Text(text="runs"))
        await entered(pipeline)
        (outcome,) = await processor.process([job("waits")], a_call(until_s=anyio.current_time() + left_s))
        pipeline.gate.set()
    assert outcome["status"] == "expired"
    assert outcome["error"].startswith("no result within")


async def test_the_queue_of_a_job_is_told_that_the_time_of_its_call_was_too_short(
    worker: InferenceWorker, records: CallRecords, pipeline: Fragile
) -> None:
    class Remote(InMemoryBackend):
        async def send_messages(self, messages: Any) -> Any:
            await anyio.lowlevel.checkpoint()  # where a call that is over is cut short
            return await super().send_messages(messages)

    queue = Remote()
    processor = make_processor(worker, records, queue)
    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(worker.predict, Text(text="runs"))
        await entered(pipeline)
        (outcome,) = await processor.process([job("waits")], a_call(until_s=anyio.current_time() + 0.5))
        pipeline.gate.set()
    assert (outcome["status"], outcome["delivery"]) == ("expired", "delivered")
    assert sent(queue, "bad")[0]["job_id"] == outcome["job_id"]


async def test_each_item_has_its_own_time(processor: CallProcessor, worker: InferenceWorker, pipeline: Fragile) -> None:
    outcomes: list[dict[str, Any]] = []

    async def call() -> None:
        outcomes.extend(await processor.process([item("a"), item("bb")], a_call(timeouts_s=[0.01, None])))

    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(worker.predict, Text(text="runs"))
        await entered(pipeline)
        task_group.start_soon(call)
        while not worker.statistics().expired:
            await anyio.sleep(0.001)
        pipeline.gate.set()
    assert [outcome.get("error_type") for outcome in outcomes] == ["DeadlineExceededError", None]


async def test_jobs_cancelled_before_the_run_are_neither_run_nor_sent(
    processor: CallProcessor, records: CallRecords, queue: InMemoryBackend, pipeline: Fragile
) -> None:
    assert await records.cancel("fc-1", 1)
    outcomes = await processor.process([job("a"), job("b"), job("c")], a_call(is_kept=True))
    assert [outcome["status"] for outcome in outcomes] == ["succeeded", "cancelled", "succeeded"]
    assert pipeline.batches == [["a", "c"]]
    assert [message["job_id"] for message in sent(queue, "ok")] == ["fc-1.0", "fc-1.2"]
    assert queue.queue_names() == ["ok"]


async def test_jobs_cancelled_while_they_run_are_not_sent_and_later_ones_come_too_late(
    processor: CallProcessor, records: CallRecords, queue: InMemoryBackend, pipeline: Fragile
) -> None:
    outcomes: list[dict[str, Any]] = []

    async def call() -> None:
        outcomes.extend(await processor.process([job("a"), job(POISON)], a_call(is_kept=True)))

    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(call)
        await entered(pipeline)
        assert await records.cancel("fc-1", 1)
        pipeline.gate.set()
    assert [outcome["status"] for outcome in outcomes] == ["succeeded", "cancelled"]
    assert queue.queue_names() == ["ok"]
    assert not await records.cancel("fc-1", 0)


async def test_a_full_queue_refuses_items_and_lets_jobs_wait(
    pipeline: Fragile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor_module, "FULL_QUEUE_RETRY_S", 0.001)
    limits = {"max_batch_size": 1, "max_queue_size": 2, "calibration": {"enabled": False}}
    settings = Settings(app_settings={"batch_config": limits})
    records, queue, refusals = CallRecords(MemoryKeyValueStore()), InMemoryBackend(), 0
    async with InferenceWorker(pipeline, settings=settings, queue_backend=queue) as worker:
        processor = make_processor(worker, records, queue)
        await entered(pipeline)  # the warm-up
        predict_many = worker.predict_many

        async def noted(items: Sequence[BaseModel], **options: Any) -> list[Outcome[InferenceOutputModel]]:
            nonlocal refusals
            try:
                return await predict_many(items, **options)
            except QueueFullError:
                refusals += 1
                raise

        monkeypatch.setattr(worker, "predict_many", noted)
        jobs: list[dict[str, Any]] = []

        async def call() -> None:
            jobs.extend(await processor.process([job("job"), job("another")], a_call()))

        pipeline.gate.clear()
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(worker.predict, Text(text="runs"))
            await entered(pipeline)
            task_group.start_soon(worker.predict, Text(text="waits"))
            await anyio.wait_all_tasks_blocked()
            outcomes = await processor.process([item("one"), item("two")], a_call())
            assert [outcome["error_type"] for outcome in outcomes] == ["QueueFullError"] * 2
            task_group.start_soon(call)
            while refusals < 3:  # the items, and the jobs twice
                await anyio.lowlevel.checkpoint()
            pipeline.gate.set()
        assert [outcome["status"] for outcome in jobs] == ["succeeded"] * 2
        too_many = await processor.process([job("1"), job("2"), job("3")], a_call())
        assert [outcome["status"] for outcome in too_many] == ["failed"] * 3
        assert "no room for 3 more" in too_many[0]["error"]


async def test_jobs_do_not_wait_for_room_beyond_their_time(pipeline: Fragile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_module, "FULL_QUEUE_RETRY_S", 0.001)
    limits = {"max_batch_size": 1, "max_queue_size": 1, "calibration": {"enabled": False}}
    settings = Settings(app_settings={"batch_config": limits})
    async with InferenceWorker(pipeline, settings=settings, queue_backend=InMemoryBackend()) as worker:
        processor = make_processor(worker, CallRecords(MemoryKeyValueStore()), None, job_timeout_s=0.01)
        await entered(pipeline)  # the warm-up
        pipeline.gate.clear()
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(worker.predict, Text(text="runs"))
            await entered(pipeline)
            task_group.start_soon(worker.predict, Text(text="waits"))
            await anyio.wait_all_tasks_blocked()
            (outcome,) = await processor.process([job("job")], a_call())
            pipeline.gate.set()
    assert (outcome["status"], outcome["error"][:19]) == ("expired", "no result within 0.")


async def test_a_device_fault_fails_the_call_and_nothing_is_sent(
    processor: CallProcessor, queue: InMemoryBackend
) -> None:
    with pytest.raises(DeviceFaultError, match="device-side assert triggered") as caught:
        await processor.process([item("a"), item(FAULT)], a_call())
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(DeviceFaultError):
        await processor.process([job("a"), job(FAULT)], a_call())
    with pytest.raises(DeviceFaultError):
        await processor.process([item(FAULT)], a_call(is_kept=True))
    assert queue.queue_names() == []


async def test_the_last_run_of_a_call_with_jobs_tells_their_queues_of_the_fault(
    worker: InferenceWorker, records: CallRecords, queue: InMemoryBackend
) -> None:
    processor = make_processor(worker, records, queue, retries=2)
    for _ in range(2):
        with pytest.raises(DeviceFaultError):
            await processor.process([job(FAULT), item("a")], a_call(is_kept=True))
    assert queue.queue_names() == []
    failed, other = await processor.process([job(FAULT), item("a")], a_call(is_kept=True))
    assert failed["status"] == "failed"
    assert "device-side assert triggered" in failed["error"]
    assert other["status"] in ("success", "error")  # of the same batch, or of another
    assert [message["job_id"] for message in sent(queue, "bad")] == ["fc-1.0"]
    with pytest.raises(DeviceFaultError):
        await processor.process([job(FAULT)], a_call("fc-2", is_kept=True))


async def test_jobs_do_not_run_again_where_the_device_is_broken(
    processor: CallProcessor, worker: InferenceWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though all fail: another container runs them sooner than this one gives up."""
    counted = Counted(worker)
    monkeypatch.setattr(processor_module, "FIRST_JOB_RETRY_S", 0.0)
    monkeypatch.setattr(worker, "predict_many", counted.predict_many)
    with pytest.raises(DeviceFaultError):
        await processor.process([job(FAULT)] * 64, a_call())
    assert counted.lists == 1


async def test_a_call_whose_worker_breaks_runs_elsewhere_and_its_last_run_tells_the_queues(
    worker: InferenceWorker,
    records: CallRecords,
    queue: InMemoryBackend,
    pipeline: Fragile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> float:
        raise ZeroDivisionError

    async def break_when_queued() -> None:
        while not any(worker.statistics().queued.values()):
            await anyio.lowlevel.checkpoint()
        monkeypatch.setattr(type(worker.costs), "predict_s", fail)
        pipeline.gate.set()

    processor, jobs = make_processor(worker, records, queue, retries=1), [job(f"{n}") for n in range(8)]
    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(worker.predict, Text(text="runs"))
        await entered(pipeline)
        task_group.start_soon(break_when_queued)
        with pytest.raises(ContainerFaultError, match=r"the worker of this container has ended: .* broken"):
            await processor.process(jobs, a_call(is_kept=True))
    assert worker.is_broken
    assert queue.queue_names() == []
    outcomes = await processor.process(jobs, a_call(is_kept=True))
    assert {(outcome["status"], outcome["delivery"]) for outcome in outcomes} == {("failed", "delivered")}


async def test_a_call_whose_worker_is_aborted_runs_elsewhere(
    pipeline: Fragile, records: CallRecords, queue: InMemoryBackend
) -> None:
    raised: list[ContainerFaultError] = []

    async def call(processor: CallProcessor) -> None:
        try:
            await processor.process([job("a")], a_call(is_kept=True))
        except ContainerFaultError as error:
            raised.append(error)
        finally:
            pipeline.gate.set()

    async with anyio.create_task_group() as task_group:
        with anyio.CancelScope() as scope:
            async with InferenceWorker(pipeline, calibrate=False) as worker:
                await entered(pipeline)  # the warm-up
                pipeline.gate.clear()
                task_group.start_soon(call, make_processor(worker, records, queue, retries=1))
                await entered(pipeline)
                scope.cancel()
                await anyio.sleep_forever()
    assert ["aborted" in str(error) for error in raised] == [True]
    assert queue.queue_names() == []


async def test_the_error_of_a_pipelines_own_scheduler_is_that_of_its_job(
    processor: CallProcessor, pipeline: Fragile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> list[InferenceOutputModel]:
        raise SchedulerClosedError("one inside the pipeline")

    monkeypatch.setattr(pipeline, "postprocess", fail)
    (outcome,) = await processor.process([job("a")], a_call(is_kept=True))
    assert (outcome["status"], outcome["error"]) == ("failed", "one inside the pipeline")


class ContainerDied(BaseException):
    """Stands for a kill: nothing that runs sees it."""


class Doomed:
    """A worker whose container dies with one text."""

    def __init__(self, worker: InferenceWorker) -> None:
        self._worker = worker
        self.lists: list[list[str]] = []

    async def predict_many(self, items: Sequence[Any], **options: Any) -> list[Outcome[InferenceOutputModel]]:
        texts = [item.text for item in items]
        self.lists.append(texts)
        if "kill" in texts:
            raise ContainerDied
        return await self._worker.predict_many(items, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


async def test_a_job_that_kills_its_containers_is_found_and_its_neighbours_succeed(
    worker: InferenceWorker, records: CallRecords, queue: InMemoryBackend
) -> None:
    doomed: Any = Doomed(worker)
    jobs = [job("first"), job("kill"), job("last")]
    ended: list[dict[str, Any]] = []
    deaths = 0
    while not ended:
        try:
            ended = await make_processor(doomed, records, queue).process(jobs, a_call(is_kept=True))
        except BaseExceptionGroup as group:
            if group.subgroup(ContainerDied) is None:
                raise
            deaths += 1
    assert deaths == MAX_CRASHES
    assert [found["status"] for found in ended] == ["succeeded", "failed", "succeeded"]
    assert "the process died 3 times while this job ran alone" in ended[1]["error"]
    assert [message["meta"]["of"] for message in sent(queue, "ok")] == ["first", "last"]
    assert [message["meta"]["of"] for message in sent(queue, "bad")] == ["kill"]
    together = ["first", "kill", "last"]
    assert doomed.lists[:4] == [together, together, ["first"], ["kill"]]
    assert doomed.lists[-2:] == [["kill"], ["first", "last"]]


async def test_calls_that_were_cut_short_run_one_job_at_a_time_among_them(
    worker: InferenceWorker, records: CallRecords, queue: InMemoryBackend, pipeline: Fragile
) -> None:
    """Else an innocent job would be noted as running alone while another one kills the container."""
    processor = make_processor(worker, records, queue)
    for call_id in ("fc-1", "fc-2"):
        await records.start_run(call_id, (), {0: CRASHES_TOGETHER, 1: CRASHES_TOGETHER})
    async with anyio.create_task_group() as task_group:
        for call_id in ("fc-1", "fc-2"):
            jobs = [job(f"{call_id} {n}") for n in range(2)]
            task_group.start_soon(processor.process, jobs, a_call(call_id, is_kept=True))
    assert [len(batch) for batch in pipeline.batches] == [1] * 4
    assert len(sent(queue, "ok")) == 4
    assert await records.crashes("fc-1") == {}


async def test_groups_of_a_call_that_was_cut_short_share_the_time_of_the_call(
    worker: InferenceWorker, records: CallRecords, pipeline: Fragile
) -> None:
    """Else the second group would run on when its call has to return, and no queue would be told."""

    class Remote(InMemoryBackend):
        async def send_messages(self, messages: Any) -> Any:
            await anyio.lowlevel.checkpoint()  # where a call that is over is cut short
            return await super().send_messages(messages)

    queue = Remote()
    processor = make_processor(worker, records, queue)
    await records.start_run("fc-1", (), {0: 1, 1: 2})
    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(worker.predict, Text(text="runs"))
        await entered(pipeline)
        call = a_call(until_s=anyio.current_time() + 0.5, is_kept=True)
        outcomes = await processor.process([job("first"), job("second")], call)
        pipeline.gate.set()
    assert [outcome["status"] for outcome in outcomes] == ["expired"] * 2
    assert [outcome["delivery"] for outcome in outcomes] == ["delivered"] * 2
    assert [outcome["error"] for outcome in outcomes] == [outcomes[0]["error"]] * 2


async def test_a_job_that_no_reader_of_json_takes_fails_alone(processor: CallProcessor) -> None:
    outcomes = await processor.process([job("a"), job("b", meta=nested(220))], a_call(is_kept=True))
    assert outcomes[0]["status"] == "succeeded"
    assert "recursion limit exceeded" in outcomes[1]["error"]


async def test_a_call_that_is_refused_counts_as_a_run(
    worker: InferenceWorker, records: CallRecords, queue: InMemoryBackend, pipeline: Fragile
) -> None:
    processor, error = make_processor(worker, records, queue, retries=1), ContainerFaultError("out of rotation")
    with pytest.raises(DeviceFaultError):
        await processor.process([job(FAULT), job("cancelled")], a_call(is_kept=True))
    pipeline.batches.clear()
    assert await records.cancel("fc-1", 1)
    failed, cancelled = await processor.refuse([job(FAULT), job("cancelled")], a_call(is_kept=True), error)
    assert (failed["status"], failed["error"], cancelled["status"]) == ("failed", "out of rotation", "cancelled")
    assert [message["job_id"] for message in sent(queue, "bad")] == ["fc-1.0"]
    for entry, is_kept in ((job("a"), False), (item("a"), True), (job("a"), True)):
        with pytest.raises(ContainerFaultError, match="out of rotation"):
            await processor.refuse([entry], a_call("fc-2", is_kept=is_kept), error)
    assert pipeline.batches == []


@pytest.mark.parametrize("entry", [item("withdrawn"), job("withdrawn")])
async def test_a_cancelled_call_takes_its_items_out_of_the_queue(
    processor: CallProcessor, worker: InferenceWorker, pipeline: Fragile, queue: InMemoryBackend, entry: dict[str, Any]
) -> None:
    pipeline.gate.clear()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(worker.predict, Text(text="runs"))
        await entered(pipeline)
        with anyio.CancelScope() as scope:
            task_group.start_soon(_cancel_when_queued, worker, scope)
            await processor.process([entry, entry], a_call())
        assert scope.cancelled_caught
        pipeline.gate.set()
    (outcome,) = await processor.process([item("works")], a_call())
    assert outcome["length"] == 5
    assert pipeline.batches == [["runs"], ["works"]]
    assert queue.queue_names() == []


async def _cancel_when_queued(worker: InferenceWorker, scope: anyio.CancelScope) -> None:
    while not any(worker.statistics().queued.values()):
        await anyio.lowlevel.checkpoint()
    scope.cancel()


@pytest.mark.parametrize("operation", ["get", "put"])
async def test_a_call_cancelled_while_it_asks_for_records_leaves_the_worker_usable(
    worker: InferenceWorker, queue: InMemoryBackend, operation: str
) -> None:
    class Hanging(MemoryKeyValueStore):
        hangs = anyio.Event()

        async def get(self, key: str) -> Any:
            if operation == "get":
                self.hangs.set()
                await anyio.sleep_forever()
            return await super().get(key)

        async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
            self.hangs.set()
            await anyio.sleep_forever()
            return False

    store = Hanging()
    processor = make_processor(worker, CallRecords(store), queue)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(processor.process, [job("a")], a_call(is_kept=True))
        await store.hangs.wait()
        task_group.cancel_scope.cancel()
    (outcome,) = await processor.process([item("works")], a_call())
    assert outcome["length"] == 5
    assert queue.queue_names() == []


async def test_a_call_cancelled_while_it_sends_leaves_the_worker_usable(
    worker: InferenceWorker, records: CallRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, sending = InMemoryBackend(), anyio.Event()

    async def hang(messages: object) -> list[None]:
        sending.set()
        await anyio.sleep_forever()
        return []

    monkeypatch.setattr(queue, "send_messages", hang)
    processor = make_processor(worker, records, queue)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(processor.process, [job("a")], a_call(is_kept=True))
        await sending.wait()
        task_group.cancel_scope.cancel()
    (outcome,) = await processor.process([item("works")], a_call())
    assert outcome["length"] == 5
