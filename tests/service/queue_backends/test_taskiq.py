"""Results reach TaskIQ's tasks, or the sender learns that they did not."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio
from taskiq import InMemoryBroker, TaskiqMessage, TaskiqMiddleware
from taskiq.receiver import Receiver
from taskiq_redis import ListQueueBroker, RedisStreamBroker

from modalkit.benchmarks.redis_server import RedisServer
from modalkit.service.queue_backends import (
    BatchQueueBackend,
    NamedQueueBackend,
    QueueBackendError,
    QueueMessage,
    QueueNameError,
)
from modalkit.service.queue_backends.sending import send_all
from modalkit.task_queue import TaskIQBackend, make_taskiq_broker

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """TaskIQ and redis-py run on asyncio alone."""
    return "asyncio"


@pytest.fixture
async def backend(redis: Any, redis_url: str) -> AsyncIterator[TaskIQBackend]:
    opened = TaskIQBackend(redis_url)
    yield opened
    await opened.aclose()


def messages_for(queue_name: str, *texts: str) -> list[QueueMessage]:
    return [QueueMessage(queue_name, json.dumps(text), f"job-{text}") for text in texts]


async def sent(redis: Any, stream: str) -> list[dict[str, Any]]:
    return [json.loads(fields[b"data"]) for _, fields in await redis.xrange(stream)]


async def test_a_message_is_a_call_of_its_queues_task_in_its_queues_stream(redis: Any, backend: TaskIQBackend) -> None:
    assert await backend.send_message("results", '{"a": 1}')
    assert await backend.send_messages([QueueMessage("errors", '{"a": 2}', "job-2")]) == [None]
    [single] = await sent(redis, "modalkit:results")
    [batched] = await sent(redis, "modalkit:errors")
    assert (single["task_name"], single["args"], single["kwargs"]) == ("process_results", ['{"a": 1}'], {})
    assert (batched["task_name"], batched["args"], batched["kwargs"]) == ("process_errors", ['{"a": 2}'], {})
    assert batched["task_id"] == "job-2"
    assert single.keys() == batched.keys()
    assert single["labels_types"] == batched["labels_types"]


async def test_a_sender_leaves_nothing_in_redis_but_messages(redis: Any, backend: TaskIQBackend) -> None:
    await backend.send_message("results", "{}")
    assert await redis.keys() == [b"modalkit:results"]
    assert await redis.xinfo_groups("modalkit:results") == []


async def test_it_offers_what_a_backend_may(backend: TaskIQBackend) -> None:
    assert isinstance(backend, BatchQueueBackend)
    assert isinstance(backend, NamedQueueBackend)


@pytest.mark.parametrize("queue_name", ["", "x" * 257, "a\nb", "half \ud800"])
async def test_a_name_that_no_queue_can_have_is_refused(backend: TaskIQBackend, queue_name: str) -> None:
    with pytest.raises(QueueNameError):
        backend.check_queue_name(queue_name)


@pytest.mark.parametrize("queue_name", ["results", "ml_sentiment", "a:b/c {d} é", "x" * 256])
async def test_other_names_are_queues(redis: Any, backend: TaskIQBackend, queue_name: str) -> None:
    backend.check_queue_name(queue_name)
    await backend.send_message(queue_name, "{}")
    assert len(await sent(redis, f"modalkit:{queue_name}")) == 1


async def test_the_tasks_name_can_be_chosen(redis: Any, redis_url: str) -> None:
    backend = TaskIQBackend(redis_url, task_name="handle")
    await backend.send_messages(messages_for("results", "a"))
    await backend.aclose()
    assert [task["task_name"] for task in await sent(redis, "modalkit:results")] == ["handle"]


async def test_a_broker_that_was_made_says_what_tasks_and_streams_are_called(redis: Any, redis_url: str) -> None:
    broker = make_taskiq_broker(redis_url, task_name="on_{queue_name}", stream_name="mine:{queue_name}")
    backend = TaskIQBackend(broker=broker)
    assert backend.broker is broker
    await backend.send_message("results", "{}")
    await backend.send_messages(messages_for("results", "a"))
    await backend.aclose()
    assert [task["task_name"] for task in await sent(redis, "mine:results")] == ["on_results"] * 2
    with pytest.raises(ValueError, match=r"give .other. to it instead"):
        TaskIQBackend(broker=broker, task_name="other")


async def test_a_message_that_redis_refuses_fails_alone(redis: Any, backend: TaskIQBackend) -> None:
    await redis.set("modalkit:taken", "no stream")
    messages = [*messages_for("results", "a"), *messages_for("taken", "b"), *messages_for("results", "c")]
    first, second, third = await backend.send_messages(messages)
    assert (first, third) == (None, None)
    assert isinstance(second, QueueBackendError)
    assert "'taken'" in str(second)
    assert "WRONGTYPE" in str(second)
    with pytest.raises(QueueBackendError, match="WRONGTYPE"):
        await backend.send_message("taken", "{}")


class Recorder(TaskiqMiddleware):
    """Notes what is sent, changes it, and refuses some."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    async def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        self.seen.append(("before", message.args[0]))
        if message.args[0] == '"bad"':
            raise ValueError("not that one")
        message.labels["tenant"] = "acme"
        return message

    def post_send(self, message: TaskiqMessage) -> None:
        self.seen.append(("after", message.args[0]))


