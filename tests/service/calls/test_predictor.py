"""Single requests, gathered into lists that a real service runs."""

from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from modalkit.service.on_modal.lists import EAGER_LISTS, RemotePredictor
from pydantic import BaseModel

from modalkit.batching import DeadlineExceededError, Failure, Priority, Success
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.errors import ContainerFaultError, DeviceFaultError, RemoteCallError, RemoteItemError
from modalkit.service.settings import BatchConfig
from tests.support.length_model import POISON, REJECTED, Text
from tests.support.modal_in_process import ModalInProcess

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # the service's hooks run on asyncio alone


def predictor(calls: ModalInProcess, **config: Any) -> RemotePredictor:
    return RemotePredictor(calls.remote, BatchConfig(**config), name="lengths")


class Calls:
    """Makes requests that wait, and keeps what becomes of them."""

    def __init__(self, predictor: RemotePredictor) -> None:
        self.predictor = predictor
        self.outcomes: dict[str, InferenceOutputModel | Exception] = {}

    async def __call__(self, text: str, options: dict[str, Any] | None = None) -> None:
        try:
            self.outcomes[text] = await self.predictor.predict(Text(text=text), **options or {})
        except Exception as error:  # noqa: BLE001  # it is the outcome
            self.outcomes[text] = error


def length(outcome: object) -> int:
    assert isinstance(outcome, InferenceOutputModel)
    return int(outcome.model_dump()["length"])


async def fill(calls: ModalInProcess, task_group: Any, asked: Calls, **options: Any) -> None:
    """Let as many lists be under way as there are of few items, so that all later items wait."""
    calls.may_call = anyio.Event()
    for number in range(EAGER_LISTS):
        task_group.start_soon(asked, f"first {number}", options)
        while len(calls.lists) <= number:
            await checkpoint()


async def queued(predictor: RemotePredictor, count: int) -> None:
    while sum(predictor.statistics().queued.values()) != count:
        await checkpoint()


async def test_requests_that_come_together_become_few_lists_and_get_their_own_results(calls: ModalInProcess) -> None:
    async with predictor(calls, max_batch_size=32) as lists:
        asked = Calls(lists)
        async with anyio.create_task_group() as task_group:
            await fill(calls, task_group, asked)
            for n in range(1, 65):
                task_group.start_soon(asked, "x" * n)
            await queued(lists, 0)
            calls.may_call.set()
    assert {len(text): length(outcome) for text, outcome in asked.outcomes.items() if text[0] == "x"} == {
        n: n for n in range(1, 65)
    }
    assert [len(entries) for entries in calls.lists[EAGER_LISTS:]] == [32, 32]
    statistics = lists.statistics()
    assert (statistics.batches, statistics.batch_sizes, statistics.succeeded) == (
        EAGER_LISTS + 2,
        {1: EAGER_LISTS, 32: 2},
        EAGER_LISTS + 64,
    )


async def test_an_item_that_fails_leaves_its_list_alone(calls: ModalInProcess) -> None:
    async with predictor(calls) as lists:
        texts = ["one", POISON, "three", REJECTED, "seven"]
        outcomes = await lists.predict_many([Text(text=text) for text in texts])
    assert [length(outcome.value) for outcome in outcomes if isinstance(outcome, Success)] == [3, 5, 5]
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Failure)]
    assert [(type(error), str(error)) for error in errors] == [
        (RemoteItemError, "ValueError: this batch is poisoned"),
        (RemoteItemError, "rejected by the model"),
    ]
    assert [error.error_type for error in errors if isinstance(error, RemoteItemError)] == [
        "ValueError",
        "ItemRejectedError",
    ]
    assert len(calls.lists) == 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(RuntimeError("the network is down"), RemoteCallError), (DeviceFaultError("CUDA error"), ContainerFaultError)],
)
async def test_a_failed_call_fails_its_items_and_is_not_sent_again_in_parts(
    calls: ModalInProcess, failure: Exception, expected: type[Exception]
) -> None:
    calls.failure = failure
    async with predictor(calls) as lists:
        outcomes = await lists.predict_many([Text(text="x" * n) for n in range(1, 9)])
    assert [type(outcome.error) for outcome in outcomes if isinstance(outcome, Failure)] == [
        type(failure) if isinstance(failure, expected) else expected
    ] * 8
    assert len(calls.lists) == 1


