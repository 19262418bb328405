"""Routes to several backends."""

from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from modalkit.service.queue_backends import InMemoryBackend, QueueMessage, QueueNameError, RoutingBackend, SQSBackend

pytestmark = pytest.mark.anyio


class Closeable(InMemoryBackend):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.closed = 0
        self.error = error

    async def aclose(self) -> None:
        self.closed += 1
        if self.error is not None:
            raise self.error


class HangsForOne:
    def __init__(self) -> None:
        self.taken: list[str] = []

    async def send_message(self, queue_name: str, message: str) -> bool:
        if message == "7":
            await anyio.sleep_forever()
        self.taken.append(message)
        return True


class NotAsync:
    def send_message(self, queue_name: str, message: str) -> bool:
        return True


class Broken(InMemoryBackend):
    async def send_messages(self, messages: Sequence[QueueMessage]) -> list[None]:
        raise OSError("no connection")


async def test_the_first_pattern_that_matches_wins() -> None:
    first, second, rest = InMemoryBackend(), InMemoryBackend(), InMemoryBackend()
    backend = RoutingBackend({"ml_*": first, "ml_results": second, "[A-Z]?": second, "*": rest})
    for name in ("ml_results", "B2", "b2", "else"):
        assert await backend.send_message(name, "x")
    assert (first.queue_names(), second.queue_names(), rest.queue_names()) == (["ml_results"], ["B2"], ["b2", "else"])


async def test_a_name_without_a_route_is_refused_and_the_others_are_sent() -> None:
    queues = InMemoryBackend()
    backend = RoutingBackend({"ml_*": queues, "hook_*": queues})
    outcomes = await backend.send_messages([QueueMessage(name, "x", "1") for name in ("ml_a", "other", "hook_b")])
    assert outcomes[0] is outcomes[2] is None
    assert isinstance(outcomes[1], QueueNameError)
    assert str(outcomes[1]) == (
        "queue 'other': matches no route; add one to queue_config.routes, which has: ml_*, hook_*"
    )
    assert queues.queue_names() == ["hook_b", "ml_a"]
    with pytest.raises(QueueNameError, match="matches no route"):
        await backend.send_message("other", "x")
    with pytest.raises(QueueNameError, match=r"'https://example\.com': matches no route"):
        backend.check_queue_name("https://example.com/secret?token=secret")


async def test_one_backends_failure_is_no_others() -> None:
    queues = InMemoryBackend()
    backend = RoutingBackend({"good": queues, "bad": Broken()})
    names = ["good", "bad", "good", "bad"]
    outcomes = await backend.send_messages([QueueMessage(name, f"{n}", f"{n}") for n, name in enumerate(names)])
    assert outcomes[0] is outcomes[2] is None
    assert [type(outcomes[1]), type(outcomes[3])] == [OSError, OSError]
    assert queues.messages("good") == ["0", "2"]


async def test_one_by_one_a_message_that_hangs_fails_alone() -> None:
    backend = HangsForOne()
    routing = RoutingBackend({"*": backend}, send_timeout_s=0.2)
    outcomes = await routing.send_messages([QueueMessage("a", f"{n}", f"{n}") for n in range(50)])
    assert str(outcomes.pop(7)) == "no answer within 0.2 s"
    assert outcomes == [None] * 49
    assert len(backend.taken) == 49


def test_names_are_checked_by_the_backend_they_lead_to() -> None:
    backend = RoutingBackend({"mem *": InMemoryBackend(), "*": SQSBackend(region="eu-west-1")})
    backend.check_queue_name("mem any name")
    backend.check_queue_name("results")
    with pytest.raises(QueueNameError, match="1 to 80 letters"):
        backend.check_queue_name("no sqs name")


async def test_each_backend_is_closed_once_also_if_another_cannot_be() -> None:
    failing, shared = Closeable(OSError("broken")), Closeable()
    backend = RoutingBackend({"a": failing, "b": shared, "c": shared, "d": InMemoryBackend()})
    with pytest.raises(ExceptionGroup) as raised:
        await backend.aclose()
    assert raised.value.exceptions == (failing.error,)
    assert (failing.closed, shared.closed) == (1, 1)


def test_no_routes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one entry"):
        RoutingBackend({})


@pytest.mark.parametrize(
    ("route", "given"),
    [
        (None, "a NoneType"),
        ("webhook", "a str"),
        (NotAsync(), "a NotAsync"),
        (InMemoryBackend, "the class InMemoryBackend"),
    ],
)
def test_a_route_that_leads_to_no_backend_is_refused_at_once(route: Any, given: str) -> None:
    with pytest.raises(TypeError, match=rf"routes\['b_\*'\] must be a backend with .*send_message.*, not {given}$"):
        RoutingBackend({"a_*": InMemoryBackend(), "b_*": route})


def test_a_timeout_must_be_positive() -> None:
    with pytest.raises(ValueError, match="send_timeout_s must be above 0"):
        RoutingBackend({"*": InMemoryBackend()}, send_timeout_s=0)
