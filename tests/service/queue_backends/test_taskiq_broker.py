"""A worker loses no results: whatever dies, is missing, comes late or is trimmed."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from taskiq import AckableMessage, SmartRetryMiddleware
from taskiq.kicker import AsyncKicker
from taskiq.receiver import Receiver
from taskiq.utils import maybe_awaitable

from modalkit.benchmarks.redis_server import RedisServer
from modalkit.service.queue_backends import QueueBackendError
from modalkit.service.queue_backends.taskiq_broker import ResultBroker
from modalkit.task_queue import TaskIQBackend, make_taskiq_broker
from tests.support.taskiq_worker import DONE, HANG, TaskiqWorker

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
STREAM = "modalkit:results"
MakeWorker = Callable[..., AbstractContextManager[TaskiqWorker]]


@pytest.fixture
def anyio_backend() -> str:
    """TaskIQ and redis-py run on asyncio alone."""
    return "asyncio"


@pytest.fixture
def make_worker(tmp_path: Path) -> MakeWorker:
    """A worker with the tasks of tests/support/taskiq_tasks.py."""

    def make(
        url: str, *options: str, queues: str = "results", idle_timeout_s: float = 600, hangs: bool = False
    ) -> TaskiqWorker:
        env = {"REDIS_URL": url, "QUEUES": queues, "IDLE_TIMEOUT_S": str(idle_timeout_s), "HANGS": "1" * hangs}
        return TaskiqWorker(
            "tests.support.taskiq_tasks:broker", *options, folder=ROOT, env=env, log=tmp_path / "worker.log"
        )

    return make


async def send(url: str, *texts: str, queue_name: str = "results") -> None:
    backend = TaskIQBackend(url)
    for text in texts:
        await backend.send_message(queue_name, json.dumps(text))
    await backend.aclose()


async def done(redis: Any, count: int) -> list[str]:
    """Wait until that many messages were handled, and tell which."""
    texts = []
    with anyio.fail_after(60):
        for _ in range(count):
            found = None
            while found is None:
                found = await redis.blpop([DONE], timeout=2)
            texts.append(json.loads(found[1]))
    return sorted(texts)


async def until_acknowledged(redis: Any, stream: str = STREAM, pending: int = 0) -> None:
    with anyio.fail_after(30):
        while True:
            [group] = await redis.xinfo_groups(stream)
            last = await redis.xrevrange(stream, count=1)
            if group["pending"] == pending and (not last or last[0][0] == group["last-delivered-id"]):
                return
            await anyio.sleep(0.01)


async def test_results_sent_before_the_first_worker_started_arrive(
    redis: Any, redis_url: str, make_worker: MakeWorker
) -> None:
    await send(redis_url, "early", "late")
    await send(redis_url, "wrong", queue_name="errors")
    with make_worker(redis_url, queues="results,errors"):
        assert await done(redis, 3) == ["early", "late", "wrong"]
        await until_acknowledged(redis)


async def test_the_messages_of_a_killed_worker_go_to_another(
    redis: Any, redis_url: str, make_worker: MakeWorker
) -> None:
    await send(redis_url, HANG)
    with make_worker(redis_url, idle_timeout_s=0.5, hangs=True) as worker:
        await done(redis, 1)
        worker.kill()
    with make_worker(redis_url, idle_timeout_s=0.5):
        assert await done(redis, 1) == [HANG]
        await until_acknowledged(redis)


async def test_a_worker_that_stops_gives_back_what_it_has_not_finished(
    redis: Any, redis_url: str, make_worker: MakeWorker
) -> None:
    await send(redis_url, HANG, "waiting")
    with make_worker(redis_url, "--max-async-tasks", "1", "--wait-tasks-timeout", "0.1", hangs=True) as worker:
        assert await done(redis, 1) == [HANG]
        await anyio.to_thread.run_sync(worker.stop)
        await until_acknowledged(redis, pending=2)
    with make_worker(redis_url):  # it would take the first one's for dead after ten minutes
        assert await done(redis, 2) == [HANG, "waiting"]


async def test_a_worker_does_not_start_while_a_queue_has_no_task(
    redis: Any, redis_url: str, make_worker: MakeWorker
) -> None:
    await send(redis_url, "kept", queue_name="misspelt")
    with make_worker(redis_url, queues="results,misspelt") as worker:
        await anyio.to_thread.run_sync(worker.wait_for_log, "queue 'misspelt' has no task")
    assert await redis.xinfo_groups("modalkit:misspelt") == []
    assert await redis.xlen("modalkit:misspelt") == 1


async def test_a_worker_goes_on_when_redis_is_back(tmp_path: Path, make_worker: MakeWorker) -> None:
    with RedisServer(append_only=True) as server, make_worker(server.url) as worker:
        async with Redis.from_url(f"{server.url}?protocol=2") as redis:
            await send(server.url, "before")
            assert await done(redis, 1) == ["before"]
            await until_acknowledged(redis)
            await anyio.to_thread.run_sync(server.kill)
            await anyio.to_thread.run_sync(worker.wait_for_log, "Redis gives no messages")
            await anyio.to_thread.run_sync(server.start)
            await send(server.url, "after")
            assert await done(redis, 1) == ["after"]
            assert "is dead" not in (tmp_path / "worker.log").read_text()


async def test_a_worker_goes_on_when_redis_has_lost_everything(
    redis: Any, redis_url: str, make_worker: MakeWorker
) -> None:
    with make_worker(redis_url) as worker:
        await anyio.to_thread.run_sync(worker.wait_for_log, "Listening started")
        await redis.flushall()
        await send(redis_url, "after")
        assert await done(redis, 1) == ["after"]


@asynccontextmanager
async def listening(url: str, **arguments: Any) -> AsyncIterator[Callable[[], Any]]:
    """A broker that listens as in a worker, and how to get its next message."""
    broker = make_taskiq_broker(url, ["results"], **arguments)

    @broker.task(task_name="process_results")
    async def process_results(message: str) -> None: ...

    await broker.startup()
    messages = broker.listen()
    try:
        yield partial(anext, messages)
    finally:
        await messages.aclose()
        await broker.shutdown()


def text_of(message: AckableMessage) -> Any:
    return json.loads(json.loads(message.data)["args"][0])


@asynccontextmanager
async def working(broker: ResultBroker) -> AsyncIterator[None]:
    """Run a broker's tasks, as a worker does."""
    broker.is_worker_process = True
    finish = asyncio.Event()
    worker = asyncio.create_task(Receiver(broker, max_async_tasks=10).listen(finish))
    try:
        yield
    finally:
        finish.set()
        await worker
        await broker.shutdown()


