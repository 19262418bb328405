"""SQS, on moto's server."""

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from threading import Barrier, Event
from typing import Any

import anyio
import anyio.to_thread
import pytest
from aiobotocore.session import get_session  # type: ignore[import-untyped]  # ships no types

from modalkit.service.queue_backends import (
    NotSentError,
    QueueBackendError,
    QueueMessage,
    QueueNameError,
    SQSBackend,
    UndeliverableError,
    sqs,
)
from modalkit.service.queue_backends.sending import ATTEMPT_S
from tests.support.backends.sqs import receive
from tests.support.sqs_server import REGION, SqsServer, forget_aws_settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # aiobotocore's client runs on asyncio alone


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SqsServer]:
    forget_aws_settings(monkeypatch)
    server = SqsServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def client(server: SqsServer) -> AsyncIterator[Any]:
    async with get_session().create_client("sqs", region_name=REGION, endpoint_url=server.url) as client:
        yield client
        for queue_url in (await client.list_queues()).get("QueueUrls", []):
            await client.delete_queue(QueueUrl=queue_url)  # moto keeps them for the whole process
        server.requests.clear()


@pytest.fixture
async def backend(server: SqsServer) -> AsyncIterator[SQSBackend]:
    backend = SQSBackend(region=REGION, endpoint_url=server.url)
    yield backend
    await backend.aclose()


async def create(client: Any, name: str, **attributes: str) -> str:
    return str((await client.create_queue(QueueName=name, Attributes=attributes))["QueueUrl"])


def messages_for(queue_name: str, bodies: list[str]) -> list[QueueMessage]:
    return [QueueMessage(queue_name, body, f"job-{n}") for n, body in enumerate(bodies)]


async def test_messages_go_in_batches_of_ten_and_the_queue_is_looked_up_once(
    server: SqsServer, client: Any, backend: SQSBackend
) -> None:
    queue_url = await create(client, "many")
    assert await backend.send_message("many", "0")
    server.requests.clear()
    assert await backend.send_messages(messages_for("many", [f"{n}" for n in range(1, 32)])) == [None] * 31
    assert sorted(server.requests) == ["SendMessage", *["SendMessageBatch"] * 3]
    assert sorted(await receive(client, queue_url, 32), key=int) == [f"{n}" for n in range(32)]


# aiohttp means that writing a megabyte at once may hold up the event loop; it takes a millisecond.
@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
async def test_a_batch_holds_at_most_one_mebibyte(server: SqsServer, client: Any, backend: SQSBackend) -> None:
    queue_url = await create(client, "large")
    bodies = ["a" * 600_000, "b" * 400_000, "é" * 300_000, "d" * 1_048_576]
    assert await backend.send_messages(messages_for("large", bodies)) == [None] * 4
    assert [request for request in server.requests if request.startswith("Send")].count("SendMessageBatch") == 1
    assert sorted(map(len, await receive(client, queue_url, 4))) == [300_000, 400_000, 600_000, 1_048_576]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("x" * 1_048_577, "has 1 to 1048576 bytes, this one 1048577"),
        ("é" * 524_289, "this one 1048578"),
        ("", "this one 0"),
        ('"\x0b"', r"no character '\\x0b'"),
        ('"\ud800"', r"no character '\\ud800'"),
    ],
    ids=["long", "long in bytes", "empty", "control", "half a surrogate pair"],
)
async def test_what_sqs_never_takes_is_undeliverable_and_is_not_sent(
    server: SqsServer, client: Any, backend: SQSBackend, body: str, problem: str
) -> None:
    await create(client, "strict")
    with pytest.raises(UndeliverableError, match=problem):
        await backend.send_message("strict", body)
    assert "SendMessage" not in server.requests


async def test_json_with_noncharacters_arrives_with_the_same_meaning(client: Any, backend: SQSBackend) -> None:
    queue_url = await create(client, "odd")
    await backend.send_message("odd", '{"result": "\ufffe and \uffff"}')
    assert await receive(client, queue_url, 1) == ['{"result": "\\ufffe and \\uffff"}']


