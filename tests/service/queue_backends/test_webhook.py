"""Webhooks, to real servers of this machine."""

import contextlib
import gc
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from threading import Event, Semaphore
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest

from modalkit.service.queue_backends import (
    NotSentError,
    QueueBackendError,
    QueueMessage,
    QueueNameError,
    UndeliverableError,
    WebhookBackend,
    WebhookVerificationError,
    verify_webhook,
    webhook,
)
from tests.support.webhook_receiver import WebhookReceiver, certificate_for

pytestmark = pytest.mark.anyio

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Names:
    """A look-up of names whose answers are given: one after the other, the last one for good."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    receiver = WebhookReceiver()
    receiver.start()
    yield receiver
    receiver.stop()


@pytest.fixture
async def backend(receiver: WebhookReceiver) -> AsyncIterator[WebhookBackend]:
    backend = WebhookBackend(allowed_hosts=[f"127.0.0.1:{receiver.port}"], secret=SECRET, allow_private_addresses=True)
    yield backend
    await backend.aclose()


def url_of(receiver: WebhookReceiver, host: str = "127.0.0.1", scheme: str = "http") -> str:
    return f"{scheme}://{host}:{receiver.port}/results?token=secret"


async def test_a_result_is_posted_signed_and_with_its_jobs_id(
    receiver: WebhookReceiver, backend: WebhookBackend
) -> None:
    body = '{"result": "Grüße"}'
    assert await backend.send_messages([QueueMessage(url_of(receiver), body, "job-1")]) == [None]
    [received] = receiver.received
    assert received.path == "/results?token=secret"
    assert received.body.decode() == body
    assert received.headers["content-type"] == "application/json"
    assert received.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert verify_webhook(SECRET, received.headers, received.body) == "job-1"
    with pytest.raises(WebhookVerificationError, match="does not match"):
        verify_webhook(SECRET.lower(), received.headers, received.body)


async def test_a_message_takes_its_trace_along(receiver: WebhookReceiver, backend: WebhookBackend) -> None:
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    messages = [
        QueueMessage(url_of(receiver), "{}", job_id, trace) for job_id, trace in (("1", traceparent), ("2", None))
    ]
    assert await backend.send_messages(messages) == [None, None]
    found = {received.headers["webhook-id"]: received.headers.get("traceparent") for received in receiver.received}
    assert found == {"1": traceparent, "2": None}


async def test_without_a_secret_nothing_is_signed_and_an_odd_id_is_made_safe(receiver: WebhookReceiver) -> None:
    backend = WebhookBackend(allowed_hosts=[f"127.0.0.1:{receiver.port}"], allow_private_addresses=True)
    message = QueueMessage(url_of(receiver), "{}", "1\r\nx-injected: 1")
    assert await backend.send_messages([message, message]) == [None, None]
    assert await backend.send_message(url_of(receiver), "{}")
    await backend.aclose()
    first, second, third = (received.headers for received in receiver.received)
    assert "webhook-signature" not in first
    assert "x-injected" not in first
    assert first["webhook-id"] == second["webhook-id"] != third["webhook-id"]
    assert len(first["webhook-id"]) == len(third["webhook-id"]) == 64


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_any_2xx_is_delivered(receiver: WebhookReceiver, backend: WebhookBackend, status: int) -> None:
    receiver.status = status
    if status == 204:
        receiver.body = b""
    assert await backend.send_message(url_of(receiver), "{}")


@pytest.mark.parametrize("status", [400, 401, 404, 409, 410, 413, 422])
async def test_most_4xx_are_final(receiver: WebhookReceiver, backend: WebhookBackend, status: int) -> None:
    receiver.status = status
    with pytest.raises(UndeliverableError, match=f"answers {status}"):
        await backend.send_message(url_of(receiver), "{}")


@pytest.mark.parametrize("status", [300, 304, 408, 425, 429, 500, 502, 503, 504])
async def test_the_others_are_tried_again(receiver: WebhookReceiver, backend: WebhookBackend, status: int) -> None:
    receiver.status = status
    if status == 304:
        receiver.body = b""
    with pytest.raises(QueueBackendError, match=f"answers {status}") as raised:
        await backend.send_message(url_of(receiver), "{}")
    assert not isinstance(raised.value, UndeliverableError)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(receiver: WebhookReceiver, backend: WebhookBackend, status: int) -> None:
    receiver.status = status
    receiver.headers["location"] = url_of(receiver)
    with pytest.raises(QueueBackendError, match=f"answers {status}"):
        await backend.send_message(url_of(receiver), "{}")
    assert len(receiver.received) == 1


async def test_connections_are_used_again_and_large_answers_are_not_read(
    receiver: WebhookReceiver, backend: WebhookBackend
) -> None:
    for _ in range(3):
        assert await backend.send_message(url_of(receiver), "{}")
    assert receiver.connections_made == 1
    receiver.body = b"x" * 10_000_000
    for _ in range(2):
        assert await backend.send_message(url_of(receiver), "{}")
    assert receiver.connections_made == 2


async def test_an_answer_whose_body_never_ends_is_an_answer(receiver: WebhookReceiver, backend: WebhookBackend) -> None:
    receiver.headers["content-length"] = "100"  # of which two bytes come
    assert await backend.send_message(url_of(receiver), "{}")


async def test_a_server_that_does_not_answer_is_an_error_in_time(receiver: WebhookReceiver) -> None:
    receiver.silent = Event()
    backend = WebhookBackend(allowed_hosts=[f"127.0.0.1:{receiver.port}"], allow_private_addresses=True, timeout_s=0.05)
    with pytest.raises(QueueBackendError, match=r"no answer within 0.05 s"):
        await backend.send_message(url_of(receiver), "{}")
    receiver.silent.set()
    await backend.aclose()


async def test_a_host_that_hangs_leaves_the_others_theirs(
    receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "ATTEMPT_S", 200)  # so that each gets its turn, however slow the machine is
    hanging = WebhookReceiver()
    hanging.silent = Event()
    hanging.start()
    hosts = [f"127.0.0.1:{port}" for port in (receiver.port, hanging.port)]
    backend = WebhookBackend(allowed_hosts=hosts, allow_private_addresses=True, timeout_s=100)
    try:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(
                backend.send_messages, [QueueMessage(url_of(hanging), "{}", f"job-{n}") for n in range(100)]
            )
            while len(hanging.received) < 32:
                await anyio.sleep(0.01)
            assert await backend.send_message(url_of(receiver), "{}")
            assert len(hanging.received) == 32
            hanging.silent.set()
    finally:
        hanging.silent.set()
        await backend.aclose()
        hanging.stop()
    assert len(hanging.received) == 100


async def test_hosts_that_take_all_connections_cost_the_others_no_attempt(
    receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "MAX_CONNECTIONS", 1)
    hanging = WebhookReceiver()
    hanging.silent = Event()
    hanging.start()
    hosts = [f"127.0.0.1:{port}" for port in (receiver.port, hanging.port)]
    backend = WebhookBackend(allowed_hosts=hosts, allow_private_addresses=True, timeout_s=2)
    messages = [QueueMessage(url_of(each), "{}", "job") for each in (hanging, receiver, receiver)]
    try:
        first, *others = await backend.send_messages(messages)
    finally:
        hanging.silent.set()
        await backend.aclose()
        hanging.stop()
    assert "no answer within 2 s" in str(first)
    assert others == [None, None]


class InGroups(Event):
    """Lets 10 requests through at a time, a while after the group before."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self._pause_s = pause_s
        self._places = Semaphore(10)

    def wait(self, timeout: float | None = None) -> bool:
        with self._places:
            return super().wait(self._pause_s)