async def test_a_message_whose_task_is_unknown_stays(
    redis: Any, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker = make_taskiq_broker(redis_url, ["results"])
    handled = anyio.Event()

    @broker.task(task_name="process_results")
    async def process_results(message: str) -> None:
        handled.set()

    labels = {"queue_name": STREAM}
    await AsyncKicker[..., Any]("renamed", broker, labels).kiq("kept")
    await AsyncKicker[..., Any]("process_results", broker, labels).kiq("known")
    async with working(broker):
        with anyio.fail_after(30):
            await handled.wait()
        await until_acknowledged(redis, pending=1)
    [entry] = await redis.xpending_range(STREAM, "taskiq", "-", "+", 10)
    [(_, fields)] = await redis.xrange(STREAM, entry["message_id"], entry["message_id"])
    assert json.loads(fields[b"data"])["task_name"] == "renamed"
    assert "it is for the task 'renamed', which this worker does not have" in caplog.text


async def test_a_tasks_own_labels_count_for_results_too(redis: Any, redis_url: str) -> None:
    """TaskIQ itself applies those of the sender alone, and modalkit's sender knows no tasks."""
    broker = make_taskiq_broker(redis_url, ["results", "errors"])
    broker.add_middlewares(SmartRetryMiddleware(default_delay=0))
    attempts = []
    last = anyio.Event()

    @broker.task(task_name="process_results", retry_on_error=True, max_retries=3)
    async def process_results(message: str) -> None:
        attempts.append(message)
        if len(attempts) == 3:
            last.set()
        raise ValueError(message)

    @broker.task(task_name="process_errors")
    async def process_errors(message: str) -> None:
        attempts.append(message)
        raise ValueError(message)

    await send(redis_url, "once", queue_name="errors")
    await send(redis_url, "thrice")
    async with working(broker):
        with anyio.fail_after(30):
            await last.wait()
        await until_acknowledged(redis)
        await until_acknowledged(redis, "modalkit:errors")
    assert sorted(attempts) == ['"once"', *['"thrice"'] * 3]


async def test_what_is_kicked_by_hand_finds_its_queues_stream(redis: Any, redis_url: str) -> None:
    broker = make_taskiq_broker(redis_url, ["results"])

    @broker.task(task_name="process_errors")
    async def process_errors(message: str) -> None: ...

    @broker.task(task_name="clean_up")
    async def clean_up() -> None: ...

    await process_errors.kiq("text")
    await clean_up.kiq()
    await broker.shutdown()
    assert await redis.xlen("modalkit:errors") == 1
    assert await redis.xlen(STREAM) == 1  # where this worker itself reads


async def test_a_deleted_message_blocks_none_behind_it(redis: Any, redis_url: str) -> None:
    await send(redis_url, "first", "deleted", "last")
    async with listening(redis_url) as next_message:
        await next_message()
        [_, (entry_id, _), _] = await redis.xrange(STREAM)
        await redis.xdel(STREAM, entry_id)
        async with listening(redis_url, idle_timeout_s=0.001) as next_claimed:
            assert [text_of(await next_claimed()) for _ in range(2)] == ["first", "last"]


async def test_what_is_no_task_stays_and_blocks_nothing(
    redis: Any, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    entry_id = await redis.xadd(STREAM, {"other": "field"})
    await send(redis_url, "good")
    async with listening(redis_url) as next_message:
        assert text_of(await next_message()) == "good"
    assert f"Entry {entry_id.decode()} stays in stream 'modalkit:results': it is no message of TaskIQ's" in caplog.text


async def test_an_old_message_is_claimed_from_behind_thousands_that_are_under_way(redis: Any, redis_url: str) -> None:
    await redis.xgroup_create(STREAM, "taskiq", id="0", mkstream=True)
    pipeline = redis.pipeline()
    template = '{"task_id": "", "task_name": "process_results", "labels": {}, "args": ["%d"], "kwargs": {}}'
    for n in range(1500):
        pipeline.xadd(STREAM, {"data": template % n})
    ids = await pipeline.execute()
    await redis.xreadgroup("taskiq", "busy", {STREAM: ">"}, count=1500)
    await redis.xclaim(STREAM, "taskiq", "dead", min_idle_time=0, message_ids=[ids[-1]], idle=3_600_000)
    async with listening(redis_url) as next_message:
        with anyio.fail_after(30):
            assert text_of(await next_message()) == 1499


async def test_a_lost_group_is_made_anew(redis: Any, redis_url: str) -> None:
    async with listening(redis_url) as next_message:
        await redis.xgroup_destroy(STREAM, "taskiq")
        await send(redis_url, "after")
        assert text_of(await next_message()) == "after"


@pytest.mark.parametrize(
    ("setting", "refusing", "accepting", "error"),
    [("min-replicas-to-write", "1", "0", "NOREPLICAS"), ("maxmemory", "1", "0", "OutOfMemoryError")],
)
async def test_a_worker_goes_on_when_redis_accepts_again(
    setting: str, refusing: str, accepting: str, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer() as server:
        async with (
            Redis.from_url(f"{server.url}?protocol=2") as redis,
            listening(server.url, trim_interval_s=0) as next_message,
        ):
            await redis.flushall()  # the group has to be made anew, which a full Redis refuses
            await redis.config_set(setting, refusing)
            reading = asyncio.create_task(next_message())
            with anyio.fail_after(30):
                while error not in caplog.text:
                    assert not reading.done()
                    await anyio.sleep(0.01)
                await redis.config_set(setting, accepting)
                await send(server.url, "after")
                assert text_of(await reading) == "after"


async def test_a_worker_goes_on_where_it_may_not_trim(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer() as server:
        async with (
            Redis.from_url(f"{server.url}?protocol=2") as redis,
            listening(server.url, trim_interval_s=0) as next_message,
        ):
            await redis.acl_setuser("default", enabled=True, commands=["-xtrim"])
            for text in ("one", "two", "three"):
                await send(server.url, text)
                with anyio.fail_after(30):
                    message = await next_message()
                assert text_of(message) == text
                await maybe_awaitable(message.ack())
    assert "The streams could not be trimmed" in caplog.text


async def test_a_worker_that_stops_with_nothing_unfinished_leaves_its_group(redis: Any, redis_url: str) -> None:
    broker = make_taskiq_broker(redis_url, ["results"])
    for unfinished in (False, True):
        await send(redis_url, "text")

        @broker.task(task_name="process_results")
        async def process_results(message: str) -> None: ...

        broker.is_worker_process = True
        await broker.startup()
        messages = broker.listen()
        message = await anext(messages)
        [consumer] = await redis.xinfo_consumers(STREAM, "taskiq")
        assert consumer["pending"] == 1
        if not unfinished:
            assert isinstance(message, AckableMessage)
            await maybe_awaitable(message.ack())
        await messages.aclose()
        await broker.shutdown()
        left = await redis.xinfo_consumers(STREAM, "taskiq")
        assert [consumer["pending"] for consumer in left] == [1] * unfinished


async def test_a_worker_can_be_stopped_at_any_moment(redis: Any, redis_url: str) -> None:
    async def stopped_after(steps: int) -> None:
        async with listening(redis_url) as next_message:
            reading = asyncio.create_task(next_message())
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            reading.cancel()
            await asyncio.wait([reading], timeout=30)
            assert reading.cancelled()

    async with anyio.create_task_group() as task_group:
        for steps in range(20):
            task_group.start_soon(stopped_after, steps)


async def test_a_stream_that_is_none_is_told_at_the_start(redis: Any, redis_url: str) -> None:
    await redis.set(STREAM, "no stream")
    broker = make_taskiq_broker(redis_url, ["results"])
    with pytest.raises(Exception, match="WRONGTYPE"):
        await broker.startup()
    await broker.shutdown()


async def test_a_worker_needs_a_queue() -> None:
    broker = make_taskiq_broker()
    broker.is_worker_process = True
    with pytest.raises(QueueBackendError, match="made for no queue"):
        await broker.startup()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"queue_names": "results"}, TypeError),
        ({"stream_name": "all"}, ValueError),
        ({"idle_timeout_s": 0}, ValueError),
        ({"timeout_s": float("nan")}, ValueError),
        ({"url": "redis://localhost?protocol=3"}, ValueError),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        make_taskiq_broker(**arguments)


async def test_a_worker_trims_what_is_done(redis: Any, redis_url: str, make_worker: MakeWorker) -> None:
    await send(redis_url, *map(str, range(30)))
    broker = make_taskiq_broker(redis_url, ["results"], trim_interval_s=0)

    @broker.task(task_name="process_results")
    async def process_results(message: str) -> None: ...

    async with working(broker):
        with anyio.fail_after(30):
            while await redis.xlen(STREAM) > 1:
                await anyio.sleep(0.01)


# What happens to a stream: an entry is added (also with an id beyond what Lua's numbers hold), a group is made, reads,
# acknowledges or claims, an entry is deleted, or the stream is trimmed.
GROUPS = ("a", "b")
STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 3)),
    st.tuples(st.just("make"), st.sampled_from(GROUPS)),
    st.tuples(st.just("read"), st.sampled_from(GROUPS), st.integers(1, 4)),
    st.tuples(st.just("acknowledge"), st.sampled_from(GROUPS), st.integers(0, 9)),
    st.tuples(st.just("delete"), st.integers(0, 9)),
    st.tuples(st.just("trim")),
)