async def test_a_message_too_long_for_this_queue_fails_alone(client: Any, backend: SQSBackend) -> None:
    queue_url = await create(client, "small", MaximumMessageSize="1024")
    outcomes = await backend.send_messages(messages_for("small", ["1", "x" * 2000, "3"]))
    assert outcomes[0] is outcomes[2] is None
    assert isinstance(outcomes[1], UndeliverableError)
    assert "must be shorter than 1024" in str(outcomes[1])
    assert sorted(await receive(client, queue_url, 2)) == ["1", "3"]


class _Watched(list[str]):
    """The requests of a server, each of which is handled once `watch` returned."""

    def __init__(self, watch: Callable[[str], object]) -> None:
        super().__init__()
        self._watch = watch

    def append(self, request: str) -> None:
        super().append(request)
        self._watch(request)


async def test_the_messages_of_a_refused_batch_go_at_the_same_time(server: SqsServer, client: Any) -> None:
    barrier = Barrier(10)  # breaks if they do not meet
    meeting = SqsServer()
    meeting.requests = _Watched(lambda request: request == "SendMessage" and barrier.wait(5))
    meeting.start()
    queue_url = await create(client, "small", MaximumMessageSize="1024")
    backend = SQSBackend(region=REGION, endpoint_url=meeting.url)
    try:
        outcomes = await backend.send_messages(messages_for("small", ["x" * 2000, *map(str, range(9))]))
    finally:
        await backend.aclose()
        meeting.stop()
    assert isinstance(outcomes[0], UndeliverableError)
    assert outcomes[1:] == [None] * 9
    assert sorted(await receive(client, queue_url, 9)) == [f"{n}" for n in range(9)]