async def test_middlewares_see_each_message_as_with_kiq(redis: Any, redis_url: str) -> None:
    recorder = Recorder()
    backend = TaskIQBackend(broker=make_taskiq_broker(redis_url).with_middlewares(recorder))
    outcomes = await backend.send_messages(messages_for("results", "a", "bad", "c"))
    await backend.aclose()
    assert outcomes[0] is outcomes[2] is None
    assert str(outcomes[1]) == "queue 'results': ValueError: not that one"
    assert sorted(recorder.seen) == [
        *[("after", '"a"'), ("after", '"c"')],
        *[("before", '"a"'), ("before", '"bad"'), ("before", '"c"')],
    ]
    assert [task["labels"]["tenant"] for task in await sent(redis, "modalkit:results")] == ["acme"] * 2


async def test_redis_being_full_is_an_error_for_each_message() -> None:
    with RedisServer(settings={"maxmemory": "1", "maxmemory-policy": "noeviction"}) as server:
        backend = TaskIQBackend(server.url)
        outcomes = await send_all(backend, messages_for("results", "a", "b"))
        await backend.aclose()
    assert ["OOM" in str(outcome) for outcome in outcomes] == [True, True]


async def test_a_redis_that_hangs_is_an_error_until_it_answers_again() -> None:
    with RedisServer() as server:
        backend = TaskIQBackend(broker=make_taskiq_broker(server.url, timeout_s=0.1))
        await backend.send_message("results", '"before"')
        server.freeze()
        with anyio.fail_after(20):
            with pytest.raises(QueueBackendError, match="Timeout"):
                await backend.send_messages(messages_for("results", "a"))
            with pytest.raises(QueueBackendError, match="Timeout"):
                await backend.send_message("results", '"b"')
        server.thaw()
        assert await backend.send_messages(messages_for("results", "after")) == [None]
        await backend.aclose()


async def test_a_cancelled_send_spoils_no_later_one(redis: Any, backend: TaskIQBackend) -> None:
    messages = messages_for("results", *[f"{n}" for n in range(500)])
    assert await backend.send_messages(messages) == [None] * 500
    for _ in range(20):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(backend.send_messages, messages)
                await anyio.lowlevel.checkpoint()
                scope.cancel()
        assert await backend.send_messages(messages_for("others", "after")) == [None]
    assert len(await sent(redis, "modalkit:others")) == 20


async def test_many_first_messages_start_the_broker_once(redis: Any, redis_url: str) -> None:
    starts: list[None] = []
    broker = make_taskiq_broker(redis_url)
    backend = TaskIQBackend(broker=broker)

    class Counter(TaskiqMiddleware):
        async def startup(self) -> None:
            await anyio.lowlevel.checkpoint()
            starts.append(None)

    broker.add_middlewares(Counter())
    async with anyio.create_task_group() as task_group:
        for _ in range(5):
            task_group.start_soon(backend.send_message, "results", "{}")
    await backend.aclose()
    assert len(starts) == 1
    assert len(await sent(redis, "modalkit:results")) == 5


async def test_a_broker_that_does_not_start_is_started_again(redis: Any, redis_url: str) -> None:
    await redis.set("modalkit:results", "no stream")
    backend = TaskIQBackend(broker=make_taskiq_broker(redis_url, ["results"]))
    with pytest.raises(QueueBackendError, match=r"did not start: .*WRONGTYPE"):
        await backend.send_message("results", "{}")
    await redis.delete("modalkit:results")
    assert await backend.send_message("results", "{}")
    await backend.aclose()


async def test_a_broker_in_memory_runs_the_task_at_once() -> None:
    broker = InMemoryBroker(await_inplace=True)
    seen = []

    @broker.task(task_name="process_results")
    async def process_results(message: str) -> None:
        seen.append(json.loads(message))

    backend = TaskIQBackend(broker=broker)
    await backend.send_message("results", '"one"')
    assert await backend.send_messages(messages_for("results", "two", "three")) == [None, None]
    [unknown] = await backend.send_messages(messages_for("other", "four"))
    assert "unknown task" in str(unknown)
    await backend.aclose()
    assert sorted(seen) == ["one", "three", "two"]


async def test_another_kind_of_broker_gets_messages_in_its_own_queue(redis: Any, redis_url: str) -> None:
    backend = TaskIQBackend(broker=ListQueueBroker(redis_url, queue_name="theirs"))
    assert await backend.send_messages(messages_for("results", "a", "b")) == [None, None]
    await backend.aclose()
    tasks = [json.loads(text) for text in await redis.lrange("theirs", 0, -1)]
    assert sorted(task["args"][0] for task in tasks) == ['"a"', '"b"']