async def test_a_slow_but_healthy_receiver_gets_each_message_once(receiver: WebhookReceiver) -> None:
    receiver.silent = InGroups(0.5)  # so that all together take longer than one may
    backend = WebhookBackend(allowed_hosts=[f"127.0.0.1:{receiver.port}"], allow_private_addresses=True, timeout_s=4.5)
    messages = [QueueMessage(url_of(receiver), f"{n}", f"job-{n}") for n in range(100)]
    assert await backend.send_messages(messages) == [None] * 100
    await backend.aclose()
    assert sorted(int(received.body) for received in receiver.received) == list(range(100))


async def test_what_gets_no_place_at_its_host_is_not_sent_and_says_why(receiver: WebhookReceiver) -> None:
    receiver.silent = Event()
    backend = WebhookBackend(
        allowed_hosts=[f"127.0.0.1:{receiver.port}"], allow_private_addresses=True, timeout_s=24.95
    )
    outcomes: list[Exception | None] = []

    async def send_one_more(task_group: anyio.abc.TaskGroup) -> None:
        while len(receiver.received) < 32:
            await anyio.sleep(0.01)
        outcomes.extend(await backend.send_messages([QueueMessage(url_of(receiver), "{}", "late")]))
        task_group.cancel_scope.cancel()

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(
            backend.send_messages, [QueueMessage(url_of(receiver), "{}", f"job-{n}") for n in range(32)]
        )
        task_group.start_soon(send_one_more, task_group)
    receiver.silent.set()
    await backend.aclose()
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [
        (NotSentError, f"http://127.0.0.1:{receiver.port}: too many messages wait for this host")
    ]
    assert len(receiver.received) == 32