async def test_what_waits_too_long_for_a_connection_is_not_sent_and_says_why(
    server: SqsServer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Event()
    slow = SqsServer()
    slow.requests = _Watched(lambda request: request == "SendMessage" and answer.wait(10))
    slow.start()
    await create(client, "waiting")
    monkeypatch.setattr(sqs, "MAX_CONCURRENT_REQUESTS", 1)
    monkeypatch.setattr(sqs, "REQUEST_S", ATTEMPT_S - 0.05)
    backend = SQSBackend(region=REGION, endpoint_url=slow.url)
    try:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(backend.send_message, "waiting", "1")
            while "SendMessage" not in slow.requests:
                await anyio.sleep(0.01)
            with pytest.raises(NotSentError, match="'waiting': too many messages wait to be sent to SQS"):
                await backend.send_message("waiting", "2")
            answer.set()
    finally:
        answer.set()
        await backend.aclose()
        slow.stop()
    assert slow.requests.count("SendMessage") == 1


async def test_no_answer_in_time_is_an_error_of_each_message(
    server: SqsServer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqs, "ATTEMPT_S", 0.0)
    await create(client, "late")
    backend = SQSBackend(region=REGION, endpoint_url=server.url)
    outcomes = await backend.send_messages(messages_for("late", ["1", "2"]))
    await backend.aclose()
    assert [str(outcome) for outcome in outcomes] == ["queue 'late': no answer of SQS within 0 s"] * 2


async def test_a_missing_queue_is_an_error_that_may_pass(client: Any, backend: SQSBackend) -> None:
    await create(client, "there")
    outcomes = await backend.send_messages([QueueMessage("not-there", "1", "a"), QueueMessage("there", "2", "b")])
    assert outcomes[1] is None
    assert isinstance(outcomes[0], QueueBackendError)
    assert not isinstance(outcomes[0], UndeliverableError)
    assert "'not-there' does not exist: create it, or set" in str(outcomes[0])
    queue_url = await create(client, "not-there")
    assert await backend.send_message("not-there", "3")
    assert await receive(client, queue_url, 1) == ["3"]


async def test_a_queue_that_was_deleted_is_looked_up_again(server: SqsServer, client: Any, backend: SQSBackend) -> None:
    queue_url = await create(client, "fickle")
    assert await backend.send_message("fickle", "1")
    await client.delete_queue(QueueUrl=queue_url)
    with pytest.raises(QueueBackendError, match="does not exist"):
        await backend.send_message("fickle", "2")
    await create(client, "fickle")
    server.requests.clear()
    assert await backend.send_message("fickle", "3")
    assert server.requests == ["GetQueueUrl", "SendMessage"]


async def test_missing_queues_are_created_where_that_is_wanted(server: SqsServer, client: Any) -> None:
    backend = SQSBackend(region=REGION, endpoint_url=server.url, create_missing_queues=True)
    assert (
        await backend.send_messages([QueueMessage(name, "1", "a") for name in ("plain", "ordered.fifo")]) == [None] * 2
    )
    await backend.aclose()
    queue_url = (await client.get_queue_url(QueueName="ordered.fifo"))["QueueUrl"]
    attributes = (await client.get_queue_attributes(QueueUrl=queue_url, AttributeNames=["All"]))["Attributes"]
    assert attributes["FifoQueue"] == "true"
    assert await receive(client, queue_url, 1) == ["1"]


@pytest.mark.parametrize("group_id", [None, "results"])
async def test_a_fifo_queue_drops_what_comes_again(server: SqsServer, client: Any, group_id: str | None) -> None:
    queue_url = await create(client, "ordered.fifo", FifoQueue="true")
    backend = SQSBackend(region=REGION, endpoint_url=server.url, message_group_id=group_id)
    messages = messages_for("ordered.fifo", ["1", "2", "3"])
    for _ in range(2):
        assert await backend.send_messages(messages) == [None] * 3
        assert await backend.send_message("ordered.fifo", "without a job")
    await backend.aclose()
    received: dict[str, tuple[str, str]] = {}
    while len(received) < 4:
        answer = await client.receive_message(
            QueueUrl=queue_url, MaxNumberOfMessages=10, MessageSystemAttributeNames=["All"]
        )
        for message in answer.get("Messages", []):
            attributes = message["Attributes"]
            assert message["Body"] not in received
            received[message["Body"]] = (attributes["MessageDeduplicationId"], attributes["MessageGroupId"])
            await client.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
    sha256 = received.pop("without a job")[0]
    assert len(sha256) == 64
    assert received == {f"{n + 1}": (f"job-{n}", group_id or f"job-{n}") for n in range(3)}


async def test_a_fifo_queue_takes_the_second_end_of_a_job_that_ran_again(server: SqsServer, client: Any) -> None:
    """The same end that is sent twice comes once."""
    queue_url = await create(client, "twice.fifo", FifoQueue="true")
    backend = SQSBackend(region=REGION, endpoint_url=server.url)
    for body, ended_at in (("failed", 1.0000001), ("failed", 1.0), ("succeeded", 2.0)):
        assert await backend.send_messages([QueueMessage("twice.fifo", body, "job", ended_at=ended_at)]) == [None]
    await backend.aclose()
    assert await receive(client, queue_url, 2) == ["failed", "succeeded"]


@pytest.mark.parametrize(
    "failed", [{"Id": "1"}, {"Id": "1", "Code": "InternalError"}, {"Id": "1", "SenderFault": True, "Message": "no"}]
)
async def test_an_incomplete_answer_for_one_message_is_an_error_of_that_alone(
    monkeypatch: pytest.MonkeyPatch, failed: dict[str, Any]
) -> None:
    """Other servers than AWS's leave parts out; what they took is not sent again."""

    class Client:
        async def get_queue_url(self, **_: str) -> dict[str, str]:
            return {"QueueUrl": "url"}

        async def send_message_batch(self, **_: Any) -> dict[str, Any]:
            return {"Successful": [{"Id": "0"}], "Failed": [failed]}

    @asynccontextmanager
    async def create_client() -> AsyncIterator[Client]:
        yield Client()

    backend = SQSBackend(region=REGION)
    monkeypatch.setattr(backend, "_create_client", create_client)
    taken, error = await backend.send_messages(messages_for("q", ["1", "2"]))
    await backend.aclose()
    assert taken is None
    assert type(error) is QueueBackendError
    assert str(error).startswith("queue 'q': SQS answers ")


@pytest.mark.parametrize(
    "name", ["", "a b", "ä", "a" * 81, "a" * 76 + ".fifo", ".fifo", "a.b", "a\n", "https://sqs.example.com/1/a"]
)
async def test_names_that_no_sqs_queue_has_are_refused(backend: SQSBackend, name: str) -> None:
    with pytest.raises(QueueNameError, match="1 to 80 letters"):
        backend.check_queue_name(name)
    with pytest.raises(QueueNameError):
        await backend.send_message(name, "1")


@pytest.mark.parametrize("name", ["a", "A_b-9", "a" * 80, "a" * 75 + ".fifo"])
def test_names_of_sqs_queues_are_accepted(name: str) -> None:
    SQSBackend(region=REGION).check_queue_name(name)


def test_without_a_region_the_error_comes_at_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_aws_settings(monkeypatch)
    with pytest.raises(QueueBackendError, match=r"set app_settings\.queue_config\.sqs\.region .* AWS_DEFAULT_REGION"):
        SQSBackend()
    monkeypatch.setenv("AWS_PROFILE", "missing")
    with pytest.raises(QueueBackendError, match=r"region of SQS cannot be used: .*\(missing\)"):
        SQSBackend()
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    SQSBackend()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"region": "us east 1"}, r"region of SQS cannot be used: .*'us east 1'.*; set app_settings\."),
        ({"endpoint_url": "localhost:4566"}, "endpoint_url must be a URL, .* not 'localhost:4566'$"),
        ({"endpoint_url": "http://a b"}, "endpoint_url must be a URL"),
    ],
)
def test_an_address_or_a_region_that_cannot_be_used_is_refused_at_once(given: dict[str, str], problem: str) -> None:
    with pytest.raises(QueueBackendError, match=problem):
        SQSBackend(**{"region": REGION, **given})  # type: ignore[arg-type]  # both are texts
    SQSBackend(region=REGION, endpoint_url="http://[::1]:4566")