async def _apply(redis: Any, broker: ResultBroker, step: tuple[Any, ...], number: int, start: int) -> None:
    match step:
        case ("add", count):
            for n in range(count):
                await redis.xadd(STREAM, {"data": "x"}, id=f"{start + number}-{2**53 + n}")
        case ("make", group):
            with suppress(Exception):  # it exists
                await redis.xgroup_create(STREAM, group, id="0", mkstream=True)
        case ("read", group, count):
            with suppress(Exception):  # there is no such group
                await redis.xreadgroup(group, "consumer", {STREAM: ">"}, count=count)
        case ("acknowledge", group, position):
            ids = [entry_id for entry_id, _ in await redis.xrange(STREAM)]
            if position < len(ids):
                await redis.xack(STREAM, group, ids[position])
        case ("delete", position):
            ids = [entry_id for entry_id, _ in await redis.xrange(STREAM)]
            if position < len(ids):
                await redis.xdel(STREAM, ids[position])
        case ("trim",):
            await broker.trim_acknowledged("results")


async def _needed(redis: Any) -> tuple[set[bytes], int]:
    """The entries that some group has not read and acknowledged, and how many entries there are that all are done with.

    Without a group, all are needed.
    """
    entries = {entry_id: _id(entry_id) for entry_id, _ in await redis.xrange(STREAM)}
    groups = await redis.xinfo_groups(STREAM) if entries else []
    needed = set() if groups else set(entries)
    for group in groups:
        unread = {each for each, value in entries.items() if value > _id(group["last-delivered-id"])}
        pending = await redis.xpending_range(STREAM, group["name"], "-", "+", 1000)
        needed |= unread | ({each["message_id"] for each in pending} & set(entries))
    first = min((entries[each] for each in needed), default=(2**64, 0))
    return needed, sum(value < first for value in entries.values())