async def test_a_name_whose_look_up_hangs_leaves_the_others_theirs(
    receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    answer = Event()
    by_system = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if not host.endswith(b".example" if isinstance(host, bytes) else ".example"):
            return by_system(host, port, *args, **options)
        asked.append(host)
        if host == b"hangs.example":
            answer.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    hosts = [f"{name}.example:{receiver.port}" for name in ("hangs", "other")]
    backend = WebhookBackend(allowed_hosts=hosts, allow_private_addresses=True, timeout_s=5)
    outcomes: list[Exception | None] = []

    async def send_to_the_one_that_hangs() -> None:
        url = url_of(receiver, "hangs.example")
        outcomes.extend(await backend.send_messages([QueueMessage(url, "{}", f"job-{n}") for n in range(30)]))

    try:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(send_to_the_one_that_hangs)
            while not asked:
                await anyio.sleep(0.01)
            await anyio.wait_all_tasks_blocked()
            assert await backend.send_message(url_of(receiver, "other.example"), "{}")
            assert asked == [b"hangs.example", b"other.example"]
            answer.set()
    finally:
        answer.set()
        await backend.aclose()
    assert outcomes == [None] * 30
    assert asked.count(b"hangs.example") == 1


async def test_a_look_up_that_is_given_up_is_made_by_the_next_who_waits_for_it(receiver: WebhookReceiver) -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        if len(asked) == 1:
            await anyio.sleep_forever()
        return ["127.0.0.1"]

    backend = WebhookBackend(
        allowed_hosts=[f"hooks.example:{receiver.port}"], allow_private_addresses=True, resolve=resolve
    )
    url = url_of(receiver, "hooks.example")
    async with anyio.create_task_group() as task_group:
        async with anyio.create_task_group() as given_up:
            given_up.start_soon(backend.send_message, url, "1")
            await anyio.wait_all_tasks_blocked()
            task_group.start_soon(backend.send_message, url, "2")
            await anyio.wait_all_tasks_blocked()
            assert len(asked) == 1
            given_up.cancel_scope.cancel()
    await backend.aclose()
    assert [received.body for received in receiver.received] == [b"2"]


async def test_a_name_is_looked_up_once_and_its_address_is_the_one_connected_to(receiver: WebhookReceiver) -> None:
    names = Names(["127.0.0.1"], ["192.0.2.1"])  # a name that changes between the check and the connection
    backend = WebhookBackend(
        allowed_hosts=[f"hooks.example:{receiver.port}"], allow_private_addresses=True, resolve=names
    )
    for _ in range(2):
        assert await backend.send_message(url_of(receiver, "hooks.example"), "{}")
    await backend.aclose()
    assert names.asked == [("hooks.example", receiver.port)]
    assert {received.headers["host"] for received in receiver.received} == {f"hooks.example:{receiver.port}"}


async def test_an_address_that_does_not_answer_leaves_the_others(receiver: WebhookReceiver) -> None:
    names = Names(["127.0.0.2", "127.0.0.1"])  # the server listens at the second alone
    backend = WebhookBackend(
        allowed_hosts=[f"hooks.example:{receiver.port}"], allow_private_addresses=True, resolve=names
    )
    assert await backend.send_message(url_of(receiver, "hooks.example"), "{}")
    await backend.aclose()


async def test_an_address_that_swallows_packets_leaves_time_for_the_others(receiver: WebhookReceiver) -> None:
    backend = WebhookBackend(
        allowed_hosts=[f"hooks.example:{receiver.port}"],
        allow_private_addresses=True,
        timeout_s=2,
        resolve=Names(["127.0.0.2", "127.0.0.1"]),
    )
    with contextlib.ExitStack() as sockets:
        # Its backlog is full, so the system answers no further connection.
        full = sockets.enter_context(socket.socket())
        full.bind(("127.0.0.2", receiver.port))
        full.listen(0)
        for _ in range(3):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.2", receiver.port))
        assert await backend.send_message(url_of(receiver, "hooks.example"), "{}")
    await backend.aclose()


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], ["10.0.0.1"]])
async def test_a_name_with_a_private_address_is_refused_before_any_connection(
    receiver: WebhookReceiver, addresses: list[str]
) -> None:
    backend = WebhookBackend(allowed_hosts=[f"hooks.example:{receiver.port}"], resolve=Names(addresses))
    url = url_of(receiver, "hooks.example", "https")
    backend.check_queue_name(url)
    with pytest.raises(QueueBackendError, match=f"hooks.example has the address {addresses[-1]}, which is not public"):
        await backend.send_message(url, "{}")
    await backend.aclose()
    assert receiver.connections_made == 0