async def test_the_region_may_come_from_the_variable_of_awss_other_sdks(
    server: SqsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    backend = SQSBackend(endpoint_url=server.url)
    async with get_session().create_client("sqs", region_name="eu-west-1", endpoint_url=server.url) as client:
        queue_url = await create(client, "regional")
        assert await backend.send_message("regional", "1")
        assert await receive(client, queue_url, 1) == ["1"]
        await client.delete_queue(QueueUrl=queue_url)
    await backend.aclose()


async def test_a_cancelled_send_leaves_the_backend_usable(server: SqsServer, client: Any, backend: SQSBackend) -> None:
    queue_url = await create(client, "calm")
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(backend.send_message, "calm", "1")
        await anyio.wait_all_tasks_blocked()
        task_group.cancel_scope.cancel()
    assert await backend.send_message("calm", "2")
    assert "2" in await receive(client, queue_url, 1)


def test_one_backend_belongs_to_one_event_loop(server: SqsServer) -> None:
    backend = SQSBackend(region=REGION, endpoint_url=server.url, create_missing_queues=True)

    async def send_twice() -> None:
        await backend.send_message("looped", "1")
        with pytest.raises(QueueBackendError, match="another event loop"):
            await anyio.to_thread.run_sync(anyio.run, backend.send_message, "looped", "2")
        await backend.aclose()

    anyio.run(send_twice)
    anyio.run(send_twice)


def test_on_trio_the_error_says_what_it_needs() -> None:
    with pytest.raises(QueueBackendError, match="needs the event loop of asyncio"):
        anyio.run(SQSBackend(region=REGION).send_message, "a", "1", backend="trio")


def test_a_missing_library_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiobotocore.config", None)
    with pytest.raises(QueueBackendError, match=r"pip install .*/.+\[sqs\]'"):
        SQSBackend()


def test_a_group_that_sqs_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="message_group_id must be 1 to 128"):
        SQSBackend(message_group_id="a b")
