"""Single items, gathered into calls that a real worker runs."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

import anyio
import pytest
from anyio.lowlevel import checkpoint
from pydantic import BaseModel

from modalkit.batching import DeadlineExceededError, Failure, Priority, Success
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, InferencePipeline
from modalkit.service.calls.engine import CallOptions
from modalkit.service.calls.in_process import InProcessCall
from modalkit.service.calls.predictor import MAX_PARTIAL_CALLS_IN_FLIGHT, CallModel
from modalkit.service.errors import (
    DeviceFaultError,
    NotReadyError,
    Readiness,
    RemoteCallError,
    RemoteItemError,
)
from modalkit.service.settings import BatchConfig
from tests.service.calls.conftest import MODEL, OpenStand, Stand
from tests.support.length_model import POISON, REJECTED, Length, LengthPipeline, Text

pytestmark = pytest.mark.anyio


class Point(BaseModel):
    x: float


def sent(stand: Stand) -> list[InProcessCall]:
    """The calls so far, without those of `fill`."""
    return [call for call in stand.carrier.calls.values() if not texts(call)[0].startswith("first")]


def texts(call: InProcessCall) -> list[str]:
    return [entry["message"]["text"] for entry in call.entries]


class Callers:
    """Makes requests that wait, and keeps what becomes of them."""

    def __init__(self, model: CallModel) -> None:
        self.model = model
        self.outcomes: dict[str, InferenceOutputModel | Exception] = {}

    async def __call__(self, text: str, options: dict[str, Any] | None = None) -> None:
        try:
            self.outcomes[text] = await self.model.predict(Text(text=text), **options or {})
        except Exception as error:  # noqa: BLE001  # it is the outcome
            self.outcomes[text] = error


def length(outcome: object) -> int:
    assert isinstance(outcome, InferenceOutputModel)
    return int(outcome.model_dump()["length"])


async def fill(stand: Stand, task_group: Any, asked: Callers, **options: Any) -> None:
    """Let as many calls be under way as there are of few items, so that all later items wait."""
    stand.carrier.hold()
    for number in range(MAX_PARTIAL_CALLS_IN_FLIGHT):
        task_group.start_soon(asked, f"first {number}", options)
        while asked.model.statistics().running <= number:
            await checkpoint()


async def queued(predictor: CallModel, count: int) -> None:
    while sum(predictor.statistics().queued.values()) != count:
        await checkpoint()


async def test_requests_that_come_together_become_few_calls_and_get_their_own_results(stand: Stand) -> None:
    async with stand.model(max_batch_size=32) as model:
        asked = Callers(model)
        async with anyio.create_task_group() as task_group:
            await fill(stand, task_group, asked)
            for n in range(1, 65):
                task_group.start_soon(asked, "x" * n)
            await queued(model, 0)
            stand.carrier.release()
    assert {len(text): length(outcome) for text, outcome in asked.outcomes.items() if text[0] == "x"} == {
        n: n for n in range(1, 65)
    }
    assert [len(call.entries) for call in sent(stand)] == [32, 32]
    statistics = model.statistics()
    assert (statistics.batches, statistics.batch_sizes, statistics.succeeded) == (
        MAX_PARTIAL_CALLS_IN_FLIGHT + 2,
        {1: MAX_PARTIAL_CALLS_IN_FLIGHT, 32: 2},
        MAX_PARTIAL_CALLS_IN_FLIGHT + 64,
    )


async def test_an_item_that_fails_leaves_its_call_alone(stand: Stand) -> None:
    async with stand.model() as model:
        texts = ["one", POISON, "three", REJECTED, "seven"]
        outcomes = await model.predict_many([Text(text=text) for text in texts])
    assert [length(outcome.value) for outcome in outcomes if isinstance(outcome, Success)] == [3, 5, 5]
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Failure)]
    assert [(type(error), str(error)) for error in errors] == [
        (RemoteItemError, "ValueError: this batch is poisoned"),
        (RemoteItemError, "rejected by the model"),
    ]
    assert [error.error_type for error in errors if isinstance(error, RemoteItemError)] == [
        "ValueError",
        "RejectItem",
    ]
    assert len(sent(stand)) == 1


class Failing:
    """A worker of which each call ends in the same way."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls = 0

    async def call(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> Sequence[Mapping[str, Any]]:
        self.calls += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        answer: Sequence[Mapping[str, Any]] = self.answer
        return answer


def model_of(client: Failing) -> CallModel:
    return CallModel("odd", client, BatchConfig(), input_model=Text, output_model=Length)


@pytest.mark.parametrize("failure", [RemoteCallError("the network is down"), DeviceFaultError("CUDA error")])
async def test_a_failed_call_fails_its_items_and_is_not_sent_again_in_parts(failure: Exception) -> None:
    client = Failing(failure)
    async with model_of(client) as model:
        outcomes = await model.predict_many([Text(text="x" * n) for n in range(1, 9)])
    assert [outcome.error for outcome in outcomes if isinstance(outcome, Failure)] == [failure] * 8
    assert client.calls == 1


@pytest.mark.parametrize("answer", [None, 7, [], [{"status": "success"}], ["text", "text"], [{"status": []}, None]])
async def test_an_answer_that_is_none_fails_its_items_and_the_call_is_not_sent_again(answer: Any) -> None:
    """A service whose `process_request` was overridden may forget what it has to return."""
    client = Failing(answer)
    async with model_of(client) as model:
        outcomes = await model.predict_many([Text(text="one"), Text(text="two")])
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Failure)]
    assert [type(error) for error in errors] == [RemoteCallError] * 2
    assert str(errors[0]).startswith("process_request ")
    assert client.calls == 1