async def test_each_new_connection_is_checked_anew(receiver: WebhookReceiver) -> None:
    names = Names(["192.0.2.7"], ["127.0.0.1"])
    backend = WebhookBackend(allowed_hosts=[f"hooks.example:{receiver.port}"], resolve=names)
    for address in ("192.0.2.7", "127.0.0.1"):
        with pytest.raises(QueueBackendError, match=f"{address}, which is not public"):
            await backend.send_message(url_of(receiver, "hooks.example", "https"), "{}")
    await backend.aclose()


async def test_a_name_that_cannot_be_found_is_an_error_that_may_pass() -> None:
    async def fail(host: str, port: int) -> Sequence[str]:
        raise OSError("Name or service not known")

    for resolve, problem in ((fail, "cannot be found: Name or service"), (Names([]), "has no address")):
        backend = WebhookBackend(allowed_hosts=["hooks.example"], resolve=resolve)
        with pytest.raises(QueueBackendError, match=problem) as raised:
            await backend.send_message("https://hooks.example/", "{}")
        assert not isinstance(raised.value, UndeliverableError)
        await backend.aclose()


async def test_a_look_up_that_failed_is_made_again_for_the_next_message(receiver: WebhookReceiver) -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        if len(asked) == 1:
            raise OSError("Temporary failure in name resolution")
        return ["127.0.0.1"]

    backend = WebhookBackend(
        allowed_hosts=[f"hooks.example:{receiver.port}"], allow_private_addresses=True, resolve=resolve
    )
    messages = [QueueMessage(url_of(receiver, "hooks.example"), "{}", "job-1")]
    outcomes = await backend.send_messages(messages)  # kept, as deliveries keep them for a while
    assert "Temporary failure" in str(outcomes[0])
    assert await backend.send_messages(messages) == [None]
    await backend.aclose()
    assert len(asked) == 2


async def test_certificates_are_checked_against_the_name_and_not_the_address(tmp_path: Path) -> None:
    server_tls, client_tls = certificate_for("hooks.example", tmp_path)
    receiver = WebhookReceiver(server_tls)
    receiver.start()
    hosts = [f"{name}.example:{receiver.port}" for name in ("hooks", "other")]
    for trusted, host, problem in (
        (client_tls, "hooks.example", None),
        (client_tls, "other.example", "CERTIFICATE_VERIFY_FAILED"),
        (None, "hooks.example", "CERTIFICATE_VERIFY_FAILED"),
    ):
        backend = WebhookBackend(
            allowed_hosts=hosts, allow_private_addresses=True, resolve=Names(["127.0.0.1"]), ssl_context=trusted
        )
        if problem is None:
            assert await backend.send_message(url_of(receiver, host, "https"), "{}")
        else:
            with pytest.raises(QueueBackendError, match=problem):
                await backend.send_message(url_of(receiver, host, "https"), "{}")
        await backend.aclose()
    assert len(receiver.received) == 1
    receiver.stop()