def _id(text: bytes) -> tuple[int, int]:
    ms, _, sequence = text.partition(b"-")
    return int(ms), int(sequence)


@pytest.fixture(scope="module")
def trimmed_url() -> Iterator[str]:
    with RedisServer(settings={"stream-node-max-entries": "1"}) as server:
        yield server.url


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=40), start=st.sampled_from([1, 10**15, 2**63]))
def test_nothing_unread_or_pending_is_ever_trimmed_and_the_rest_is(
    trimmed_url: str, steps: list[tuple[Any, ...]], start: int
) -> None:
    async def check() -> None:
        broker = make_taskiq_broker(trimmed_url, ["results"])
        async with Redis.from_url(f"{trimmed_url}?protocol=2") as redis:
            await redis.flushall()
            for number, step in enumerate([*steps, ("trim",)]):
                needed_before, _ = await _needed(redis)
                await _apply(redis, broker, step, number, start)
                needed, done_with = await _needed(redis)
                if step == ("trim",):
                    assert needed == needed_before
                    # The last entry that a group was given stays, as the mark of how far it read; a deleted one, whose
                    # place is still pending, keeps what follows it.
                    assert done_with <= 1 or any(each[0] == "delete" for each in steps)
        await broker.shutdown()

    anyio.run(check)


@pytest.mark.parametrize(
    ("url", "shown", "problem"),
    [
        ("localhost:6379", "localhost:6379", "must begin with redis://"),
        ("amqp://me:secret@host", "amqp://***@host", "must begin with redis://"),
        ("redis://me:secret@host/abc", "redis://***@host/abc", "the number of a database"),
        ("redis://me:secret@host?foo=1", "redis://***@host", "'foo'"),
        ("redis://host?db=x", "redis://host", "Invalid value for 'db'"),
        ("redis://me:secret#?/@host", "redis://***@host", "must be written as %2F"),
        ("redis://host:99999", "redis://host:99999", "the port must be a number"),
    ],
)
def test_a_url_with_which_no_connection_can_be_made_is_refused_at_once_without_its_password(
    url: str, shown: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=f"^broker_url {re.escape(repr(shown))}: .*{problem}") as raised:
        make_taskiq_broker(url)
    assert "secret" not in str(raised.value)


def test_urls_of_redis_are_taken() -> None:
    for url in ("redis://", "redis://me:pa%2Fss@host:1/2?socket_timeout=3", "rediss://host/0?ssl_cert_reqs=none"):
        make_taskiq_broker(url)
