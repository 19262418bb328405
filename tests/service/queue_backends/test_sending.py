"""Sending many messages through any backend."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from modalkit.service.queue_backends import InMemoryBackend, QueueBackendError, QueueMessage
from modalkit.service.queue_backends.sending import ConnectedBackend, close_backend, send_all

pytestmark = pytest.mark.anyio


def messages_for(bodies: Sequence[str]) -> list[QueueMessage]:
    return [QueueMessage("a", body, f"job-{n}") for n, body in enumerate(bodies)]


class OneByOne:
    """Takes what says so, and counts how many calls were under way at once."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.under_way = 0
        self.most_under_way = 0

    async def send_message(self, queue_name: str, message: str) -> bool:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await anyio.lowlevel.checkpoint()
        self.under_way -= 1
        if message == "raise":
            raise OSError("no connection")
        if message == "decline":
            return False
        self.taken.append(message)
        return True


class Together(OneByOne):
    def __init__(self, outcomes: Any) -> None:
        super().__init__()
        self.outcomes = outcomes

    async def send_messages(self, messages: Sequence[QueueMessage]) -> Any:
        if isinstance(self.outcomes, Exception):
            raise self.outcomes
        return self.outcomes


async def test_one_by_one_each_message_has_its_own_outcome() -> None:
    backend = OneByOne()
    outcomes = await send_all(backend, messages_for(["a", "raise", "decline", "b"]))
    assert outcomes[0] is outcomes[3] is None
    assert isinstance(outcomes[1], OSError)
    assert isinstance(outcomes[2], QueueBackendError)
    assert str(outcomes[2]) == "the backend did not take the message"
    assert sorted(backend.taken) == ["a", "b"]


async def test_a_forgotten_return_is_an_error_that_says_what_to_return() -> None:
    class Forgetful:
        async def send_message(self, queue_name: str, message: str) -> bool:
            return None  # type: ignore[return-value]  # that is the point

    (outcome,) = await send_all(Forgetful(), messages_for(["a"]))
    assert str(outcome) == (
        "Forgetful.send_message returned None; it must return True for a message that it took, else False"
    )


async def test_one_by_one_is_several_at_once_but_not_all() -> None:
    backend = OneByOne()
    assert await send_all(backend, messages_for([f"{n}" for n in range(20)]), max_concurrent=7) == [None] * 20
    assert backend.most_under_way == 7


async def test_together_the_outcomes_are_the_backends() -> None:
    error = OSError("no connection")
    assert await send_all(Together((None, error)), messages_for(["a", "b"])) == [None, error]
    queues = InMemoryBackend()
    assert await send_all(queues, messages_for(["a", "b"])) == [None, None]
    assert queues.messages("a") == ["a", "b"]


@pytest.mark.parametrize(
    ("outcomes", "problem"),
    [
        (OSError("no connection"), "no connection"),
        ([None], r"Together.send_messages returned 1 outcomes for 2 messages"),
        ([None] * 3, "returned 3 outcomes for 2 messages"),
        (None, r"Together.send_messages returned None; it must return a sequence"),
        (True, r"Together.send_messages returned True; it must return a sequence"),
        ([True, True], "returned True as an outcome"),
    ],
)
async def test_together_what_is_no_answer_is_an_error_for_each(outcomes: Any, problem: str) -> None:
    first, second = await send_all(Together(outcomes), messages_for(["a", "b"]))
    assert first is second
    with pytest.raises(Exception, match=problem):
        raise first or AssertionError("taken")


async def test_a_message_that_hangs_fails_alone_and_waiting_is_no_hanging() -> None:
    class Slow(OneByOne):
        async def send_message(self, queue_name: str, message: str) -> bool:
            if message == "hang":
                await anyio.sleep_forever()
            return await super().send_message(queue_name, message)

    # One at a time: what comes after the first waits longer for its turn than it may take then.
    bodies = ["hang", "hang", "a", "b"]
    outcomes = await send_all(Slow(), messages_for(bodies), max_concurrent=1, timeout_s=0.2)
    assert [str(outcome) for outcome in outcomes] == [*["no answer within 0.2 s"] * 2, "None", "None"]
    assert isinstance(outcomes[0], QueueBackendError)


