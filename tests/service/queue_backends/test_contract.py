"""What every queue backend promises, on real servers."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import pytest

from modalkit.service.queue_backends import QueueMessage, UndeliverableError
from modalkit.service.queue_backends.sending import send_all
from tests.support.backends import memory, routing, sqs, taskiq, webhook
from tests.support.backends.under_test import BackendUnderTest

pytestmark = pytest.mark.anyio

# A new backend is one more line here, and one more file in tests/support/backends.
BACKENDS: dict[str, tuple[Callable[[], AbstractAsyncContextManager[BackendUnderTest]], tuple[str, ...]]] = {
    "memory": (memory.opened, ("asyncio", "trio")),
    "routing": (routing.opened, ("asyncio", "trio")),
    "sqs": (sqs.opened, ("asyncio",)),
    "taskiq": (taskiq.opened, ("asyncio",)),
    "webhook": (webhook.opened, ("asyncio", "trio")),
}
WITH_A_SERVER = ("sqs", "taskiq", "webhook")
THAT_REFUSE_TEXTS = ("routing", "sqs", "webhook")


def cases(names: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param((BACKENDS[name][0], loop), id=f"{name}-{loop}") for name in names for loop in BACKENDS[name][1]
    ]


@pytest.fixture(params=cases(tuple(BACKENDS)))
def case(request: pytest.FixtureRequest) -> Any:
    """A backend and an event loop; a test that is not for all of them has a `case` of its own."""
    return request.param


@pytest.fixture
def anyio_backend(case: Any) -> str:
    loop: str = case[1]
    return loop


@pytest.fixture
async def under_test(case: Any) -> AsyncIterator[BackendUnderTest]:
    async with case[0]() as opened:
        yield opened


def messages_for(queue_names: list[str], count: int) -> list[QueueMessage]:
    return [
        QueueMessage(queue_names[n % len(queue_names)], json.dumps({"job_id": f"job-{n}"}), f"job-{n}")
        for n in range(count)
    ]


CONTENTS = [
    "plain",
    "",
    "\"quotes\" and \\ and 'more'",
    "Grüße 世界 🎉 \u2028",
    "line\nbreak\ttab\x00\x1f",
    "x" * 200_000,
]


async def test_texts_arrive_unchanged(under_test: BackendUnderTest) -> None:
    queue_name = under_test.make_queue_name()
    texts = [json.dumps({"result": content}, ensure_ascii=False) for content in CONTENTS]
    for text in texts:
        assert await under_test.backend.send_message(queue_name, text)
    assert sorted(await under_test.received(queue_name, len(texts))) == sorted(texts)


async def test_a_batch_for_two_queues_arrives_whole(under_test: BackendUnderTest) -> None:
    queue_names = [under_test.make_queue_name(), under_test.make_queue_name()]
    messages = messages_for(queue_names, 25)
    assert await send_all(under_test.backend, messages) == [None] * 25
    for queue_name in queue_names:
        expected = [message.body for message in messages if message.queue_name == queue_name]
        assert sorted(await under_test.received(queue_name, len(expected))) == sorted(expected)


@pytest.mark.parametrize("case", cases(THAT_REFUSE_TEXTS))
async def test_a_bad_message_of_a_batch_fails_alone(under_test: BackendUnderTest) -> None:
    queue_names = [under_test.make_queue_name(), under_test.make_queue_name()]
    messages = messages_for(queue_names, 12)
    assert under_test.refused_text is not None
    messages[5] = QueueMessage(queue_names[1], under_test.refused_text, "job-5")
    outcomes = await send_all(under_test.backend, messages)
    assert isinstance(outcomes[5], UndeliverableError)
    assert [n for n, outcome in enumerate(outcomes) if outcome is not None] == [5]
    taken = {message.body for n, message in enumerate(messages) if n != 5 and message.queue_name == queue_names[1]}
    assert taken <= set(await under_test.received(queue_names[1], len(taken)))


async def test_many_send_at_once(under_test: BackendUnderTest) -> None:
    queue_name = under_test.make_queue_name()
    messages = messages_for([queue_name], 60)

    async def send(some: list[QueueMessage]) -> None:
        assert await send_all(under_test.backend, some) == [None] * len(some)

    async with anyio.create_task_group() as task_group:
        for start in range(0, 60, 3):
            task_group.start_soon(send, messages[start : start + 3])
    received = await under_test.received(queue_name, 60)
    assert sorted(received) == sorted(message.body for message in messages)


@pytest.mark.parametrize("case", cases(WITH_A_SERVER))
async def test_a_stopped_server_is_an_error_until_it_is_back(under_test: BackendUnderTest) -> None:
    assert under_test.stop is not None
    assert under_test.start is not None
    queue_name = under_test.make_queue_name()
    assert await under_test.backend.send_message(queue_name, '"before"')
    await under_test.stop()
    with anyio.fail_after(20):
        outcomes = await send_all(under_test.backend, messages_for([queue_name], 3))
    assert all(isinstance(outcome, Exception) for outcome in outcomes)
    assert not any(isinstance(outcome, UndeliverableError) for outcome in outcomes)
    await under_test.start()
    assert await under_test.backend.send_message(queue_name, '"after"')
    assert '"after"' in await under_test.received(queue_name, 1)


async def test_a_closed_backend_can_be_closed_again_and_used_again(under_test: BackendUnderTest) -> None:
    queue_name = under_test.make_queue_name()
    close = getattr(under_test.backend, "aclose", None)
    for text in ('"first"', '"second"'):
        assert await under_test.backend.send_message(queue_name, text)
        if close is not None:
            await close()
            await close()
    assert sorted(await under_test.received(queue_name, 2)) == ['"first"', '"second"']


async def test_nothing_to_send_is_nothing_sent(under_test: BackendUnderTest) -> None:
    assert await send_all(under_test.backend, []) == []