@pytest.mark.parametrize("answer", [None, 7, [], [{"status": "success"}], ["text", "text"], [{"status": []}, None]])
async def test_an_answer_that_is_none_fails_its_items_and_the_list_is_not_sent_again(answer: Any) -> None:
    class Overridden:
        """A service whose `process_request` was overridden, and forgets what it has to return."""

        asked = 0

        async def process(self, input_list: Any, **options: Any) -> Any:
            self.asked += 1
            return answer

        async def spawn(self, input_list: Any, **options: Any) -> str:
            raise NotImplementedError

    remote = Overridden()
    async with RemotePredictor(remote, BatchConfig(), name="odd") as lists:
        outcomes = await lists.predict_many([Text(text="one"), Text(text="two")])
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Failure)]
    assert [type(error) for error in errors] == [RemoteCallError] * 2
    assert str(errors[0]).startswith("process_request ")
    assert remote.asked == 1


async def test_the_time_that_an_item_has_travels_with_it(calls: ModalInProcess) -> None:
    async with predictor(calls) as lists:
        asked = Calls(lists)
        async with anyio.create_task_group() as task_group:
            await fill(calls, task_group, asked)
            task_group.start_soon(asked, "bounded", {"timeout_s": 60.0})
            task_group.start_soon(asked, "unbounded")
            await queued(lists, 2)
            calls.may_call.set()
    sent = {entry["message"]["text"]: n for n, entry in enumerate(calls.lists[-1])}
    bounded, unbounded = (calls.options[-1]["timeouts_s"][sent[text]] for text in ("bounded", "unbounded"))
    assert 0 < bounded <= 60
    assert unbounded is None
    assert "timeouts_s" not in calls.options[0]


async def test_an_item_whose_time_runs_out_is_told_so_though_its_list_is_under_way(calls: ModalInProcess) -> None:
    async with predictor(calls) as lists:
        calls.may_call = anyio.Event()
        with pytest.raises(DeadlineExceededError):
            await lists.predict(Text(text="late"), timeout_s=0.01)
        calls.may_call.set()
    assert lists.statistics().expired == 1


async def test_a_list_has_items_of_one_priority_and_says_which(calls: ModalInProcess) -> None:
    async with predictor(calls) as lists:
        asked = Calls(lists)
        async with anyio.create_task_group() as task_group:
            await fill(calls, task_group, asked)
            for n in range(8):
                task_group.start_soon(asked, f"{n}", {"priority": list(Priority)[n % 2]})
            await queued(lists, 8)
            calls.may_call.set()
    sent = [
        (options["priority"], sorted(entry["message"]["text"] for entry in entries))
        for entries, options in zip(calls.lists, calls.options, strict=True)
    ][EAGER_LISTS:]
    assert sorted(sent) == [("bulk", ["1", "3", "5", "7"]), ("interactive", ["0", "2", "4", "6"])]


async def test_an_item_that_nobody_waits_for_any_more_is_not_sent(calls: ModalInProcess) -> None:
    async with predictor(calls) as lists:
        asked = Calls(lists)
        async with anyio.create_task_group() as task_group:
            await fill(calls, task_group, asked)
            async with anyio.create_task_group() as gone:
                gone.start_soon(asked, "gone")
                await queued(lists, 1)
                gone.cancel_scope.cancel()
            task_group.start_soon(asked, "stays")
            await queued(lists, 1)
            calls.may_call.set()
    assert [entry["message"]["text"] for entry in calls.lists[-1]] == ["stays"]
    assert "gone" not in asked.outcomes
    assert lists.statistics().cancelled == 1


async def test_what_was_accepted_is_finished_before_it_is_left(calls: ModalInProcess) -> None:
    calls.may_call = anyio.Event()
    async with anyio.create_task_group() as task_group:
        async with predictor(calls) as lists:
            asked = Calls(lists)
            task_group.start_soon(asked, "four")
            while not calls.lists:
                await checkpoint()
            calls.may_call.set()
    assert length(asked.outcomes["four"]) == 4


async def test_an_item_travels_as_json_under_the_names_that_its_caller_uses(calls: ModalInProcess) -> None:
    class Aliased(BaseModel):
        model_config = {"populate_by_name": True, "alias_generator": str.upper}

        text: str

    async with predictor(calls) as lists:
        with pytest.raises(RemoteItemError, match="text: is missing"):
            await lists.predict(Aliased(text="four"))
    assert calls.lists == [[{"message": {"TEXT": "four"}}]]