async def test_a_model_that_is_not_open_takes_no_items() -> None:
    model = model_of(Failing([]))
    seen = [model.readiness]
    with pytest.raises(NotReadyError):
        await model.predict(Text(text="one"))
    async with model:
        seen.append(model.readiness)
    seen.append(model.readiness)
    assert seen == [Readiness.LOADING, Readiness.READY, Readiness.DRAINING]


async def test_the_time_that_an_item_has_travels_with_it(stand: Stand) -> None:
    async with stand.model() as model:
        asked = Callers(model)
        async with anyio.create_task_group() as task_group:
            await fill(stand, task_group, asked)
            task_group.start_soon(asked, "bounded", {"timeout_s": 60.0})
            task_group.start_soon(asked, "unbounded")
            await queued(model, 2)
            stand.carrier.release()
    (call,) = sent(stand)
    times = dict(zip(texts(call), call.options.timeouts_s or (), strict=True))
    assert 0 < (times["bounded"] or 0) <= 60
    assert times["unbounded"] is None
    assert next(iter(stand.carrier.calls.values())).options.timeouts_s is None


async def test_an_item_whose_time_runs_out_is_told_so_though_its_call_is_under_way(stand: Stand) -> None:
    async with stand.model() as model:
        stand.carrier.hold()
        with pytest.raises(DeadlineExceededError):
            await model.predict(Text(text="late"), timeout_s=0.01)
        stand.carrier.release()
    assert model.statistics().expired == 1


async def test_a_call_has_items_of_one_priority_and_says_which(stand: Stand) -> None:
    async with stand.model() as model:
        asked = Callers(model)
        async with anyio.create_task_group() as task_group:
            await fill(stand, task_group, asked)
            for n in range(8):
                task_group.start_soon(asked, f"{n}", {"priority": list(Priority)[n % 2]})
            await queued(model, 8)
            stand.carrier.release()
    calls = sorted((call.options.priority, sorted(texts(call))) for call in sent(stand))
    assert calls == [("bulk", ["1", "3", "5", "7"]), ("interactive", ["0", "2", "4", "6"])]


async def test_an_item_whose_caller_was_cancelled_is_not_sent(stand: Stand) -> None:
    async with stand.model() as model:
        asked = Callers(model)
        async with anyio.create_task_group() as task_group:
            await fill(stand, task_group, asked)
            async with anyio.create_task_group() as gone:
                gone.start_soon(asked, "gone")
                await queued(model, 1)
                gone.cancel_scope.cancel()
            task_group.start_soon(asked, "stays")
            await queued(model, 1)
            stand.carrier.release()
    assert [texts(call) for call in sent(stand)] == [["stays"]]
    assert "gone" not in asked.outcomes
    assert model.statistics().cancelled == 1


async def test_what_was_accepted_is_finished_before_it_is_left(stand: Stand) -> None:
    stand.carrier.hold()
    async with anyio.create_task_group() as task_group:
        async with stand.model() as model:
            asked = Callers(model)
            task_group.start_soon(asked, "four")
            while not model.statistics().running:
                await checkpoint()
            stand.carrier.release()
    assert length(asked.outcomes["four"]) == 4


async def test_an_item_travels_as_json_under_the_names_that_its_caller_uses(stand: Stand) -> None:
    class Aliased(BaseModel):
        model_config = {"populate_by_name": True, "alias_generator": str.upper}

        text: str

    async with stand.model() as model:
        with pytest.raises(RemoteItemError, match="text: is missing"):
            await model.predict(Aliased(text="four"))
    (call,) = stand.carrier.calls.values()
    assert call.entries == [{"message": {"TEXT": "four"}}]


class Nested(BaseModel):
    """What a pipeline without an input model of its own is to get from a frontend that has one."""

    at: datetime
    point: Point


class Typed(LengthPipeline):
    """Has no input model of its own, and notes what it gets."""

    input_model: ClassVar[type[BaseModel]] = InferencePipeline.input_model
    got: ClassVar[list[BaseModel]] = []

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        self.got.extend(input_list)
        return {"texts": ["x"] * len(input_list)}

    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        return []


async def test_the_pipeline_gets_items_of_the_class_that_the_frontend_validates_them_as(open_stand: OpenStand) -> None:
    item = Nested(at=datetime(2024, 1, 1, tzinfo=UTC), point=Point(x=1.5))
    path = f"{__name__}:Nested"
    async with open_stand(Typed) as stand:
        Typed.got.clear()
        async with (
            stand.model(Nested, input_model_path=path) as model,
            stand.jobs(model, input_model_path=path) as jobs,
        ):
            await model.predict(item)
            (outcome,) = await jobs.submit([AsyncInputModel(message=item)], model_name=MODEL)
            assert isinstance(outcome, Success)
            await jobs.get(outcome.value, 30.0)
        assert Typed.got == [item, item]


async def test_a_class_that_the_worker_cannot_import_leaves_it_with_its_own(
    open_stand: OpenStand, caplog: pytest.LogCaptureFixture
) -> None:
    item = Nested(at=datetime(2024, 1, 1, tzinfo=UTC), point=Point(x=1.5))
    async with open_stand(Typed) as stand:
        Typed.got.clear()
        async with stand.model(Nested, input_model_path="nowhere:Nested") as model:
            await model.predict(item)
            await model.predict(item)
        assert [type(got) for got in Typed.got] == [InferencePipeline.input_model] * 2
    assert caplog.text.count("there is no module 'nowhere'") == 1