async def test_a_plain_stream_broker_keeps_its_own_stream_and_length(redis: Any, redis_url: str) -> None:
    plain = TaskIQBackend(broker=RedisStreamBroker(redis_url))
    assert await plain.send_messages(messages_for("results", "a", "b")) == [None, None]
    await plain.aclose()
    assert len(await sent(redis, "taskiq")) == 2
    short = TaskIQBackend(broker=RedisStreamBroker(redis_url, queue_name="short", maxlen=1, approximate=False))
    assert await short.send_messages(messages_for("results", "a", "b")) == [None, None]
    await short.aclose()
    assert len(await sent(redis, "short")) == 1


async def test_a_broker_can_be_left_to_its_owner(redis: Any, redis_url: str) -> None:
    broker = RedisStreamBroker(redis_url, queue_name="theirs")
    backend = TaskIQBackend(broker=broker, start=False)
    await backend.send_message("results", "{}")
    assert await redis.xinfo_groups("theirs") == []
    await backend.aclose()
    assert await backend.send_messages(messages_for("results", "a")) == [None]
    await broker.shutdown()


class DocumentedBackend:
    """As the documentation writes it, with the broker of taskiq-redis that exists."""

    def __init__(self, broker: RedisStreamBroker) -> None:
        self.broker = broker

    async def send_message(self, queue_name: str, message: str) -> bool:
        @self.broker.task(task_name=f"process_{queue_name}")
        async def process_ml_result(msg: str) -> str:
            return f"Processed {json.loads(msg)['status']} result"

        await process_ml_result.kiq(message)
        return True


@pytest.mark.parametrize(
    ("make", "stream"),
    [(RedisStreamBroker, "taskiq"), (make_taskiq_broker, "modalkit:results")],
    ids=["RedisStreamBroker", "make_taskiq_broker"],
)
async def test_a_backend_that_makes_its_task_at_each_message_works(
    redis: Any, redis_url: str, make: Any, stream: str
) -> None:
    backend = DocumentedBackend(make(redis_url))  # never started
    messages = [QueueMessage("results", '{"status": "success"}', f"job-{n}") for n in range(50)]
    assert await send_all(backend, messages) == [None] * 50
    await backend.broker.shutdown()
    tasks = await sent(redis, stream)
    assert [(task["task_name"], task["args"]) for task in tasks] == [("process_results", [messages[0].body])] * 50
    assert list(backend.broker.get_all_tasks()) == ["process_results"]
    results = [
        await Receiver(backend.broker, max_async_tasks=1).run_task(
            backend.broker.get_all_tasks()[task["task_name"]].original_func, TaskiqMessage.model_validate(task)
        )
        for task in tasks[:2]
    ]
    assert [result.return_value for result in results] == ["Processed success result"] * 2


def test_it_says_that_it_does_not_run_on_trio() -> None:
    with pytest.raises(QueueBackendError, match="needs the event loop of asyncio"):
        trio.run(TaskIQBackend().send_message, "results", "{}")


def test_it_says_that_it_was_started_in_another_event_loop() -> None:
    backend = TaskIQBackend(broker=InMemoryBroker())
    anyio.run(backend.send_messages, [])
    with pytest.raises(QueueBackendError, match="another event loop"):
        anyio.run(backend.send_messages, [])


def test_a_closed_backend_sends_as_much_in_another_event_loop() -> None:
    async def send_at_once(backend: TaskIQBackend) -> list[Exception | None]:
        outcomes: list[Exception | None] = []

        async def send(number: int) -> None:
            assert await backend.send_message("results", "{}")
            outcomes.extend(await backend.send_messages(messages_for("results", f"{number}")))

        async with anyio.create_task_group() as task_group:
            for number in range(100):
                task_group.start_soon(send, number)
        await backend.aclose()
        return outcomes

    with RedisServer() as server:
        backend = TaskIQBackend(broker=make_taskiq_broker(server.url, max_connections=2))
        for _ in range(3):
            assert anyio.run(send_at_once, backend) == [None] * 100


def test_a_broker_whose_connections_stay_in_their_event_loop_is_refused_in_another() -> None:
    async def send_and_close(backend: TaskIQBackend) -> None:
        for _ in range(2):
            await backend.send_message("results", "{}")
            await backend.aclose()

    with RedisServer() as server:
        backend = TaskIQBackend(broker=RedisStreamBroker(server.url))
        anyio.run(send_and_close, backend)
        with pytest.raises(QueueBackendError, match="another event loop: make one for each"):
            anyio.run(send_and_close, backend)


def test_a_broker_and_a_url_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="not both"):
        TaskIQBackend("redis://localhost", broker=InMemoryBroker())


@pytest.mark.parametrize("make", [TaskIQBackend, make_taskiq_broker, lambda: TaskIQBackend(broker=InMemoryBroker())])
def test_what_is_not_installed_is_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modalkit.service.queue_backends.taskiq_broker", None)
    with pytest.raises(QueueBackendError, match=r"pip install .*/.+\[taskiq\]'"):
        make()


def test_taskiq_is_imported_only_when_it_is_used() -> None:
    code = (
        "import sys, modalkit.service.queue_backends; assert not {'taskiq', 'taskiq_redis', 'redis'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_backend_needs_no_server_until_it_sends() -> None:
    assert isinstance(TaskIQBackend().broker, RedisStreamBroker)