async def test_a_cancelled_send_is_cancelled_and_no_outcome() -> None:
    class Hanging:
        async def send_message(self, queue_name: str, message: str) -> bool:
            await anyio.sleep_forever()
            return True

    with anyio.move_on_after(0) as scope:
        await send_all(Hanging(), messages_for(["a", "b"]))
    assert scope.cancelled_caught


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit])
async def test_what_would_end_the_process_is_the_error_of_the_message(kind: type[BaseException]) -> None:
    class Ends(OneByOne):
        async def send_message(self, queue_name: str, message: str) -> bool:
            if message == "end":
                raise kind
            return await super().send_message(queue_name, message)

    class EndsTogether(Ends):
        async def send_messages(self, messages: Sequence[QueueMessage]) -> Any:
            raise kind

    class EndsInAGroup(Ends):
        async def send_messages(self, messages: Sequence[QueueMessage]) -> Any:
            raise BaseExceptionGroup("two", [kind(), ValueError()])

    taken, failed = await send_all(Ends(), messages_for(["a", "end"]))
    assert taken is None
    assert f"raised {kind.__name__}" in str(failed)
    for backend in (EndsTogether(), EndsInAGroup()):
        assert [type(outcome) for outcome in await send_all(backend, messages_for(["a", "b"]))] == [RuntimeError] * 2


async def test_outcomes_that_raise_when_looked_at_are_the_error_of_each_message() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise SystemExit

    for outcomes in (Odd(), [Odd()]):
        (outcome,) = await send_all(Together(outcomes), messages_for(["a"]))
        assert isinstance(outcome, QueueBackendError)
        assert "a Odd whose __repr__ raises" in str(outcome)


@pytest.mark.parametrize("together", [False, True])
async def test_sending_can_still_be_cancelled(together: bool) -> None:
    class Hangs(OneByOne):
        async def send_message(self, queue_name: str, message: str) -> bool:
            await anyio.sleep_forever()
            return True

    class HangsTogether(Hangs):
        async def send_messages(self, messages: Sequence[QueueMessage]) -> Any:
            async with anyio.create_task_group() as task_group:
                for _ in messages:
                    task_group.start_soon(anyio.sleep_forever)

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(send_all, HangsTogether() if together else Hangs(), messages_for(["a", "b"]))
        await anyio.wait_all_tasks_blocked()
        task_group.cancel_scope.cancel()


async def test_a_backend_that_ends_the_process_when_it_is_closed_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    class Ends(OneByOne):
        async def aclose(self) -> None:
            raise SystemExit

    await close_backend(Ends())
    assert "could not be closed" in caplog.text


async def test_a_connection_that_opens_while_its_backend_is_closed_is_closed_and_fails_who_waits_for_it() -> None:
    class Connected(ConnectedBackend):
        def __init__(self) -> None:
            self.may_open = anyio.Event()
            self.log: list[str] = []

        async def _connect(self, stack: AsyncExitStack) -> str:
            self.log.append("opening")
            stack.callback(self.log.append, "closed")
            await self.may_open.wait()
            return "connection"

        async def send_messages(self, messages: Sequence[QueueMessage]) -> list[Exception | None]:
            assert await self._connection().get() == "connection"
            return [None] * len(messages)

    backend = Connected()
    outcomes: dict[str, list[Exception | None]] = {}

    async def send(body: str) -> None:
        outcomes[body] = await send_all(backend, messages_for([body]))

    async with anyio.create_task_group() as task_group:
        for body in ("opens", "waits"):
            task_group.start_soon(send, body)
            await anyio.wait_all_tasks_blocked()
        task_group.start_soon(backend.aclose)
        await anyio.wait_all_tasks_blocked()
        backend.may_open.set()
    assert outcomes["opens"] == [None]
    assert str(outcomes["waits"][0]) == "the backend was closed while the message waited to be sent"
    assert backend.log == ["opening", "closed"]
    await send("again")
    assert outcomes["again"] == [None]
    await backend.aclose()
    assert backend.log == ["opening", "closed"] * 2