@pytest.mark.filterwarnings("ignore:Async generator 'httpcore:ResourceWarning")  # it leaves the body it could not send
async def test_a_server_that_refuses_the_connection_after_the_handshake_is_named(tmp_path: Path) -> None:
    """As one that asks for a client's certificate: by TLS 1.3, the refusal comes in place of the answer."""
    server_tls, client_tls = certificate_for("hooks.example", tmp_path)
    server_tls.verify_mode = ssl.CERT_REQUIRED
    receiver = WebhookReceiver(server_tls)
    receiver.start()
    backend = WebhookBackend(
        allowed_hosts=[f"hooks.example:{receiver.port}"],
        allow_private_addresses=True,
        resolve=Names(["127.0.0.1"]),
        ssl_context=client_tls,
    )
    try:
        with pytest.raises(QueueBackendError, match=rf"https://hooks.example:{receiver.port}: .*Error"):
            await backend.send_message(url_of(receiver, "hooks.example", "https"), "{}")
    finally:
        await backend.aclose()
        receiver.stop()


async def test_proxies_of_the_environment_are_not_used(
    receiver: WebhookReceiver, backend: WebhookBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert await backend.send_message(url_of(receiver), "{}")


async def test_a_url_that_is_not_allowed_is_refused_also_when_sending(
    receiver: WebhookReceiver, backend: WebhookBackend
) -> None:
    with pytest.raises(QueueNameError, match="not among the allowed hosts"):
        await backend.send_message(f"http://localhost:{receiver.port}/", "{}")
    with pytest.raises(UndeliverableError, match="is no Unicode text"):
        await backend.send_message(url_of(receiver), "\ud800")
    assert receiver.connections_made == 0


async def test_path_and_query_are_in_no_error_and_in_no_log(
    receiver: WebhookReceiver, backend: WebhookBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts = []
    for status in (200, 404, 500):
        receiver.status = status
        outcomes = await backend.send_messages([QueueMessage(url_of(receiver), "{}", "1")])
        texts.append(str(outcomes))
    await anyio.to_thread.run_sync(receiver.stop)
    texts.append(str(await backend.send_messages([QueueMessage(url_of(receiver), "{}", "1")])))
    with pytest.raises(QueueNameError) as raised:
        backend.check_queue_name("https://user:secret@a.example/results?secret")
    texts += [str(raised.value), raised.value.queue_name, caplog.text]
    assert f"http://127.0.0.1:{receiver.port} answers 404" in texts[1]
    assert not any("secret" in text or "results" in text for text in texts)


async def test_a_cancelled_request_leaves_the_backend_usable(
    receiver: WebhookReceiver, backend: WebhookBackend
) -> None:
    receiver.silent = Event()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(backend.send_message, url_of(receiver), "1")
        await anyio.wait_all_tasks_blocked()
        task_group.cancel_scope.cancel()
    receiver.silent.set()
    assert await backend.send_message(url_of(receiver), "2")
    gc.collect()  # what is left open would warn, and warnings are errors


def test_one_backend_belongs_to_one_event_loop(receiver: WebhookReceiver, anyio_backend_name: str) -> None:
    backend = WebhookBackend(allowed_hosts=[f"127.0.0.1:{receiver.port}"], allow_private_addresses=True)

    def elsewhere() -> Any:
        return anyio.run(backend.send_message, url_of(receiver), "2", backend=anyio_backend_name)

    async def send_twice() -> None:
        assert await backend.send_message(url_of(receiver), "1")
        with pytest.raises(QueueBackendError, match="another event loop"):
            await anyio.to_thread.run_sync(elsewhere)
        await backend.aclose()

    anyio.run(send_twice, backend=anyio_backend_name)
    anyio.run(send_twice, backend=anyio_backend_name)


def test_a_timeout_must_be_positive() -> None:
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        WebhookBackend(allowed_hosts=["a.example"], timeout_s=0)
